"""Plans training on a pod without having it: memory, compute, collectives and a lower limit of the step's time.

For TPUs the real train step is compiled for the absent chips, and the compiled program is analyzed. XLA compiles for a
GPU only on a machine that has one, so the plan of a GPU contains only what follows from array shapes: the bytes that
stay on a chip, and the model's floating-point operations. No array is allocated in either case.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geotoken_jax import chips, hlo, randomness, sharding
from geotoken_jax.batch import Spec
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import placement
from geotoken_jax.gallery.placement import GallerySettings
from geotoken_jax.model import batch, flops
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.task import GeoTokenTask, LossSettings
from geotoken_jax.settings import SettingsError
from geotoken_jax.sharding import MeshSettings
from geotoken_jax.train.loop import TrainSettings
from geotoken_jax.train.optimizer import make_optimizer, make_schedule
from geotoken_jax.train.step import Trainer

#: Number of photos in the paper's gallery: the usable ones of MP16-Pro.
GALLERY = 4_120_000
#: Topologies in docs/scale.md.
DOCUMENTED = ("v5e:4x4", "v5e:16x16", "v6e:8x8", "v5p:4x4x4")
#: Usable share of a chip's memory if the compiler does not report it: runtime and fragmentation take the rest.
_USABLE = 0.9
#: Chip -> value of TPU_ACCELERATOR_TYPE, which libtpu needs to compile for an absent machine.
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-16", "v5p": "v5p-8", "v6e": "v6e-8"}
#: Needed and available memory in the compiler's errors: "Used 17.79G of 15.75G hbm", or "the total memory required ...
#: (17.79G) exceeds available HBM (15.75G)".
_OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMG])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMG])")
#: Environment variables that make libtpu query no metadata server and let several processes compile at once.
_ABSENT = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
#: Compiler options for minimal effort. Compiling is 3 to 6 times faster than with full effort. The program's memory
#: differs by up to 10 %, but its memory traffic is up to 2.7 times as high.
_QUICK: Any = {"exec_time_optimization_effort": -1.0}
#: Costs of a GPU's plan, whose step is not compiled.
_NOT_COMPILED: dict[str, Any] = {
    "method": "not compiled, which needs a GPU: activations, memory traffic and collectives are left out",
    "memory": {},
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Settings that determine the costs of a train step. rows: number of gallery photos."""

    model: ModelSettings
    loss: LossSettings
    train: TrainSettings
    mesh: MeshSettings
    gallery: GallerySettings
    rows: int


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of a pod. name: CHIP:SHAPE, such as v5e:16x16. chip: key of chips.CHIPS. shape: number of chips along each
    axis of the network."""

    name: str
    chip: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def compiled(self) -> bool:
        return self.chip in _ACCELERATORS


def read(config: Config, rows: int = GALLERY) -> Workload:
    """Returns the workload of a configuration. rows: number of gallery photos."""
    names = [field.name for field in dataclasses.fields(Workload) if field.name != "rows"]
    return Workload(**{name: getattr(config, name) for name in names}, rows=rows)


def topology(name: str) -> Topology:
    """Returns the topology named CHIP:SHAPE, as in "v5e:16x16" or "h100:8".

    Raises SettingsError if the chip is not in chips.CHIPS or the shape has another form.
    """
    chip, _, shape = name.partition(":")
    if chip not in chips.CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        known = ", ".join(chips.CHIPS)
        raise SettingsError(f"--topology={name} is unknown: use CHIP:SHAPE, as in v5e:16x16 or h100:8; chips: {known}")
    return Topology(name, chip, tuple(map(int, shape.split("x"))))


def run(workload: Workload, pod: Topology, quick: bool = False) -> dict[str, Any]:
    """Returns the plan of training on a pod, as JSON values. Sizes are in bytes; all costs are per chip and step.

    quick: compile with minimal effort (see _QUICK).

    Raises SettingsError if the mesh does not fit the devices, the batch or a parameter, if a TPU cannot have this
    shape, or if the TPU compiler is not installed.
    """
    chip = chips.CHIPS[pod.chip]
    step = _Step(workload, _devices(pod))
    costs = _costs(step, pod, quick)
    memory = {**step.resident_bytes(), **costs["memory"]}
    total = sum(memory.values())
    usable = costs.get("usable", chip.memory * _USABLE)
    photos = workload.train.batch_size
    compute = {"model": flops.per_example(workload.model) * photos / pod.size}
    seconds = {"compute": costs.get("flops", compute["model"]) / chip.flops}
    if "flops" in costs:
        compute["executed"] = costs["flops"]
        seconds["memory"] = costs["traffic"] / chip.bandwidth
        seconds["links"] = sum(costs["sent"].values()) / (chip.links / 2)  # half of the bandwidth is for sending
    bound = max(seconds, key=lambda name: seconds[name])
    rate = photos / seconds[bound]
    plan = {
        "topology": pod.name,
        "chips": pod.size,
        "mesh": dict(step.mesh.shape),
        "batch_size": photos,
        "accumulate": workload.train.accumulate,
        "group": workload.model.group,
        "remat": workload.model.remat,
        "gallery": {"placement": workload.gallery.placement, "rows": workload.rows},
        "parameters": step.parameters,
        "method": costs["method"],
        "bytes": {**memory, "total": total, "usable": usable, "chip": chip.memory},
        "fits": total <= usable and not costs.get("refused", False),
        "flops": compute,
        **_traffic(costs),
        "seconds": {**seconds, "bound": bound},
        "examples_per_second": rate,
        "days": workload.train.examples / rate / 86_400,
    }
    if not plan["fits"]:
        plan["advice"] = advice(workload, pod)
    return plan


def _costs(step: "_Step", pod: Topology, quick: bool) -> dict[str, Any]:
    return _compiled(step, quick) if pod.compiled else _NOT_COMPILED


def _traffic(costs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the memory traffic and collectives of a plan; an empty dict if there is no compiled program."""
    if "flops" not in costs:
        return {}
    payload = costs["payload"]
    collectives = {kind: {"payload": payload[kind], "sent": n} for kind, n in costs["sent"].items()}
    return {"traffic": costs["traffic"], "collectives": collectives}


