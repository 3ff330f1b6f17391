"""Neighbors of benchmarks under further exclusion rules, as a step of `geotoken predict`.

The gallery may have photos by the authors of a benchmark, or the same pictures. So each benchmark is searched again
without the gallery photos that the rules in config.benchmarks.exclude exclude, and the report shows both accuracies.
"""

import json
from typing import Any

import numpy as np

from geotoken_jax import records, settings
from geotoken_jax.configuration import Config
from geotoken_jax.gallery import exclude
from geotoken_jax.gallery.exclude import ExcludeSettings
from geotoken_jax.gallery.neighbors import Neighbors, search_neighbors
from geotoken_jax.gallery.table import index_vectors
from geotoken_jax.manifests import Manifest, write_json
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Workdir

#: Photos per search.
_BATCH = 8192


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes exclusion/: neighbors of every benchmark under each entry of config.benchmarks.exclude.

    The files BENCHMARK-RULES.rows.npy and .scores.npy are as in neighbors/. The rules are applied in addition to those
    in config.index.neighbors.exclude_in_evaluation. The manifest has, per benchmark, the number of photos whose author
    is unknown and, per benchmark and rules, the numbers of `_counts`. Returns an empty list without benchmarks.
    """
    every = config.benchmarks.exclude
    if not workdir.benchmarks or not every:
        return []
    stage = workdir.begin(config, "exclusion", ["benchmarks.exclude"], ["neighbors"])
    if stage.manifest:
        return [stage.manifest]
    photos = {benchmark: workdir.query_counts[benchmark] for benchmark in workdir.benchmarks}
    facts: dict[str, Any] = {}
    with Progress("exclusion", sum(photos.values()) * len(every), "photos") as progress:
        for benchmark, n in photos.items():
            queries = workdir.table(benchmark)
            unknown = int((queries.authors() == queries.ids()).sum())
            facts[benchmark] = {"unknown_authors": unknown, "rules": {}}
            for name, rules in every.items():
                file = stage.path / f"{workdir.split_under(benchmark, name)}.json"
                if not file.exists():
                    found = _search(config, workdir, benchmark, rules)
                    for kind, values in zip(("rows", "scores"), found, strict=True):
                        records.save_array(file.with_suffix(f".{kind}.npy"), values)
                    write_json(file, _counts(rules, workdir, benchmark, found[0]))
                facts[benchmark]["rules"][name] = json.loads(file.read_text())
                progress.add(n)
    counts = {workdir.split_under(benchmark, name): n for benchmark, n in photos.items() for name in every}
    return [stage.finish(counts, benchmarks=facts)]


def _search(config: Config, workdir: Workdir, benchmark: str, rules: ExcludeSettings) -> Neighbors:
    """Returns the neighbors of a benchmark under rules, as many as neighbors/ has."""
    stored = workdir.manifest("neighbors").settings["index"]["neighbors"]
    always = settings.read(ExcludeSettings, stored["exclude_in_evaluation"], "index.neighbors.exclude_in_evaluation")
    excluded, queries = workdir.exclusions_by([always, rules], benchmark), workdir.table(benchmark)
    index = workdir.index(config.index.search.threads)
    parts = []
    for first in range(0, len(queries), _BATCH):
        here = slice(first, min(first + _BATCH, len(queries)))
        vectors = index_vectors(queries.embeddings(here))
        parts.append(search_neighbors(index, vectors, stored["count"], excluded(here)))
    rows, scores = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(scores)


def _counts(rules: ExcludeSettings, workdir: Workdir, benchmark: str, found: np.ndarray) -> dict[str, int]:
    """Returns how much the rules exclude.

    photos: number of photos for which they exclude at least one gallery row. gallery: number of gallery rows that they
    exclude for at least one photo. neighbors: number of photos that have other neighbors than without the rules. fewer:
    number of photos with fewer neighbors than are stored. found: neighbors under the rules.
    """
    photos, gallery = exclude.affected(rules, workdir.table(benchmark), workdir.gallery)
    changed = (found != workdir.neighbors(benchmark)[0]).any(axis=1)
    fewer = (found[:, -1:] < 0).any(axis=1)
    numbers = {"photos": photos, "gallery": gallery, "neighbors": changed, "fewer": fewer}
    return {name: int(flags.sum()) for name, flags in numbers.items()}
