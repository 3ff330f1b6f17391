"""The judge of `geotoken predict`: a multimodal language model that gives new answers after a variant's predictions."""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, write_json
from geotoken_jax.predict.judge import Judge, Question
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.progress import Progress
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages.predict import write
from geotoken_jax.workdir import Workdir

#: Photos that are in memory at a time.
_BATCH = 64


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Writes predictions/VARIANT_judge/SPLIT.jsonl for config.judge.splits, from the predictions of a variant.

    A photo that is not judged, or that gets no usable reply, keeps the variant's answer. Does nothing if
    config.judge.base_url is empty. Raises SettingsError if config.judge.splits contains a split without predictions.
    """
    options, inputs, folder = config.variant(variant).judge, [f"predictions/{variant}"], f"predictions/{variant}_judge"
    if not options.base_url:
        return []
    counts = workdir.query_counts
    if unknown := sorted(set(options.splits) - set(counts)):
        raise SettingsError(f"config.judge.splits contains {unknown[0]!r}: choose among {', '.join(counts)}")
    wanted = {split: min(options.photos or counts[split], counts[split]) for split in options.splits}
    begin = functools.partial(workdir.begin, config, folder, [], inputs, config.variant(variant).select("judge"))
    stage = begin()
    if stage.manifest and all(stage.manifest.counts[split] >= photos for split, photos in wanted.items()):
        return [stage.manifest]
    if stage.manifest:  # more photos are wanted: reopen the folder, with its replies and its recorded settings
        (stage.path / "manifest.json").replace(stage.path / "begun.json")
        stage = begin()
    with Progress(f"judge {variant}", sum(wanted.values()), "photos") as progress:
        for split, photos in wanted.items():
            lines = workdir.predictions_file(variant, split).read_text().splitlines()
            rows = {row["id"]: row for row in map(json.loads, lines)}
            judge = Judge(options, stage.path / "judge" / f"{split}.jsonl")
            drawn = set(np.random.default_rng(0).permutation(np.array(list(rows)))[:photos].tolist())
            judged = {name: row for name, row in rows.items() if name in drawn}
            places = dict(_places(judge, workdir, split, judged, progress))
            write_json(stage.path / "judge" / f"{split}.json", judge.report())
            answers = ((name.encode(), _answer(row, places.get(name))) for name, row in rows.items())
            write(workdir.predictions_file(f"{variant}_judge", split), answers)
    return [stage.finish(wanted)]


def _places(
    judge: Judge, workdir: Workdir, split: str, rows: Mapping[str, Mapping[str, Any]], progress: Progress
) -> Iterator[tuple[str, list[float] | None]]:
    """Yields the id of each photo in `rows`, with the coordinates that the judge answered; None without an answer.

    photos/ is read once, from front to back.
    """
    photos, batch = workdir.photos(split), []
    for number in range(len(photos)):
        photo = photos[number]
        if photo["id"] in rows:
            batch.append(_question(rows[photo["id"]], photo["image"]))
        if len(batch) == _BATCH or (batch and number == len(photos) - 1):
            yield from zip((question.id for question in batch), judge(batch), strict=True)
            progress.add(len(batch))
            batch = []


def _question(row: Mapping[str, Any], photo: bytes) -> Question:
    """Returns the question about a photo. row: a line of the variant's predictions."""
    candidates, neighbors = (
        np.array([(place["latitude"], place["longitude"]) for place in row[kind]]).reshape(-1, 2)
        for kind in ("candidates", "neighbors")
    )
    log_p = np.array([candidate["log_probability"] for candidate in row["candidates"]])
    return Question(row["id"], photo, candidates, log_p, neighbors, np.array([n["score"] for n in row["neighbors"]]))


def _answer(row: Mapping[str, Any], place: list[float] | None) -> Prediction:
    at = place or (row["latitude"], row["longitude"])
    return Prediction(float(at[0]), float(at[1]), math.nan, math.nan, {}, (), (), (), "judge")