class _Step:
    """The train step on a mesh, with the shapes and shardings of its arguments."""

    def __init__(self, workload: Workload, devices: Sequence[Any]):
        self.workload = workload
        self.mesh: Mesh = sharding.make_mesh(workload.mesh, devices)
        train, model = workload.train, workload.model
        shards = math.prod(self.mesh.shape[axis] for axis in sharding.RULES["batch"])
        if train.batch_size % (train.accumulate * shards):
            raise SettingsError(
                f"config.train.batch_size is {train.batch_size}: choose a multiple of {train.accumulate * shards}, "
                f"which is config.train.accumulate = {train.accumulate} times data x fsdp = {shards} devices"
            )
        schedule = make_schedule(train.optimizer, train.steps, max(1, workload.rows // train.batch_size))
        task = GeoTokenTask(model, workload.loss, placement.lookup(workload.gallery, self.mesh))
        optimizer = make_optimizer(train.optimizer, schedule)
        self.trainer = Trainer(task, optimizer, self.mesh, train.accumulate, train.ema, train.gradient_dtype)
        self.gallery = placement.layout(workload.rows, model.backbone_width, model.cells, workload.gallery, self.mesh)
        whole = NamedSharding(self.mesh, PartitionSpec())
        key = jax.eval_shape(lambda: randomness.key(0))
        self.arguments = (
            self.trainer.abstract,
            self._batch(),
            jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
            self.gallery,
        )

    def _batch(self) -> Spec:
        """Returns the shapes of a batch that data.join reads, with its sharding in training."""
        arrays = batch.spec(self.workload.model, self.workload.train.batch_size, self.workload.gallery.on_device)
        layout = self.trainer.batch_sharding
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for name, x in arrays.items()}

    @property
    def parameters(self) -> int:
        return sum(p.size for p in jax.tree.leaves(self.trainer.abstract["params"]))

    def resident_bytes(self) -> dict[str, int]:
        """Returns name -> bytes per chip, for the arrays that stay allocated between two steps and for a batch."""
        state = self.trainer.abstract
        parameters = [state["params"], state["constants"], state.get("ema")]
        return {
            "parameters": bytes_per_chip(parameters),
            "optimizer": bytes_per_chip(state["optimizer"]),
            "gallery": bytes_per_chip(self.gallery),
            "batch": bytes_per_chip(self.arguments[1]),
        }


def bytes_per_chip(tree: Any) -> int:
    """Returns the number of bytes on one device. tree: sharded arrays or ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _devices(pod: Topology) -> Sequence[Any]:
    """Returns libtpu's descriptions of absent TPUs, or as many CPU devices as the pod has GPUs."""
    jax.config.update("jax_platforms", "cpu")
    if not pod.compiled:
        return _cpu_devices(pod.size)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError(
            f"--topology={pod.name} needs the TPU compiler: install it with pip install 'geotoken-jax[tpu]'"
        ) from None
    from jax.experimental import topologies

    os.environ.update(_ABSENT, TPU_ACCELERATOR_TYPE=_ACCELERATORS[pod.chip])
    # Without megacore each of a v4 chip's two cores would be a device.
    cores = {"chip_config_name": "megacore"} if pod.chip == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=pod.name, **cores).devices
    except jax.errors.JaxRuntimeError as error:
        raise SettingsError(f"--topology={pod.name} is not a shape of {pod.chip}, choose another: {error}") from None


