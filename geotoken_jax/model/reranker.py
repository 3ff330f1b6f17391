"""The reranker's network: features of the places in a pool, and the probability that each is the photo's place.

A pool has candidates from several channels (predict/channels.py). A candidate's features say how strongly each channel
supports the places around it: the neighbors of a channel by their scores and ranks, and the decoder by its probability
of the cells there. The features have no units of a backbone: scores enter relative to the photo's best score, divided
by a scale that is measured on the photos of the fit.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from geotoken_jax.geo.distance import EARTH_RADIUS_KM, THRESHOLDS_KM
from geotoken_jax.model.comparator import Measured

#: Names of the channels. "index" searches by the vectors of the gallery's own index: image, location and text;
#: "backbone" by whitened image embeddings; "comparator" by the vectors of the trained comparator; "location" compares
#: the photo's location vector with the encoded coordinates of gallery photos. The comparator's channel searches images,
#: which are the gallery's photos and their augmented views; the others search photos.
CHANNELS = ("index", "backbone", "comparator", "location")
#: Distances in km within which a channel's best neighbor and the share of the decoder's samples are features.
_NEIGHBOR_KM, _SAMPLE_KM = (1.0, 25.0, 200.0), (1.0, 25.0, 200.0, 750.0)
#: Distances in km within which the decoder's probability is a feature.
_MASS_KM = (1.0, 5.0, 25.0, 200.0, 750.0)
#: Smallest density and smallest probability, so that their logarithms are finite.
_LEAST_DENSITY, _LEAST_MASS = 1e-6, 1e-7
#: Smallest relative score; a neighbor with a smaller one, or none within the distance, counts as this.
_LEAST_SCORE = -4.0
#: Rank of the neighbor whose distance in score from the best one is a channel's scale.
SCALE_RANK = 32
#: Weight of a candidate's probability beside its expected value; it decides only between equal values.
_TIE = 1e-5
#: Kilometers in which the value of an answer falls to 1 / e in GeoGuessr's points.
_POINTS_KM = 1492.7


@dataclasses.dataclass(frozen=True)
class RerankerSettings:
    """Settings of the reranker (config.reranker.model).

    channels: names of the channels that search the gallery, see CHANNELS. depth: number of neighbors
    per channel that features are computed from, above 32. candidates: number of these neighbors, the best ones, whose
    places are candidates. cells: number of the decoder's most probable cells whose centers are candidates. widths_km:
    standard deviations of the Gaussians around neighbors in the features. sharpness: factors on relative scores in
    the weights of neighbors. hidden: width of the hidden layer; 0 for a linear network. objective: value that the
    answer is chosen for, one of OBJECTIVES.
    """

    channels: tuple[str, ...]
    depth: int
    candidates: int
    cells: int
    widths_km: tuple[float, ...]
    sharpness: tuple[float, ...]
    hidden: int
    objective: str

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}: choose one of {', '.join(OBJECTIVES)}")
        for name in self.channels:
            if name not in CHANNELS:
                raise ValueError(f"channels has {name!r}: choose among {', '.join(CHANNELS)}")
        if self.depth <= SCALE_RANK or not 0 < self.candidates <= self.depth:
            raise ValueError(
                f"depth is {self.depth} with {self.candidates} candidates: set depth above {SCALE_RANK}, and "
                "candidates from 1 to depth"
            )


class Evidence(NamedTuple):
    """What the reranker knows of b photos, as arrays of fixed shapes. Places are unit vectors.

    candidates: places of K candidates. present: False for padding and for a place that an earlier candidate has too.
    channels: which of S sources brought each candidate: the channels, then the decoder's samples, then its cells.
    neighbors: places of the L neighbors per channel, best first. scores: their scores, -inf if missing. samples: places
    of the decoder's candidates. cells, radius_km, probability: the decoder's distribution over places, as discs.
    """

    candidates: Float[Any, "b K 3"]
    present: Bool[Any, "b K"]
    channels: Bool[Any, "b K S"]
    neighbors: Float[Any, "b C L 3"]
    scores: Float[Any, "b C L"]
    samples: Float[Any, "b N 3"]
    cells: Float[Any, "b F 3"]
    radius_km: Float[Any, "b F"]
    probability: Float[Any, "b F"]


def scales(scores: Float[np.ndarray, "n C L"]) -> Float[np.ndarray, " C"]:
    """Returns each channel's scale, the median over photos of the best score less the 32nd. Missing scores are -inf.

    A channel whose photos all have fewer neighbors has the scale of their last ones, and 1 if there are none.
    """
    last = np.clip(np.isfinite(scores).sum(-1) - 1, 0, SCALE_RANK - 1)
    finite = np.where(np.isfinite(scores), scores, 0)
    fall = finite[..., 0] - np.take_along_axis(finite, last[..., None], -1)[..., 0]
    columns = [some[kept] for some, kept in zip(fall.T, (last > 0).T, strict=True)]
    medians = [np.median(column) if len(column) else 1.0 for column in columns]
    return np.maximum(np.array(medians), 1e-6).astype(np.float32)


def kilometers(a: Float[Any, "... n 3"], b: Float[Any, "... m 3"]) -> Float[Any, "... n m"]:
    """Returns great-circle distances between unit vectors, in km.

    Differences are squared: an inner product in float32 would be wrong by 2 km for near points.
    """
    squares = sum((a[..., :, None, i] - b[..., None, :, i]) ** 2 for i in range(3))
    return 2 * EARTH_RADIUS_KM * jnp.arcsin(jnp.minimum(jnp.sqrt(squares) / 2, 1.0))


def names(settings: RerankerSettings) -> list[tuple[str, str]]:
    """Returns the group and the name of each feature, in their order. The groups are the channels and the decoder."""
    listed = []
    for channel in settings.channels:
        listed += [(channel, f"density {s:g} {w:g} km") for s in settings.sharpness for w in settings.widths_km]
        listed += [(channel, f"{kind} within {km:g} km") for km in _NEIGHBOR_KM for kind in ("best score", "rank")]
    listed += [("decoder", f"probability within {km:g} km") for km in _MASS_KM]
    listed += [("decoder", f"samples within {km:g} km") for km in _SAMPLE_KM]
    return listed + [("source", name) for name in (*settings.channels, "samples", "cells")]


def features(settings: RerankerSettings, scale: Float[Any, " C"], evidence: Evidence) -> Float[Any, "b K F"]:
    """Returns the features of all candidates, in the order of `names`.

    Per channel: for each sharpness and width, the logarithm of the weighted share of neighbors around the candidate;
    for each distance, the best relative score within it and 1 / the rank of that neighbor. Of the decoder: the
    logarithm of its probability within each distance, and the share of its samples. Last: the sources.

    scale: see `scales`.
    """
    columns = []
    for c in range(evidence.neighbors.shape[1]):
        columns += _channel(settings, scale[c], evidence.candidates, evidence.neighbors[:, c], evidence.scores[:, c])
    km = kilometers(evidence.candidates, evidence.cells)
    for limit in _MASS_KM:
        share = _share(km, evidence.radius_km[:, None], limit)
        columns.append(jnp.log(jnp.einsum("bkf,bf->bk", share, evidence.probability) + _LEAST_MASS))
    km = kilometers(evidence.candidates, evidence.samples)
    columns += [(km <= limit).astype(jnp.float32).mean(-1) for limit in _SAMPLE_KM]
    columns += [evidence.channels[..., i].astype(jnp.float32) for i in range(evidence.channels.shape[-1])]
    return jnp.stack(columns, -1)


def _channel(settings: RerankerSettings, scale: Any, candidates: Any, neighbors: Any, scores: Any) -> list:
    """Returns the features of one channel [b, K]."""
    km = kilometers(candidates, neighbors)
    found = jnp.isfinite(scores)
    # The best score may be missing too. It is then 0, so that no difference of infinities is computed.
    best = jnp.where(found[:, :1], scores[:, :1], 0.0)
    relative = jnp.where(found, (jnp.where(found, scores, 0.0) - best) / scale, -jnp.inf)
    kernels = [jnp.exp(-0.5 * (km / width) ** 2) for width in settings.widths_km]
    columns = []
    for sharpness in settings.sharpness:
        weights = jnp.exp(sharpness * relative)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        columns += [jnp.log(jnp.einsum("bkl,bl->bk", kernel, weights) + _LEAST_DENSITY) for kernel in kernels]
    for limit in _NEIGHBOR_KM:
        inside = (km <= limit) & found[:, None]
        columns.append(jnp.maximum(jnp.where(inside, relative[:, None], _LEAST_SCORE).max(-1), _LEAST_SCORE))
        columns.append(jnp.where(inside.any(-1), 1 / (1.0 + inside.argmax(-1)), 0.0))
    return columns


def _share(km: Any, radius: Any, limit: float) -> Any:
    """Returns the share of a disc within `limit` km of a point that is `km` from its center, as select._share does."""
    crossed = (limit - jnp.abs(km - radius)) / (2 * jnp.minimum(km, radius) + 1e-6)
    return jnp.where(km < radius, jnp.minimum((limit / radius) ** 2, 1.0), jnp.clip(crossed, 0.0, 1.0))


class Reranker(nnx.Module):
    """Maps features of candidates to log-probabilities over the pool."""

    def __init__(
        self,
        settings: RerankerSettings,
        moments: Float[np.ndarray, "2 F"],
        scale: Float[np.ndarray, " C"],
        *,
        rngs: nnx.Rngs,
    ):
        """moments: mean and standard deviation of each feature. scale: see `scales`.

        The first weights multiply the densities of all channels and of the decoder. A fit on few photos stays near this
        product.
        """
        self.settings = settings
        self.moments, self.scale = (Measured(jnp.asarray(values, jnp.float32)) for values in (moments, scale))
        self.linear = nnx.Linear(moments.shape[1], 1, use_bias=False, rngs=rngs)
        self.linear.kernel[...] = jnp.asarray(_product(settings) * moments[1])[:, None]
        self.layers = nnx.List([])
        if settings.hidden:
            self.layers.append(nnx.Linear(moments.shape[1], settings.hidden, rngs=rngs))
            zeros = nnx.initializers.zeros
            self.layers.append(nnx.Linear(settings.hidden, 1, use_bias=False, kernel_init=zeros, rngs=rngs))

    def __call__(self, features: Float[Any, "b K F"], present: Bool[Any, "b K"]) -> Float[Any, "b K"]:
        """Returns log-probabilities, -1e9 for candidates that are not present."""
        mean, deviation = self.moments[...]
        x = jnp.clip((features - mean) / (deviation + 1e-3), -5, 5)
        logits = self.linear(x)
        if self.layers:
            logits = logits + self.layers[1](jax.nn.gelu(self.layers[0](x)))
        return jax.nn.log_softmax(jnp.where(present, logits[..., 0], -1e9), -1)


def _product(settings: RerankerSettings) -> Float[np.ndarray, " F"]:
    """Returns weights of features: 1 in all for the densities of channels, 1/2 for the decoder's probability."""
    listed, weights = names(settings), np.zeros(len(names(settings)), np.float32)
    for i, (group, name) in enumerate(listed):
        if name.startswith("density"):
            weights[i] = 1 / max(1, sum(other.startswith("density") for _, other in listed))
        if group == "decoder" and name.startswith("probability"):
            weights[i] = 0.5 / len(_MASS_KM)
    return weights


