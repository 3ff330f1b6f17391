"""The stage `predict`: candidates and choice of every photo of every split, as JSON lines."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax import records
from geotoken_jax.artifacts import VALIDATION, Workdir, needed
from geotoken_jax.configuration import Config
from geotoken_jax.data import pipeline
from geotoken_jax.gallery.table import Table
from geotoken_jax.predict.answer import Answerer, calibrate, with_radii
from geotoken_jax.predict.judge import Judge
from geotoken_jax.predict.pool import PlaceDistribution, Pool
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.select import log_probability
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError
from geotoken_jax.workdir import Manifest, write_bytes, write_json


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Makes predictions/VARIANT/SPLIT.jsonl for every split that has a table under queries/, but views.

    Beside them is calibration.json, what their radii are made with: fitted to the answers for validation. Without that
    split there is none, radii are the model's own, and the manifest says so.
    """
    own, folder = config.variant(variant), f"predictions/{variant}"
    keys = ["predict", "judge"] if own.judge.base_url else ["predict"]
    inputs = ["tokens", f"geotoken/{variant}", *(f"{name}/{variant}" for name in needed(own.predict))]
    stage = workdir.begin(config, folder, keys, inputs)
    if stage.manifest:
        return [stage.manifest]
    answerer, counts = workdir.answerer(own, variant), workdir.query_counts
    calibrated = bool(own.predict.search.expansions) and VALIDATION in counts
    judges = _judges(own, stage.path, counts)
    with Progress(f"predict {variant}", sum(counts.values()), "photos") as progress:
        for split in sorted(counts, key=lambda name: name != VALIDATION):
            file = workdir.answers(variant, split)
            if file.exists():
                progress.add(counts[split])
                continue
            found = _answered(answerer, workdir, split, judges.get(split), progress)
            if calibrated and split == VALIDATION:
                found = list(found)
                calibrate(found, workdir.table(split).coordinates()).save(workdir.calibration_file(variant))
            calibration = workdir.calibration(variant)
            answers = [answer for part in found for answer in with_radii(*part, calibration)]
            if judge := judges.get(split):
                write_json(stage.path / "judge" / f"{split}.json", judge.report())
            write(file, zip(workdir.table(split).ids(), answers, strict=True))
    return [stage.finish(counts, calibrated=calibrated)]


def _judges(config: Config, folder: epath.Path, counts: dict[str, int]) -> dict[str, Judge]:
    """Returns the judge of each split that config.judge has one for: none where the greedy candidate is alone."""
    options = config.judge
    if not options.base_url or not config.predict.samples:
        return {}
    if unknown := sorted(set(options.splits) - set(counts)):
        raise SettingsError(f"config.judge.splits has {unknown[0]!r}: choose among {', '.join(counts)}")
    return {split: Judge(options, folder / "judge" / f"{split}.jsonl") for split in options.splits}


def _answered(
    answerer: Answerer, workdir: Workdir, split: str, judge: Judge | None, progress: Progress
) -> Iterator[tuple[list[Prediction], PlaceDistribution | None]]:
    """Yields the answers of one split in batches, without radii, and the model's distribution over places."""
    decoder, own = answerer.decoder, workdir.table(split)
    read = workdir.tokens(split, decoder.model, decoder.gallery)
    near, scores = workdir.neighbors(split, decoder.neighbors)
    excluded, size = workdir.exclusions(split), decoder.settings.batch_size
    images = _images(workdir.photos(split), own) if judge else iter(())
    for number, batch in enumerate(pipeline.evaluation(len(own), read, size)):
        rows = np.arange(number * size, number * size + int(batch["valid"].sum()))
        real = {name: values[: len(rows)] for name, values in batch.items()}
        ids = [photo.decode() for photo in own.ids(rows)]

        def judged(pool: Pool, ids: list[str] = ids) -> Any:
            assert judge
            return judge(ids, [next(images) for _ in ids], pool, log_probability(pool))

        others = {"judge": judged} if judge else {}
        yield answerer(real, near[rows], scores[rows], rows, others, excluded(rows))
        progress.add(len(rows))


def _images(photos: records.Photos, own: Table) -> Iterator[bytes]:
    """Yields the encoded files of the photos that a table holds, in its order, which is that of photos/."""
    every = (photos[row] for row in range(len(photos)))
    for wanted in own.ids():
        yield next(photo["image"] for photo in every if photo["id"] == wanted.decode())


def write(file: epath.Path, answers: Iterable[tuple[bytes, Prediction]]) -> None:
    """Writes the answers of photos as JSON lines, whole or not at all. answers: pairs of an id and its answer."""
    lines = ({"id": photo.decode(), **answer.plain()} for photo, answer in answers)
    write_bytes(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