def _cpu_devices(n: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX is initialized, and its number of devices cannot change
        jax.config.update("jax_num_cpu_devices", n)
    if len(jax.devices("cpu")) < n:
        raise SettingsError(f"JAX is in use already: plan for {n} GPUs in a process of its own, with `geotoken plan`")
    return jax.devices("cpu")[:n]


def _compiled(step: _Step, quick: bool) -> dict[str, Any]:
    """Returns the costs of the compiled step: memory and, if it fits, compute, memory traffic and collectives."""
    resident = bytes_per_chip(step.arguments)
    try:
        program: Any = step.trainer.step.lower(*step.arguments).compile(compiler_options=_QUICK if quick else None)
    except jax.errors.JaxRuntimeError as error:
        used = _OUT_OF_MEMORY.search(str(error))
        if not used:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        needed, usable = (float(used[i]) * unit[used[i + 1]] for i in (1, 3))
        return {
            "method": "refused by the compiler, because a chip has too little memory: there is no program to analyze",
            "memory": {"activations and temporaries": max(0, int(needed) - resident)},
            "usable": usable,
            "refused": True,
        }
    memory = program.memory_analysis()
    allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    costs = hlo.Program(program.as_text()).costs()
    return {
        "method": "compiled with minimal effort" if quick else "compiled",
        "memory": {
            "activations and temporaries": memory.temp_size_in_bytes,
            "program and padding": memory.generated_code_size_in_bytes + max(0, allocated - resident),
        },
        "flops": costs.flops,
        "traffic": costs.traffic,
        "payload": costs.payload,
        "sent": costs.sent,
    }


def advice(workload: Workload, pod: Topology) -> list[dict[str, Any]]:
    """Returns the changes of settings that were tried on a step that does not fit, until one of them makes it fit.

    First each change is tried alone, the change that costs least speed first. Then the first two changes are tried at
    once, the first three and so on. Changes that the mesh or the batch does not allow are left out. If no change is
    enough, the last one does not fit either. For TPUs each changed step is compiled with minimal effort. For GPUs its
    bytes are only those that stay allocated between steps.
    """
    devices = _devices(pod)
    usable = chips.CHIPS[pod.chip].memory * _USABLE
    changes = list(_changes(workload, pod.size))
    tried: list[dict[str, Any]] = []
    for combination in [[c] for c in changes] + [changes[:n] for n in range(2, len(changes) + 1)]:
        try:
            step = _Step(_changed(workload, combination), devices)
        except SettingsError:
            continue
        costs = _costs(step, pod, quick=True)
        total = sum(step.resident_bytes().values()) + sum(costs["memory"].values())
        fits = total <= usable and not costs.get("refused", False)
        tried.append({"change": _spelled(combination), "bytes": total, "fits": fits})
        if tried[-1]["fits"]:
            break
    return tried


#: Name of a section of the workload, and new values of its keys.
_Change = tuple[str, Mapping[str, Any]]


def _changes(workload: Workload, size: int) -> Iterator[_Change]:
    """Yields changes that make a step need less memory, the change that costs least speed first."""
    if workload.gallery.placement == "replicated":
        yield "gallery", {"placement": "sharded"}
    if workload.model.remat == "none":
        yield "model", {"remat": "dots"}
    for parts in (4, 16):
        if parts > workload.train.accumulate:
            yield "train", {"accumulate": parts}
    if workload.model.remat != "full":
        yield "model", {"remat": "full"}
    if workload.mesh.fsdp == 1 and size > 1:
        yield "mesh", {"data": 1, "fsdp": size // workload.mesh.tensor}
    if workload.gallery.on_device:
        yield "gallery", {"placement": "host"}
    yield "train", {"batch_size": workload.train.batch_size // 4}


def _changed(workload: Workload, changes: Sequence[_Change]) -> Workload:
    for section, keys in changes:
        workload = dataclasses.replace(workload, **{section: dataclasses.replace(getattr(workload, section), **keys)})
    return workload


def _spelled(changes: Sequence[_Change]) -> str:
    last = {f"config.{section}.{key}": value for section, keys in changes for key, value in keys.items()}
    return " ".join(f"--{key}={value}" for key, value in last.items())


def table(plan: Mapping[str, Any]) -> str:
    """Returns a plan as text for the terminal."""
    sizes, seconds = plan["bytes"], plan["seconds"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    lines = [
        f"{plan['topology']}: {plan['chips']} chips as {mesh}; {plan['method']}",
        f"batch {plan['batch_size']:,}, accumulate {plan['accumulate']}, group {plan['group']}, remat {plan['remat']}, "
        f"{plan['parameters']:,} parameters, gallery {plan['gallery']['placement']}",
        "",
        "memory per chip",
        *(f"  {name:30}{size / 2**30:10.3f} GiB" for name, size in sizes.items()),
        f"  {'it fits' if plan['fits'] else 'it does not fit'}",
        "",
        "per step and chip",
        f"  {'model compute':30}{plan['flops']['model'] / 1e12:10.3f} TFLOP",
        *_program_lines(plan),
        "",
        "time per step, at peak rates",
        *(f"  {name:30}{1e3 * seconds[name]:10.3f} ms" for name in seconds if name != "bound"),
        f"  bound by {seconds['bound']}: {plan['examples_per_second']:,.0f} examples/s, "
        f"{plan['days']:.3g} days for all steps",
    ]
    if "advice" in plan:
        lines += ["", "changes tried"]
        lines += [
            f"  {'fits   ' if a['fits'] else 'too big'} {a['bytes'] / 2**30:8.2f} GiB  {a['change']}"
            for a in plan["advice"]
        ]
    return "\n".join(lines)


def _program_lines(plan: Mapping[str, Any]) -> list[str]:
    """Returns the table's lines on the compiled program; an empty list if the step was not compiled."""
    if "traffic" not in plan:
        return []
    return [
        f"  {'executed compute':30}{plan['flops']['executed'] / 1e12:10.3f} TFLOP",
        f"  {'memory traffic':30}{plan['traffic'] / 1e9:10.3f} GB",
        *(
            f"  {kind:30}{n['payload'] / 1e6:10.1f} MB, {n['sent'] / 1e6:,.1f} MB sent"
            for kind, n in plan["collectives"].items()
        ),
    ]


def document(workload: Workload, command: str, quick: bool = False) -> str:
    """Returns the text of docs/scale.md: plans with group 2 and group 1 on each topology of DOCUMENTED.

    command: command line that made the document.
    """
    parts = [_INTRODUCTION.format(command=command, date=datetime.date.today(), rows=workload.rows)]
    for group in (2, 1):
        plans = [run(_changed(workload, [("model", {"group": group})]), topology(name), quick) for name in DOCUMENTED]
        parts.append(f"## Group {group}\n\n{_markdown(plans)}\n")
    return "\n".join(parts)


_INTRODUCTION = """# Scale

This page shows the memory and time that one training step of the paper's configuration needs per chip, for people who
choose hardware. Made on {date} with

```
{command}
```

**Method.** For TPUs, the real training step was compiled for the pod, without having any TPU, and the compiled program
was analyzed; the body of a loop counts as often as it runs. Compiling "with minimal effort" (`--quick`) is 3 to 6 times
faster. Its memory is within 10 % of the result with the compiler's full effort; its memory traffic is up to 2.7 times
as high.

**GPUs are not in the tables**, because XLA compiles for a GPU only if there is one. `geotoken plan --topology=h100:8`
prints the bytes that stay on a chip and the model's compute.

**Memory** is per chip. A gallery of {rows:,} photos takes 4.7 KB per photo if `config.gallery.placement` puts it on
the devices, and nothing if it is `host`.

**Time.** The three times are the least that compute, memory traffic and links take, each alone, at the manufacturer's
peak rates. The row "bound by" names the longest of them; examples/s and days follow from it. Use it to decide which of
the three to improve, not to predict the speed of a run.

- Compute and the bytes sent over links are counted exactly, so their times are lower limits. No kernel reaches the peak
  (790 of 989 TFLOP/s for a large bf16 product on an H100). All links are assumed to be used at once, by rings.
- Memory traffic is an estimate: operands and results in the compiled program that are stored in HBM, not in on-chip
  memory.
- Executed compute exceeds model compute because rematerialization computes some products twice.
- If a column has no values from the program, the compiler refused the step for its memory.
"""


def _markdown(plans: Sequence[Mapping[str, Any]]) -> str:
    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def gib(name: str) -> list[str]:
        return [f"{p['bytes'].get(name, 0) / 2**30:.2f}" for p in plans]

    def known(figure: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [figure(p) if "traffic" in p else "" for p in plans]

    kinds = [kind for kind in hlo.COLLECTIVES if any(kind in p.get("collectives", {}) for p in plans)]
    sizes = dict.fromkeys(name for p in plans for name in p["bytes"])
    return "\n".join(
        [
            row("", [f"{p['topology']}" for p in plans]),
            "|---" + "|---:" * len(plans) + "|",
            row("method", [p["method"] for p in plans]),
            *(row(f"{name}, GiB", gib(name)) for name in sizes),
            row("fits", ["yes" if p["fits"] else "no" for p in plans]),
            row("model compute, TFLOP", [f"{p['flops']['model'] / 1e12:.2f}" for p in plans]),
            row("executed compute, TFLOP", known(lambda p: f"{p['flops']['executed'] / 1e12:.2f}")),
            row("memory traffic, GB", known(lambda p: f"{p['traffic'] / 1e9:.1f}")),
            *(
                row(
                    f"{kind}, MB",
                    known(lambda p, k=kind: f"{p['collectives'].get(k, {}).get('payload', 0) / 1e6:.0f}"),
                )
                for kind in kinds
            ),
            row("compute, ms", [f"{1e3 * p['seconds']['compute']:.2f}" for p in plans]),
            *(
                row(f"{name}, ms", known(lambda p, n=name: f"{1e3 * p['seconds'][n]:.2f}"))
                for name in ("memory", "links")
            ),
            row("bound by", [p["seconds"]["bound"] for p in plans]),
            row("examples/s at that bound", [f"{p['examples_per_second']:,.0f}" for p in plans]),
            row("days at that bound", [f"{p['days']:.3g}" for p in plans]),
        ]
    )
