"""The trained verifier: features of every candidate of a pool, and the selectors that choose by them.

The verifier compares a photo with the gallery photos that were taken nearest to each candidate. Retrieval returns few
of these gallery photos. Their similarity to the photo, by the trained comparator and by the backbone, is therefore new
information. Two selectors choose not a candidate but the location of a gallery photo: the one with the highest density
of similar photos around it.
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
from geotoken_jax.settings import SettingsError
from geotoken_jax.vectors import unit

#: Photos per batch; with 31 candidates and 64 gallery photos near each, they make 0.5 million pairs.
_BATCH = 256
#: Selectors that choose a candidate, and selectors that choose a point in the gallery.
CANDIDATE_CHOICES, GALLERY_CHOICES = ("verifier", "comparator", "likeness"), ("point_comparator", "point_likeness")
#: Images per block, always the same number, so that one shape is compiled.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class VerifierSettings:
    """Settings of the verifier's features and selectors (config.verifier.model).

    near: number of gallery photos per candidate, the nearest ones, that the photo is compared with. similar: number of
    images of the augmented gallery, the ones most similar to the photo, whose locations may be chosen. widths_km:
    standard deviations of the Gaussians that weight gallery photos by their distance from a candidate. width_km:
    element of widths_km that the selectors `comparator` and `likeness` use. point_km: standard deviation of the
    Gaussian in the density of similar photos. sharpness: s in the weight exp(s * cosine) of a similar photo. floor:
    largest difference, in nats, between a candidate's feature and the best of its pool; larger ones are clipped.
    temperature: temperature of the weights exp(score / temperature) of the photo's neighbors. comparator: settings of
    the comparator. scorer: settings of the scorer.
    """

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
    """The image embeddings of all N gallery photos and, after them, of their W augmented views, if there are any.

    An image is a row of the augmented gallery: a gallery photo or a view of one. of [N, 1 + V]: images of each gallery
    photo, first the photo itself, then its views; V is the largest number of views of a photo. A photo with fewer is
    padded with itself. owner [N + W]: gallery row of each image.
    """

    def __init__(self, gallery: Table, views: Vectors, owner: Int[np.ndarray, " W"]):
        """views [W, C]: image embeddings of views, W >= 0. owner: gallery row of the photo that each view shows."""
        photos = np.arange(len(gallery))
        self.owner = np.concatenate([photos, owner])
        order = np.argsort(owner, kind="stable")
        first, last = (np.searchsorted(owner[order], photos, side)[:, None] for side in ("left", "right"))
        v = np.arange((last - first).max())
        images = len(photos) + order[np.minimum(first + v, len(order) - 1)]
        self.of = np.concatenate([photos[:, None], np.where(v < last - first, images, photos[:, None])], 1)
        self._gallery, self._views = gallery, views

    def __len__(self) -> int:
        return len(self.owner)

    def images(self, rows: Int[np.ndarray, " m"]) -> Float32[np.ndarray, "m C"]:
        """Returns the embeddings of the images in `rows`."""
        n = len(self._gallery)
        embeddings = np.empty((len(rows), self._gallery.width), np.float32)
        photo = rows < n
        embeddings[photo] = self._gallery.embeddings(rows[photo])[:, 0]
        embeddings[~photo] = self._views[rows[~photo] - n]
        return embeddings


class NearestPhotos:
    """Finds the gallery photos nearest to a point, in a k-d tree of unit vectors."""

    def __init__(self, coordinates: Float[np.ndarray, "N 2"]):
        self._tree = KDTree(to_unit_vectors(*coordinates.T))

    def __call__(
        self, coordinates: Float[np.ndarray, "n 2"], k: int
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Returns the gallery rows of the k nearest photos, or of all if there are fewer, and their distances in km."""
        k = min(k, self._tree.n)
        chord, rows = map(np.asarray, self._tree.query(to_unit_vectors(*coordinates.T), k))
        rows, chord = (x.reshape(len(coordinates), k) for x in (rows, chord))  # KDTree drops the axis if k is 1
        return rows, 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chord / 2, 1))


def encode(comparator: Comparator, images: Float[np.ndarray, "n C"]) -> Float32[np.ndarray, "n D"]:
    """Returns the comparator's unit vectors for image embeddings."""
    graph, state = nnx.split(comparator)
    vectors = [np.asarray(_encode(graph, state, x.astype(np.float32)))[:n] for x, n in blocks(images, _BLOCK)]
    return np.concatenate([np.zeros((0, comparator.output.out_features), np.float32), *vectors])


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, state: nnx.State, images: np.ndarray) -> jax.Array:
    return nnx.merge(graph, state)(images)


