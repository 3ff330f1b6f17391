"""The stage `predict`: candidates and choice of every photo of every split, as JSON lines.

What imports jax is imported once a stage is known to have work to do: a finished one answers at once.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from geotoken_jax import records, settings, workdir
from geotoken_jax.backbone import views
from geotoken_jax.gallery.table import Table
from geotoken_jax.predict import learn
from geotoken_jax.progress import Progress
from geotoken_jax.workdir import Manifest

if TYPE_CHECKING:
    from geotoken_jax.align.heads import AlignModel
    from geotoken_jax.model.geotoken import GeoTokenModel
    from geotoken_jax.predict.answer import Answerer
    from geotoken_jax.predict.judge import Judge
    from geotoken_jax.predict.pool import Places, Pool
    from geotoken_jax.predict.select import Selector

#: The split that radii are calibrated on.
_VALIDATION = "validation"


def run(config: Any, path: epath.PathLike, variant: str) -> Manifest:
    """Makes predictions/VARIANT/SPLIT.jsonl for every split that has a table under queries/, but views.

    Beside them is calibration.json, what their radii are made with: fitted to the answers for validation. Without that
    split there is none, radii are the model's own, and the manifest says so.
    """
    path = epath.Path(path)
    config = settings.variant(config, variant)
    learned = [f"{name}/{variant}" for name in learn.needed(config)]
    made_with = {"predict": config.predict}
    if config.judge.base_url:
        made_with["judge"] = settings.outcome(config.judge)
    stage = workdir.begin(path, f"predictions/{variant}", made_with, ["tokens", f"geotoken/{variant}", *learned])
    if stage.manifest:
        return stage.manifest
    from geotoken_jax.predict.answer import calibrate, with_radii
    from geotoken_jax.predict.uncertainty import UNCALIBRATED, Calibration

    answerer = opened(config, path, variant)
    saved = stage.path / "calibration.json"
    counts = asked(path)
    calibrated = bool(config.predict.search.expansions) and _VALIDATION in counts
    asked_too = _judges(config, path, stage.path, counts)
    with Progress(f"predict {variant}", sum(counts.values()), "photos") as progress:
        for split in sorted(counts, key=lambda name: name != _VALIDATION):
            file = stage.path / f"{split}.jsonl"
            if file.exists():
                progress.add(counts[split])
                continue
            found = _answered(answerer, path, split, asked_too.get(split), progress)
            if calibrated and split == _VALIDATION:
                found = list(found)
                calibrate(found, Table(path / "queries" / split).coordinates()).save(saved)
            calibration = Calibration.load(saved) if calibrated else UNCALIBRATED
            lines = [line for part in found for line in with_radii(*part, calibration)]
            if judge := asked_too.get(split):
                workdir.write_json(stage.path / "judge" / f"{split}.json", judge.report())
            write(file, lines)
    return stage.finish(counts, calibrated=calibrated)


def opened(config: Any, path: epath.Path, variant: str, exported: epath.Path | None = None) -> "Answerer":
    """Returns what answers with a variant's trained parts. config: with the variant's changes made. exported: folder of
    an export, whose gallery and what was learned of it are taken instead of the work directory's."""
    from geotoken_jax.predict.answer import Answerer
    from geotoken_jax.predict.decode import Decoder, PredictSettings
    from geotoken_jax.predict.select import Parts

    options = settings.read(PredictSettings, config.predict, "predict")
    gallery = Table((exported or path) / "gallery")
    model = learn.read_model(config, path, variant)
    aligned = functools.cache(lambda: learn.read_aligned(config, path))
    sections = {name: config[name].model for name in learn.LEARNED}

    def folder(name: str) -> epath.Path:
        return exported / name if exported else path / name / variant

    learned = chooser(sections, folder, gallery, model, aligned)
    return Answerer(Decoder(model, options, gallery), Parts(options.vote, aligned, learned))


