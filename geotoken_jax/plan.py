"""Costs of training on a pod that is not here: memory, products, collectives and the time that they bound.

For a TPU the real train step is compiled for the absent chips and its program is read. XLA compiles for a GPU only on
a machine that has one, so a GPU's plan holds what the shapes alone say: the bytes that stay on a chip, and the model's
products. Nothing is allocated either way.
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

from geotoken_jax import chips, hlo, sharding
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

#: Usable photos of MP16-Pro: the paper's gallery.
GALLERY = 4_120_000
#: What `document` plans: the paper's configuration at both groups, on these.
DOCUMENTED = ("v5e:4x4", "v5e:16x16", "v6e:8x8", "v5p:4x4x4")
#: Of a chip's memory, where the compiler does not say: the rest goes to its runtime and to fragmentation.
_USABLE = 0.9
#: What libtpu wants to be told of a machine that is not there.
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-16", "v5p": "v5p-8", "v6e": "v6e-8"}
#: "Used 17.79G of 15.75G hbm", or "the total memory required ... (17.79G) exceeds available HBM (15.75G)".
_OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMG])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMG])")
#: Ask no metadata server, and let several processes compile at once.
_ABSENT = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
#: The compiler's least effort: 3 to 6 times sooner, memory within 10 % and traffic up to 2.7 times that of its full.
_QUICK: Any = {"exec_time_optimization_effort": -1.0}
#: The plan of a GPU beyond the bytes that stay on it and the model's products.
_NOT_COMPILED: dict[str, Any] = {
    "method": "not compiled, which needs a GPU: activations, memory traffic and collectives are left out",
    "memory": {},
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained and how it is laid out; rows: photos of the gallery."""

    model: ModelSettings
    loss: LossSettings
    train: TrainSettings
    mesh: MeshSettings
    gallery: GallerySettings
    rows: int


@dataclasses.dataclass(frozen=True)
class Topology:
    """chip: a key of chips.CHIPS. shape: chips along each axis of the network."""

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
    """Returns the workload of a configuration. rows: photos in the gallery."""
    names = [field.name for field in dataclasses.fields(Workload) if field.name != "rows"]
    return Workload(**{name: getattr(config, name) for name in names}, rows=rows)


def topology(name: str) -> Topology:
    """Returns what "v5e:16x16" or "h100:8" means. Raises SettingsError."""
    chip, _, shape = name.partition(":")
    if chip not in chips.CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        known = ", ".join(chips.CHIPS)
        raise SettingsError(f"--topology={name} is not known: write CHIP:SHAPE as in v5e:16x16 or h100:8, of {known}")
    return Topology(name, chip, tuple(map(int, shape.split("x"))))


def run(workload: Workload, where: Topology, quick: bool = False) -> dict[str, Any]:
    """Returns the plan, as JSON holds it; all sizes in bytes and of one chip and one step.

    quick: compile at the compiler's least effort. Raises SettingsError for what the mesh cannot hold.
    """
    chip = chips.CHIPS[where.chip]
    step = _Step(workload, _devices(where))
    found = _costs(step, where, quick)
    memory = {**step.resident_bytes(), **found["memory"]}
    total = sum(memory.values())
    usable = found.get("usable", chip.memory * _USABLE)
    photos = workload.train.batch_size
    products = {"model": flops.per_example(workload.model) * photos / where.size}
    seconds = {"compute": found.get("flops", products["model"]) / chip.flops}
    if "flops" in found:
        products["executed"] = found["flops"]
        seconds["memory"] = found["traffic"] / chip.bandwidth
        seconds["links"] = sum(found["sent"].values()) / (chip.links / 2)  # half of them lead away
    bound = max(seconds, key=lambda name: seconds[name])
    rate = photos / seconds[bound]
    plan = {
        "topology": where.name,
        "chips": where.size,
        "mesh": dict(step.mesh.shape),
        "batch_size": photos,
        "accumulate": workload.train.accumulate,
        "group": workload.model.group,
        "remat": workload.model.remat,
        "gallery": {"placement": workload.gallery.placement, "rows": workload.rows},
        "parameters": step.parameters,
        "method": found["method"],
        "bytes": {**memory, "total": total, "usable": usable, "chip": chip.memory},
        "fits": total <= usable and not found.get("refused", False),
        "flops": products,
        **_traffic(found),
        "seconds": {**seconds, "bound": bound},
        "examples_per_second": rate,
        "days": workload.train.examples / rate / 86_400,
    }
    if not plan["fits"]:
        plan["advice"] = advice(workload, where)
    return plan


def _costs(step: "_Step", where: Topology, quick: bool) -> dict[str, Any]:
    return _compiled(step, quick) if where.compiled else _NOT_COMPILED


