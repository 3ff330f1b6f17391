"""Measures how alignment settings change the neighbors that are found on EarthView.

`python -m benchmarks.align --workdir=runs/demo` needs the features/ that `make demo` makes. For each setting it trains
the demo's alignment with one change, searches the gallery exactly, and prints a line of JSON. The neighbors by image
features alone are measured too, for comparison. `--document` prints docs/alignment.md from the lines.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from configs import demo
from geotoken_jax import checkpoint, configuration, records
from geotoken_jax import manifests as stages
from geotoken_jax.align.heads import embeddings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.analysis import evaluate
from geotoken_jax.analysis.coordinates import CoordinateTable, Method
from geotoken_jax.gallery import index, neighbors
from geotoken_jax.gallery.table import index_vectors
from geotoken_jax.geo import distance
from geotoken_jax.sharding import make_mesh
from geotoken_jax.stages import align, training
from geotoken_jax.workdir import Workdir

#: Changes to the demo's alignment in all settings: whitening, twice as many examples, and a single validation at the
#: end, so that the last parameters are the ones saved.
BASE: dict[str, Any] = dict(model=dict(whiten=3.0), train=dict(examples=96_000, evaluate_every=187))
#: Setting -> its changes to config.align.
CHANGES: dict[str, dict[str, Any]] = {
    "InfoNCE": {},
    "InfoNCE, `seed` 1": dict(train=dict(seed=1)),
    "InfoNCE, `seed` 2": dict(train=dict(seed=2)),
    "sigmoid": dict(loss=dict(kind="sigmoid")),
    "InfoNCE, `queue` 4,096": dict(loss=dict(queue=4096)),
    "InfoNCE, `same_within_km` 25": dict(loss=dict(same_within_km=25.0)),
    "InfoNCE, not whitened": dict(model=dict(whiten=0.0)),
    "InfoNCE, not whitened, 48,000 examples": dict(
        model=dict(whiten=0.0), train=dict(examples=48_000, evaluate_every=93)
    ),
    "InfoNCE, `equal_earth`": dict(model=dict(location=dict(projection="equal_earth"))),
    "InfoNCE, `unit_vector`": dict(model=dict(location=dict(projection="unit_vector"))),
    "InfoNCE, `same_within_km` 1": dict(loss=dict(same_within_km=1.0)),
}
#: The setting to which the others are compared.
RAW = "features alone"
GALLERY, SPLITS = "train", ("validation", "test", "test_shift")
RANKS, DISTANCES_KM = (1, 5, 15), (25, 200)


def train(config: Any, workdir: str) -> tuple[Any, int]:
    """Returns the alignment model that config.align trains on a work directory's features, and its size."""
    config = configuration.read(config)
    mesh = make_mesh(config.mesh)
    task, splits, resident = align.aligner(config, Workdir(workdir), mesh)
    with tempfile.TemporaryDirectory() as folder:
        result = training.fit(task, config, "align.train", splits, folder, "align", mesh, resident)
        untrained = AlignTask(task.settings, task.width)
        return checkpoint.read_module(Path(folder) / "parameters.safetensors", untrained.init), result.parameters