def chooser(
    sections: Mapping[str, Any],
    folder: Callable[[str], epath.Path],
    gallery: Table,
    model: "GeoTokenModel",
    aligned: Callable[[], "AlignModel"],
) -> Callable[[str], "Selector"]:
    """Returns what opens a trained selector by its name, and what it shares with others once.

    sections: name in learn.LEARNED -> its model's settings; folder: -> where its parameters are.
    """

    @functools.cache
    def verifier() -> Any:
        from geotoken_jax.predict.verify import Verifier, VerifierSettings

        options = settings.read(VerifierSettings, sections["verifier"], "verifier.model")
        return Verifier(folder("verifier"), options, gallery, aligned())

    def opened(name: str) -> "Selector":
        if name in learn.LEARNED["verifier"]:
            return verifier().selector(name)
        from geotoken_jax.model.reward import RewardSettings
        from geotoken_jax.predict.reward import Reward

        return Reward(folder("reward"), settings.read(RewardSettings, sections["reward"], "reward.model"), model)

    return opened


def _judges(config: Any, path: epath.Path, folder: epath.Path, counts: dict[str, int]) -> dict[str, "Judge"]:
    """Returns the judge of each split that config.judge has one for: none where the greedy candidate is alone."""
    from geotoken_jax.predict.judge import Judge, JudgeSettings

    options = settings.read(JudgeSettings, config.judge, "judge")
    if not options.base_url or not config.predict.samples:
        return {}
    if unknown := sorted(set(options.splits) - set(counts)):
        raise settings.SettingsError(f"config.judge.splits has {unknown[0]!r}: choose among {', '.join(counts)}")
    return {split: Judge(options, folder / "judge" / f"{split}.jsonl") for split in options.splits}


def asked(path: epath.Path) -> dict[str, int]:
    """Returns the splits that are to be answered, and how many photos they have: not the views that are trained on."""
    return {split: n for split, n in workdir.read_manifest(path, "queries").counts.items() if split != views.SPLIT}


def _answered(
    answerer: "Answerer", path: epath.Path, split: str, judge: "Judge | None", progress: Progress
) -> Iterator[tuple[list[dict[str, Any]], "Places | None"]]:
    """Yields the answers of one split in batches, and where the model thinks their photos are."""
    from geotoken_jax.data import pipeline
    from geotoken_jax.data.join import Tokens
    from geotoken_jax.predict.select import log_probability

    decoder, own = answerer.decoder, Table(path / "queries" / split)
    layout = records.token_layout(workdir.read_manifest(path, "tokens").facts["neighbors"])
    read = Tokens(
        records.Records(path / "tokens", split, layout),
        own,
        decoder.gallery,
        decoder.cells,
        decoder.neighbors,
        decoder.times,
    )
    near, scores = (
        records.open_array(path / "neighbors" / f"{split}.{name}.npy")[:, : decoder.neighbors]
        for name in ("rows", "scores")
    )
    excluded = learn.excluded(path, own, decoder.gallery, "exclude_in_evaluation")
    size = decoder.settings.batch_size
    images = _images(records.Photos(path / "photos", split), own) if judge else iter(())
    for number, batch in enumerate(pipeline.evaluation(len(own), read, size)):
        rows = np.arange(number * size, number * size + int(batch["valid"].sum()))
        real = {name: values[: len(rows)] for name, values in batch.items()}
        ids = [photo.decode() for photo in own.ids(rows)]

        def judged(pool: "Pool", ids: list[str] = ids) -> Any:
            assert judge
            return judge(ids, [next(images) for _ in ids], pool, log_probability(pool))

        others = {"judge": judged} if judge else {}
        found, places = answerer(real, near[rows], scores[rows], rows, others, excluded(rows))
        lines = [
            {"id": photo, **answer, "neighbors": described(near[row], decoder.gallery)}
            for photo, row, answer in zip(ids, rows, found, strict=True)
        ]
        yield lines, places
        progress.add(len(rows))


def _images(photos: records.Photos, own: Table) -> Iterator[bytes]:
    """Yields the encoded files of the photos that a table holds, in its order, which is that of photos/."""
    every = (photos[row] for row in range(len(photos)))
    for wanted in own.ids():
        yield next(photo["image"] for photo in every if photo["id"] == wanted.decode())


def described(rows: np.ndarray, gallery: Table) -> list[dict[str, Any]]:
    """Returns the neighbors of gallery rows [k], those of -1 left out, as JSON has them."""
    rows = rows[rows >= 0]
    coordinates = gallery.coordinates(rows)
    return [
        {"id": i.decode(), "latitude": float(latitude), "longitude": float(longitude)}
        for i, (latitude, longitude) in zip(gallery.ids(rows), coordinates, strict=True)
    ]


def write(file: epath.Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines, whole or not at all."""
    workdir.write_bytes(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
