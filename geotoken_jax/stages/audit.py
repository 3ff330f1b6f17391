"""`geotoken audit`: runs one audit on a work directory and writes audit/NAME/figures.json and index.html."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from scipy.spatial import KDTree

from geotoken_jax import records
from geotoken_jax.analysis import coverage, leakage, neighbor_gap, overlap, per_level
from geotoken_jax.analysis.masking import MaskedGallery
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data import pipeline
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance
from geotoken_jax.manifests import Manifest, Stage, StageError, write_bytes, write_json
from geotoken_jax.pages import coverage as coverage_page
from geotoken_jax.pages import leakage as leakage_page
from geotoken_jax.pages import levels as levels_page
from geotoken_jax.pages import neighbors as neighbors_page
from geotoken_jax.pages.frame import Source
from geotoken_jax.progress import Progress
from geotoken_jax.stages import evaluate
from geotoken_jax.workdir import GALLERY, Workdir

#: Name of an audit -> function that formats the contents of its figures.json as a text table.
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "coverage": coverage.table,
    "leakage": leakage.table,
    "neighbors": neighbor_gap.table,
    "levels": per_level.table,
}


def run(config: Config, workdir: Workdir, name: str) -> list[Manifest]:
    """Runs one audit and writes audit/NAME/.

    "coverage" and "leakage" raise StageError if the reference variant has no predictions; "coverage" also if
    config.audit.coverage.split is not an evaluated split.
    """
    makers = {"coverage": _coverage, "leakage": _leakage, "neighbors": _neighbors, "levels": _levels}
    return [makers[name](config, workdir)]


def _coverage(config: Config, workdir: Workdir) -> Manifest:
    options, scoring = config.audit, config.evaluate
    folders = evaluate.predicted(config, workdir)
    split = options.coverage.split
    if split not in workdir.query_counts:
        raise StageError(
            f"config.audit.coverage.split is {split!r}: choose one of the splits in {workdir.path / 'queries'}, "
            f"{', '.join(sorted(workdir.query_counts))}"
        )
    inputs = ["photos", "gallery", "queries", "neighbors", f"geotoken/{scoring.reference}", *folders]
    stage = workdir.begin(config, "audit/coverage", ["name", "audit.coverage", "evaluate"], inputs)
    if stage.manifest:
        return stage.manifest
    truths, methods = evaluate.read_predictions(workdir, scoring)
    gallery = workdir.gallery
    tree = KDTree(distance.to_unit_vectors(*gallery.coordinates().T))
    file = stage.path / "regions.npy"
    if not file.exists():
        records.save_array(file, coverage.gallery_regions(workdir.photos(GALLERY), gallery))
    regions = records.open_array(file)
    by_split = {
        name: coverage.split_photos(
            truth, methods[name], tree, gallery, regions, _sources(workdir.table(name), truth.ids)
        )
        for name, truth in truths.items()
    }
    row_of = overlap.match(overlap.encoded(truths[split].ids), workdir.table(split).ids())
    answer = _without_region(config, stage, workdir, scoring.reference, split)
    masked = coverage.score_without_regions(
        split, by_split[split], regions, row_of, options.coverage.countries, answer, scoring
    )
    figures = coverage.figures(by_split, gallery, regions, masked, options.coverage.level, scoring)
    maps = coverage.maps(figures, gallery, by_split[split], scoring.reference)
    page = coverage_page.page(figures, maps, scoring.reference, _source(stage, workdir, scoring.resamples))
    counts = {"regions": len(masked["regions"]), **{name: len(truth.ids) for name, truth in truths.items()}}
    return _finish(stage, figures, page, counts)


def _sources(table: Table, ids: Sequence[str]) -> np.ndarray:
    """Returns the source of each photo; empty if the table lacks the photo or has no sources."""
    rows = overlap.match(overlap.encoded(ids), table.ids())
    return np.where(rows < 0, b"", table.sources(np.maximum(rows, 0)))


def _without_region(config: Config, stage: Stage, workdir: Workdir, variant: str, split: str) -> coverage.Answer:
    """Returns a function that predicts photos of a split with one region hidden from the gallery.

    Predictions are stored in masked-NUMBER.npy, so an interrupted audit continues with the next region.
    """
    opened: list[MaskedGallery] = []

    def answer(number: int, rows: np.ndarray, visible: np.ndarray) -> np.ndarray:
        file = stage.path / f"masked-{number:03d}.npy"
        if not file.exists():
            opened[:] = opened or [MaskedGallery(config, workdir, variant, split)]
            records.save_array(file, opened[0](rows, visible))
        return records.open_array(file)

    return answer


def _leakage(config: Config, workdir: Workdir) -> Manifest:
    above, scoring = config.audit.leakage.cosine_above, config.evaluate
    inputs = ["photos", "gallery", "queries", *evaluate.predicted(config, workdir)]
    stage = workdir.begin(config, "audit/leakage", ["name", "audit.leakage", "evaluate"], inputs)
    if stage.manifest:
        return stage.manifest
    truths, methods = evaluate.read_predictions(workdir, scoring)
    overlaps = overlap.find_leaks(workdir, truths, above)
    figures = leakage.figures(truths, methods, overlaps, workdir.gallery, above, scoring)
    pairs = {
        split: [pair for kind in values["kinds"].values() for pair in kind["pairs"]]
        for split, values in figures["splits"].items()
    }
    photos = {s: evaluate.gallery(workdir, [pair["photo"] for pair in listed], s) for s, listed in pairs.items()}
    gallery = evaluate.gallery(workdir, [pair["gallery"] for listed in pairs.values() for pair in listed])
    source = _source(stage, workdir, scoring.resamples)
    worst = leakage.worst_kinds(truths, overlaps)
    page = leakage_page.page(figures, worst, photos, gallery, scoring.reference, source)
    return _finish(
        stage, figures, page, {f"leaked of {split}": int(overlaps[split].leaked().sum()) for split in truths}
    )


def _neighbors(config: Config, workdir: Workdir) -> Manifest:
    scoring = config.evaluate
    stage = workdir.begin(config, "audit/neighbors", ["name", "evaluate"], ["gallery", "queries", "neighbors"])
    if stage.manifest:
        return stage.manifest
    manifest, gallery = workdir.manifest("neighbors"), workdir.gallery
    # Display order: training splits, validation, then the other splits by name.
    order = sorted(
        manifest.counts,
        key=lambda split: (split not in (views.SOURCE_SPLIT, views.VIEWS_SPLIT), split != "validation", split),
    )
    samples = []
    for split in order:
        neighbors = workdir.neighbors(split)
        samples.append(neighbor_gap.sample(split, workdir.table(split), gallery, neighbors, scoring.seed))
    figures = neighbor_gap.figures(samples, manifest.settings["index"]["neighbors"], scoring)
    page = neighbors_page.page(figures, samples, _source(stage, workdir, scoring.resamples))
    return _finish(stage, figures, page, {sample.split: len(sample.km) for sample in samples})


def _levels(config: Config, workdir: Workdir) -> Manifest:
    scoring = config.evaluate
    variant = scoring.reference
    inputs = ["queries", "gallery", "tokens", f"geotoken/{variant}"]
    stage = workdir.begin(config, "audit/levels", ["name", "evaluate"], inputs)
    if stage.manifest:
        return stage.manifest
    seen = split_outputs(config.variant(variant), workdir, variant)
    figures = per_level.figures(scoring.labels.get(variant, variant), variant, seen, scoring)
    page = levels_page.page(figures, _source(stage, workdir, scoring.resamples))
    return _finish(stage, figures, page, {split: len(values.tokens) for split, values in seen.items()})


def split_outputs(config: Config, workdir: Workdir, variant: str) -> dict[str, per_level.DecoderOutputs]:
    """Returns split -> outputs of the decoder for all photos of the split, for every evaluated split.

    Splits whose names begin with "test" come first.

    config: configuration with the variant's changes applied. variant: name of the decoder's folder.
    """
    model = workdir.decoder(variant, config.model)
    compiled, options, photos = nnx.jit(per_level.decoder_outputs), model.settings, workdir.query_counts
    seen = {}
    with Progress("audit levels", sum(photos.values()), "photos") as progress:

        def counted(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for batch in batches:
                yield batch
                progress.add(int(batch["valid"].sum()))

        for split in sorted(photos, key=lambda name: (not name.startswith("test"), name)):
            table, read = workdir.table(split), workdir.tokens(split, options, workdir.gallery)
            batches = counted(pipeline.evaluation(len(table), read, config.predict.batch_size))
            seen[split] = per_level.split_outputs(lambda batch: compiled(model, batch), options.cells, batches, table)
    return seen


def _source(stage: Stage, workdir: Workdir, resamples: int) -> Source:
    return Source({folder: workdir.manifest(folder) for folder in stage.inputs}, resamples)


def _finish(stage: Stage, figures: Mapping[str, Any], page: str, counts: Mapping[str, int]) -> Manifest:
    write_json(stage.path / "figures.json", figures)
    write_bytes(stage.path / "index.html", page.encode())
    return stage.finish(counts)