class CandidateFeatures:
    """Computes the features of a pool's candidates, and the points in the gallery where similar photos are dense."""

    def __init__(
        self, options: VerifierSettings, comparator: Comparator, keys: Vectors, augmented: AugmentedGallery,
        gallery: Table, aligned: AlignModel,
    ):  # fmt: skip
        """keys [len(augmented), D]: the comparator's vectors of all images in the augmented gallery."""
        self._options, self._comparator, self._keys, self._augmented = options, comparator, keys, augmented
        self._coordinates = gallery.coordinates()
        self._nearest = NearestPhotos(self._coordinates)
        graph, state = nnx.split(aligned.location)
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
        self._location = lambda coordinates: np.asarray(run(state, jnp.asarray(coordinates, jnp.float32)))

    def __call__(self, pool: Pool) -> Float32[np.ndarray, "b K F"]:
        """Returns F features per candidate, computed without the gallery photos that the pool's rules exclude."""
        starts = range(0, len(pool.coordinates), _BATCH)
        return np.concatenate(
            [self._features(subset(pool, np.arange(n, min(n + _BATCH, len(pool.coordinates))))) for n in starts]
        )

    def densest(self, pool: Pool) -> tuple[Float[np.ndarray, "b 2"], ...]:
        """Returns two arrays of points, one per photo, where the density of similar gallery photos is highest.

        The density is a sum of Gaussians around gallery photos, weighted by similarity to the photo. The gallery photos
        are the owners of the `options.similar` images most similar by the comparator, and the point is the location of
        one of them. In the first array, similarity is by the comparator. In the second, the density by the comparator
        is multiplied by the density by the backbone. If the pool's rules exclude all gallery photos, the point is the
        location of the most probable candidate. Points are in degrees.
        """
        images = np.asarray(pool.query[:, 0], np.float32)
        query, owner = encode(self._comparator, images), self._augmented.owner
        exclude = [lambda queries, rows, rule=rule: rule(queries, owner[rows]) for rule in pool.exclude]
        similar = neighbors.search_neighbors(self, query, min(self._options.similar, len(owner)), exclude)[0]
        rows = np.sort(np.where(similar < 0, len(self._coordinates), owner[similar]), 1)
        # Missing neighbors, and further images of a gallery photo that is already in `rows`.
        left_out = (rows == len(self._coordinates)) | np.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
        rows = np.minimum(rows, len(self._coordinates) - 1)
        at = self._coordinates[rows]
        kernel = np.exp(-0.5 * (pairwise_km(at, at) / self._options.point_km) ** 2)
        sharpness = self._options.sharpness
        by_comparator, by_backbone = (
            np.log(np.einsum("bnm,bm->bn", kernel, np.where(left_out, 0, np.exp(sharpness * (s - 1)))) + 1e-30)
            for s in self._cosines(images, query, rows)
        )
        most_probable = np.take_along_axis(pool.coordinates, log_probability(pool)[:, None, None], 1)[:, 0]
        return tuple(
            np.where(
                left_out.all(1)[:, None],
                most_probable,
                at[np.arange(len(at)), np.where(left_out, -np.inf, score).argmax(1)],
            )
            for score in (by_comparator, by_comparator + by_backbone)
        )

    def search(
        self, queries: Float32[np.ndarray, "n D"], k: int
    ) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Returns the k images most similar by the comparator, and their cosines. `search_neighbors` calls it."""
        return index.exact(self._keys, queries, k)

    def _features(self, pool: Pool) -> Float32[np.ndarray, "b K F"]:
        options, (b, k) = self._options, pool.coordinates.shape[:2]
        rows, km = self._nearest(pool.coordinates.reshape(-1, 2), self._options.near)
        rows, km = rows.reshape(b, -1), km.reshape(b, k, -1)
        excluded = np.zeros(rows.shape, bool)
        for rule in pool.exclude:
            excluded |= rule(np.arange(b), rows)
        km = np.where(excluded.reshape(km.shape), np.inf, km)
        images = np.asarray(pool.query[:, 0], np.float32)
        columns = []
        for cosines in self._cosines(images, encode(self._comparator, images), rows):
            columns += _similarity_features(cosines.reshape(km.shape), km, options)
        columns += [*_pool_features(pool, options.floor), *_neighbor_features(pool, options)]
        columns += [self._location_similarity(pool), np.log1p(np.minimum(km.min(-1), 2e4))]
        return np.stack(columns, -1).astype(np.float32)

    def _cosines(
        self, images: Float32[np.ndarray, "b C"], query: Float32[np.ndarray, "b D"], rows: Int[np.ndarray, "b n"]
    ) -> Iterator[Float32[np.ndarray, "b n"]]:
        """Yields two arrays, the cosines of each photo with its gallery rows by the comparator, then by the backbone.

        The cosine of a gallery photo is the highest of all its images. Each image is read once for all photos.
        """
        photos, position = np.unique(rows, return_inverse=True)
        stored, column = np.unique(self._augmented.of[photos], return_inverse=True)
        for vectors, keys in (
            (query, np.asarray(self._keys[stored], np.float32)),
            (unit(images), unit(self._augmented.images(stored))),
        ):
            cosines = (vectors @ keys.T)[:, column.reshape(-1, self._augmented.of.shape[1])].max(-1)
            yield np.take_along_axis(cosines, position.reshape(rows.shape), 1)

    def _location_similarity(self, pool: Pool) -> np.ndarray:
        """Returns the cosine of the photo's location vector with each candidate's encoded coordinates."""
        b, k = pool.coordinates.shape[:2]
        encoded = unit(self._location(pool.coordinates.reshape(-1, 2))).reshape(b, k, -1)
        return np.einsum("bkc,bc->bk", encoded, unit(np.asarray(pool.query[:, 1], np.float32)))


def _similarity_features(
    cosines: Float[np.ndarray, "b K n"], km: Float[np.ndarray, "b K n"], options: VerifierSettings
) -> list[Float[np.ndarray, "b K"]]:
    """Returns features of the similarity of a photo to the n gallery photos nearest to each candidate.

    First come, for each of widths_km, the logarithm of the sum of the gallery photos' similarities, weighted by their
    distance; then the highest cosine within 25 km, and within 200 km, of the candidate, times `sharpness`. All these
    are differences in nats from the best candidate of the pool, and at least -floor. The last feature is the highest
    cosine within 200 km of any candidate. km: distances from the candidate, inf for an excluded gallery photo.
    """
    weights = np.exp(options.sharpness * (cosines - 1))
    features = [np.log((weights * np.exp(-0.5 * (km / w) ** 2)).sum(-1) + 1e-30) for w in options.widths_km]
    highest = [np.where(km <= limit, cosines, -1.0).max(-1) for limit in (25, 200)]
    features += [options.sharpness * h for h in highest]
    best = np.broadcast_to(highest[1].max(1, keepdims=True), highest[1].shape)
    return [*(np.maximum(f - f.max(1, keepdims=True), -options.floor) for f in features), best]


def _pool_features(pool: Pool, floor: float) -> list[Float[np.ndarray, "b K"]]:
    """Returns log-probabilities, their differences from the pool's best, and shares of candidates near each candidate.

    The tempered log-probability and its difference come first, then the untempered ones; a difference is at least
    -floor. For each of THRESHOLDS_KM, the share counts the pool's candidates within that distance. It is the
    candidate's expected accuracy if the truth were drawn from the pool.
    """
    features = []
    for log_p in (pool.candidates.tempered_log_probability, pool.candidates.log_probability):
        features += [log_p, np.maximum(log_p - log_p.max(1, keepdims=True), -floor)]
    latitude, longitude = np.moveaxis(pool.coordinates, -1, 0)
    km = great_circle_km(latitude[:, :, None], longitude[:, :, None], latitude[:, None], longitude[:, None])
    return features + [(km <= limit).mean(-1) for limit in THRESHOLDS_KM]


def _neighbor_features(pool: Pool, options: VerifierSettings) -> list[Float[np.ndarray, "b K"]]:
    """Returns features of each candidate from the photo's neighbors.

    They are the density of the neighbors at the candidate for each of widths_km, the score of the best neighbor, and
    log(1 + km) for the candidate's distance from the nearest neighbor.
    """
    present = np.arange(pool.neighbor_scores.shape[1]) < pool.neighbor_count[:, None]
    scores = np.where(present, pool.neighbor_scores, -np.inf)
    neighbor, candidate = (np.moveaxis(c, -1, 0) for c in (pool.neighbor_coordinates, pool.coordinates))
    km = great_circle_km(*candidate[..., None], *neighbor[:, :, None])
    km = np.where(present[:, None], km, 2e4)
    densities = [density(km, scores, options.temperature, w) for w in options.widths_km]
    best = scores.max(1, keepdims=True, initial=-3.0)
    return [*densities, np.broadcast_to(best, km.shape[:2]), np.log1p(km.min(-1))]


class Verifier:
    """A trained verifier with its five selectors: three choose a candidate, two choose a point in the gallery."""

    def __init__(self, folder: epath.PathLike, options: VerifierSettings, gallery: Table, aligned: AlignModel):
        """folder: verifier/VARIANT of a work directory, or verifier/ of an export, with a verifier for this gallery.

        Raises SettingsError if the verifier was trained for a gallery with another number of photos.
        """
        folder = epath.Path(folder)
        task = ComparatorTask(options.comparator, np.zeros(gallery.width, np.float32))
        comparator = checkpoint.read_module(folder / "comparator" / "parameters.safetensors", task.init)
        augmented, keys = open_augmented_gallery(folder, gallery), encodings.open_encodings(folder / "keys.npy")
        if len(keys) != len(augmented):
            raise SettingsError(
                f"{folder / 'keys.npy'} has {len(keys):,} rows, but the gallery and its views have {len(augmented):,}: "
                f"the verifier was trained for another gallery. In a work directory, remove {folder} and run `geotoken "
                "learn`; in an export, export again"
            )
        self._options = options
        self._features = CandidateFeatures(options, comparator, keys, augmented, gallery, aligned)
        scorer = ScorerTask(options.scorer, np.load(folder / "moments.npy"))
        self._scorer = checkpoint.read_module(folder / "scorer" / "parameters.safetensors", scorer.init)
        self._choices, self._points = _cached(self.choices), _cached(self.points)

    def selector(self, name: str) -> Selector:
        """Returns a selector by its name in CANDIDATE_CHOICES or GALLERY_CHOICES."""
        results = self._points if name in GALLERY_CHOICES else self._choices
        return lambda pool: results(pool)[name]

    def within(self, pool: Pool) -> Float32[np.ndarray, "b K 5"]:
        """Returns the uncalibrated probability that each candidate is within each of THRESHOLDS_KM of the truth."""
        return np.asarray(jax.nn.sigmoid(self._scorer(jnp.asarray(self._features(pool)))))

    def choices(self, pool: Pool) -> dict[str, Int[np.ndarray, " b"]]:
        """Returns name -> indices of the chosen candidates, for each of the three selectors in CANDIDATE_CHOICES.

        `verifier` chooses the highest expected accuracy by the scorer, averaged over THRESHOLDS_KM. `comparator`
        chooses the candidate near which gallery photos are most similar to the photo, by the comparator. `likeness`
        adds the similarity by the backbone, which separates places less well but depends less on the kind of photo.
        """
        features = self._features(pool)
        widths = self._options.widths_km
        count = len(widths) + 3  # features from _similarity_features, first by the comparator, then by the backbone
        by_comparator, by_backbone = (features[..., i * count + widths.index(self._options.width_km)] for i in range(2))
        scored = np.asarray(choose(self._scorer(jnp.asarray(features))))
        indices = scored, by_comparator.argmax(1), (by_comparator + by_backbone).argmax(1)
        return dict(zip(CANDIDATE_CHOICES, indices, strict=True))

    def points(self, pool: Pool) -> dict[str, Float[np.ndarray, "b 2"]]:
        """Returns name -> chosen coordinates in degrees, for each of the two selectors in GALLERY_CHOICES."""
        return dict(zip(GALLERY_CHOICES, self._features.densest(pool), strict=True))


def open_augmented_gallery(folder: epath.Path, gallery: Table) -> AugmentedGallery:
    """Returns the gallery with the views that `geotoken learn` stored in a folder verifier/VARIANT."""
    return AugmentedGallery(
        gallery, encodings.open_encodings(folder / "views.npy"), records.open_array(folder / "owner.npy")
    )


def _cached(function: Callable[[Pool], dict[str, Any]]) -> Callable[[Pool], dict[str, Any]]:
    """Returns a function that stores its result for the last pool.

    One result is enough: all selectors choose from a pool before the next pool comes.
    """
    last: list[Any] = [None, {}]

    def cached(pool: Pool) -> dict[str, Any]:
        if last[0] is not pool:
            last[:] = pool, function(pool)
        return last[1]

    return cached
