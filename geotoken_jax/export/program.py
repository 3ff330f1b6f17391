"""The whole model as one function of arrays, from a photo's pixels to its place with radii, for other runtimes.

The function has three arguments: the parameters, the gallery and the photos. It computes the same as `GeoToken.predict`
with exact search, in float32, from the same functions: features, vectors, neighbors, candidates, the choice of the
export's selector, radii and probabilities within thresholds.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jax import export

from geotoken_jax import randomness, settings
from geotoken_jax.backbone.settings import BackboneSettings
from geotoken_jax.export import standalone
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model import reranker
from geotoken_jax.model.comparator import ComparatorTask
from geotoken_jax.model.geotoken import GeoTokenModel, Memory
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.model.reranker import Reranker, RerankerSettings
from geotoken_jax.model.reward import RewardTask, choose
from geotoken_jax.predict import beam, bundle, parts, rerank, sample, search
from geotoken_jax.predict.decode import CAPACITY, CELLS
from geotoken_jax.predict.parts import Parts
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.select import SELECTORS, SelectorInputs
from geotoken_jax.settings import SettingsError
from geotoken_jax.vectors import unit

#: Gallery rows per block of scores.
_ROWS = 65_536
#: Largest number of ranked places in an answer.
_PLACES = 16
#: Name of an output -> its shape per photo, in letters, and its meaning. B photos, K candidates, T tokens, M neighbors.
OUTPUTS = {
    "coordinates": "[B, 2] the answer: latitude and longitude in degrees",
    "radius_km": "[B, 2] radii around the answer in km that contain the photo's place with 50 % and 90 %",
    "within": "[B, 5] probability that the photo's place is within 1, 25, 200, 750 and 2500 km of the answer",
    "candidates": "[B, K, 2] the decoder's candidates: latitude and longitude in degrees",
    "cell_tokens": "[B, K, T] tokens of the candidates' cells",
    "log_probability": "[B, K] log-probability of the candidates' cells, in nats",
    "neighbors": "[B, M] rows of the neighbors in the gallery, best first; -1 if missing",
    "neighbor_scores": "[B, M] inner products of the photo's and the neighbor's index vectors, at most 3",
    "places": "[B, 16, 2] the most probable places, if the reranker chooses: latitude and longitude in degrees",
    "place_probability": "[B, 16] probability of each of them",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """The function of one export.

    model: all parameters. gallery: name -> shape and type of each array of the gallery. photo: name, shape and type of
    the input for one photo: `pixels` [h, w, 3] uint8, or `features` [C] float32 if the export lacks its backbone's
    checkpoint. run: function of the model, of the gallery's arrays by name and of the photos; it returns the arrays of
    OUTPUTS by name. prepare: how a photo becomes pixels, for preprocess.prepare; None without a backbone.
    """

    model: nnx.Module
    gallery: dict[str, jax.ShapeDtypeStruct]
    photo: tuple[str, jax.ShapeDtypeStruct]
    run: Callable[[Any, Mapping[str, Any], Any], dict[str, Any]]
    prepare: dict[str, Any] | None

    def photos(self) -> jax.ShapeDtypeStruct:
        """Returns shape and type of the input for a symbolic number of photos."""
        (b,) = export.symbolic_shape("b")
        return jax.ShapeDtypeStruct((b, *self.photo[1].shape), self.photo[1].dtype)


class _Model(nnx.Module):
    """The modules of an export, in one tree of parameters."""

    def __init__(self, **modules: Any):
        for name, module in modules.items():
            if module is not None:
                setattr(self, name, module)


def load(folder: epath.PathLike, *, plain: bool = False) -> Program:
    """Returns the program of an export.

    plain: for runtimes without bfloat16 and without jax's random numbers. The decoder then computes in float32, and the
    random numbers of the samples are constants of the program. Raises SettingsError if the model has another scheme
    than S2 cells, or decodes by beam search and `plain` is True.
    """
    folder = epath.Path(folder)
    found = parts.read(folder, dtype="float32" if plain else None)
    cells, options = found.decoder.settings.cells, found.predict
    if not isinstance(cells, CellScheme):
        raise SettingsError(
            f"config.model.scheme is {found.decoder.settings.scheme!r}, but programs decode S2 cells only: use "
            "GeoToken.load for this model"
        )
    if plain and options.beam:
        raise SettingsError(
            f"config.predict.beam is {options.beam}, but this target can only sample: set it to 0 and export again"
        )
    tower, prepare = _tower(folder, found.config["backbone"])
    width = found.decoder.settings.backbone_width
    photo = ("features", jax.ShapeDtypeStruct((width,), jnp.float32))
    if tower:
        photo = ("pixels", jax.ShapeDtypeStruct((tower.side, tower.side, 3), jnp.uint8))
    gallery = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays(folder).items()}
    modules = {"aligned": found.aligned, "decoder": found.decoder, **_selector(found)}
    model = _Model(**modules, tower=getattr(tower, "model", None))
    noise = _noise(found) if plain else None

    def run(model: Any, gallery: Mapping[str, Any], photos: Any) -> dict[str, Any]:
        features = tower.features(getattr(model, "tower", None), photos) if tower else photos
        return _Answering(model, found, gallery, noise)(features)

    return Program(model, gallery, photo, run, prepare)


def arrays(folder: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the gallery's arrays that an export's program reads, by name.

    embeddings [N, 3, C] bfloat16, or int8 with scales [N, 3] float32. coordinates [N, 2] float32, in degrees. tokens
    [N, 21] uint8. If the reranker chooses, the vectors [n, D] of its channels except `index`: NAME in bfloat16 or
    float32, or in int8 with NAME_scales [n] float32; owner [n] int32, the gallery row of each image of the channel
    `comparator`; and source [N] int32, the number of each photo's source, if there are several sources.
    """
    columns = standalone.arrays(pathlib.Path(folder))
    return {name: x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x for name, x in columns.items()}