def _traffic(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the memory traffic and collectives of a plan; nothing if there is no compiled program."""
    if "flops" not in found:
        return {}
    payload = found["payload"]
    collectives = {kind: {"payload": payload[kind], "sent": n} for kind, n in found["sent"].items()}
    return {"traffic": found["traffic"], "collectives": collectives}


class _Step:
    """The train step on a mesh, with everything it is called with as shapes."""

    def __init__(self, workload: Workload, devices: Sequence[Any]):
        self.workload = workload
        self.mesh: Mesh = sharding.make_mesh(workload.mesh, devices)
        train, model = workload.train, workload.model
        ways = math.prod(self.mesh.shape[axis] for axis in sharding.RULES["batch"])
        if train.batch_size % (train.accumulate * ways):
            raise SettingsError(
                f"config.train.batch_size = {train.batch_size} in config.train.accumulate = {train.accumulate} parts "
                f"does not divide over data x fsdp = {ways} devices: choose a multiple of "
                f"{train.accumulate * ways}"
            )
        schedule = make_schedule(train.optimizer, train.steps, max(1, workload.rows // train.batch_size))
        task = GeoTokenTask(model, workload.loss, placement.lookup(workload.gallery, self.mesh))
        optimizer = make_optimizer(train.optimizer, schedule)
        self.trainer = Trainer(task, optimizer, self.mesh, train.accumulate, train.ema)
        self.gallery = placement.layout(workload.rows, model.backbone_width, model.cells, workload.gallery, self.mesh)
        whole = NamedSharding(self.mesh, PartitionSpec())
        key = jax.eval_shape(lambda: jax.random.key(0))
        self.arguments = (
            self.trainer.abstract,
            self._batch(),
            jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
            self.gallery,
        )

    def _batch(self) -> Spec:
        """What data.join reads, as the loop puts it on the mesh."""
        found = batch.spec(self.workload.model, self.workload.train.batch_size, self.workload.gallery.on_device)
        lies = self.trainer.batch_sharding
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies) for name, x in found.items()}

    @property
    def parameters(self) -> int:
        return sum(p.size for p in jax.tree.leaves(self.trainer.abstract["params"]))

    def resident_bytes(self) -> dict[str, int]:
        """Returns what lies on a chip between two steps, and the batch."""
        state = self.trainer.abstract
        parameters = [state["params"], state["constants"], state.get("ema")]
        return {
            "parameters": bytes_a_chip(parameters),
            "optimizer": bytes_a_chip(state["optimizer"]),
            "gallery": bytes_a_chip(self.gallery),
            "batch": bytes_a_chip(self.arguments[1]),
        }


def bytes_a_chip(tree: Any) -> int:
    """Returns the bytes of one device's shards of arrays, or of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _devices(where: Topology) -> Sequence[Any]:
    """Returns the absent TPUs, as libtpu describes them, or CPU devices that stand in for GPUs' number."""
    jax.config.update("jax_platforms", "cpu")
    if not where.compiled:
        return _stand_ins(where.size)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError(
            f"--topology={where.name} needs the TPU compiler: install it with pip install 'geotoken-jax[tpu]'"
        ) from None
    from jax.experimental import topologies

    os.environ.update(_ABSENT, TPU_ACCELERATOR_TYPE=_ACCELERATORS[where.chip])
    cores = {"chip_config_name": "megacore"} if where.chip == "v4" else {}  # or each of its two is a device
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=where.name, **cores).devices
    except jax.errors.JaxRuntimeError as error:
        raise SettingsError(f"--topology={where.name} is no shape of {where.chip}: {error}") from None


