"""Plans a workload on a pod: memory, compute, traffic and communication per chip and step, and the time of a step."""

import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from geotoken_jax import chips
from geotoken_jax.configuration import Config
from geotoken_jax.plan import hlo, topology
from geotoken_jax.plan.topology import Topology
from geotoken_jax.plan.workloads import GALLERY, WORKLOADS, Workload, bytes_per_chip
from geotoken_jax.settings import SettingsError

#: Usable share of a chip's memory if the compiler does not report it. Runtime and fragmentation take the rest.
USABLE = 0.9
#: A Pallas kernel is assumed to run at this share of the peak rates. The TPU compiler has no estimate for kernels.
KERNEL_SHARE = 0.5
#: Needed and available memory in the compiler's errors: "Used 17.79G of 15.75G hbm", or "the total memory required ...
#: (17.79G) exceeds available HBM (15.75G)".
_OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMG])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMG])")
#: Compiler options for minimal effort. Compiling takes a third of the time or less. The program's memory differs by up
#: to 10 %, but its memory traffic is up to 2.3 times as high, and its estimated time up to 2.8 times.
_QUICK: Any = {"exec_time_optimization_effort": -1.0}
#: Costs in the plan of a GPU. Its step is not compiled.
_NOT_COMPILED: dict[str, Any] = {
    "method": "not compiled, which needs a GPU: activations, memory traffic and collectives are left out",
    "memory": {},
}


def run(
    config: Config, pod: Topology, workload: str = "train", rows: int = GALLERY, quick: bool = False
) -> dict[str, Any]:
    """Returns the plan of a workload on a pod, as JSON values. Sizes are in bytes; all costs are per chip and step.

    workload: key of WORKLOADS. rows: number of gallery photos. quick: compile with minimal effort (see _QUICK).

    Raises SettingsError if the mesh does not fit the devices, the batch or a parameter, if a TPU cannot have this
    shape, if the TPU compiler is missing or does not fit jax, or if the workload can only be planned for TPUs.
    """
    chip = chips.CHIPS[pod.chip]
    program = check(config, pod, workload, rows)
    costs = _costs(program, pod, quick)
    memory = {**program.resident_bytes(), **costs["memory"]}
    total = sum(memory.values())
    usable = costs.get("usable", chip.memory * USABLE)
    model = program.flops * program.photos / program.mesh.size
    plan = {
        "topology": pod.name,
        "workload": workload,
        "chips": pod.size,
        "mesh": dict(program.mesh.shape),
        "copies": program.copies,
        "batch_size": program.photos,
        "settings": _settings(config, workload),
        "rows": rows,
        "parameters": program.parameters,
        "method": costs["method"],
        "bytes": {**memory, "total": total, "usable": usable, "chip": chip.memory},
        "fits": total <= usable and not costs.get("refused", False),
        **_times(program, costs, chip, model),
    }
    if not plan["fits"] and workload == "train":
        plan["advice"] = advice(config, pod, rows)
    return plan


def check(config: Config, pod: Topology, workload: str, rows: int) -> Workload:
    """Returns the program of a workload on a pod, which is not compiled yet. Arguments and errors: see `run`."""
    program = WORKLOADS[workload](config, rows, topology.devices(pod))
    if not (pod.compiled or program.flops):
        raise SettingsError(
            f"--workload={workload} cannot be planned for --topology={pod.name}, because XLA compiles for a GPU only "
            "if there is one: choose a TPU, as in v5e:4x4"
        )
    return program


def _settings(config: Config, workload: str) -> dict[str, Any]:
    """Returns the settings that affect a plan's costs most, by key."""
    keys = {
        "train": ("train.accumulate", "model.group", "model.remat", "model.attention", "gallery.placement"),
        "align": ("align.train.accumulate", "align.loss.kind", "align.loss.queue"),
        "embed": ("embed.huggingface.dtype",),
        "predict": ("predict.samples", "predict.beam", "model.group"),
    }
    return {key: config.at(key) for key in keys[workload]}


def _costs(program: Workload, pod: Topology, quick: bool) -> dict[str, Any]:
    return _compiled(program, quick) if pod.compiled else _NOT_COMPILED


def _times(program: Workload, costs: Mapping[str, Any], chip: chips.Chip, model: float) -> dict[str, Any]:
    """Returns the part of a plan on compute, traffic, collectives and times.

    Its key "seconds" has the time of each resource alone at its peak rate, and "bound", the resource with the longest
    time. Its key "estimate" is the result of `_estimate`. The key is missing if the compiler estimated no cycles.

    costs: result of `_costs`. model: the model's floating-point operations per chip and step.
    """
    found: hlo.Costs | None = costs.get("program")
    executed = found.flops if found else model
    plan: dict[str, Any] = {"flops": {"model": model or executed, "executed": executed}}
    seconds = {"compute": executed / chip.flops}
    if found:
        seconds["memory"] = found.traffic / chip.bandwidth
        seconds["vector"] = found.vector / chip.vector
        seconds["links"] = sum(found.sent.values()) / (chip.links / 2)  # half of the bandwidth is for sending
        if found.between_slices:
            seconds["slices"] = found.between_slices / chip.network
        plan |= {
            "traffic": found.traffic,
            "vector": found.vector,
            "collectives": {
                kind: {"payload": found.payload[kind], "sent": sent, "runs": found.runs[kind]}
                for kind, sent in found.sent.items()
            },
            "between_slices": found.between_slices,
            "unknown_loops": found.unknown_loops,
        }
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    if found and found.cycles:
        plan["estimate"] = _estimate(found, chip, seconds)
        step = plan["estimate"]["step"]
        plan["estimate"]["mfu"] = plan["flops"]["model"] / step / chip.flops
    photos = program.photos * program.copies
    return {
        **plan,
        "seconds": {**seconds, "bound": bound},
        "photos_per_second_at_bound": photos / seconds[bound],
        "photos_per_second": photos / step,
        "examples": program.examples,
        "days": program.examples * step / photos / 86_400,
    }


