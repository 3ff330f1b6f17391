"""The stage `predict`: writes the predictions of all evaluated splits as JSON lines."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from geotoken_jax import disk
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, write_bytes, write_json
from geotoken_jax.predict.answer import Answerer, calibrate, with_radii
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.rerank import Recall, folds
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import VALIDATION, Workdir, trained_selectors


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Writes predictions/VARIANT/SPLIT.jsonl for every split with a table in queries/, except augmented views.

    Radii are calibrated with calibration.json, which is fitted to the predictions of the validation split. Without a
    validation split there is no such file: radii are uncalibrated and the manifest has `calibrated` false. If
    config.predict.search.expansions is 0 and the reranker does not choose the answer, predictions have no radii.
    """
    variant_config, folder = config.variant(variant), f"predictions/{variant}"
    inputs = [
        "tokens",
        f"geotoken/{variant}",
        *(f"{name}/{variant}" for name in trained_selectors(variant_config.predict)),
    ]
    stage = workdir.begin(config, folder, ["predict"], inputs)
    if stage.manifest:
        return [stage.manifest]
    answerer, counts = workdir.answerer(variant_config, variant), workdir.query_counts
    with Progress(f"predict {variant}", sum(counts.values()), "photos") as progress:
        for split in sorted(counts, key=lambda name: name != VALIDATION):
            file = workdir.predictions_file(variant, split)
            if file.exists():
                progress.add(counts[split])
                continue
            answers, recall = _answers(workdir, answerer, variant, split, progress)
            if recall.photos:
                write_json(workdir.recall_file(variant, split), recall.shares())
            write(file, zip(workdir.table(split).ids(), answers, strict=True))
    return [stage.finish(counts, calibrated=workdir.calibration_file(variant).exists())]


def run_excluded(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Predicts the benchmarks again with the neighbors in exclusion/.

    Writes excluded/VARIANT/BENCHMARK-RULES.jsonl for every benchmark and set of rules in exclusion/. The radii are
    calibrated with the calibration of predictions/VARIANT. Returns an empty list if exclusion/ is missing.
    """
    counts = workdir.counts_under_rules
    if not counts:
        return []
    stage = workdir.begin(config, f"excluded/{variant}", ["predict"], ["exclusion", f"predictions/{variant}"])
    if stage.manifest:
        return [stage.manifest]
    answerer = workdir.answerer(config.variant(variant), variant)
    with Progress(f"predict {variant}, with exclusion", sum(counts.values()), "photos") as progress:
        for split, photos in counts.items():
            file = workdir.predictions_file(variant, split)
            if file.exists():
                progress.add(photos)
            else:
                answers, _ = _answers(workdir, answerer, variant, split, progress)
                write(file, zip(workdir.table(split).ids(), answers, strict=True))
    return [stage.finish(counts)]


def _answers(
    workdir: Workdir, answerer: Answerer, variant: str, split: str, progress: Progress
) -> tuple[list[Prediction], Recall]:
    """Returns the predictions for a split's photos, and the recall of the reranker's candidates.

    The radii are calibrated on the answers for the validation photos. A reranker, if there is one, was fitted to these
    photos as well. Each of them is therefore ranked by the reranker that was fitted without the photo's fold.
    """
    table, recall = workdir.table(split), Recall()
    calibrates = split == VALIDATION
    count = len(disk.matching(workdir.path / "reranker" / variant, "fold-*.safetensors"))
    fold = folds(table.authors(), table.ids(), count) if calibrates and count else None
    calibration, waiting, predictions = workdir.calibration(variant), [], []
    for pool, rows, *found in decoded(workdir, answerer.decoder, split, np.arange(len(table))):
        answers = answerer(pool if fold is None else pool._replace(fold=fold[rows]), *found)
        recall.add(answers.ranking, table.coordinates(rows))
        if calibrates and answers.distribution is not None:
            waiting.append(answers._replace(ranking=None))
        else:
            predictions += with_radii(answers.predictions, answers.distribution, calibration)
        progress.add(len(rows))
    if waiting:
        calibration = calibrate(waiting, table.coordinates())
        calibration.save(workdir.calibration_file(variant))
        predictions = [p for a in waiting for p in with_radii(a.predictions, a.distribution, calibration)]
    return predictions, recall


def decoded(
    workdir: Workdir, decoder: Decoder, split: str, rows: Int[np.ndarray, " n"]
) -> Iterator[tuple[Pool, Int[np.ndarray, " b"], Int[np.ndarray, "b M"], Float[np.ndarray, "b M"]]]:
    """Decodes photos of a split, and yields four items per batch.

    The items are the pool, the rows of the batch's photos in the split's table, and the gallery rows and scores of
    their neighbors. rows: rows of all photos in the split's table.
    """
    read = workdir.tokens(split, decoder.model, decoder.gallery)
    neighbors, scores = workdir.neighbors(split, decoder.neighbors)
    excluded, size = workdir.exclusions(split), decoder.settings.batch_size
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        found = neighbors[some], scores[some]
        # Every photo has number 0, as in an export, so that both draw the same samples.
        yield decoder(read(some), *found, np.zeros(len(some), np.int64))._replace(exclude=excluded(some)), some, *found


def write(file: epath.Path, answers: Iterable[tuple[bytes, Prediction]]) -> None:
    """Writes predictions as JSON lines, atomically. answers: pairs of photo id and prediction."""
    lines = ({"id": photo.decode(), **answer.plain()} for photo, answer in answers)
    write_bytes(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
