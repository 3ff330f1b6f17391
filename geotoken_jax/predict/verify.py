"""The verifier at work: what is known of each candidate of a pool, and the choice that is made of it.

A candidate is compared with the gallery photos that lie nearest to it, most of which retrieval never returned: how
alike they and the photo are, to the trained comparator and to the backbone, is what the decoder could not weigh. Nor
need the answer be a candidate: the place of the whole gallery around which most photos are alike is one too.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float, Float32, Int, Int32
from scipy.spatial import KDTree

from geotoken_jax import checkpoint, records
from geotoken_jax.align.heads import AlignModel
from geotoken_jax.batch import blocks
from geotoken_jax.gallery import encodings, index, neighbors
from geotoken_jax.gallery.index import Vectors
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, THRESHOLDS_KM, great_circle_km, pairwise_km, to_unit_vectors
from geotoken_jax.model.verifier import (
    Comparator,
    ComparatorSettings,
    ComparatorTask,
    ScorerSettings,
    ScorerTask,
    choose,
)
from geotoken_jax.predict.pool import Pool, subset
from geotoken_jax.predict.select import Selector, density, log_probability
from geotoken_jax.vectors import unit

#: Photos looked at together: of 31 candidates and 64 photos around each they are 0.5 million pairs.
_BATCH = 256
#: The ways in which a verifier takes a candidate, and a place of the whole gallery.
CANDIDATE_CHOICES, GALLERY_CHOICES = ("verifier", "comparator", "likeness"), ("point_comparator", "point_likeness")
#: Images encoded at once, always, so that one shape is compiled.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class VerifierSettings:
    """near: gallery photos around each candidate that the photo is compared with. alike: looks of the whole gallery,
    the most alike to the comparator, among whose places an answer may be. widths_km: standard deviations of the
    Gaussians by which gallery photos and neighbors count less with their distance. width_km: the one of them by which
    the selectors `comparator` and `likeness` choose. point_km: standard deviation of the density over the gallery.
    sharpness: factor on cosines before they are summed as exponentials. floor: nats that a candidate is behind the best
    of its pool at most. temperature: of retrieval's scores, as of the baseline `knn`."""

    near: int
    similar: int
    widths_km: tuple[float, ...]
    width_km: float
    point_km: float
    sharpness: float
    floor: float
    temperature: float
    comparator: ComparatorSettings
    scorer: ScorerSettings

    def __post_init__(self):
        if self.width_km not in self.widths_km:
            raise ValueError(f"width_km is {self.width_km}: choose one of widths_km, which are {self.widths_km}")
        for name in ("point_km", "sharpness", "floor", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")


class AugmentedGallery:
    """Every gallery photo, and behind them all views of them where there are any, as image embeddings.

    of [N, 1 + V]: the looks of each gallery photo, itself first; one of fewer views has itself again. owner: of each
    look, the gallery row.
    """

    def __init__(self, gallery: Table, views: Vectors, owner: Int[np.ndarray, " W"]):
        """views: image embeddings of views, maybe none. owner: gallery rows of their photos."""
        own = np.arange(len(gallery))
        self.owner = np.concatenate([own, owner])
        order = np.argsort(owner, kind="stable")
        first, last = (np.searchsorted(owner[order], own, side)[:, None] for side in ("left", "right"))
        v = np.arange((last - first).max())
        found = len(own) + order[np.minimum(first + v, len(order) - 1)]
        self.of = np.concatenate([own[:, None], np.where(v < last - first, found, own[:, None])], 1)
        self._gallery, self._views = gallery, views

    def __len__(self) -> int:
        return len(self.owner)

    def images(self, rows: Int[np.ndarray, " m"]) -> Float32[np.ndarray, "m C"]:
        """Returns the embeddings of looks."""
        n = len(self._gallery)
        found = np.empty((len(rows), self._gallery.width), np.float32)
        inside = rows < n
        found[inside] = self._gallery.embeddings(rows[inside])[:, 0]
        found[~inside] = self._views[rows[~inside] - n]
        return found


class NearestPhotos:
    """The gallery photos nearest to a place: a tree over points of the sphere."""

    def __init__(self, coordinates: Float[np.ndarray, "N 2"]):
        self._tree = KDTree(to_unit_vectors(*coordinates.T))

    def __call__(
        self, coordinates: Float[np.ndarray, "n 2"], k: int
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Returns rows of the k nearest, or of all there are, and their distances in km."""
        k = min(k, self._tree.n)
        chord, rows = map(np.asarray, self._tree.query(to_unit_vectors(*coordinates.T), k))
        rows, chord = (found.reshape(len(coordinates), k) for found in (rows, chord))  # of k = 1 it drops the axis
        return rows, 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1))


def encode(comparator: Comparator, images: Float[np.ndarray, "n C"]) -> Float32[np.ndarray, "n D"]:
    """Returns the comparator's vectors of image embeddings."""
    graph, state = nnx.split(comparator)
    parts = [np.asarray(_encode(graph, state, x.astype(np.float32)))[:n] for x, n in blocks(images, _BLOCK)]
    return np.concatenate([np.zeros((0, comparator.output.out_features), np.float32), *parts])


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state: nnx.State, images: np.ndarray) -> jax.Array:
    return nnx.merge(graph, state)(images)


class CandidateFeatures:
    """Gathers what is known of the candidates of pools, as features, and of places of the whole gallery."""

    def __init__(
        self, options: VerifierSettings, comparator: Comparator, keys: Vectors, looks: AugmentedGallery, gallery: Table,
        aligned: AlignModel,
    ):  # fmt: skip
        """keys [len(looks), D]: what `encode` gives of all looks."""
        self._options, self._comparator, self._keys, self._looks = options, comparator, keys, looks
        self._coordinates = gallery.coordinates()
        self._around = NearestPhotos(self._coordinates)
        graph, state = nnx.split(aligned.location)
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        self._location = lambda coordinates: np.asarray(run(state, jnp.asarray(coordinates, jnp.float32)))

    def __call__(self, pool: Pool) -> Float32[np.ndarray, "b K F"]:
        """Returns features; gallery photos that a rule of the pool excludes are not looked at."""
        starts = range(0, len(pool.coordinates), _BATCH)
        return np.concatenate(
            [self._features(subset(pool, np.arange(n, min(n + _BATCH, len(pool.coordinates))))) for n in starts]
        )

    def densest(self, pool: Pool) -> tuple[Float[np.ndarray, "b 2"], ...]:
        """Returns the places, of the photos whose looks are most alike to the comparator, that are best by the density
        of these photos, weighted by how alike they are: to the comparator alone, and to the backbone too.

        Where all that comes near is excluded, the most probable candidate.
        """
        images = np.asarray(pool.query[:, 0], np.float32)
        query, owner = encode(self._comparator, images), self._looks.owner
        exclude = [lambda queries, rows, rule=rule: rule(queries, owner[rows]) for rule in pool.exclude]
        looks = neighbors.find(self, query, min(self._options.similar, len(owner)), exclude)[0]
        rows = np.sort(np.where(looks < 0, len(self._coordinates), owner[looks]), 1)
        # Nobody, and another look of the same photo.
        left_out = (rows == len(self._coordinates)) | np.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
        rows = np.minimum(rows, len(self._coordinates) - 1)
        at = self._coordinates[rows]
        kernel = np.exp(-0.5 * (pairwise_km(at, at) / self._options.point_km) ** 2)
        sharpness = self._options.sharpness
        learned, plain = (
            np.log(np.einsum("bnm,bm->bn", kernel, np.where(left_out, 0, np.exp(sharpness * (s - 1)))) + 1e-30)
            for s in self._similar(images, query, rows)
        )
        nobody = np.take_along_axis(pool.coordinates, log_probability(pool)[:, None, None], 1)[:, 0]
        return tuple(
            np.where(left_out.all(1)[:, None], nobody, at[np.arange(len(at)), np.where(left_out, -np.inf, s).argmax(1)])
            for s in (learned, learned + plain)
        )

    def search(
        self, queries: Float32[np.ndarray, "n D"], k: int
    ) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Returns the k looks most alike to the comparator (an Index of all of them), and their cosines."""
        return index.exact(self._keys, queries, k)

    def _features(self, pool: Pool) -> Float32[np.ndarray, "b K F"]:
        options, (b, k) = self._options, pool.coordinates.shape[:2]
        rows, km = self._around(pool.coordinates.reshape(-1, 2), self._options.near)
        rows, km = rows.reshape(b, -1), km.reshape(b, k, -1)
        hidden = np.zeros(rows.shape, bool)
        for rule in pool.exclude:
            hidden |= rule(np.arange(b), rows)
        km = np.where(hidden.reshape(km.shape), np.inf, km)
        images = np.asarray(pool.query[:, 0], np.float32)
        columns = []
        for similar in self._similar(images, encode(self._comparator, images), rows):
            columns += _similarities(similar.reshape(km.shape), km, options)
        columns += [*_of_pool(pool, options.floor), *_of_neighbors(pool, options)]
        columns += [self._of_place(pool), np.log1p(np.minimum(km.min(-1), 2e4))]
        return np.stack(columns, -1).astype(np.float32)

    def _similar(
        self, images: Float32[np.ndarray, "b C"], query: Float32[np.ndarray, "b D"], rows: Int[np.ndarray, "b n"]
    ) -> Iterator[Float32[np.ndarray, "b n"]]:
        """Yields the cosines of photos and those of gallery rows, of the most alike look: the comparator's, then the
        backbone's. Each look is read once, for all photos."""
        unique, place = np.unique(rows, return_inverse=True)
        looks, versions = np.unique(self._looks.of[unique], return_inverse=True)
        for mine, keys in (
            (query, np.asarray(self._keys[looks], np.float32)),
            (unit(images), unit(self._looks.images(looks))),
        ):
            found = (mine @ keys.T)[:, versions.reshape(-1, self._looks.of.shape[1])].max(-1)
            yield np.take_along_axis(found, place.reshape(rows.shape), 1)

    def _of_place(self, pool: Pool) -> np.ndarray:
        """Returns the cosine of the photo's location vector and the candidates' encoded coordinates."""
        b, k = pool.coordinates.shape[:2]
        encoded = unit(self._location(pool.coordinates.reshape(-1, 2))).reshape(b, k, -1)
        return np.einsum("bkc,bc->bk", encoded, unit(np.asarray(pool.query[:, 1], np.float32)))


def _similarities(
    similar: Float[np.ndarray, "b K n"], km: Float[np.ndarray, "b K n"], options: VerifierSettings
) -> list[Float[np.ndarray, "b K"]]:
    """Returns how alike a photo and those around each candidate are, nearer ones counting for more, at several widths;
    the most alike within 25 and 200 km; all in nats, against the pool's best and no less than -floor; and that best's
    cosine. km: inf for a photo that may not be seen."""
    raised = np.exp(options.sharpness * (similar - 1))
    found = [np.log((raised * np.exp(-0.5 * (km / w) ** 2)).sum(-1) + 1e-30) for w in options.widths_km]
    most = [np.where(km <= limit, similar, -1.0).max(-1) for limit in (25, 200)]
    found += [options.sharpness * m for m in most]
    best = np.broadcast_to(most[1].max(1, keepdims=True), most[1].shape)
    return [*(np.maximum(f - f.max(1, keepdims=True), -options.floor) for f in found), best]


def _of_pool(pool: Pool, floor: float) -> list[Float[np.ndarray, "b K"]]:
    """Returns log-probabilities, how far they are from the pool's best, and the share of candidates within each
    threshold: the expected accuracy of a candidate, were the truth drawn from the pool."""
    found = []
    for log_p in (pool.candidates.tempered_log_probability, pool.candidates.log_probability):
        found += [log_p, np.maximum(log_p - log_p.max(1, keepdims=True), -floor)]
    latitude, longitude = np.moveaxis(pool.coordinates, -1, 0)
    km = great_circle_km(latitude[:, :, None], longitude[:, :, None], latitude[:, None], longitude[:, None])
    return found + [(km <= limit).mean(-1) for limit in THRESHOLDS_KM]


def _of_neighbors(pool: Pool, options: VerifierSettings) -> list[Float[np.ndarray, "b K"]]:
    """Returns the density of the photo's neighbors at each candidate, at several widths, the best one's score, and the
    logarithm of the distance to the nearest."""
    there = np.arange(pool.neighbor_scores.shape[1]) < pool.neighbor_count[:, None]
    scores = np.where(there, pool.neighbor_scores, -np.inf)
    near, candidate = (np.moveaxis(c, -1, 0) for c in (pool.neighbor_coordinates, pool.coordinates))
    km = great_circle_km(*candidate[..., None], *near[:, :, None])
    km = np.where(there[:, None], km, 2e4)
    found = [density(km, scores, options.temperature, w) for w in options.widths_km]
    best = scores.max(1, keepdims=True, initial=-3.0)
    return [*found, np.broadcast_to(best, km.shape[:2]), np.log1p(km.min(-1))]


class Verifier:
    """A trained verifier: five selectors, which share their work."""

    def __init__(self, folder: epath.PathLike, options: VerifierSettings, gallery: Table, aligned: AlignModel):
        """folder: what `learn.verifier` made of this gallery, verifier/VARIANT."""
        folder = epath.Path(folder)
        task = ComparatorTask(options.comparator, np.zeros(gallery.width, np.float32))
        comparator = checkpoint.read_module(folder / "comparator" / "parameters.safetensors", task.init)
        looks, keys = open_augmented_gallery(folder, gallery), encodings.open(folder / "keys.npy")
        if len(keys) != len(looks):
            raise ValueError(f"{folder / 'keys.npy'} is of {len(keys):,} photos, and there are {len(looks):,}")
        self._evidence, self._options = CandidateFeatures(options, comparator, keys, looks, gallery, aligned), options
        scorer = ScorerTask(options.scorer, np.load(folder / "moments.npy"))
        self._scorer = checkpoint.read_module(folder / "scorer" / "parameters.safetensors", scorer.init)
        self._choices, self._points = _once(self.choices), _once(self.points)

    def selector(self, name: str) -> Selector:
        """Returns what chooses in one of the ways of `choices` and `points`."""
        way = self._points if name in GALLERY_CHOICES else self._choices
        return lambda pool: way(pool)[name]

    def within(self, pool: Pool) -> Float32[np.ndarray, "b K 5"]:
        """Returns the probability, not calibrated, of each candidate's being within each of THRESHOLDS_KM."""
        return np.asarray(jax.nn.sigmoid(self._scorer(jnp.asarray(self._evidence(pool)))))

    def choices(self, pool: Pool) -> dict[str, Int[np.ndarray, " b"]]:
        """Returns the index of the candidate that each of three ways takes.

        verifier: with the most expected accuracy, by the scorer, over all thresholds alike. comparator: around which
        photos are most alike to the comparator. likeness: to the comparator and the backbone, which knows less of where
        photos were taken, and is less at a loss where they are of another kind.
        """
        features = self._evidence(pool)
        widths = self._options.widths_km
        each = len(widths) + 3  # features that _similarities gives, of the comparator first
        learned, plain = (features[..., i * each + widths.index(self._options.width_km)] for i in range(2))
        found = np.asarray(choose(self._scorer(jnp.asarray(features)))), learned.argmax(1), (learned + plain).argmax(1)
        return dict(zip(CANDIDATE_CHOICES, found, strict=True))

    def points(self, pool: Pool) -> dict[str, Float[np.ndarray, "b 2"]]:
        """Returns the place that the last two of those ways take from the whole gallery, candidate or not."""
        return dict(zip(GALLERY_CHOICES, self._evidence.densest(pool), strict=True))


def open_augmented_gallery(folder: epath.Path, gallery: Table) -> AugmentedGallery:
    """Returns the gallery's photos with the views of them that `learn.verifier` put in a folder."""
    return AugmentedGallery(gallery, encodings.open(folder / "views.npy"), records.open_array(folder / "owner.npy"))


def _once(way: Callable[[Pool], dict[str, Any]]) -> Callable[[Pool], dict[str, Any]]:
    """Returns what asks again only for another pool than the last: all selectors choose from one before the next."""
    last: list[Any] = [None, {}]

    def shared(pool: Pool) -> dict[str, Any]:
        if last[0] is not pool:
            last[:] = pool, way(pool)
        return last[1]

    return shared
