"""The stage `predict`: writes the predictions of all evaluated splits as JSON lines."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from geotoken_jax.configuration import Config
from geotoken_jax.data import pipeline
from geotoken_jax.manifests import Manifest, write_bytes
from geotoken_jax.predict.answer import Answerer, calibrate, with_radii
from geotoken_jax.predict.pool import PlaceDistribution
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import VALIDATION, Workdir, selector_folders


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Writes predictions/VARIANT/SPLIT.jsonl for every split with a table in queries/, except augmented views.

    Radii are calibrated with calibration.json, which is fitted to the predictions of the validation split. Without a
    validation split there is no such file: radii are uncalibrated and the manifest has `calibrated` false. If
    config.predict.search.expansions is 0, predictions have no radii.
    """
    variant_config, folder = config.variant(variant), f"predictions/{variant}"
    inputs = [
        "tokens",
        f"geotoken/{variant}",
        *(f"{name}/{variant}" for name in selector_folders(variant_config.predict)),
    ]
    stage = workdir.begin(config, folder, ["predict"], inputs)
    if stage.manifest:
        return [stage.manifest]
    answerer, counts = workdir.answerer(variant_config, variant), workdir.query_counts
    calibrated = bool(variant_config.predict.search.expansions) and VALIDATION in counts
    with Progress(f"predict {variant}", sum(counts.values()), "photos") as progress:
        for split in sorted(counts, key=lambda name: name != VALIDATION):
            file = workdir.predictions_file(variant, split)
            if file.exists():
                progress.add(counts[split])
                continue
            batches = _predictions(answerer, workdir, split, progress)
            if calibrated and split == VALIDATION:
                batches = list(batches)
                calibrate(batches, workdir.table(split).coordinates()).save(workdir.calibration_file(variant))
            calibration = workdir.calibration(variant)
            answers = [answer for batch in batches for answer in with_radii(*batch, calibration)]
            write(file, zip(workdir.table(split).ids(), answers, strict=True))
    return [stage.finish(counts, calibrated=calibrated)]


def _predictions(
    answerer: Answerer, workdir: Workdir, split: str, progress: Progress
) -> Iterator[tuple[list[Prediction], PlaceDistribution | None]]:
    """Yields, per batch of a split, the predictions without radii and the model's distribution over cells."""
    decoder, table = answerer.decoder, workdir.table(split)
    read = workdir.tokens(split, decoder.model, decoder.gallery)
    neighbors, scores = workdir.neighbors(split, decoder.neighbors)
    excluded, size = workdir.exclusions(split), decoder.settings.batch_size
    for number, batch in enumerate(pipeline.evaluation(len(table), read, size)):
        rows = np.arange(number * size, number * size + int(batch["valid"].sum()))
        real = {name: values[: len(rows)] for name, values in batch.items()}
        yield answerer(real, neighbors[rows], scores[rows], rows, excluded(rows))
        progress.add(len(rows))


def write(file: epath.Path, answers: Iterable[tuple[bytes, Prediction]]) -> None:
    """Writes predictions as JSON lines, atomically. answers: pairs of photo id and prediction."""
    lines = ({"id": photo.decode(), **answer.plain()} for photo, answer in answers)
    write_bytes(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
