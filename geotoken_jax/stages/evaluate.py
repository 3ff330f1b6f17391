"""`geotoken evaluate`: scores every variant's predictions on every split, and writes report/."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from geotoken_jax import records, settings, workdir
from geotoken_jax.analysis import evaluate, examples, overlap, training
from geotoken_jax.analysis.evaluate import EvaluateSettings
from geotoken_jax.analysis.examples import Examples
from geotoken_jax.analysis.points import Method, Points, in_order, methods_of, read_points, read_truth
from geotoken_jax.gallery.table import Table
from geotoken_jax.pages import report as report_page
from geotoken_jax.pages.photos import NEIGHBORS
from geotoken_jax.workdir import Manifest


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes report/metrics.json and report/index.html, again and whole if there are predictions that an earlier report
    did not have. Raises StageError if the reference has no predictions."""
    path = epath.Path(path)
    options = settings.read(EvaluateSettings, config.evaluate, "evaluate")
    folders = predicted(path, options)
    for name in ("manifest.json", "begun.json"):
        earlier = path / "report" / name
        if earlier.exists() and not set(folders) <= json.loads(earlier.read_text())["inputs"].keys():
            earlier.unlink()
    leakage = settings.read(overlap.OverlapSettings, config.audit.leakage, "audit.leakage")
    made_with = {"name": config.name, "evaluate": options, "audit": {"leakage": leakage}}
    stage = workdir.begin(path, "report", made_with, ["photos", "gallery", "queries", *folders])
    if stage.manifest:
        return stage.manifest
    truths, methods = read_predictions(path, folders, options)
    known = overlap.find(path, truths, leakage.cosine_above)
    metrics = evaluate.score_splits(truths, methods, known, options) | {"cosine_above": leakage.cosine_above}
    workdir.write_json(stage.path / "metrics.json", metrics)
    page = report_page.page(_report(path, config.name, metrics, truths, methods, options))
    workdir.write_bytes(stage.path / "index.html", page.encode())
    return stage.finish({"variants": len(folders), **{split: len(truth.ids) for split, truth in truths.items()}})


def predicted(path: epath.Path, options: EvaluateSettings) -> list[str]:
    """Returns the folders of predictions. Raises StageError if the reference is not among them."""
    folder = path / "predictions"
    variants = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    if options.reference not in variants:
        raise workdir.StageError(
            f"config.evaluate.reference is {options.reference!r}, and {folder} holds "
            f"{', '.join(variants) or 'nothing'}: run `geotoken predict` for it first, or name one that is there"
        )
    return [f"predictions/{variant}" for variant in variants]


def read_predictions(
    path: epath.Path, folders: Sequence[str], options: EvaluateSettings
) -> tuple[dict[str, Points], dict[str, list[Method]]]:
    """Returns truth and methods by split, in the order to show: splits whose names begin with test come first.

    `extra` of the truth holds the author and the place names.
    """
    files = {(file.stem, file.parent.name): file for folder in folders for file in (path / folder).glob("*.jsonl")}
    truths, methods = {}, {}
    for split in sorted({split for split, _ in files}, key=lambda name: (not name.startswith("test"), name)):
        truth = truths[split] = read_truth(path, split)
        found = []
        for variant in (folder.split("/")[1] for folder in folders):
            if (split, variant) in files:
                points = read_points(files[split, variant])
                found += methods_of(points, truth, variant, options.labels.get(variant, variant), options.earth)
        methods[split] = in_order(found, options.reference)
    return truths, methods


def gallery(path: epath.Path, wanted: Sequence[str], split: str = "train") -> examples.Gallery:
    """Returns the photos of a split by id: of the gallery's, or of a split's that is asked about.

    wanted: ids of the photos that are shown.
    """
    folder = "gallery" if split == "train" else f"queries/{split}"
    return examples.Gallery(records.Photos(path / "photos", split), Table(path / folder), wanted)


def _report(
    path: epath.Path,
    name: str,
    metrics: Mapping[str, Any],
    truths: Mapping[str, Points],
    methods: Mapping[str, Sequence[Method]],
    options: EvaluateSettings,
) -> report_page.Report:
    photos = {split: records.Photos(path / "photos", split) for split in truths}
    split = report_page.first_split(truths)
    shown = _examples(path, split, photos[split], methods[split], options.reference)
    rows = shown.predictions.values() if shown else ()
    neighbors = [n["id"] for row in rows for n in row.get("neighbors", ())[:NEIGHBORS]]
    folders = [file.parent for pattern in ("*", "*/*") for file in sorted(path.glob(f"{pattern}/manifest.json"))]
    names = [folder.relative_to(path).as_posix() for folder in folders]
    made = [folder for folder in names if folder.split("/")[0] not in ("report", "audit")]
    return report_page.Report(
        name=name,
        reference=options.reference,
        seed=options.seed,
        metrics=metrics,
        truths=truths,
        methods=methods,
        photos=photos,
        examples=shown,
        gallery=gallery(path, neighbors),
        losses=_losses(path, options.labels),
        manifests={folder: workdir.read_manifest(path, folder) for folder in made},
    )


def _examples(
    path: epath.Path, split: str, photos: records.Photos, methods: Sequence[Method], reference: str
) -> Examples | None:
    method = next((m for m in methods if m.main and m.variant == reference), None)
    if method is None:
        return None
    kinds = {kind: [photos[int(row)] for row in rows] for kind, rows in examples.ranked(method).items()}
    wanted = {photo["id"] for shown in kinds.values() for photo in shown}
    lines = (path / "predictions" / reference / f"{split}.jsonl").read_text().split("\n")
    rows = (json.loads(line) for line in lines if line.strip())
    return Examples(split, method.name, kinds, {row["id"]: row for row in rows if row["id"] in wanted})


def _losses(path: epath.Path, labels: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Returns the losses of every model that kept its metrics, by the name that people read."""
    found = []
    for file in [path / "align" / "metrics.jsonl", *sorted((path / "geotoken").glob("*/metrics.jsonl"))]:
        curves = training.curves(file.read_text()) if file.exists() else {}
        if curves:
            name = "Alignment" if file.parent.name == "align" else labels.get(file.parent.name, file.parent.name)
            found.append((name, curves))
    return found