def _stand_ins(n: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has begun: it has the devices that it has
        jax.config.update("jax_num_cpu_devices", n)
    if len(jax.devices("cpu")) < n:
        raise SettingsError(f"counting for {n} GPUs has to come before any other use of JAX: start it alone")
    return jax.devices("cpu")[:n]


def _compiled(step: _Step, quick: bool) -> dict[str, Any]:
    """Returns what the compiler makes of the step: its memory, and what its program does."""
    kept = bytes_a_chip(step.arguments)
    try:
        program: Any = step.trainer.step.lower(*step.arguments).compile(compiler_options=_QUICK if quick else None)
    except jax.errors.JaxRuntimeError as error:
        used = _OUT_OF_MEMORY.search(str(error))
        if not used:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        taken, usable = (float(used[i]) * unit[used[i + 1]] for i in (1, 3))
        return {
            "method": "compiled, and refused: memory is as the compiler says, and there is no program to read",
            "memory": {"activations and temporaries": max(0, int(taken) - kept)},
            "usable": usable,
            "refused": True,
        }
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    costs = hlo.Program(program.as_text()).costs()
    return {
        "method": "compiled at least effort" if quick else "compiled",
        "memory": {
            "activations and temporaries": memory.temp_size_in_bytes,
            "program and padding": memory.generated_code_size_in_bytes + max(0, held - kept),
        },
        "flops": costs.flops,
        "traffic": costs.traffic,
        "payload": costs.payload,
        "sent": costs.sent,
    }


def advice(workload: Workload, where: Topology) -> list[dict[str, Any]]:
    """Returns the settings that were tried for one that does not fit, each with its bytes; the last one fits.

    Each is compiled at least effort for a TPU; for a GPU the bytes are those that stay on it.

    One change at a time, what costs least speed first; then, where none is enough, one after another together. If all
    of them are not enough, the last one does not fit either.
    """
    devices = _devices(where)
    usable = chips.CHIPS[where.chip].memory * _USABLE
    changes = list(_changes(workload, where.size))
    tried: list[dict[str, Any]] = []
    for together in [[c] for c in changes] + [changes[:n] for n in range(2, len(changes) + 1)]:
        try:
            step = _Step(_changed(workload, together), devices)
        except SettingsError:
            continue
        found = _costs(step, where, quick=True)
        total = sum(step.resident_bytes().values()) + sum(found["memory"].values())
        fits = total <= usable and not found.get("refused", False)
        tried.append({"change": _spelled(together), "bytes": total, "fits": fits})
        if tried[-1]["fits"]:
            break
    return tried


#: A section of the workload, and what becomes of its keys.
_Change = tuple[str, Mapping[str, Any]]


def _changes(workload: Workload, size: int) -> Iterator[_Change]:
    """Yields what makes a step smaller, what costs least speed first."""
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
    """Returns a plan for the eye."""
    sizes, seconds = plan["bytes"], plan["seconds"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    lines = [
        f"{plan['topology']}: {plan['chips']} chips as {mesh}; {plan['method']}",
        f"batch {plan['batch_size']:,} in {plan['accumulate']}, group {plan['group']}, remat {plan['remat']}, "
        f"{plan['parameters']:,} parameters, gallery {plan['gallery']['placement']}",
        "",
        "memory a chip",
        *(f"  {name:30}{size / 2**30:10.3f} GiB" for name, size in sizes.items()),
        f"  {'it fits' if plan['fits'] else 'it does not fit'}",
        "",
        "a step, a chip",
        f"  {'products of the model':30}{plan['flops']['model'] / 1e12:10.3f} TFLOP",
        *_program_lines(plan),
        "",
        "time a step, at the peak rates",
        *(f"  {name:30}{1e3 * seconds[name]:10.3f} ms" for name in seconds if name != "bound"),
        f"  bound by {seconds['bound']}: {plan['examples_per_second']:,.0f} examples/s, {plan['days']:.3g} days in all",
    ]
    if "advice" in plan:
        lines += ["", "changes tried"]
        lines += [
            f"  {'fits   ' if a['fits'] else 'too big'} {a['bytes'] / 2**30:8.2f} GiB  {a['change']}"
            for a in plan["advice"]
        ]
    return "\n".join(lines)


def _program_lines(plan: Mapping[str, Any]) -> list[str]:
    """Returns the table's lines on the compiled program; none if there is none."""
    if "traffic" not in plan:
        return []
    return [
        f"  {'products executed':30}{plan['flops']['executed'] / 1e12:10.3f} TFLOP",
        f"  {'memory traffic':30}{plan['traffic'] / 1e9:10.3f} GB",
        *(
            f"  {kind:30}{n['payload'] / 1e6:10.1f} MB, {n['sent'] / 1e6:,.1f} MB sent"
            for kind, n in plan["collectives"].items()
        ),
    ]


def document(workload: Workload, command: str, quick: bool = False) -> str:
    """Returns docs/scale.md: the configuration at both groups on each of DOCUMENTED. command: what made it."""
    parts = [_INTRODUCTION.format(command=command, date=datetime.date.today(), rows=workload.rows)]
    for group in (2, 1):
        plans = [run(_changed(workload, [("model", {"group": group})]), topology(name), quick) for name in DOCUMENTED]
        parts.append(f"## Group {group}\n\n{_markdown(plans)}\n")
    return "\n".join(parts)


_INTRODUCTION = """# Scale

What one step of the paper's configuration asks of a chip, and the time that this bounds. Made on {date} with

```
{command}
```

TPU columns: the real train step was compiled for the absent pod (no TPU was at hand), and its program read: loops
multiplied out. "At least effort" (`--quick`) is 3 to 6 times sooner: memory within 10 % of what the compiler's full
effort finds, but up to 2.7 times the traffic. GPUs are not here: XLA compiles for one only where there is one, and
`geotoken plan --topology=h100:8` gives the bytes that stay on a chip and the model's products. Memory is of one chip;
a gallery of {rows:,} photos takes 4.7 KB each where `config.gallery.placement` puts it on the devices, and nothing
where it says `host`.

How to read it: the three times are what products, memory traffic and links would take alone at the maker's peak
rates; the longest of them, which the row "bound by" names, gives examples/s and days. It tells which of the three to
work on, not what a run will reach. Products and links are exact, so their times are lower limits; no kernel reaches the
peak (790 of 989 TFLOP/s for a large bf16 product on an H100), and links are taken to be used all at once, by rings.
Traffic is an estimate: of the compiled program the operands and results that lie outside the chip's own memory.
Executed products exceed the model's where rematerialization makes some a second time. A column without figures of the
program is a step that the compiler refused for its memory.
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
            row("products of the model, TFLOP", [f"{p['flops']['model'] / 1e12:.2f}" for p in plans]),
            row("products executed, TFLOP", known(lambda p: f"{p['flops']['executed'] / 1e12:.2f}")),
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