def _estimate(found: hlo.Costs, chip: chips.Chip, seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the estimated seconds of instructions, of Pallas kernels and of collectives, and "step", their sum.

    The time of instructions is the TPU compiler's estimate. The time of a kernel is the longer of the times for its
    operations and for its bytes, at KERNEL_SHARE of the peak rates. Collectives are assumed to run at the peak rate,
    without other work at the same time.
    """
    parts = {
        "instructions": found.cycles / chip.clock,
        "kernels": sum(
            runs * max(flops / chip.flops, moved / chip.bandwidth) / KERNEL_SHARE
            for runs, flops, moved in found.kernels
        ),
        "collectives": seconds["links"] + seconds.get("slices", 0.0),
    }
    return {**parts, "step": sum(parts.values())}


def _compiled(program: Workload, quick: bool) -> dict[str, Any]:
    """Compiles the program and returns its costs: memory and, if it fits into memory, the costs of its instructions."""
    resident, began = bytes_per_chip(program.arguments), time.perf_counter()
    try:
        lowered = program.function.lower(*program.arguments)
        compiled: Any = lowered.compile(compiler_options=_QUICK if quick else None)
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
    effort = "with minimal effort (--quick), into a slower program" if quick else "with full effort"
    print(f"compiled {effort} in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    memory = compiled.memory_analysis()
    allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "method": f"compiled {effort}",
        "memory": {
            "activations and temporaries": memory.temp_size_in_bytes,
            "program and padding": memory.generated_code_size_in_bytes + max(0, allocated - resident),
        },
        "program": hlo.Program(compiled.as_text()).costs(),
    }


def advice(config: Config, pod: Topology, rows: int) -> list[dict[str, Any]]:
    """Tries changes of settings until a train step fits into memory. Returns the changes that were tried.

    First each change is tried alone, beginning with the change that costs least speed. Then the first two changes are
    tried together, then the first three, and so on. Changes that the mesh or the batch does not allow are left out. If
    the last returned change does not fit, no change was enough. For TPUs each changed step is compiled with minimal
    effort. For GPUs only the bytes that stay allocated between steps are counted.
    """
    devices = topology.devices(pod)
    usable = chips.CHIPS[pod.chip].memory * USABLE
    changes = list(_changes(config, pod))
    tried: list[dict[str, Any]] = []
    for combination in [[c] for c in changes] + [changes[:n] for n in range(2, len(changes) + 1)]:
        try:
            program = WORKLOADS["train"](changed(config, combination), rows, devices)
        except SettingsError:
            continue
        costs = _costs(program, pod, quick=True)
        total = sum(program.resident_bytes().values()) + sum(costs["memory"].values())
        fits = total <= usable and not costs.get("refused", False)
        tried.append({"change": _as_flags(combination), "bytes": total, "fits": fits})
        if tried[-1]["fits"]:
            break
    return tried


#: Name of a section of the configuration, and new values of its keys.
Change = tuple[str, Mapping[str, Any]]


def _changes(config: Config, pod: Topology) -> Iterator[Change]:
    """Yields changes that reduce the memory of a train step, beginning with the change that costs least speed."""
    if config.gallery.placement == "replicated":
        yield "gallery", {"placement": "sharded"}
    if config.model.remat == "none":
        yield "model", {"remat": "dots"}
    for parts in (4, 16):
        if parts > config.train.accumulate:
            yield "train", {"accumulate": parts}
    if config.model.remat != "full":
        yield "model", {"remat": "full"}
    if config.mesh.fsdp == 1 and pod.size > pod.slices:
        yield "mesh", {"data": pod.slices, "fsdp": pod.size // pod.slices // config.mesh.tensor}
    if config.gallery.on_device:
        yield "gallery", {"placement": "host"}
    yield "train", {"batch_size": config.train.batch_size // 4}


def changed(config: Config, changes: Sequence[Change]) -> Config:
    """Returns the configuration with changes applied."""
    for section, keys in changes:
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **keys)})
    return config


def _as_flags(changes: Sequence[Change]) -> str:
    last = {f"config.{section}.{key}": value for section, keys in changes for key, value in keys.items()}
    return " ".join(f"--{key}={value}" for key, value in last.items())
