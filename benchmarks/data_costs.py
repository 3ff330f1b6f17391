"""Projects the hours and dollars to prepare all of MP16-Pro, from the figures of other benchmarks. Prints two tables.

    python -m benchmarks.data_costs FILE

FILE contains JSON lines of the benchmarks `photos --side=405`, `neighbors`, `cells`, `input` and `embed`, in any order.
If there are several lines of one benchmark, the line with the largest photos or the most rows is used. If there is no
line of a benchmark, its stage is shown as "not measured".

The first table has the costs of the stages. It assumes that a machine has `--cores` cores, each as fast as one of the
`--measured_cores`, and that disks reach the rates in the column "MB/s". A stage that can use only one machine takes the
same time, and costs more, with several machines.

The second table has the costs of each backbone, which are computed and not measured. `--backbones` prints this table
alone, without FILE.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from configs import common

#: MP16-Pro: number of photos in the CSV, bytes of all images, and number of photos that G3's filter keeps
#: (arXiv 2405.14702).
LISTED, BYTES, USABLE = 4_654_532, 371e9, 4_120_000
#: A key that only one benchmark prints -> name of this benchmark, and its key for the size of a run.
KINDS = {
    "shards_photos_per_second": ("photos", "bytes_per_photo"),
    "exact_queries_per_second": ("neighbors", "rows"),
    "speedup_numpy_encode_over_cell": ("cells", "coordinates"),
    "host": ("input", "photos"),
    "decode_photos_per_second_per_core": ("embed", "jpeg_bytes"),
}
#: Size of the search index per component of a vector, in bytes: an index of a million vectors of width 2304 has 9.5 GB.
INDEX_BYTES = 9.5e9 / 1e6 / 2304
#: Peak rate of an H100 in bfloat16, in FLOP/s, from its data sheet, and the assumed share of the peak that is reached.
H100, UTILIZATION = 989e12, 0.4


@dataclasses.dataclass(frozen=True)
class Tower:
    """The image tower of a backbone.

    patch: number of values per patch, three per pixel. features: width of the features. pooled: whether the features
    are pooled by attention over all positions; if false, an extra position collects them.
    """

    name: str
    layers: int
    width: int
    feed_forward: int
    patches: int
    patch: int
    features: int
    pooled: bool

    @property
    def flops(self) -> float:
        """FLOPs per photo, for the products with weights and the two matrix products of attention."""
        positions, d = self.patches + (not self.pooled), self.width
        layer = 2 * positions * (4 * d * d + 2 * d * self.feed_forward) + 4 * positions**2 * d
        head = 2 * self.patches * 2 * d * d if self.pooled else 0  # keys and values
        return self.layers * layer + 2 * self.patches * self.patch * d + head


#: Backbones of configs/mp16_pro.py and configs/mp16_siglip2.py.
TOWERS = (
    Tower("CLIP ViT-L/14, 224 pixels", 24, 1024, 4096, 256, 588, 768, False),
    Tower("SigLIP 2 so400m/14, 384 pixels", 27, 1152, 4304, 729, 588, 1152, True),
    Tower("SigLIP 2 giant-opt/16, 384 pixels", 40, 1536, 6144, 576, 768, 1536, True),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the preparation.

    on: unit that shares the work: "core" (one core), "machine" (all cores of one machine) or "machines" (all cores).
    core_seconds: time on one core; None if not measured. pieces: number of indivisible pieces of the work; 0 if the
    work divides freely. bytes: number of bytes to read.
    """

    name: str
    on: str
    core_seconds: float | None
    pieces: int = 0
    bytes: float = 0

    def seconds(self, cores: int, machines: int) -> float:
        """Returns the duration of the stage. Raises TypeError if the stage was not measured."""
        workers = {"core": 1, "machine": cores, "machines": cores * machines}[self.on]
        share = math.ceil(self.pieces / workers) / self.pieces if self.pieces else 1 / workers
        return self.core_seconds * share  # pyright: ignore[reportOptionalOperand]


