"""The reranker's network: it computes features of a photo's candidates, and the probability of each candidate.

A candidate is a place. The candidates come from the decoder and from channels, which search the gallery for neighbors
of the photo (predict/channels.py). A candidate's features measure how much the channels and the decoder support the
places around it: channels by the scores and ranks of their neighbors there, the decoder by its probability there.

Scores enter as relative scores: the score minus the photo's best score in the channel, divided by the channel's scale
(`scales`). So features of different backbones are comparable.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from geotoken_jax.geo.distance import THRESHOLDS_KM, chord_km
from geotoken_jax.model.comparator import Statistic
from geotoken_jax.settings import Added

#: Names of the channels, which compare different vectors of the photo and of gallery photos. "index": image, location
#: and text embedding, in the gallery's own index. "backbone": whitened image embeddings. "comparator": vectors of the
#: trained comparator; this channel searches augmented views of gallery photos too. "location": the photo's location
#: embedding, and the encoded coordinates of gallery photos.
CHANNELS = ("index", "backbone", "comparator", "location")
#: Radii in km around a candidate. For each radius in _NEIGHBOR_KM, the score and the rank of a channel's best neighbor
#: within it are features. For each radius in _SAMPLE_KM, the share of the decoder's samples within it is a feature.
_NEIGHBOR_KM, _SAMPLE_KM = (1.0, 25.0, 200.0), (1.0, 25.0, 200.0, 750.0)
#: Kinds of features of the best neighbor within a radius.
_BEST = ("best score", "rank")
#: Radii in km around a candidate. For each, the decoder's probability within it is a feature.
_PROBABILITY_KM = (1.0, 5.0, 25.0, 200.0, 750.0)
#: Numbers added to densities and to probabilities, so that their logarithms are finite.
_ADDED_DENSITY, _ADDED_PROBABILITY = 1e-6, 1e-7
#: Lower bound of relative scores as features. The feature also has this value if there is no neighbor in the radius.
_MIN_RELATIVE_SCORE = -4.0
#: Rank of a neighbor, from 1. A channel's scale is the difference between the best score and the score at this rank.
SCALE_RANK = 32
#: A candidate's probability times this number is added to its expected value, to decide between equal expected values.
_TIE_BREAK = 1e-5
#: Distance in km over which a GeoGuessr score falls by a factor of e.
_GEOSCORE_KM = 1492.7


@dataclasses.dataclass(frozen=True)
class RerankerSettings:
    """Settings of the reranker (config.reranker.model).

    channels: names of the channels, see CHANNELS. depth: number of neighbors per channel that features are computed
    from, above 32. candidates: number of a channel's neighbors, the best ones, whose places are candidates. cells:
    number of the decoder's most probable cells whose centers are candidates.
    widths_km, sharpness: settings of the density of a channel's neighbors, which is a weighted sum of Gaussians around
    them. Each pair of a width and a sharpness gives one density. The width is the standard deviation of the Gaussians.
    A neighbor's weight is exp(sharpness x relative score), divided by the sum of these numbers over all neighbors.
    (Relative scores are defined at the beginning of this file.)
    hidden: width of the hidden layer; if 0, the network is linear. objective: key of OBJECTIVES; the answer is the
    candidate with the highest expected value of this objective.
    sources: whether support by other sources is a feature. `geotoken learn` sets it if the gallery has several sources.
    """

    channels: tuple[str, ...]
    depth: int
    candidates: int
    cells: int
    widths_km: tuple[float, ...]
    sharpness: tuple[float, ...]
    hidden: int
    objective: str
    sources: Annotated[bool, Added(False)]

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


class RerankerInputs(NamedTuple):
    """The inputs of the reranker's features for b photos. Places are unit vectors.

    candidates: places of K candidates. present: False for padding, and for a gallery photo that is an earlier candidate
    already. channels: whether each of S sources found the candidate. The sources are the channels, then the decoder's
    samples, then its cells.
    neighbors: places of the L neighbors per channel, best first. scores: scores of the neighbors, -inf if missing.
    samples: places of the decoder's N samples. cells: centers of F discs, which stand for the decoder's cells.
    radius_km: radius of each disc. probability: the decoder's probability of each disc.
    other: whether a neighbor is of another source than the candidate; None if the features do not need it. All
    neighbors are of another source than a candidate of the decoder.
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
    other: Bool[Any, "b K C L"] | None = None


