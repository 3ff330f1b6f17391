"""Cost of a scaling study before it starts: examples, operations and chip-hours of each run."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from geotoken_jax import chips
from geotoken_jax.analysis import scaling
from geotoken_jax.configuration import Config
from geotoken_jax.plan import planning, topology
from geotoken_jax.plan.topology import Topology
from geotoken_jax.plan.workloads import GALLERY, WORKLOADS

#: Share of the peak rate at which a step runs if it is not compiled. Plans of the paper's model on TPUs have 12 to 18 %
#: with 8 to 32 photos per chip (docs/scale.md).
MFU = 0.15


def costs(
    config: Config, pod: Topology | None = None, mfu: float = MFU, compiled: bool = False, rows: int = GALLERY
) -> list[dict[str, Any]]:
    """Returns the cost of each run of config.scaling.

    Each entry has `number`, `label`, `axis`, `parameters` (N), `examples`, `epochs`, `compute` (floating-point
    operations). With a pod, it also has `chip_hours`, `hours` (on the whole pod), `mfu`, `bytes` per chip, and `fits`.
    Validations, checkpoints and predictions do not count.

    mfu: share of the chips' peak rate at which a step runs. Bytes are then only those that stay allocated between
    steps, without activations. compiled: compile the step of each model for the pod with minimal effort instead, as
    `geotoken plan --quick` does; this takes minutes per model. rows: number of gallery photos.

    Raises SettingsError if a run does not fit the pod's mesh, or for reasons given in planning.run.
    """
    plan, steps = [], {}
    for number, run in enumerate(scaling.runs(config)):
        epochs = run.examples / run.unique
        row: dict[str, Any] = {"number": number, "label": run.label, "axis": run.axis, "parameters": run.parameters}
        row |= {"examples": run.examples, "epochs": epochs, "compute": run.compute}
        if pod:
            model, train = run.config.model, run.config.train
            key = repr((model, train.batch_size, train.accumulate, train.ema > 0, run.config.mesh))
            if key not in steps:
                steps[key] = _step(run, pod, mfu, compiled, rows)
            seconds = run.examples / run.config.train.batch_size * steps[key]["seconds"]
            row |= {"hours": seconds / 3600, "chip_hours": seconds * pod.size / 3600, **steps[key]}
        plan.append(row)
    return plan


def _step(run: scaling.Run, pod: Topology, mfu: float, compiled: bool, rows: int) -> dict[str, Any]:
    """Returns `seconds`, `mfu`, `bytes` and `fits` of a run's training step on the pod."""
    if compiled and pod.compiled:
        found = planning.run(run.config, pod, "train", rows, quick=True)
        if "estimate" in found:
            share, seconds = found["estimate"]["mfu"], found["estimate"]["step"]
        else:
            share, seconds = mfu, found["flops"]["model"] / (mfu * chips.CHIPS[pod.chip].flops)
        return {"seconds": seconds, "mfu": share, "bytes": found["bytes"]["total"], "fits": found["fits"]}
    program, chip = WORKLOADS["train"](run.config, rows, topology.stand_ins(pod)), chips.CHIPS[pod.chip]
    seconds = run.flops * program.photos / pod.size / (mfu * chip.flops)
    allocated = sum(program.resident_bytes().values())
    return {"seconds": seconds, "mfu": mfu, "bytes": allocated, "fits": allocated <= planning.USABLE * chip.memory}


def table(plan: Sequence[Mapping[str, Any]], pod: Topology | None) -> str:
    """Returns the costs of a study as a Markdown table, and sentences with the sums. plan: result of `costs`.

    Runs in a row that differ only in the learning rate are one line. Its hours are the sum over these runs.
    """
    heads = ["runs", "label", "varies", "N", "examples", "epochs", "FLOPs"]
    heads += ["MFU, %", "GB per chip", "fits", "hours", "chip-hours"] if pod else []
    lines = [heads, ["---:", "---", "---"] + ["---:"] * (len(heads) - 3)]
    for (axis, _, _), group in itertools.groupby(plan, lambda row: (row["axis"], row["parameters"], row["compute"])):
        same = list(group)
        for rows in [same] if axis == scaling.RATE else [[row] for row in same]:
            lines.append(_cells(rows, pod))
    ends = [f"{len(plan)} runs, {sum(row['compute'] for row in plan):.2e} floating-point operations in all."]
    if pod:
        hours = sum(row["chip_hours"] for row in plan)
        misfits = dict.fromkeys(row["label"] for row in plan if not row["fits"])
        ends.append(f"{hours:,.0f} chip-hours in all on {pod.name}, {hours / pod.size:,.1f} hours of the whole pod.")
        ends.append(f"These runs do not fit: {', '.join(misfits)}." if misfits else "Every run fits into memory.")
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", " ".join(ends)])


def _cells(rows: Sequence[Mapping[str, Any]], pod: Topology | None) -> list[str]:
    """Returns the cells of a line for one run, or for several runs of one model."""
    first, last = rows[0], rows[-1]
    numbers = f"{first['number']}" if len(rows) == 1 else f"{first['number']} to {last['number']}"
    label = first["label"] if len(rows) == 1 else f"{first['label']} ... {last['label'].rpartition('_')[2]}"
    cells = [numbers, label, first["axis"], f"{first['parameters']:,}", f"{first['examples']:,}"]
    cells += [
        f"{first['epochs']:,.2g}" if first["epochs"] < 10 else f"{first['epochs']:,.0f}",
        f"{first['compute']:.2g}",
    ]
    if not pod:
        return cells
    hours, chip_hours = (sum(row[key] for row in rows) for key in ("hours", "chip_hours"))
    fits = "yes" if first["fits"] else "no"
    return [
        *cells,
        f"{100 * first['mfu']:.1f}",
        f"{first['bytes'] / 1e9:.2f}",
        fits,
        f"{hours:.2g}",
        f"{chip_hours:.3g}",
    ]


def commands(plan: Sequence[Mapping[str, Any]], config: str) -> str:
    """Returns the commands that train the runs as an array job. config: value of --config."""
    last, options = len(plan) - 1, f"launch/scaling.sbatch --config={config} --workdir=DIR"
    return (
        "As an array job, one task per run, and the held-out run after the others:\n\n"
        f"    sbatch --array=0-{last - 1} {options}\n    sbatch --array={last} --dependency=afterok:JOB {options}\n"
    )


def document(config: Config, pods: Sequence[Topology], command: str, mfu: float, compiled: bool) -> str:
    """Returns docs/scaling_pod.md: the costs of a study on each pod. command: command line that made the document."""
    method = (
        "The step of each model is compiled for the topology with minimal effort, and its time is estimated as in "
        "[scale](scale.md). GB per chip are all bytes of the program."
        if compiled
        else f"A step is assumed to run at {100 * mfu:.0f} % of the chips' peak rate. GB per chip are the bytes that "
        "stay allocated between steps, without activations."
    )
    parts = [
        "# Cost of a scaling study\n",
        f"The runs of `{config.name}` and their cost, made with\n\n    {command}\n",
        f"{method} Validations, checkpoints and predictions do not count.\n",
    ]
    for pod in pods:
        parts += [f"## {pod.name}\n", table(costs(config, pod, mfu, compiled), pod) + "\n"]
    return "\n".join(parts)
