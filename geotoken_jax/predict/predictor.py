"""A trained model as one object, which predicts where photos were taken."""

import abc
import asyncio
import collections
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Literal, overload

import numpy as np
from etils import epath
from jaxtyping import Float, Num, UInt8

from geotoken_jax import backbone as backbones
from geotoken_jax import jax_modes, settings
from geotoken_jax.align.heads import embeddings
from geotoken_jax.backbone.preprocess import ImageError
from geotoken_jax.gallery import index
from geotoken_jax.gallery.exclude import Excluded, exclusions_of
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.predict import bundle, export_format, hub, parts
from geotoken_jax.predict.answer import Answerer, with_places, with_radii
from geotoken_jax.predict.decode import Decoder
from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.predict.select import SelectorInputs
from geotoken_jax.predict.trained_selectors import selector_loader

#: Threads that decode photos while the model predicts. Pillow decodes outside Python's global lock.
_DECODERS = min(16, os.cpu_count() or 1)


class Predictor(abc.ABC):
    """A model that predicts where one photo, or each photo of a list, was taken."""

    #: Photos per batch.
    batch_size: int
    #: Whether the model reads capture times.
    reads_time = False

    @overload
    def predict(
        self,
        photos: list[Any] | tuple[Any, ...],
        captured: Sequence[datetime | None] | None = None,
        on_error: Literal["raise"] = "raise",
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self,
        photos: list[Any] | tuple[Any, ...],
        captured: Sequence[datetime | None] | None = None,
        *,
        on_error: Literal["return"],
    ) -> list[Prediction | ImageError]: ...
    @overload
    def predict(self, photos: Any, captured: datetime | None = None) -> Prediction: ...
    def predict(self, photos: Any, captured: Any = None, on_error: Literal["raise", "return"] = "raise") -> Any:
        """Returns the prediction for a photo, or a list of predictions for a list of photos.

        photos: a photo or a list of photos; each is a path, a PIL image, an array [height, width, 3] of uint8, or the
        bytes of an image file. Positions and times in EXIF are not read. captured: the photo's capture time, or a list
        with one time per photo; None if unknown. A datetime without a zone is UTC. on_error: "return" puts an
        ImageError into the list for each photo that cannot be read.

        Raises ImageError, with the photo's name, if a photo cannot be read and on_error is "raise". Raises ValueError
        if `captured` is given and has another length than photos, or is given to a model that does not read times
        (config.model.context).
        """
        if not isinstance(photos, (list, tuple)):
            return self._listed([photos], self._times([photos], None if captured is None else [captured]), on_error)[0]
        return self._listed(photos, self._times(photos, captured), on_error)

    def stream(
        self, photos: Iterable[Any], exclude: Iterable[Excluded] | None = None
    ) -> Generator[Prediction | ImageError, None, None]:
        """Yields the prediction of each photo, or the ImageError of a photo that cannot be read, in order.

        Photos are taken from the iterable as they are needed, and threads decode them while the model predicts. Memory
        does not grow with the number of photos. Capture times are unknown. exclude: gallery photos that may not be
        neighbors, per photo; only for models with a gallery.
        """
        each = itertools.repeat(Excluded()) if exclude is None else exclude
        return self._stream((photo, np.nan, excluded) for photo, excluded in zip(photos, each, strict=False))

    @overload
    async def predict_async(
        self, photos: list[Any] | tuple[Any, ...], captured: Sequence[datetime | None] | None = None
    ) -> list[Prediction]: ...
    @overload
    async def predict_async(self, photos: Any, captured: datetime | None = None) -> Prediction: ...
    async def predict_async(self, photos: Any, captured: Any = None) -> Prediction | list[Prediction]:
        """Returns the same as `predict`, without blocking the event loop.

        One thread runs the batches of all these calls, in the order in which they are awaited. Calls with several
        batches therefore take turns. A canceled call drops its batches that have not begun.
        """
        if not isinstance(photos, (list, tuple)):
            return (await self.predict_async([photos], None if captured is None else [captured]))[0]
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self._thread, self._listed)
        times = self._times(photos, captured)
        batches = (slice(first, first + self.batch_size) for first in range(0, len(photos), self.batch_size))
        return [answer for batch in batches for answer in await run(photos[batch], times[batch], "raise")]

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "predict")

    def _times(self, photos: Sequence[Any], captured: Any) -> Float[np.ndarray, " b"]:
        """Returns the capture times of photos in seconds since 1970, NaN if unknown."""
        if captured is not None and not self.reads_time:
            raise ValueError("captured is given, but this model does not read when a photo was taken: leave it out")
        if captured is not None and len(captured) != len(photos):
            raise ValueError(
                f"captured has {len(captured)} times for {len(photos)} photos: give one per photo, None if unknown"
            )
        return np.array([_seconds(time) for time in captured or [None] * len(photos)])

    def _listed(self, photos: Sequence[Any], times: Float[np.ndarray, " b"], on_error: str) -> list[Any]:
        answers = []
        items = ((photo, time, Excluded()) for photo, time in zip(photos, times, strict=True))
        with contextlib.closing(self._stream(items)) as stream:
            for answer in stream:
                if on_error == "raise" and isinstance(answer, ImageError):
                    raise answer
                answers.append(answer)
        return answers

    def _stream(self, photos: Iterable[tuple[Any, float, Excluded]]) -> Generator[Prediction | ImageError, None, None]:
        """Yields the predictions and ImageErrors as `stream` does. photos: tuples of a photo, its capture time in
        seconds since 1970, and the gallery photos that may not be its neighbors."""
        source = iter(photos)
        with ThreadPoolExecutor(_DECODERS, "decode") as pool:
            ahead: collections.deque[tuple[Future, float, Excluded]] = collections.deque()
            try:
                while True:
                    batch: list[tuple[Any, float, Excluded]] = []
                    prepared = 0
                    while prepared < self.batch_size:
                        for photo, time, excluded in itertools.islice(source, 2 * self.batch_size - len(ahead)):
                            ahead.append((pool.submit(self._prepare_or_error, photo), time, excluded))
                        if not ahead:
                            break
                        future, time, excluded = ahead.popleft()
                        batch.append((future.result(), time, excluded))
                        prepared += not isinstance(batch[-1][0], ImageError)
                    if not batch:
                        return
                    yield from self._predict_batch(batch)
            finally:
                for future, *_ in ahead:
                    future.cancel()

    def _prepare_or_error(self, photo: Any) -> Any:
        try:
            return self.prepare(photo)
        except ImageError as error:
            return error

    def _predict_batch(self, batch: list[tuple[Any, float, Excluded]]) -> Iterator[Prediction | ImageError]:
        read = [one for one in batch if not isinstance(one[0], ImageError)]
        predictions = iter(())
        if read:
            photos, times, exclude = zip(*read, strict=True)
            options = {"exclude": exclude} if any(map(any, exclude)) else {}
            predictions = iter(self.predict_prepared(photos, np.array(times), **options))
        return (one if isinstance(one, ImageError) else next(predictions) for one, *_ in batch)

    @abc.abstractmethod
    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        """Returns a photo decoded and resized to one shape for all photos. Raises ImageError if it cannot be read.

        photo: see `predict`.
        """

    @abc.abstractmethod
    def predict_prepared(
        self, photos: Sequence[UInt8[np.ndarray, "h w 3"]], captured: Float[np.ndarray, " b"] | None = None
    ) -> list[Prediction]:
        """Returns the predictions for a batch of photos that `prepare` returned.

        captured: capture times in seconds since 1970, NaN if unknown; all unknown if None.
        """


