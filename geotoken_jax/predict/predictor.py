"""A model in one object: photos in, coordinates with candidates and radius out."""

import abc
import asyncio
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, overload

import numpy as np
from etils import epath
from jaxtyping import Float, Num

from geotoken_jax import backbone as backbones
from geotoken_jax import checkpoint, settings
from geotoken_jax.align.heads import AlignSettings, embeddings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.gallery import index
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.reward import RewardSettings
from geotoken_jax.predict import bundle, hub
from geotoken_jax.predict.answer import Answerer, with_radii
from geotoken_jax.predict.decode import Decoder, PredictSettings
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.select import SelectorInputs
from geotoken_jax.predict.trained_selectors import selector_loader
from geotoken_jax.predict.uncertainty import UNCALIBRATED, Calibration
from geotoken_jax.predict.verify import VerifierSettings


class Predictor(abc.ABC):
    """Answers for one photo, or for a list of them."""

    #: Photos that are answered at once.
    batch_size: int
    #: Whether it can be told when a photo was taken.
    reads_time = False

    @overload
    def predict(
        self, photos: list[Any] | tuple[Any, ...], captured: Sequence[datetime | None] | None = None
    ) -> list[Prediction]: ...
    @overload
    def predict(self, photos: Any, captured: datetime | None = None) -> Prediction: ...
    def predict(self, photos: Any, captured: Any = None) -> Prediction | list[Prediction]:
        """Returns where a photo was taken, or a list of answers for a list of photos.

        A photo is a path, a PIL image, an array [height, width, 3] of uint8, or an encoded file's bytes. captured: when
        it was taken, or a list of that, None where it is unknown; a datetime without a zone is taken to be UTC. EXIF
        positions and times are not read. Raises ImageError, which names the photo, if one cannot be read; ValueError if
        times are not one a photo, or the model does not read them (config.model.context).
        """
        if not isinstance(photos, (list, tuple)):
            return self.predict([photos], None if captured is None else [captured])[0]
        return [answer for batch in self._batches(photos, captured) for answer in self._predict(*batch)]

    @overload
    async def predict_async(
        self, photos: list[Any] | tuple[Any, ...], captured: Sequence[datetime | None] | None = None
    ) -> list[Prediction]: ...
    @overload
    async def predict_async(self, photos: Any, captured: datetime | None = None) -> Prediction: ...
    async def predict_async(self, photos: Any, captured: Any = None) -> Prediction | list[Prediction]:
        """Returns what `predict` does, while the event loop does other things.

        The model has one thread, to which batches go in the order in which they are awaited; those of several lists
        take turns. A list that is canceled gives up the batches that have not begun.
        """
        if not isinstance(photos, (list, tuple)):
            return (await self.predict_async([photos], None if captured is None else [captured]))[0]
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self._thread, self._predict)
        return [answer for batch in self._batches(photos, captured) for answer in await run(*batch)]

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "predict")

    def _batches(self, photos: Sequence[Any], captured: Any) -> Iterator[tuple[Sequence[Any], np.ndarray]]:
        """Returns photos and their seconds since 1970, NaN where unknown, batch by batch."""
        if captured is not None and not self.reads_time:
            raise ValueError("captured is given, and this model does not read when a photo was taken: leave it out")
        if captured is not None and len(captured) != len(photos):
            raise ValueError(f"captured has {len(captured)} times for {len(photos)} photos: give each one, or None")
        times = np.array([_seconds(time) for time in captured or [None] * len(photos)])
        parts = (slice(first, first + self.batch_size) for first in range(0, len(photos), self.batch_size))
        return ((photos[part], times[part]) for part in parts)

    @abc.abstractmethod
    def _predict(self, photos: Sequence[Any], captured: Float[np.ndarray, " b"]) -> list[Prediction]: ...


