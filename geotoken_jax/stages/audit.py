"""`geotoken audit`: makes one audit of a work directory. audit/NAME/ holds figures.json and index.html."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from scipy.spatial import KDTree

from geotoken_jax import records, settings, workdir
from geotoken_jax.analysis import audit, coverage, leakage, neighbor_gap, overlap, per_level
from geotoken_jax.backbone import views
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo import distance
from geotoken_jax.pages import coverage as coverage_page
from geotoken_jax.pages import leakage as leakage_page
from geotoken_jax.pages import levels as levels_page
from geotoken_jax.pages import neighbors as neighbors_page
from geotoken_jax.pages.frame import Source
from geotoken_jax.progress import Progress
from geotoken_jax.stages import evaluate
from geotoken_jax.workdir import Manifest, Stage

#: Name of an audit -> figures as text.
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "coverage": coverage.table,
    "leakage": leakage.table,
    "neighbors": neighbor_gap.table,
    "levels": per_level.table,
}


def run(config: Any, path: epath.PathLike, name: str) -> Manifest:
    """Makes audit/NAME/. Raises StageError if the split whose regions are left out has no predictions."""
    makers = {"coverage": _coverage, "leakage": _leakage, "neighbors": _neighbors, "levels": _levels}
    return makers[name](config, epath.Path(path))


def _coverage(config: Any, path: epath.Path) -> Manifest:
    options, scoring = audit.read(config)
    folders = evaluate.predicted(path, scoring)
    split, splits = options.coverage.split, sorted({f.stem for name in folders for f in (path / name).glob("*.jsonl")})
    if split not in splits:
        raise workdir.StageError(
            f"config.audit.coverage.split is {split!r}, and {path / 'predictions'} has {', '.join(splits)}: "
            "name one of these"
        )
    inputs = ["photos", "gallery", "queries", "neighbors", f"geotoken/{scoring.reference}", *folders]
    made_with = {"name": config.name, "audit": {"coverage": options.coverage}, "evaluate": scoring}
    stage = workdir.begin(path, "audit/coverage", made_with, inputs)
    if stage.manifest:
        return stage.manifest
    truths, methods = evaluate.read_predictions(path, folders, scoring)
    gallery = Table(path / "gallery")
    tree = KDTree(distance.to_unit_vectors(*gallery.coordinates().T))
    file = stage.path / "regions.npy"
    if not file.exists():
        records.save_array(file, coverage.gallery_regions(records.Photos(path / "photos", "train"), gallery))
    regions = records.open_array(file)
    asked = {name: coverage.asked(truth, methods[name], tree, gallery, regions) for name, truth in truths.items()}
    row_of = overlap.match(overlap.encoded(truths[split].ids), Table(path / "queries" / split).ids())
    answer = _masked(config, stage, path, scoring.reference, split)
    masked = coverage.mask(split, asked[split], regions, row_of, options.coverage.countries, answer, scoring)
    figures = coverage.figures(asked, gallery, regions, masked, options.coverage.level, scoring)
    maps = coverage.maps(figures, gallery, asked[split], scoring.reference)
    page = coverage_page.page(figures, maps, scoring.reference, _source(stage, path, scoring.resamples))
    counts = {"regions": len(masked["regions"]), **{name: len(truth.ids) for name, truth in truths.items()}}
    return _finish(stage, figures, page, counts)


def _masked(config: Any, stage: Stage, path: epath.Path, variant: str, split: str) -> coverage.Answer:
    """Returns what answers without a region. Its answers are kept as masked-NUMBER.npy, so that an interrupted audit
    goes on with the next region."""
    from geotoken_jax.analysis.masking import Masked  # and jax with it

    opened: list[Masked] = []

    def answer(number: int, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        file = stage.path / f"masked-{number:03d}.npy"
        if not file.exists():
            opened[:] = opened or [Masked(config, path, variant, split)]
            records.save_array(file, opened[0](rows, kept))
        return records.open_array(file)

    return answer


def _leakage(config: Any, path: epath.Path) -> Manifest:
    options, scoring = audit.read(config)
    above = options.leakage.cosine_above
    folders = evaluate.predicted(path, scoring)
    made_with = {"name": config.name, "audit": {"leakage": options.leakage}, "evaluate": scoring}
    stage = workdir.begin(path, "audit/leakage", made_with, ["photos", "gallery", "queries", *folders])
    if stage.manifest:
        return stage.manifest
    truths, methods = evaluate.read_predictions(path, folders, scoring)
    found = overlap.find(path, truths, above)
    figures = leakage.figures(truths, methods, found, Table(path / "gallery"), above, scoring)
    pairs = {
        s: [pair for kind in of["kinds"].values() for pair in kind["pairs"]] for s, of in figures["splits"].items()
    }
    photos = {s: evaluate.gallery(path, [pair["photo"] for pair in listed], s) for s, listed in pairs.items()}
    gallery = evaluate.gallery(path, [pair["gallery"] for listed in pairs.values() for pair in listed])
    source = _source(stage, path, scoring.resamples)
    worst = leakage.worst_kinds(truths, found)
    page = leakage_page.page(figures, worst, photos, gallery, scoring.reference, source)
    return _finish(stage, figures, page, {f"leaked of {split}": int(found[split].leaked().sum()) for split in truths})


def _neighbors(config: Any, path: epath.Path) -> Manifest:
    _, scoring = audit.read(config)
    made_with = {"name": config.name, "evaluate": scoring}
    stage = workdir.begin(path, "audit/neighbors", made_with, ["gallery", "queries", "neighbors"])
    if stage.manifest:
        return stage.manifest
    manifest, gallery = workdir.read_manifest(path, "neighbors"), Table(path / "gallery")
    # Splits that are trained on come first, then what evaluation is used to show first.
    order = sorted(
        manifest.counts, key=lambda split: (split not in (views.OF, views.SPLIT), split != "validation", split)
    )
    found = []
    for split in order:
        own = gallery if split == views.OF else Table(path / "queries" / split)
        rows, scores = (records.open_array(path / "neighbors" / f"{split}.{of}.npy") for of in ("rows", "scores"))
        found.append(neighbor_gap.sample(split, own, gallery, (rows, scores), scoring.seed))
    figures = neighbor_gap.figures(found, manifest.settings["index"]["neighbors"], scoring)
    page = neighbors_page.page(figures, found, _source(stage, path, scoring.resamples))
    return _finish(stage, figures, page, {near.split: len(near.km) for near in found})


def _levels(config: Any, path: epath.Path) -> Manifest:
    _, scoring = audit.read(config)
    variant = scoring.reference
    changed = settings.variant(config, variant)
    inputs = ["queries", "gallery", "tokens", f"geotoken/{variant}"]
    stage = workdir.begin(path, "audit/levels", {"name": config.name, "evaluate": scoring}, inputs)
    if stage.manifest:
        return stage.manifest
    seen = see(changed, path, variant)
    figures = per_level.figures(scoring.labels.get(variant, variant), variant, seen, scoring)
    page = levels_page.page(figures, _source(stage, path, scoring.resamples))
    return _finish(stage, figures, page, {split: len(of.tokens) for split, of in seen.items()})


def see(config: Any, path: epath.Path, variant: str) -> dict[str, per_level.Seen]:
    """Returns what a variant's decoder makes of every photo of every evaluated split; splits whose names begin with
    test come first. config: the variant's."""
    from flax import nnx

    from geotoken_jax import checkpoint
    from geotoken_jax.data import pipeline
    from geotoken_jax.data.join import Tokens
    from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
    from geotoken_jax.predict import stage
    from geotoken_jax.predict.decode import PredictSettings

    options = settings.read(ModelSettings, config.model, "model")
    batch_size = settings.read(PredictSettings, config.predict, "predict").batch_size
    file = path / "geotoken" / variant / "parameters.safetensors"
    model = checkpoint.read_module(file, lambda rngs: GeoTokenModel(options, rngs))
    compiled = nnx.jit(per_level.look)
    layout = records.token_layout(workdir.read_manifest(path, "tokens").facts["neighbors"])
    gallery, asked = Table(path / "gallery"), stage.asked(path)
    seen = {}
    with Progress("audit levels", sum(asked.values()), "photos") as progress:

        def counted(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for batch in batches:
                yield batch
                progress.add(int(batch["valid"].sum()))

        for split in sorted(asked, key=lambda name: (not name.startswith("test"), name)):
            own = Table(path / "queries" / split)
            tokens = records.Records(path / "tokens", split, layout)
            read = Tokens(tokens, own, gallery, options.cells, options.neighbors, options.times)
            batches = counted(pipeline.evaluation(len(own), read, batch_size))
            seen[split] = per_level.see(lambda batch: compiled(model, batch), options.cells, batches, own)
    return seen


def _source(stage: Stage, path: epath.Path, resamples: int) -> Source:
    return Source({folder: workdir.read_manifest(path, folder) for folder in stage.inputs}, resamples)


def _finish(stage: Stage, figures: Mapping[str, Any], page: str, counts: Mapping[str, int]) -> Manifest:
    workdir.write_json(stage.path / "figures.json", figures)
    workdir.write_bytes(stage.path / "index.html", page.encode())
    return stage.finish(counts)
