"""Runs the benchmarks one after another, each in its own process. Prints their JSON lines, and the projected costs.

The first line contains the machine and the date. Two keys are added to every other line: `benchmark`, the name, and
`seconds`, the duration of the benchmark including its start.

With `--small`, each benchmark takes only seconds. This shows that all of them run; its figures mean nothing. `--table
FILE` prints the table of docs/data.md; FILE contains the printed lines.

Four benchmarks are not run, because they need more than this environment: `serving` needs locust, `export` makes
virtual environments, `folder` needs an export, and `torch_reference` needs torch.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: Modules with a command line that are not run here.
LEFT_OUT = ("__main__", "clients", "export", "folder", "serving", "torch_reference")
#: Benchmark -> its arguments with --small. {work} is replaced by a small work directory of the demo.
SMALL = {
    "align": "--workdir={work} --only=InfoNCE --examples=2048",
    "align_loss": "--batch=256 --width=16 --devices=2 --chunk=64",
    "cells": "--n=2000 --sample=200 --repeats=1",
    "data_costs": "",
    "decoding": "--batch=2 --candidates=2 --times=1 --rounds=1",
    "embed": "--shape=tiny --photos=32 --batch=4 --rounds=1",
    "embed_scaling": "--photos=32 --processes 1 2 --threads=1",
    "gallery": "--devices=2 --batch=64",
    "input": "--photos=512 --width=16 --batch=64 --seconds=0.2 --rounds=1",
    "neighbors": "--rows=4000 --width=48 --queries=200 --exact=100",
    "photos": "--photos=1000 --photos_per_shard=200",
    "settings": "--workdir={work} --only=post-norm --examples=1024",
    "train_step": "--photos=512 --steps=1 --rounds=1",
}
#: Benchmark -> format strings for its row in the table. The names in braces are keys of the benchmark's JSON lines.
TEXTS = {
    "align": ("{setting}: see docs/alignment.md",),
    "align_loss": (
        "InfoNCE of {batch:,} pairs in chunks: {info_nce[ours][temporary]:,} bytes",
        "the plain formula: {info_nce[plain][temporary]:,} bytes",
    ),
    "cells": ("{per_second[numpy_encode]:,} coordinates/s to tokens, {speedup[numpy_encode]:,} times s2sphere",),
    "decoding": ("{ours[photos_per_second]:.1f} photos/s, a small model, {candidates} candidates",),
    "embed": (
        "{images_per_second} images/s in the tower {shape}",
        "{decode_photos_per_second_per_core} JPEGs/s decoded per core",
        "{photos_per_second} photos/s in the stage",
    ),
    "embed_scaling": ("{processes} process(es) with {threads} thread(s): {embedded_per_second:,} photos/s",),
    "gallery": ("{sent_total:,} bytes sent per device and step, {needed:,} needed",),
    "input": (
        "{device[examples_per_second]:,.0f} examples/s with the gallery on devices",
        "{host[examples_per_second]:,.0f} with neighbors gathered on the host",
    ),
    "neighbors": (
        "{rows:,} rows x {width}: built in {build_seconds} s",
        "{queries_per_second:,} queries/s, {ratio} times exact search, recall@15 {recall_at_15}",
    ),
    "photos": ("{photos_per_second:,} photos/s prepared", "{survey_photos_per_second:,} headers/s surveyed"),
    "settings": ("{setting}: loss {loss}",),
    "train_step": ("{ours[examples_per_second]:.0f} examples/s, a small model",),
}
#: Changes to configs/demo.py that make the small work directory in seconds.
_DEMO = {
    "photos.workers": 1,
    "photos.earthview.places": 200,
    "photos.earthview.train": 600,
    "photos.earthview.validation": 60,
    "photos.earthview.test": 60,
    "photos.earthview.test_unseen": 30,
    "photos.earthview.test_shift": 30,
    "embed.views.count": 1,
    "align.train.examples": 1024,
    "align.train.evaluate_every": 1,
    "index.search.kind": "exact",
}


def names() -> list[str]:
    """Returns the names of the benchmarks. data_costs is last, because it reads the lines of the others."""
    files = sorted(file for file in HERE.glob("*.py") if "__main__" in file.read_text() and file.stem not in LEFT_OUT)
    return sorted((file.stem for file in files), key=lambda name: name == "data_costs")


def machine() -> dict[str, Any]:
    """Returns the machine and the date."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": f"{cores} cores, {model or platform.machine()}", "date": str(datetime.date.today())}


def run(name: str, arguments: list[str]) -> Iterator[str]:
    """Runs a benchmark and yields its lines of output. Raises SystemExit if the benchmark fails."""
    began = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks.{name} ended with status {done.returncode}: its error is above")
    more = {"benchmark": name, "seconds": round(time.monotonic() - began, 1)}
    for line in done.stdout.splitlines():
        yield json.dumps({**more, **json.loads(line)}) if line.startswith("{") else line


def small_demo(folder: Path) -> None:
    """Makes a small work directory of the demo, up to the stage `index`."""
    config = ["--config=configs/demo.py", *(f"--config.{key}={value}" for key, value in _DEMO.items())]
    for verb in ("prepare", "embed", "align", "index"):
        command = [sys.executable, "-m", "geotoken_jax", verb, f"--workdir={folder}", *config]
        subprocess.run(command, cwd=HERE.parent, stdout=subprocess.DEVNULL, check=True)


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the figures of all lines as a Markdown table, under the machine and the date."""
    first, *rest = lines
    rows = [f"Measured on {first['date']}: {first['machine']}.", ""]
    rows += ["| benchmark | figures | seconds |", "|---|---|---:|"]
    for line in rest:
        texts = [f"skipped: {line['skipped']}"] if "skipped" in line else TEXTS[line["benchmark"]]
        figures = "; ".join(text if "skipped" in line else text.format(**line) for text in texts)
        rows.append(f"| `{line['benchmark']}` | {figures} | {line['seconds']} |")
    return "\n".join(rows)


def main() -> None:
    """Runs the benchmarks, or prints a table of their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="use the smallest sizes")
    parser.add_argument("--only", action="append", choices=names(), help="a benchmark (may be repeated)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of printed lines")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines() if line.startswith("{")]))
        return
    if options.small:  # most of the time is compilation, which takes less than half as long without optimizations
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work, printed = Path(folder) / "demo", Path(folder) / "lines"
        printed.touch()
        for name in options.only or names():
            arguments = SMALL[name].format(work=work).split() if options.small else []
            if str(work) in " ".join(arguments) and not work.exists():
                small_demo(work)
            for line in run(name, [str(printed)] if name == "data_costs" else arguments):
                print(line, flush=True)
                with printed.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