def _seconds(time: datetime | None) -> float:
    """Returns seconds since 1970, NaN if the time is None."""
    return np.nan if time is None else (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


class GeoToken(Predictor):
    """A trained model with its backbone and gallery, read from an export."""

    @jax_modes.standard()
    def __init__(self, folder: epath.PathLike, verify: bool = False, backbone: epath.PathLike | None = None):
        """Reads the export in a folder.

        folder: folder that `geotoken export` made. verify: if True, every file's SHA-256 sum is checked; if False, only
        the sums of parameters and settings. backbone: the backbone's checkpoint, a folder or a name on the Hugging Face
        hub; None if the export contains it. Raises FileNotFoundError if the folder is not an export, and UserError if a
        file of the export or of the checkpoint is missing or damaged, or if settings and parameters do not match.
        """
        #: The folder of the export.
        self.folder = folder = epath.Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} has no config.json: give the folder that `geotoken export` made")
        bundle.check(folder, verify)
        with bundle.reading(folder):
            self._read(folder, backbone)

    def _read(self, folder: epath.Path, backbone: epath.PathLike | None) -> None:
        """Reads settings, parameters and gallery of an export."""
        config = export_format.read_config(folder)
        tower = bundle.backbone(folder, config["backbone"], config.get("checkpoint"), backbone)
        self._backbone = backbones.make(settings.read(backbones.BackboneSettings, tower, "backbone"))
        found = parts.read(folder, self._backbone.width)
        self._aligned, self._calibration, options = found.aligned, found.calibration, found.predict
        self._gallery = Table(folder / "gallery")
        decoder = Decoder(found.decoder, options, self._gallery)
        threads = config["index"]["threads"]
        self._index = index.load(folder / "gallery" / "index", threads)
        trained = selector_loader(
            found.learned, lambda name: folder / name, self._gallery, found.decoder, lambda: (self._index, threads)
        )
        self._answerer = Answerer(decoder, SelectorInputs(options.vote, lambda: self._aligned, trained))
        self.batch_size, self.reads_time = options.batch_size, found.decoder.settings.times > 0

    @classmethod
    def load(
        cls,
        model: epath.PathLike,
        verify: bool = False,
        revision: str | None = None,
        backbone: epath.PathLike | None = None,
    ) -> "GeoToken":
        """Returns the model of an export.

        model: folder that `geotoken export` made, or name ORG/NAME or ORG/NAME@REVISION of a model on the Hugging Face
        hub. revision: branch, tag or commit on the hub, if `model` has none; the main branch if None. verify, backbone:
        see GeoToken. Raises SettingsError if there is no such model or the download fails. Also raises the errors of
        GeoToken(...).
        """
        return cls(hub.resolve(model, revision), verify, backbone)

    @classmethod
    def from_pretrained(cls, name_or_folder: epath.PathLike, **options: Any) -> "GeoToken":
        """Returns the same as `load`. The library transformers has this name for it. options: see `load`."""
        return cls.load(name_or_folder, **options)

    def push_to_hub(self, name: str) -> str:
        """Uploads the export to the Hugging Face hub as `geotoken export --push` does; returns the model's address.

        name: ORG/NAME. A model of that name is created if there is none. Raises SettingsError if the name has another
        form or the upload fails, and ExportError if a file of the export is missing or damaged.
        """
        return hub.push(self.folder, name)

    def prepare(self, photo: Any) -> UInt8[np.ndarray, "h w 3"]:
        return self._backbone.prepare(photo)

    @property
    def knows_authors(self) -> bool:
        """Whether the gallery contains the authors of its photos (config.export.authors)."""
        return "authors" in self._gallery.stored

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Returns those of the ids that no gallery photo has, each once and in order."""
        names = list(dict.fromkeys(ids))
        there = np.isin(np.array([name.encode() for name in names], np.bytes_), self._gallery.ids())
        return [name for name, found in zip(names, there, strict=True) if not found]

    @jax_modes.standard()
    def predict_prepared(
        self,
        photos: Sequence[UInt8[np.ndarray, "h w 3"]],
        captured: Float[np.ndarray, " b"] | None = None,
        exclude: Sequence[Excluded] = (),
    ) -> list[Prediction]:
        """Returns the predictions for a batch of photos. exclude: gallery photos that may not be neighbors, per photo;
        none if empty. captured: see Predictor.predict_prepared."""
        times = np.full(len(photos), np.nan) if captured is None else captured
        vectors = embeddings(self._aligned, self._backbone.images(np.stack(photos)))
        rules = exclusions_of(exclude, self._gallery)
        predictions, distribution, _ = self._answerer.from_vectors(self._index, vectors, times, rules)
        if distribution is not None:
            return with_places(with_radii(predictions, distribution, self._calibration))
        return with_places([_with_sample_radii(prediction) for prediction in predictions])


def _with_sample_radii(prediction: Prediction) -> Prediction:
    """Returns a prediction with radii and `within`, computed from its candidates, each with its `count` as weight."""
    at, candidates = np.array([prediction.latitude, prediction.longitude]), prediction.candidates
    points, counts = np.array([(c.latitude, c.longitude) for c in candidates]), np.array([c.count for c in candidates])
    radius, radius_90, within = spread(at, points, counts)
    return dataclasses.replace(prediction, radius_km=radius, radius_90_km=radius_90, within=within)


def spread(
    at: Float[np.ndarray, "2"], points: Float[np.ndarray, "n 2"], weights: Num[np.ndarray, " n"]
) -> tuple[float, float, dict[int, float]]:
    """Returns the fields `radius_km`, `radius_90_km` and `within` of Prediction for an answer, from weighted points.

    at: the answer, in degrees. points: points in degrees at which the truth may be. weights: weight of each point; the
    sum need not be 1.
    """
    km = great_circle_km(*at, *points.T)
    nearest_first = np.argsort(km, kind="stable")
    share = np.cumsum(weights[nearest_first]) / weights.sum()
    radius, radius_90 = (float(km[nearest_first[np.searchsorted(share, p - 1e-6)]]) for p in (0.5, 0.9))
    return radius, radius_90, {limit: float(weights[km <= limit].sum() / weights.sum()) for limit in THRESHOLDS_KM}