def _seconds(time: datetime | None) -> float:
    """Returns seconds since 1970; NaN for None."""
    return np.nan if time is None else (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


class GeoToken(Predictor):
    """A trained model with its backbone and gallery, as `geotoken export` writes it."""

    def __init__(self, folder: epath.PathLike, verify: bool = False, backbone: epath.PathLike | None = None):
        """verify: compare every file with SHA256SUMS, not parameters and settings alone. backbone: folder of the
        checkpoint that an export refers to, where it does not hold it.

        Raises FileNotFoundError if the folder is not an export, ValueError if a file is missing or damaged, or its
        parts do not fit each other.
        """
        folder = epath.Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} has no config.json: give the folder that `geotoken export` made")
        bundle.check(folder, verify)
        config = json.loads((folder / "config.json").read_text())
        tower = bundle.backbone(folder, config["backbone"], config.get("checkpoint"), backbone)
        self._backbone = backbones.make(settings.read(backbones.BackboneSettings, tower, "backbone"))
        align = AlignTask(settings.read(AlignSettings, config["align"], "align"), self._backbone.width)
        self._aligned = checkpoint.read_module(folder / "align.safetensors", align.init)
        model_settings = settings.read(ModelSettings, config["model"], "model")
        model = checkpoint.read_module(
            folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(model_settings, rngs)
        )
        options = settings.read(PredictSettings, config["predict"], "predict")
        options = dataclasses.replace(options, selectors=(options.choice,))  # nobody sees what the others choose
        self._gallery = Table(folder / "gallery")
        decoder = Decoder(model, options, self._gallery)
        kinds = {"reward": RewardSettings, "verifier": VerifierSettings}
        selectors = {n: settings.read(kinds[n], of, f"{n}.model") for n, of in config["learned"].items()}
        learned = selector_loader(selectors, lambda name: folder / name, self._gallery, model, lambda: self._aligned)
        self._answerer = Answerer(decoder, SelectorInputs(options.vote, lambda: self._aligned, learned))
        calibrated = folder / "calibration.json"
        self._calibration = Calibration.load(calibrated) if calibrated.exists() else UNCALIBRATED
        self.batch_size, self.reads_time = options.batch_size, model_settings.times > 0
        self._index = index.load(folder / "gallery" / "index", config["index"]["threads"])

    @classmethod
    def load(
        cls,
        model: epath.PathLike,
        verify: bool = False,
        revision: str | None = None,
        backbone: epath.PathLike | None = None,
    ) -> "GeoToken":
        """Returns the model in a folder that `geotoken export` made, or that the Hugging Face hub has as ORG/NAME.

        revision: branch, tag or commit on the hub. verify, backbone: see GeoToken.
        """
        return cls(hub.located(model, revision), verify, backbone)

    def _predict(self, photos: Sequence[Any], captured: Float[np.ndarray, " b"]) -> list[Prediction]:
        prepared = np.stack([self._backbone.prepare(photo) for photo in photos])
        vectors = embeddings(self._aligned, self._backbone.images(prepared))
        answers, places = self._answerer.of_vectors(self._index, vectors, captured)
        if places is not None:
            return with_radii(answers, places, self._calibration)
        return [_by_samples(answer) for answer in answers]


def _by_samples(answer: Prediction) -> Prediction:
    """Returns an answer with the radii and `within` that its samples give."""
    places = np.array([(c.latitude, c.longitude) for c in answer.candidates])
    at, counts = np.array([answer.latitude, answer.longitude]), np.array([c.count for c in answer.candidates])
    half, most, within = spread(at, places, counts)
    return dataclasses.replace(answer, radius_km=half, radius_90_km=most, within=within)


def spread(
    at: Float[np.ndarray, "2"], places: Float[np.ndarray, "n 2"], weights: Num[np.ndarray, " n"]
) -> tuple[float, float, dict[int, float]]:
    """Returns Prediction's radius_km, radius_90_km and within of an answer, in degrees, by the weight of places."""
    km = great_circle_km(*at, *places.T)
    nearest_first = np.argsort(km, kind="stable")
    share = np.cumsum(weights[nearest_first]) / weights.sum()
    half, most = (float(km[nearest_first[np.searchsorted(share, p - 1e-6)]]) for p in (0.5, 0.9))
    return half, most, {limit: float(weights[km <= limit].sum() / weights.sum()) for limit in THRESHOLDS_KM}