def scales(scores: Float[np.ndarray, "n C L"]) -> Float[np.ndarray, " C"]:
    """Returns each channel's scale: the median over photos of the best score minus the score of the 32nd neighbor.

    For a photo with fewer neighbors, the last neighbor takes the place of the 32nd. Photos with fewer than two do not
    count. If no photo counts, the scale is 1. scores: scores of L neighbors, best first, -inf if missing.
    """
    last = np.clip(np.isfinite(scores).sum(-1) - 1, 0, SCALE_RANK - 1)
    finite = np.where(np.isfinite(scores), scores, 0)
    differences = finite[..., 0] - np.take_along_axis(finite, last[..., None], -1)[..., 0]
    columns = [column[counted] for column, counted in zip(differences.T, (last > 0).T, strict=True)]
    medians = [np.median(column) if len(column) else 1.0 for column in columns]
    return np.maximum(np.array(medians), 1e-6).astype(np.float32)


def names(settings: RerankerSettings) -> list[tuple[str, str]]:
    """Returns the group and the name of each feature, in the order of `features`.

    The groups are the channels, "decoder" and "source".
    """
    listed = []
    for channel in settings.channels:
        listed += [(channel, f"density {s:g} {w:g} km") for s in settings.sharpness for w in settings.widths_km]
        listed += [(channel, f"{kind} within {km:g} km") for km in _NEIGHBOR_KM for kind in _BEST]
        if settings.sources:
            listed += [(channel, f"{kind} of another source within {km:g} km") for km in _NEIGHBOR_KM for kind in _BEST]
    listed += [("decoder", f"probability within {km:g} km") for km in _PROBABILITY_KM]
    listed += [("decoder", f"samples within {km:g} km") for km in _SAMPLE_KM]
    return listed + [("source", name) for name in (*settings.channels, "samples", "cells")]


def features(settings: RerankerSettings, scale: Float[Any, " C"], evidence: RerankerInputs) -> Float[Any, "b K F"]:
    """Returns the features of all candidates, in the order of `names`.

    For each channel:
    - for each sharpness and width, the logarithm of the density of neighbors at the candidate (RerankerSettings);
    - for each of _NEIGHBOR_KM, the relative score of the best neighbor within this radius, and 1 / its rank;
    - if settings.sources is true, the same of the best neighbor of another source than the candidate.
    For the decoder:
    - for each of _PROBABILITY_KM, the logarithm of the decoder's probability within this radius;
    - for each of _SAMPLE_KM, the share of the decoder's samples within this radius.
    For each source: 1 if the source found the candidate, else 0.

    scale: scale of each channel, see `scales`.
    """
    columns = []
    for c in range(evidence.neighbors.shape[1]):
        other = None if evidence.other is None else evidence.other[:, :, c]
        columns += _channel_features(
            settings, scale[c], evidence.candidates, evidence.neighbors[:, c], evidence.scores[:, c], other
        )
    km = chord_km(evidence.candidates, evidence.cells)
    for limit in _PROBABILITY_KM:
        share = _share(km, evidence.radius_km[:, None], limit)
        columns.append(jnp.log(jnp.einsum("bkf,bf->bk", share, evidence.probability) + _ADDED_PROBABILITY))
    km = chord_km(evidence.candidates, evidence.samples)
    columns += [(km <= limit).astype(jnp.float32).mean(-1) for limit in _SAMPLE_KM]
    columns += [evidence.channels[..., i].astype(jnp.float32) for i in range(evidence.channels.shape[-1])]
    return jnp.stack(columns, -1)


def _channel_features(
    settings: RerankerSettings, scale: Any, candidates: Any, neighbors: Any, scores: Any, other: Any
) -> list:
    """Returns the features of one channel, each an array [b, K]. Arguments: see RerankerInputs."""
    km = chord_km(candidates, neighbors)
    found = jnp.isfinite(scores)
    # If even the best score is missing, 0 takes its place. A difference of infinities would be NaN.
    best = jnp.where(found[:, :1], scores[:, :1], 0.0)
    relative = jnp.where(found, (jnp.where(found, scores, 0.0) - best) / scale, -jnp.inf)
    kernels = [jnp.exp(-0.5 * (km / width) ** 2) for width in settings.widths_km]
    columns = []
    for sharpness in settings.sharpness:
        weights = jnp.exp(sharpness * relative)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        columns += [jnp.log(jnp.einsum("bkl,bl->bk", kernel, weights) + _ADDED_DENSITY) for kernel in kernels]
    for counted in [found[:, None], *([found[:, None] & other] if settings.sources else [])]:
        for limit in _NEIGHBOR_KM:
            inside = (km <= limit) & counted
            columns.append(
                jnp.maximum(jnp.where(inside, relative[:, None], _MIN_RELATIVE_SCORE).max(-1), _MIN_RELATIVE_SCORE)
            )
            columns.append(jnp.where(inside.any(-1), 1 / (1.0 + inside.argmax(-1)), 0.0))
    return columns


