"""A model in one object: photos in, coordinates with candidates and radius out."""

import abc
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from etils import epath
from jaxtyping import Float, Num

from geotoken_jax import backbone, checkpoint, settings
from geotoken_jax.align.heads import AlignSettings, embeddings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.data.join import neighbors
from geotoken_jax.gallery import index
from geotoken_jax.gallery.neighbors import find
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.predict.decode import Decoder, PredictSettings, answers


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A place the photo may be from: degrees, and the model's probability of the level-20 cell around it (GeoCLIP's: of
    this place among those of its gallery)."""

    latitude: float
    longitude: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Neighbor:
    """A gallery photo that was looked at: id, degrees, and the inner product of the index vectors (at most 3)."""

    id: str
    latitude: float
    longitude: float
    score: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Where a photo was taken: degrees.

    radius_km: of the circle around the answer that holds half of the samples (GeoCLIP's: half of the probability); of
    the tempered distribution, and not calibrated. candidates: distinct ones, most probable first. neighbors: best
    first; none where a model looks at none.
    """

    latitude: float
    longitude: float
    radius_km: float
    candidates: tuple[Candidate, ...]
    neighbors: tuple[Neighbor, ...]


class Predictor(abc.ABC):
    """Answers for one photo, or for a list of them."""

    #: Photos that are answered at once.
    batch_size: int

    @overload
    def predict(self, photos: list[Any] | tuple[Any, ...]) -> list[Prediction]: ...
    @overload
    def predict(self, photos: Any) -> Prediction: ...
    def predict(self, photos: Any) -> Prediction | list[Prediction]:
        """Returns where a photo was taken, or a list of answers for a list of photos.

        A photo is a path, a PIL image, an array [height, width, 3] of uint8, or an encoded file's bytes. EXIF positions
        are not read. Raises ImageError, which names the photo, if one cannot be read.
        """
        if not isinstance(photos, (list, tuple)):
            return self._predict([photos])[0]
        size = self.batch_size
        return [p for first in range(0, len(photos), size) for p in self._predict(photos[first : first + size])]

    @abc.abstractmethod
    def _predict(self, photos: Sequence[Any]) -> list[Prediction]: ...


class GeoToken(Predictor):
    """A trained model with its backbone and gallery, as `geotoken export` writes it."""

    def __init__(self, folder: epath.PathLike):
        """Raises FileNotFoundError if the folder is not an export, ValueError if its parts do not fit each other."""
        folder = epath.Path(folder)
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} has no config.json: give the folder that `geotoken export` made")
        config = json.loads((folder / "config.json").read_text())
        self._backbone = backbone.make(settings.read(backbone.BackboneSettings, config["backbone"], "backbone"))
        align = AlignTask(settings.read(AlignSettings, config["align"], "align"), self._backbone.width)
        self._aligned = checkpoint.read_module(folder / "align.safetensors", align.init)
        model_settings = settings.read(ModelSettings, config["model"], "model")
        model = checkpoint.read_module(
            folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(model_settings, rngs)
        )
        self._decoder = Decoder(model, settings.read(PredictSettings, config["predict"], "predict"))
        self.batch_size = self._decoder.settings.batch_size
        self._neighbors = model_settings.neighbors
        self._gallery = Table(folder / "gallery")
        self._index = index.load(folder / "gallery" / "index", config["index"]["threads"])

    @classmethod
    def load(cls, folder: epath.PathLike) -> "GeoToken":
        """Returns the model in a folder that `geotoken export` made."""
        return cls(folder)

    def _predict(self, photos: Sequence[Any]) -> list[Prediction]:
        prepared = np.stack([self._backbone.prepare(photo) for photo in photos])
        vectors = embeddings(self._aligned, self._backbone.images(prepared))
        rows, scores = find(self._index, index_vectors(vectors), self._neighbors)
        batch = {"query": vectors, **neighbors(self._gallery, rows, self._decoder.cells)}
        # The samples of a photo are the same whichever others come with it.
        candidates = self._decoder(batch, np.zeros(len(photos), np.int64))
        found = answers(candidates, self._decoder.cells, self._decoder.settings.choice)
        near = [
            tuple(
                Neighbor(
                    self._gallery.ids(row).item().decode(), *self._gallery.coordinates(row).tolist(), score=float(score)
                )
                for row, score in zip(*pair, strict=True)
                if row >= 0
            )
            for pair in zip(rows, scores, strict=True)
        ]
        return [_prediction(answer, n) for answer, n in zip(found, near, strict=True)]


def _prediction(answer: dict[str, Any], near: tuple[Neighbor, ...]) -> Prediction:
    listed = answer["candidates"]
    latitude, longitude, log_p, count = (
        np.array([c[name] for c in listed]) for name in ("latitude", "longitude", "log_probability", "count")
    )
    radius = half_within(
        np.array([answer["latitude"], answer["longitude"]]), np.stack([latitude, longitude], -1), count
    )
    candidates = tuple(
        Candidate(float(latitude[i]), float(longitude[i]), float(np.exp(log_p[i])))
        for i in np.argsort(-log_p, kind="stable")
    )
    return Prediction(answer["latitude"], answer["longitude"], radius, candidates, near)


def half_within(at: Float[np.ndarray, "2"], places: Float[np.ndarray, "n 2"], weights: Num[np.ndarray, " n"]) -> float:
    """Returns the least distance in km from a place, in degrees, within which half of the places' weight is."""
    km = great_circle_km(*at, *places.T)
    nearest_first = np.argsort(km, kind="stable")
    half = np.searchsorted(np.cumsum(weights[nearest_first]), weights.sum() / 2)
    return float(km[nearest_first[half]])