def choose(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns benchmark -> its largest run. Lines that are not JSON objects are skipped."""
    largest: dict[str, dict[str, Any]] = {}
    for run in (json.loads(line) for line in lines if line.startswith("{")):
        for key, (name, size) in KINDS.items():
            if key in run and (name not in largest or run[size] >= largest[name][size]):
                largest[name] = run
    return largest


def stages(runs: dict[str, dict[str, Any]], measured_cores: int) -> list[Stage]:
    """Returns the stages that read all photos. measured_cores: cores that `neighbors` and `input` ran on."""
    config: Any = common.get_config()
    shards, examples = math.ceil(LISTED / config.photos.mp16_pro.photos_per_shard), config.train.examples

    def of(name: str, figure: Callable[[dict[str, Any]], float]) -> float | None:
        return figure(runs[name]) if name in runs else None

    # Every query searches every shard of the index, so a query takes longer in a larger gallery.
    return [
        Stage("prepare: survey", "core", of("photos", lambda run: LISTED / run["survey_photos_per_second"])),
        Stage(
            "prepare: read, check, tokens, write",
            "machines",
            of(
                "photos", lambda run: LISTED * run["cpu_seconds"] / run["photos"]
            ),  # an eighth of it is start and survey
            shards,
            BYTES,
        ),
        Stage(
            "of that: tokens", "machines", of("cells", lambda run: USABLE / run["per_second"]["numpy_encode"]), shards
        ),
        Stage(
            "embed: decode JPEG on the CPU",
            "machines",
            of("embed", lambda run: USABLE / run["decode_photos_per_second_per_core"]),
            bytes=BYTES,
        ),
        Stage(
            "index: build",
            "machine",
            of("neighbors", lambda run: run["build_seconds"] * USABLE / run["rows"] * measured_cores),
        ),
        Stage(
            "index: neighbors of every photo",
            "machine",
            of("neighbors", lambda run: USABLE / run["queries_per_second"] * USABLE / run["rows"] * measured_cores),
        ),
        Stage(
            f"input of training, {examples / 1e6:.0f} M examples",
            "machines",
            of("input", lambda run: examples / run["device"]["examples_per_second"] * measured_cores),
            bytes=of("input", lambda run: examples * run["device"]["bytes_per_example"]) or 0,
        ),
    ]


def table(rows: list[Stage], cores: int, machines: int, price: float) -> str:
    """Returns the stages as a Markdown table. price: dollars per core and hour."""
    lines = [
        f"| stage | hours, 1 machine | dollars | MB/s | hours, {machines} machines | dollars | MB/s, all |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row.name]
        for n in (1, machines):
            if row.core_seconds is None:
                cells += ["not measured", "", ""]
                continue
            seconds = row.seconds(cores, n)
            dollars = seconds / 3600 * cores * (n if row.on == "machines" else 1) * price
            rate = f"{row.bytes / seconds / 1e6:,.0f}" if row.bytes else ""
            cells += [_rounded(seconds / 3600), _rounded(dollars), rate]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def backbones() -> str:
    """Returns the costs of each backbone as a Markdown table."""
    lines = [
        "| backbone | numbers per feature | GFLOP per photo | H100 hours | features, GB | gallery, GB | index, GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for tower in TOWERS:
        hours, numbers = USABLE * tower.flops / (H100 * UTILIZATION) / 3600, USABLE * tower.features
        # In bfloat16: a photo's and its text's features; three vectors per photo of the gallery.
        sizes = (2 * 2 * numbers, 3 * 2 * numbers, 3 * numbers * INDEX_BYTES)
        cells = [f"{tower.features:,}", f"{tower.flops / 1e9:,.0f}", f"{hours:.2f}"]
        lines.append(f"| {' | '.join([tower.name, *cells, *(f'{size / 1e9:,.0f}' for size in sizes)])} |")
    return "\n".join(lines)


def _rounded(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else "< 0.01"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--cores", type=int, default=16, help="cores of a machine")
    parser.add_argument("--machines", type=int, default=16)
    parser.add_argument("--measured_cores", type=int, default=2, help="cores of the machine that printed FILE")
    parser.add_argument("--dollars_per_core_hour", type=float, default=0.05)
    parser.add_argument("--backbones", action="store_true", help="print the table of backbones alone")
    options = parser.parse_args()
    if options.backbones:
        print(backbones())
        return
    if options.file is None:
        print(json.dumps({"skipped": "FILE is missing: name a file with JSON lines of the other benchmarks"}))
        return
    rows = stages(choose(options.file.read_text().splitlines()), options.measured_cores)
    print(table(rows, options.cores, options.machines, options.dollars_per_core_hour))
    print(f"\n{backbones()}")


if __name__ == "__main__":
    main()