def _share(km: Any, radius: Any, limit: float) -> Any:
    """Returns the share of a disc that is within a distance of a point, by the formula of predict.select._share.

    km: distance from the point to the disc's center. radius: radius of the disc in km. limit: the distance in km.
    """
    crossed = (limit - jnp.abs(km - radius)) / (2 * jnp.minimum(km, radius) + 1e-6)
    return jnp.where(km < radius, jnp.minimum((limit / radius) ** 2, 1.0), jnp.clip(crossed, 0.0, 1.0))


class Reranker(nnx.Module):
    """Maps the features of a photo's candidates to their log-probabilities."""

    def __init__(
        self,
        settings: RerankerSettings,
        moments: Float[np.ndarray, "2 F"],
        scale: Float[np.ndarray, " C"],
        *,
        rngs: nnx.Rngs,
    ):
        """moments: mean and standard deviation of each feature. scale: scale of each channel, see `scales`.

        With its initial weights, the network multiplies the densities of all channels and the decoder's probabilities
        (`_initial_weights`). A fit on few photos changes these weights little.
        """
        self.settings = settings
        self.moments, self.scale = (Statistic(jnp.asarray(values, jnp.float32)) for values in (moments, scale))
        self.linear = nnx.Linear(moments.shape[1], 1, use_bias=False, rngs=rngs)
        self.linear.kernel[...] = jnp.asarray(_initial_weights(settings) * moments[1])[:, None]
        self.layers = nnx.List([])
        if settings.hidden:
            self.layers.append(nnx.Linear(moments.shape[1], settings.hidden, rngs=rngs))
            zeros = nnx.initializers.zeros
            self.layers.append(nnx.Linear(settings.hidden, 1, use_bias=False, kernel_init=zeros, rngs=rngs))

    def __call__(self, features: Float[Any, "b K F"], present: Bool[Any, "b K"]) -> Float[Any, "b K"]:
        """Returns log-probabilities, about -1e9 for candidates that are not present."""
        mean, deviation = self.moments[...]
        x = jnp.clip((features - mean) / (deviation + 1e-3), -5, 5)
        logits = self.linear(x)
        if self.layers:
            logits = logits + self.layers[1](jax.nn.gelu(self.layers[0](x)))
        return jax.nn.log_softmax(jnp.where(present, logits[..., 0], -1e9), -1)


def _initial_weights(settings: RerankerSettings) -> Float[np.ndarray, " F"]:
    """Returns the initial weight of each feature.

    The weights of the logarithms of densities have the sum 1. The weights of the logarithms of the decoder's
    probabilities have the sum 1/2. All other weights are 0.
    """
    listed, weights = names(settings), np.zeros(len(names(settings)), np.float32)
    for i, (group, name) in enumerate(listed):
        if name.startswith("density"):
            weights[i] = 1 / max(1, sum(other.startswith("density") for _, other in listed))
        if group == "decoder" and name.startswith("probability"):
            weights[i] = 0.5 / len(_PROBABILITY_KM)
    return weights


def within_loss(log_p: Float[Any, "b K"], km: Float[Any, "b K"], present: Bool[Any, "b K"]) -> Float[Any, ""]:
    """Returns minus the logarithm of the sum of the probabilities of all candidates near the truth, in nats.

    It is a mean over photos and THRESHOLDS_KM. If a photo has no candidate within a threshold, its value there is 0.
    km: distance of each candidate from the truth.
    """
    near = (km[..., None] <= jnp.asarray(THRESHOLDS_KM, jnp.float32)) & present[..., None]
    mass = jnp.einsum("bk,bkt->bt", jnp.exp(log_p), near.astype(jnp.float32))
    return -(jnp.log(mass + 1e-4) * near.any(1)).mean()


#: Name -> function from an answer's distance to the truth, in km, to the value of the answer, in [0, 1].
OBJECTIVES = {
    "accuracy": lambda km: sum((km <= limit).astype(jnp.float32) for limit in THRESHOLDS_KM) / len(THRESHOLDS_KM),
    **{f"{limit}_km": lambda km, limit=limit: (km <= limit).astype(jnp.float32) for limit in THRESHOLDS_KM},
    "geoscore": lambda km: jnp.exp(-km / _GEOSCORE_KM),
}


def choose(objective: str, log_p: Float[Any, "b K"], evidence: RerankerInputs) -> Int[Any, " b"]:
    """Returns the index of the candidate with the highest expected value as the answer.

    For the expectation, the true place is one of the candidates, with the probabilities exp(log_p). Candidates close to
    each other often have the same expected value. Then the most probable of them is chosen. objective: key of
    OBJECTIVES.
    """
    value = OBJECTIVES[objective](chord_km(evidence.candidates, evidence.candidates))
    expected = jnp.einsum("bij,bj->bi", value, jnp.exp(log_p))
    return jnp.where(evidence.present, expected + _TIE_BREAK * jnp.exp(log_p), -1.0).argmax(-1)