def within_loss(log_p: Float[Any, "b K"], km: Float[Any, "b K"], present: Bool[Any, "b K"]) -> Float[Any, ""]:
    """Returns minus the logarithm of the probability of candidates near the truth, in nats.

    It is a mean over photos and THRESHOLDS_KM. A photo without a candidate within a threshold does not count there.
    km: distance of each candidate from the truth.
    """
    near = (km[..., None] <= jnp.asarray(THRESHOLDS_KM, jnp.float32)) & present[..., None]
    mass = jnp.einsum("bk,bkt->bt", jnp.exp(log_p), near.astype(jnp.float32))
    return -(jnp.log(mass + 1e-4) * near.any(1)).mean()


#: Objective -> value of an answer by its distance in km from the truth, in [0, 1].
OBJECTIVES = {
    "accuracy": lambda km: sum((km <= limit).astype(jnp.float32) for limit in THRESHOLDS_KM) / len(THRESHOLDS_KM),
    **{f"{limit}_km": lambda km, limit=limit: (km <= limit).astype(jnp.float32) for limit in THRESHOLDS_KM},
    "geoscore": lambda km: jnp.exp(-km / _POINTS_KM),
}


def choose(objective: str, log_p: Float[Any, "b K"], evidence: Evidence) -> Int[Any, " b"]:
    """Returns the index of the candidate with the highest expected value, if the truth were drawn from the pool.

    Of candidates with equal values, as near ones often have, the most probable is chosen.
    """
    value = OBJECTIVES[objective](kilometers(evidence.candidates, evidence.candidates))
    expected = jnp.einsum("bij,bj->bi", value, jnp.exp(log_p))
    return jnp.where(evidence.present, expected + _TIE * jnp.exp(log_p), -1.0).argmax(-1)
