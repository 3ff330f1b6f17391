"""A step of `geotoken predict`: searches neighbors of benchmark photos again, with fewer gallery photos.

The gallery may contain photos by the same authors as a benchmark, or even the same pictures. config.benchmarks.exclude
has named sets of rules that exclude such gallery photos, e.g. `same_author`. For each set of rules, the neighbors are
searched without the excluded photos. The report shows the accuracy with and without them.
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
    """Writes exclusion/: the neighbors of every benchmark under each set of rules in config.benchmarks.exclude.

    BENCHMARK-RULES.rows.npy has the gallery rows of the neighbors, and BENCHMARK-RULES.scores.npy their scores, as in
    neighbors/. RULES is the name of a set of rules. The rules in config.index.neighbors.exclude_in_evaluation apply as
    well. The manifest has, per benchmark, the number of photos whose author is unknown, and per benchmark and set of
    rules the result of `_counts`. Returns an empty list if there are no benchmarks or no rules.
    """
    rule_sets = config.benchmarks.exclude
    if not workdir.benchmarks or not rule_sets:
        return []
    stage = workdir.begin(config, "exclusion", ["benchmarks.exclude"], ["neighbors"])
    if stage.manifest:
        return [stage.manifest]
    photos = {benchmark: workdir.query_counts[benchmark] for benchmark in workdir.benchmarks}
    facts: dict[str, Any] = {}
    for name, rules in rule_sets.items():
        exclude.check_source(rules, f"benchmarks.exclude.{name}", workdir.gallery)
    with Progress("exclusion", sum(photos.values()) * len(rule_sets), "photos") as progress:
        for benchmark, n in photos.items():
            queries = workdir.table(benchmark)
            # A photo without an author has its id as the author.
            unknown = int((queries.authors() == queries.ids()).sum())
            facts[benchmark] = {"unknown_authors": unknown, "rules": {}}
            for name, rules in rule_sets.items():
                file = stage.path / f"{workdir.split_under(benchmark, name)}.json"
                if not file.exists():
                    found = _search(config, workdir, benchmark, rules)
                    for kind, values in zip(("rows", "scores"), found, strict=True):
                        records.save_array(file.with_suffix(f".{kind}.npy"), values)
                    write_json(file, _counts(rules, workdir, benchmark, found[0]))
                facts[benchmark]["rules"][name] = json.loads(file.read_text())
                progress.add(n)
    counts = {workdir.split_under(benchmark, name): n for benchmark, n in photos.items() for name in rule_sets}
    return [stage.finish(counts, benchmarks=facts)]


def _search(config: Config, workdir: Workdir, benchmark: str, rules: ExcludeSettings) -> Neighbors:
    """Returns the neighbors of a benchmark's photos without the gallery photos that the rules exclude.

    The number of neighbors per photo is the same as in neighbors/. If the search finds fewer, the last rows of the
    photo are -1 and their scores -inf.
    """
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
    """Returns four counts that show the effect of a set of rules on a benchmark.

    photos: benchmark photos for which the rules exclude at least one gallery photo. gallery: gallery photos that the
    rules exclude for at least one benchmark photo. neighbors: benchmark photos whose neighbors differ from the
    neighbors without these rules. fewer: benchmark photos with fewer neighbors than in neighbors/.

    found: gallery rows of the neighbors under these rules.
    """
    photos, gallery = exclude.affected(rules, workdir.table(benchmark), workdir.gallery)
    changed = (found != workdir.neighbors(benchmark)[0]).any(axis=1)
    fewer = (found[:, -1:] < 0).any(axis=1)
    numbers = {"photos": photos, "gallery": gallery, "neighbors": changed, "fewer": fewer}
    return {name: int(flags.sum()) for name, flags in numbers.items()}
