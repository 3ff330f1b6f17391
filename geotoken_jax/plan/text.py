"""Plans as text: a table for the terminal, and docs/scale.md."""

import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from geotoken_jax.configuration import Config
from geotoken_jax.plan import hlo, planning, topology

#: Topologies of the tables in docs/scale.md: for training, for training with config.model.group = 1, and for the other
#: workloads.
TRAINING = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "2xv5e:16x16", "v6e:8x8", "v5p:4x4x4")
GROUP_1 = ("v5e:16x16", "v6e:8x8", "v5p:4x4x4")
OTHERS = ("v5e:4x4", "v6e:8x8", "v5p:4x4x4")
#: Keys in the `seconds` of a plan -> their names in tables. Each is the least time of one resource alone.
_TIMES = {
    "compute": "matrix products",
    "memory": "memory traffic",
    "vector": "vector unit",
    "links": "links",
    "slices": "network between slices",
}
_ESTIMATE = {
    "instructions": "instructions, by XLA",
    "kernels": "kernels",
    "collectives": "collectives",
    "step": "step",
}


def table(plan: Mapping[str, Any]) -> str:
    """Returns a plan as text for the terminal."""
    seconds, copies = plan["seconds"], plan["copies"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    settings = ", ".join(f"{key} {value or 'none'}" for key, value in plan["settings"].items())
    chips = f"{plan['chips']} chips as {f'{copies} x ' if copies > 1 else ''}{mesh}"
    lines = [
        f"{plan['topology']}, {plan['workload']}: {chips}; {plan['method']}",
        f"batch {plan['batch_size']:,}, {plan['parameters']:,} parameters, {settings}",
        "",
        "memory per chip",
        *(f"  {name:30}{size / 2**30:10.3f} GiB" for name, size in plan["bytes"].items()),
        f"  {'it fits' if plan['fits'] else 'it does not fit'}",
        "",
        "per step and chip",
        f"  {'model compute':30}{plan['flops']['model'] / 1e12:10.3f} TFLOP",
        *_program_lines(plan),
        "",
        "least time per step, of each resource alone at its peak rate",
        *(f"  {_TIMES[name]:30}{1e3 * seconds[name]:10.3f} ms" for name in _TIMES if name in seconds),
        f"  bound by {_TIMES[seconds['bound']]}: {plan['photos_per_second_at_bound']:,.0f} photos/s",
        *_estimate_lines(plan),
    ]
    if plan["days"]:
        lines += [f"  {plan['days']:.3g} days for {plan['examples']:,} photos"]
    if "advice" in plan:
        lines += ["", "changes tried"]
        lines += [
            f"  {'fits   ' if a['fits'] else 'too big'} {a['bytes'] / 2**30:8.2f} GiB  {a['change']}"
            for a in plan["advice"]
        ]
    return "\n".join(lines)


def _program_lines(plan: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table about the compiled program, or no lines if the step was not compiled."""
    if "traffic" not in plan:
        return []
    lines = [
        f"  {'executed compute':30}{plan['flops']['executed'] / 1e12:10.3f} TFLOP",
        f"  {'memory traffic':30}{plan['traffic'] / 1e9:10.3f} GB",
        f"  {'vector operations':30}{plan['vector'] / 1e9:10.3f} G",
        *(
            f"  {kind:30}{n['payload'] / 1e6:10.1f} MB, {n['sent'] / 1e6:,.1f} MB sent in {n['runs']:,.0f} transfers"
            for kind, n in plan["collectives"].items()
        ),
    ]
    if plan["between_slices"]:
        lines.append(f"  {'sent to other slices':30}{plan['between_slices'] / 1e6:10.1f} MB")
    if plan["unknown_loops"]:
        lines.append(f"  loops with an unknown number of iterations, counted as one iteration: {plan['unknown_loops']}")
    return lines


def _estimate_lines(plan: Mapping[str, Any]) -> list[str]:
    if "estimate" not in plan:
        return []
    estimate = plan["estimate"]
    share = f"{planning.KERNEL_SHARE:.0%}".replace("%", " %")
    return [
        "",
        f"estimated time per step: XLA's cycles, kernels at {share} of the peak rates, collectives not overlapped",
        *(f"  {_ESTIMATE[name]:30}{1e3 * estimate[name]:10.3f} ms" for name in _ESTIMATE),
        f"  {plan['photos_per_second']:,.0f} photos/s, {100 * estimate['mfu']:.1f} % of the peak compute",
    ]


def document(config: Config, command: str, rows: int, quick: bool = False) -> str:
    """Returns the text of docs/scale.md.

    It has plans of training with group 2 on the topologies TRAINING, of training with group 1 on GROUP_1, and of the
    other workloads on OTHERS. command: command line that made the document. rows: number of gallery photos. quick: see
    planning.run. Raises SettingsError before the first program is compiled if a plan cannot be made.
    """
    configs = {group: planning.changed(config, [("model", {"group": group})]) for group in (1, 2)}
    others = [(OTHERS, workload, 2) for workload in _OTHER_TITLES]
    for names, workload, group in ((TRAINING, "train", 2), (GROUP_1, "train", 1), *others):
        for name in names:
            planning.check(configs[group], topology.read(name), workload, rows)

    def plans(names: Sequence[str], workload: str, group: int) -> list[dict[str, Any]]:
        found = []
        for name in names:
            print(f"planning {workload} on {name} with config.model.group = {group}", file=sys.stderr)
            found.append(planning.run(configs[group], topology.read(name), workload, rows, quick))
        return found

    training = plans(TRAINING, "train", 2)
    sections = [
        _INTRODUCTION.format(command=command, date=datetime.date.today(), rows=rows) + _attention_note(config),
        f"## Training, group 2\n\n{_advice(training)}\n\n{_markdown(training)}\n",
        f"## Training, group 1\n\n{_markdown(plans(GROUP_1, 'train', 1))}\n",
        *(f"## {title}\n\n{_markdown(plans(OTHERS, name, 2))}\n" for name, title in _OTHER_TITLES.items()),
    ]
    return "\n".join(sections)


def _attention_note(config: Config) -> str:
    """Returns a paragraph if the decoder drops attention weights, which fused attention kernels cannot do."""
    rate = config.model.attention_dropout
    if not rate:
        return ""
    return f"""
**Training computes attention without a fused kernel**, because `config.model.attention_dropout` is {rate}, as in the
paper. With `--config.model.attention_dropout=0` the step is shorter ([how much](training.md#the-speed-of-a-step)).
"""


_OTHER_TITLES = {
    "align": "Alignment",
    "embed": "Embedding photos",
    "predict": "Decoding candidates",
}
_INTRODUCTION = """# Scale

This page shows the memory and time that the paper's configuration needs per chip, for people who choose hardware. Made
on {date} with

```
{command}
```

**Method.** For TPUs, the real program was compiled for the pod with the flags of `launch/env.sh`, without having any
TPU. Then the compiled program was analyzed. The body of a loop counts as often as it runs. With `--quick`
the compiler makes less effort: it takes a third of the time, and its program moves up to 2.3 times as many bytes.

**GPUs are not in the tables**, because XLA compiles for a GPU only if there is one. `geotoken plan --topology=h100:8`
prints the bytes that stay on a chip and the model's compute.

**Memory** is per chip. A gallery of {rows:,} photos takes 4.7 KB per photo if `config.gallery.placement` puts it on
the devices, and nothing if it is `host`.

**Least times.** Each is the time of one resource alone, at the peak rate in `geotoken_jax/chips.py`. The longest of
them is a lower limit of the step's time.

- Matrix products, including products of rematerialization, and the bytes sent over links are counted exactly. All
  links are assumed to be used at once, by rings. The network between slices is the chip's share of its host's network
  cards.
- Memory traffic counts the operands and results of instructions that are stored in HBM, not in on-chip memory. If an
  instruction reads a slice of an array, only the slice counts.
- The vector unit computes everything but matrix products: dropout, softmax, norms, the optimizer. Each element of a
  result counts as one operation. Operations inside Pallas kernels do not count.

**Estimated times.** The TPU compiler stores in each instruction its own estimate of the clock cycles. It has no
estimate for Pallas kernels and for collectives. A kernel's time is the longer of the times for its operations and its
bytes, at half of the peak rates. The time of collectives is their least time, without latency and not overlapped with
other work. No TPU has confirmed these estimates. Use them to compare settings and topologies.

If a column has no values from the program, the compiler refused the step for its memory.

For alignment and training a step is one batch of the whole pod. For embedding and decoding, hosts process different
batches. The batch of a host is split over its chips. Decoding does not include the exact search of places, because its
number of steps depends on the photo.
"""


def _advice(plans: Sequence[Mapping[str, Any]]) -> str:
    """Returns advice on the number of chips, and a table. plans: plans of the same batch on several topologies."""
    estimated = [p for p in plans if "estimate" in p]
    if not estimated:
        return "The compiler estimates no time for these chips."
    lines = [
        "| chips | photos per chip | photos/s | photos/s per chip | of the best on this chip |",
        "|---|---:|---:|---:|---:|",
    ]

    def per_chip(plan: Mapping[str, Any]) -> float:
        return plan["photos_per_second"] / plan["chips"]

    for plan in estimated:
        chip = topology.read(plan["topology"]).chip
        best = max(per_chip(p) for p in estimated if topology.read(p["topology"]).chip == chip)
        lines.append(
            f"| {plan['topology']} | {plan['batch_size'] / plan['chips']:g} | {plan['photos_per_second']:,.0f} | "
            f"{per_chip(plan):,.0f} | {100 * per_chip(plan) / best:.0f} % |"
        )
    return _CHIPS_PER_BATCH.format(batch=estimated[0]["batch_size"]) + "\n".join(lines)


_CHIPS_PER_BATCH = """Number of chips for a batch of {batch:,}: a chip is used well if it has many photos of the batch.
With few photos per chip, the small instructions of the decoder, the optimizer and the collectives take a larger part of
the step. More chips still shorten the training, at a lower speed per chip.

"""


def _markdown(plans: Sequence[Mapping[str, Any]]) -> str:
    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def known(figure: Callable[[Mapping[str, Any]], str], key: str = "traffic") -> list[str]:
        return [figure(p) if key in p else "" for p in plans]

    def milliseconds(name: str, key: str) -> list[str]:
        return [f"{1e3 * p[key][name]:.2f}" if name in p.get(key, {}) and "traffic" in p else "" for p in plans]

    kinds = [kind for kind in hlo.COLLECTIVES if any(kind in p.get("collectives", {}) for p in plans)]
    sizes = dict.fromkeys(name for p in plans for name in p["bytes"])
    times = [name for name in _TIMES if any(name in p["seconds"] for p in plans)]
    parts = _ESTIMATE if any("estimate" in p for p in plans) else ()
    rows = [
        row("", [p["topology"] for p in plans]),
        "|---" + "|---:" * len(plans) + "|",
        row("program", [p["method"] for p in plans]),
        row("photos per step and chip", [f"{p['batch_size'] * p['copies'] / p['chips']:g}" for p in plans]),
        *(row(f"{name}, GiB", [f"{p['bytes'].get(name, 0) / 2**30:.2f}" for p in plans]) for name in sizes),
        row("fits", ["yes" if p["fits"] else "no" for p in plans]),
        row("model compute, TFLOP", [f"{p['flops']['model'] / 1e12:.3f}" for p in plans]),
        row("executed compute, TFLOP", known(lambda p: f"{p['flops']['executed'] / 1e12:.3f}")),
        row("memory traffic, GB", known(lambda p: f"{p['traffic'] / 1e9:.2f}")),
        row("vector operations, G", known(lambda p: f"{p['vector'] / 1e9:.2f}")),
        *(
            row(f"{kind}, MB", known(lambda p, k=kind: f"{p['collectives'].get(k, {}).get('payload', 0) / 1e6:.1f}"))
            for kind in kinds
        ),
        *(row(f"least time of {_TIMES[name]}, ms", milliseconds(name, "seconds")) for name in times),
        row("bound by", [_TIMES[p["seconds"]["bound"]] for p in plans]),
        row("photos/s at that bound", [f"{p['photos_per_second_at_bound']:,.0f}" for p in plans]),
        *(row(f"estimated time of {_ESTIMATE[name]}, ms", milliseconds(name, "estimate")) for name in parts),
    ]
    if parts:
        rows += [
            row("share of peak compute (MFU)", known(lambda p: f"{100 * p['estimate']['mfu']:.1f} %", "estimate")),
            row("estimated photos/s", known(lambda p: f"{p['photos_per_second']:,.0f}", "estimate")),
        ]
    if any(p["days"] for p in plans):
        rows.append(row(f"days for {plans[0]['examples']:,} photos", [f"{p['days']:.3g}" for p in plans]))
    return "\n".join(rows)