class Search:
    """Scores alignment models by the neighbors that they find for the photos of SPLITS.

    The score at k, for a distance, is the share of photos for which one of the k nearest gallery photos in the search
    was taken within this distance.
    """

    def __init__(self, workdir: str):
        layout = records.feature_layout(stages.read_manifest(workdir, "features").facts["width"])
        self._photos = {split: records.Records(f"{workdir}/features", split, layout)[:] for split in (GALLERY, *SPLITS)}
        self._truth = {}
        for split in SPLITS:
            photos = self._photos[split]
            ids, authors = (list(photos[name].astype(str)) for name in ("id", "author"))
            none = np.empty((len(ids), 0, 2))
            self._truth[split] = CoordinateTable(
                split, ids, photos["coordinates"], none, False, [{"author": author} for author in authors]
            )
        self._raw = self._nearest(lambda image: image)

    def score(self, model: Any = None) -> dict[str, Any]:
        """Returns split -> k -> kilometers -> score, its 95 % interval, and its difference from the score of RAW.

        Intervals are from a bootstrap over authors, paired for the difference, as in the report. model: alignment
        model; if None, the image features are compared without a model.
        """
        nearest = self._raw if model is None else self._nearest(lambda image: index_vectors(embeddings(model, image)))
        return {split: {str(k): self._score(split, nearest[split][:, :k], k) for k in RANKS} for split in SPLITS}

    def _nearest(self, vectors: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
        """Returns split -> nearest gallery rows of its photos.

        No author is in two splits, so no gallery photo needs to be excluded.
        """
        queries = {split: vectors(photos["image"].astype(np.float32)) for split, photos in self._photos.items()}
        gallery = index.Exact(queries[GALLERY])
        return {split: neighbors.search_neighbors(gallery, queries[split], max(RANKS))[0] for split in SPLITS}

    def _score(self, split: str, rows: np.ndarray, k: int) -> dict[str, Any]:
        truth = self._truth[split]
        methods = [self._best(RAW, self._raw[split][:, :k], truth), self._best("aligned", rows, truth)]
        scores = evaluate.score(methods, truth, RAW, resamples=2_000, seed=0)
        own, more = scores["methods"][1]["accuracy"], scores["differences"][0]["accuracy"]
        return {
            str(own[i]["km"]): {**own[i], "difference": more[i]}
            for i in range(len(own))
            if own[i]["km"] in DISTANCES_KM
        }

    def _best(self, name: str, rows: np.ndarray, truth: Any) -> Any:
        """Returns a method that predicts, for each photo, the coordinates of its geographically closest neighbor."""
        placed, here = self._photos[GALLERY]["coordinates"][rows], truth.coordinates[:, None]
        km = np.asarray(distance.great_circle_km(placed[..., 0], placed[..., 1], here[..., 0], here[..., 1]))
        best = np.take_along_axis(placed, km.argmin(axis=1)[:, None, None], axis=1)[:, 0]
        return Method(name, "", name, True, False, False, best, km.min(axis=1))


def markdown(lines: list[dict[str, Any]], split: str) -> str:
    """Returns the table of a split."""
    heads = [f"{km} km @{k}" for km in DISTANCES_KM for k in RANKS]
    rows = [f"| setting | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for line in lines:
        cells = []
        for km in map(str, DISTANCES_KM):
            for k in map(str, RANKS):
                one = line["found"][split][k][km]
                ends = one if line["setting"] == RAW else one["difference"]
                sign = "" if line["setting"] == RAW else "+"
                span = f"{100 * ends['low']:{sign}.1f}..{100 * ends['high']:{sign}.1f}"
                cells.append(f"{100 * one['value']:.1f} ({span})")
        rows.append(f"| {line['setting']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def document(lines: list[dict[str, Any]]) -> str:
    """Returns docs/alignment.md."""
    parts = [_INTRODUCTION.format(date=datetime.date.today())]
    parts += [f"## {split}\n\n{markdown(lines, split)}\n" for split in SPLITS]
    return "\n".join(parts)


_INTRODUCTION = """# What alignment is worth on EarthView

This page shows how much alignment improves the neighbors of a photo, for people who choose its settings.

**Comparison.** An aligned index searches by three vectors of a photo: image features, location head and text head, each
scaled to length 1. It is compared with a search by the image features alone. Queries are all photos of a split, the
gallery is `train`, and search is exact.

**How to read the tables.** `25 km @5` is the percentage of photos for which at least one of the 5 nearest neighbors was
taken within 25 km. A 95 % interval from a bootstrap over authors is in brackets. In the row "features alone" it is the
interval of the percentage. In the other rows it is the interval of the paired difference from the features alone.

**Settings.** Every row is one run of the demo's alignment with `config.align.model.whiten=3`, 96,000 examples instead
of 48,000, and the change that the row names. The row "not whitened, 48,000 examples" is the demo's setting.
`test_shift` shows places of `train` on a map without training photos.

**How the settings were chosen.** About twenty trainings were compared on `validation`, so the results on `validation`
are not independent of this choice. They were also compared on the places of `validation`, rendered from the map of
`test_shift` in other styles. The photos of `test` and `test_shift` were not used, but the map of `test_shift` was. On
an unseen map the gain may be smaller.

**Results.**

- Without whitening, alignment gains most on the maps on which it was trained, and loses on the map of `test_shift`.
  Both effects grow with the number of examples.
- With whitening, InfoNCE gains on `test` and on `test_shift`, with each of three seeds. Within 25 km, the intervals at
  5 and 15 neighbors are above zero on both splits. At the first neighbor they are above zero on `test` with two of
  three seeds, and on `test_shift` with none.
- The sigmoid loss gains on `test`. On `test_shift` it is no better than the features.
- The differences between projections, queue and `same_within_km` are smaller than the intervals.

**The demo does not use whitening.** In one run with whitening, the decoder answers 29.9 % of `test_shift` within 25 km,
instead of 26.2 % without. On `test` it answers 2.0/38.5/51.1/55.9/63.1 % within 1/25/200/750/2500 km, instead of
2.2/39.8/51.4/55.3/62.2 %. Its gain over the first neighbor at 25 km falls from 1.8 points to 0.4. The run was

```
geotoken all --config=configs/demo.py --workdir=DIR --config.align.model.whiten=3 \\
    --config.align.train.examples=96000 --config.align.train.evaluate_every=187
```

Printed by `python -m benchmarks.align` on {date}, two x86-64 cores.
"""


def main() -> None:
    """Trains and scores each setting, or formats printed lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--only", action="append", help="a setting of CHANGES (may be repeated)")
    parser.add_argument("--examples", type=int, help="examples of a short training, which measures nothing")
    parser.add_argument("--document", action="store_true", help="format lines from standard input")
    options = parser.parse_args()
    if options.document:
        print(document([json.loads(line) for line in sys.stdin if line.startswith("{")]), end="")
        return
    if not (Path(options.workdir) / "features" / "manifest.json").exists():
        print(json.dumps({"skipped": f"{options.workdir} has no features/: `make demo` makes it"}))
        return
    search = Search(options.workdir)
    print(json.dumps({"setting": RAW, "found": search.score()}), flush=True)
    for name in options.only or CHANGES:
        config: Any = demo.get_config()
        for change in (BASE, CHANGES[name]):
            config.align.update(change)
        if options.examples:
            config.align.train.update(examples=options.examples, evaluate_every=1)
        began = time.monotonic()
        model, parameters = train(config, options.workdir)
        seconds = round(time.monotonic() - began)
        line = {"setting": name, "parameters": parameters, "seconds": seconds, "found": search.score(model)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
