"""`geotoken evaluate`: scores the predictions of all variants on all splits and writes report/."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from geotoken_jax import records
from geotoken_jax.analysis import evaluate, examples, overlap, training
from geotoken_jax.analysis.coordinates import (
    CoordinateTable,
    Method,
    in_order,
    methods_of,
    read_coordinates,
    read_truth,
)
from geotoken_jax.analysis.examples import Examples
from geotoken_jax.configuration import Config, EvaluateSettings
from geotoken_jax.manifests import Manifest, StageError, write_bytes, write_json
from geotoken_jax.pages import report as report_page
from geotoken_jax.pages.photos import NEIGHBORS
from geotoken_jax.workdir import GALLERY, Workdir


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Scores all predictions and writes report/metrics.json and report/index.html.

    A finished report is replaced if predictions of further variants exist by now. Raises StageError if
    config.evaluate.reference has no predictions.
    """
    folders = [*predicted(config, workdir), *workdir.excluded_folders()]
    for name in ("manifest.json", "begun.json"):
        earlier = workdir.path / "report" / name
        if earlier.exists() and not set(folders) <= json.loads(earlier.read_text())["inputs"].keys():
            earlier.unlink()
    keys, inputs = ["name", "evaluate", "audit.leakage"], ["photos", "gallery", "queries", *folders]
    stage = workdir.begin(config, "report", keys, inputs)
    if stage.manifest:
        return [stage.manifest]
    options, above = config.evaluate, config.audit.leakage.cosine_above
    truths, methods = read_predictions(workdir, options)
    overlaps = overlap.find_leaks(workdir, truths, above)
    files = {split: workdir.recall_file(options.reference, split) for split in truths}
    recall = {split: json.loads(file.read_text()) for split, file in files.items() if file.exists()}
    metrics = evaluate.score_splits(truths, methods, overlaps, options) | {"cosine_above": above, "recall": recall}
    for benchmark, facts in workdir.exclusion_facts().items():
        metrics["splits"][benchmark]["exclusion"] = _exclusion(workdir, benchmark, facts, truths, methods, options)
    write_json(stage.path / "metrics.json", metrics)
    page = report_page.page(_report(workdir, config.name, metrics, truths, methods, options))
    write_bytes(stage.path / "index.html", page.encode())
    return [stage.finish({"variants": len(folders), **{split: len(truth.ids) for split, truth in truths.items()}})]


def predicted(config: Config, workdir: Workdir) -> list[str]:
    """Returns the folders predictions/VARIANT. Raises StageError if the reference variant has none."""
    variants = workdir.predicted_variants()
    if config.evaluate.reference not in variants:
        raise StageError(
            f"config.evaluate.reference is {config.evaluate.reference!r}, but {workdir.path / 'predictions'} has "
            f"{', '.join(variants) or 'no predictions'}: run `geotoken predict` for it first, or set the key to a "
            "variant that has predictions"
        )
    return [f"predictions/{variant}" for variant in variants]


def read_predictions(
    workdir: Workdir, options: EvaluateSettings
) -> tuple[dict[str, CoordinateTable], dict[str, list[Method]]]:
    """Returns the true coordinates and the methods to score, for every split in display order.

    Splits whose names begin with "test" come first. The truth's `extra` contains the author and the place names.
    """
    truths, methods = {}, {}
    for split in sorted(workdir.query_counts, key=lambda name: (not name.startswith("test"), name)):
        truth = truths[split] = read_truth(workdir, split)
        methods[split] = in_order(_methods(workdir, split, truth, options), options.reference)
    return truths, methods


def _methods(workdir: Workdir, split: str, truth: CoordinateTable, options: EvaluateSettings) -> list[Method]:
    """Returns the methods of all variants that have predictions for a split.

    truth: true coordinates of the split's photos.
    """
    listed = []
    for variant in workdir.predicted_variants():
        if (file := workdir.predictions_file(variant, split)).exists():
            label = options.labels.get(variant, variant)
            listed += methods_of(read_coordinates(file), truth, variant, label, options.earth)
    return listed


def _exclusion(
    workdir: Workdir,
    benchmark: str,
    facts: Mapping[str, Any],
    truths: Mapping[str, CoordinateTable],
    methods: Mapping[str, Sequence[Method]],
    options: EvaluateSettings,
) -> dict[str, Any]:
    """Returns the entry `exclusion` of a benchmark in metrics.json: the scores with and without each set of rules.

    facts: entry of the benchmark in the manifest of exclusion/, which is copied into the result.
    """
    truth = truths[benchmark]
    under = {
        rules: _methods(workdir, workdir.split_under(benchmark, rules), truth, options) for rules in facts["rules"]
    }
    return {**facts, "methods": evaluate.score_exclusion(methods[benchmark], under, truth, options)}


def gallery(workdir: Workdir, wanted: Sequence[str], split: str = GALLERY) -> examples.PhotoLookup:
    """Returns a lookup of photos by id, to show them on a page.

    wanted: ids of the photos to show. split: split that contains these photos, by default the split in the gallery.
    """
    return examples.PhotoLookup(workdir.photos(split), workdir.table(split), wanted)


def _report(
    workdir: Workdir,
    name: str,
    metrics: Mapping[str, Any],
    truths: Mapping[str, CoordinateTable],
    methods: Mapping[str, Sequence[Method]],
    options: EvaluateSettings,
) -> report_page.Report:
    photos = {split: workdir.photos(split) for split in truths}
    split = report_page.first_split(truths)
    shown = _examples(workdir, split, photos[split], methods[split], options.reference)
    rows = shown.predictions.values() if shown else ()
    neighbors = [n["id"] for row in rows for n in row.get("neighbors", ())[:NEIGHBORS]]
    folders = [folder for folder in workdir.complete_folders() if folder.split("/")[0] not in ("report", "audit")]
    return report_page.Report(
        name=name,
        reference=options.reference,
        seed=options.seed,
        metrics=metrics,
        truths=truths,
        methods=methods,
        photos=photos,
        examples=shown,
        gallery=gallery(workdir, neighbors),
        losses=_losses(workdir, options.labels),
        manifests={folder: workdir.manifest(folder) for folder in folders},
    )


def _examples(
    workdir: Workdir, split: str, photos: records.Photos, methods: Sequence[Method], reference: str
) -> Examples | None:
    method = next((m for m in methods if m.main and m.variant == reference), None)
    if method is None:
        return None
    kinds = {kind: [photos[int(row)] for row in rows] for kind, rows in examples.ranked(method).items()}
    wanted = {photo["id"] for shown in kinds.values() for photo in shown}
    lines = workdir.predictions_file(reference, split).read_text().split("\n")
    rows = (json.loads(line) for line in lines if line.strip())
    return Examples(split, method.name, kinds, {row["id"]: row for row in rows if row["id"] in wanted})


def _losses(workdir: Workdir, labels: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Returns display name and training curves of every model that has a metrics log."""
    losses = []
    for file in workdir.training_logs():
        curves = training.curves(file.read_text()) if file.exists() else {}
        if curves:
            name = "Alignment" if file.parent.name == "align" else labels.get(file.parent.name, file.parent.name)
            losses.append((name, curves))
    return losses