def _tower(folder: epath.Path, section: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Returns the image tower of an export's backbone and how it prepares photos; None, None without its checkpoint."""
    if section["backbone"] == "huggingface" and not section["huggingface"]["path"]:
        return None, None
    section = bundle.backbone(folder, section, None, None)
    from geotoken_jax import backbone  # its imports take a second

    made: Any = backbone.make(settings.read(BackboneSettings, section, "backbone"))
    return made.tower(), made.preparation


def _selector(found: Parts) -> dict[str, Any]:
    """Returns the modules that the export's selector needs, by name."""
    choice, width = found.predict.choice, found.decoder.settings.backbone_width
    if choice == "reward":
        task = RewardTask(found.learned["reward"], found.decoder.settings.width)
        return {"reward": found.module("reward/parameters.safetensors", task.init)}
    if choice != "reranker":
        return {}
    options: RerankerSettings = found.learned["reranker"]
    modules: dict[str, Any] = {"reranker": rerank.read(found.folder / "reranker", options)[0]}
    if "comparator" in options.channels:
        task = ComparatorTask(found.learned["comparator"], np.zeros(width, np.float32))
        modules["comparator"] = found.module("channels/comparator/parameters.safetensors", task.init)
    if "backbone" in options.channels:
        modules["whitening"] = nnx.Param(np.load(found.folder / "channels" / "backbone" / "whitening.npy"))
    return modules


def _noise(found: Parts) -> np.ndarray:
    """Returns the noise [T, K, V] of the samples for number 0, as in GeoToken.predict; see sample.noise."""
    key = jax.random.fold_in(randomness.key(found.predict.seed), 0)
    cells, samples = found.decoder.settings.cells, found.predict.samples
    drawn = [sample.noise(key[None], jnp.int32(t), samples, max(cells.vocab_sizes))[0] for t in range(cells.length)]
    return np.stack(drawn)


def _no_selector(name: str) -> Any:
    raise AssertionError(f"the program computes the selector {name} itself")


class _Answering:
    """Computes the answers of photos inside a jax transformation."""

    def __init__(self, model: Any, found: Parts, gallery: Mapping[str, Any], noise: np.ndarray | None):
        self.model, self.found, self.gallery, self.noise = model, found, gallery, noise

    def __call__(self, features: Any) -> dict[str, Any]:
        """Returns the outputs. features: [b, C] float32."""
        decoder: Any = self.model.decoder
        options = decoder.settings
        # Rounded as in features/ and in tables, so that a photo has the same vectors as there.
        query: Any = _rounded(unit(self.model.aligned.embed(_rounded(features))))
        rows, scores = self._nearest("index", _flat(unit(query)), options.neighbors)
        found = self._neighbors(rows)
        memory = decoder.encode(query.astype(options.dtype), found)
        drawn = self._draw(decoder, memory)
        places = self.gallery["coordinates"][jnp.maximum(rows, 0)]
        pool = Pool(
            drawn,
            options.cells.prefix_centers(drawn.tokens, jnp.full(drawn.tokens.shape[:-1], options.cells.length)),
            query,
            found.embeddings.astype(jnp.float32),
            places,
            scores,
            found.count,
            self._distribution(decoder, memory),
        )
        outputs = {
            **self._answer(pool, memory),
            "candidates": pool.coordinates,
            "cell_tokens": drawn.tokens,
            "log_probability": drawn.log_probability,
            "neighbors": rows,
            "neighbor_scores": scores,
        }
        return {name: outputs[name] for name in OUTPUTS if name in outputs}

    def _neighbors(self, rows: jax.Array) -> Any:
        """Returns the neighbors in gallery rows [b, M] as the decoder reads them."""
        options, at = self.model.decoder.settings, jnp.maximum(rows, 0)
        embeddings = self._embeddings(self.gallery["embeddings"][at], lambda scales: scales[at])
        tokens = options.cells.regroup(self.gallery["tokens"][at])
        return Neighbors(embeddings.astype(options.dtype), tokens, (rows >= 0).sum(1, dtype=jnp.int32))

    def _embeddings(self, stored: jax.Array, part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns stored embeddings of some gallery photos in float32. part: function that takes these photos' rows of
        an array."""
        if "scales" not in self.gallery:
            return stored.astype(jnp.float32)
        return _rounded(stored.astype(jnp.float32) * part(self.gallery["scales"])[..., None])

    def _nearest(self, channel: str, queries: Any, k: int) -> tuple[Any, Any]:
        """Returns rows [b, k] and scores of the gallery photos nearest to queries [b, D] in a channel, best first."""
        total = len(self.gallery["coordinates"])
        if channel == "comparator":
            best = jnp.full((queries.shape[0], total), -jnp.inf)
            owner = self.gallery["owner"]

            def add(best: jax.Array, first: Any, size: int) -> jax.Array:
                rows = jax.lax.dynamic_slice_in_dim(owner, first, size)
                return best.at[:, rows].max(self._products(channel, queries, first, size))

            best = _over_blocks(add, best, len(owner))
            return _padded(*jax.lax.top_k(best, min(k, total)), k)

        kept = min(k, total)

        def merge(best: tuple[jax.Array, jax.Array], first: Any, size: int) -> tuple[jax.Array, jax.Array]:
            products = self._products(channel, queries, first, size)
            scores, at = jax.lax.top_k(products, min(kept, size))
            rows = at + first
            # Blocks may overlap: a row that an earlier block has counts once.
            again = (rows[:, :, None] == best[1][:, None, :]).any(2)
            scores = jnp.concatenate([best[0], jnp.where(again, -jnp.inf, scores)], 1)
            rows = jnp.concatenate([best[1], rows], 1)
            scores, at = jax.lax.top_k(scores, kept)
            return scores, jnp.take_along_axis(rows, at, 1)

        none = jnp.full((queries.shape[0], kept), -jnp.inf), jnp.full((queries.shape[0], kept), -1, jnp.int32)
        scores, rows = _over_blocks(merge, none, total)
        return _padded(scores, rows, k)

    def _products(self, channel: str, queries: jax.Array, first: Any, size: int) -> jax.Array:
        """Returns the inner products [b, size] of queries with a block of a channel's vectors."""

        def part(values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(values, first, size)

        if channel == "index":
            vectors = _flat(unit(self._embeddings(part(self.gallery["embeddings"]), part)))
            return jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
        vectors = part(self.gallery[channel]).astype(jnp.float32)
        products = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
        scales = self.gallery.get(f"{channel}_scales")
        return products if scales is None else products * part(scales)

    def _draw(self, decoder: GeoTokenModel, memory: Memory) -> Any:
        options, noise = self.found.predict, self.noise
        if options.beam:
            return beam.search(decoder, memory, options.beam)
        if noise is not None:
            fixed = jnp.asarray(noise)
            k = 1 + options.samples
            return sample.draw(decoder, memory, lambda t: fixed[t], k, options.temperature, options.top_p)
        key = jax.random.fold_in(randomness.key(options.seed), 0)  # of number 0, as in GeoToken.predict
        keys = jnp.broadcast_to(key, (memory.lengths.shape[0], *key.shape))
        return sample.sample(decoder, memory, keys, options.samples, options.temperature, options.top_p)

    def _distribution(self, decoder: GeoTokenModel, memory: Memory) -> Any:
        """Returns the decoder's distribution over places; None if the model is not searched."""
        options = self.found.predict.search
        if not options.expansions:
            return None
        cells: Any = decoder.settings.cells
        length = 1 + options.level // cells.group
        limits = dict(width=options.width, expansions=options.expansions, capacity=CAPACITY)
        return search.distribution(
            search.search(decoder, memory, options.leaves, length=length, **limits), cells, CELLS
        )

    def _answer(self, pool: Any, memory: Memory) -> dict[str, jax.Array]:
        """Returns the answer, its radii and probabilities and, if the reranker chooses, the most probable places."""
        places, distribution = {}, pool.distribution
        if self.found.predict.choice == "reranker":
            coordinates, probability, chosen = self._rank(pool)
            distribution = rerank.discs(coordinates, probability)
            # The package computes radii around coordinates of 5 decimals, and so does this function.
            listed = min(_PLACES, probability.shape[1])
            places["places"] = distribution.coordinates[:, :listed]
            places["place_probability"] = distribution.probability[:, :listed]
            answer = jnp.take_along_axis(coordinates, chosen[:, None, None], 1)[:, 0]
        else:
            chosen = self._choose(pool, memory)
            points = chosen.ndim == 2
            answer = chosen if points else jnp.take_along_axis(pool.coordinates, chosen[:, None, None], 1)[:, 0]
        if distribution is None:
            radius, within = _of_samples(pool.coordinates, answer)
        else:
            radius, within = self.found.calibration.traced(distribution, answer)
        return {"coordinates": answer, "radius_km": radius, "within": within, **places}

    def _choose(self, pool: Any, memory: Memory) -> Any:
        """Returns the choice of a selector other than the reranker: indices [b] of candidates, or points [b, 2]."""
        choice = self.found.predict.choice
        if choice == "reward":
            return choose(self.model.reward(self.model.decoder.states(memory, pool.candidates.tokens)))
        if choice == "similarity":
            b, k = pool.coordinates.shape[:2]
            vectors = unit(self.model.aligned.location(pool.coordinates.reshape(-1, 2))).reshape(b, k, -1)
            return jnp.einsum("bkc,bc->bk", vectors, pool.query[:, 1]).argmax(1)
        inputs = SelectorInputs(self.found.predict.vote, lambda: self.model.aligned, _no_selector)
        return SELECTORS[choice](inputs)(pool)

    def _rank(self, pool: Any) -> tuple[Any, Any, Any]:
        """Returns the reranker's candidates in degrees [b, K, 2], their probabilities, and the index of the answer."""
        network: Reranker = self.model.reranker
        options = network.settings
        image = pool.query[:, 0]
        queries = {
            "index": lambda: _flat(unit(pool.query)),
            "location": lambda: unit(pool.query[:, 1]),
        }
        if "backbone" in options.channels:
            whitening = self.model.whitening[...]
            queries["backbone"] = lambda: unit((unit(image) - whitening[0]) @ whitening[1:])
        if "comparator" in options.channels:
            queries["comparator"] = lambda: self.model.comparator(image)
        found = [self._nearest(name, queries[name](), options.depth) for name in options.channels]
        rows, scores = (jnp.stack(columns, 1) for columns in zip(*found, strict=True))
        places = self.gallery["coordinates"][jnp.maximum(rows, 0)]
        sources = self.gallery["source"][jnp.maximum(rows, 0)] if options.sources else None
        candidates = rerank.assemble(options, pool, rows, scores, places, sources)
        features = reranker.features(options, network.scale[...], candidates.evidence)
        log_p = network(features, candidates.present)
        chosen = reranker.choose(options.objective, log_p, candidates.evidence)
        return candidates.coordinates, jnp.exp(log_p), chosen


def _of_samples(candidates: Any, answer: Any) -> tuple[jax.Array, jax.Array]:
    """Returns radii [b, 2] and probabilities [b, 5] from the shares of candidates around each answer."""
    km = distance.pairwise_km(answer[:, None], candidates)[:, 0]
    share = (km[:, None, :] <= km[:, :, None]).mean(-1, dtype=jnp.float32)
    radii = [jnp.where(share >= p - 1e-6, km, jnp.inf).min(1) for p in (0.5, 0.9)]
    limits = jnp.array(distance.THRESHOLDS_KM, jnp.float32)
    return jnp.stack(radii, 1), (km[:, None] <= limits[:, None]).mean(-1, dtype=jnp.float32)


def _over_blocks(step: Callable[[Any, Any, int], Any], start: Any, rows: int) -> Any:
    """Returns the result of `step` over blocks of rows. The last block overlaps the one before, to have its size."""
    if rows <= _ROWS:
        return step(start, 0, rows)
    firsts = np.minimum(np.arange(0, rows, _ROWS), rows - _ROWS).astype(np.int32)
    return jax.lax.scan(lambda carry, first: (step(carry, first, _ROWS), None), start, jnp.asarray(firsts))[0]


def _flat(vectors: jax.Array) -> jax.Array:
    return vectors.reshape(vectors.shape[0], vectors.shape[1] * vectors.shape[2])


def _padded(scores: jax.Array, rows: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns rows and scores of k neighbors; a missing one has row -1 and score -inf."""
    rows = jnp.where(jnp.isfinite(scores), rows, -1)
    if rows.shape[1] == k:
        return rows, scores
    missing = (rows.shape[0], k - rows.shape[1])
    more = jnp.full(missing, -1, rows.dtype), jnp.full(missing, -jnp.inf)
    return jnp.concatenate([rows, more[0]], 1), jnp.concatenate([scores, more[1]], 1)


def _rounded(values: jax.Array) -> jax.Array:
    """Returns float32 values rounded to bfloat16. A cast there and back may be left out by the compiler."""
    return jax.lax.reduce_precision(values.astype(jnp.float32), 8, 7)
