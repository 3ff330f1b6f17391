"""The verifier: how far is a candidate from the truth, seen by the gallery photos that lie around it?

A comparator first learns which photos show one place, whatever camera took them; then a scorer reads how alike the
photo and those around each candidate are, beside all else that is known (`predict.verify` gathers it).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from geotoken_jax import sharding
from geotoken_jax.batch import Spec, spec
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, THRESHOLDS_KM
from geotoken_jax.vectors import unit


@dataclasses.dataclass(frozen=True)
class ComparatorSettings:
    """hidden: width of its one hidden layer. width: of a photo's vector. dropout: rate on the image embedding. noise:
    largest share of another photo's embedding that is added to a photo's own. same_within_km: photos no farther apart
    show one place."""

    hidden: int
    width: int
    dropout: float
    noise: float
    same_within_km: float


class Measured(nnx.Variable):
    """What is measured on the training data: saved with the weights, and no nnx.Param, so no optimizer moves it."""


class Comparator(nnx.Module):
    """Image embeddings -> vectors of length 1, near each other where two photos show one place."""

    def __init__(self, settings: ComparatorSettings, mean: Float[np.ndarray, " C"], *, rngs: nnx.Rngs):
        """mean: of the image embeddings."""
        c = len(mean)
        self.mean = Measured(jnp.asarray(mean, jnp.float32))
        self.hidden = sharding.linear(c, settings.hidden, ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(settings.hidden, settings.width, ("mlp", "embed"), rngs=rngs)
        self.dropout = nnx.Dropout(settings.dropout)
        self.scale = nnx.Param(jnp.float32(np.log(10)))  # the logarithm of the factor on cosines

    def __call__(self, image: Float[Array, "B C"], rngs: nnx.Rngs | None = None) -> Float[Array, "B D"]:
        """rngs: source of dropout; None is evaluation, without it."""
        x = (unit(image) - self.mean[...]) * np.sqrt(image.shape[-1])  # about 1 a column, as first weights expect it
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        return unit(self.output(jax.nn.gelu(self.hidden(x))))


class ComparatorTask:
    """Learns to tell photos of one place from others: symmetric InfoNCE over the batch (van den Oord et al. 2018).

    `batch` specifies its batch.
    """

    def __init__(self, settings: ComparatorSettings, mean: Float[np.ndarray, " C"]):
        self.settings, self._mean = settings, mean
        self.flops = 12.0 * settings.hidden * (len(mean) + settings.width)

    def batch(self, size: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        image, other [B, C]: embeddings of two photos of one place. place [B, 3]: the place, a unit vector. All float32.
        Evaluation adds valid [B] bool: False for examples that only fill the batch up.
        """
        features = ((len(self._mean),), jnp.float32)
        return spec(size, image=features, other=features, place=((3,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> Comparator:
        return Comparator(self.settings, self._mean, rngs=rngs)

    def loss(
        self, model: Comparator, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss in nats, and the share of photos whose nearest other is their own.

        In training a random share of another photo is added to each, so that the comparator does not take to fine
        detail alone, of which a photo of another style has little (of EarthView's validation photos with 0.7 of another
        added, 33 % then have their nearest within 25 km, and 24 % without; as they are, 50.6 and 51.3 %).
        """
        image, rngs = unit(batch["image"]), None
        if key is not None:
            noise_key, dropout_key = jax.random.split(key)
            share = self.settings.noise * jax.random.uniform(noise_key, (len(image), 1))
            image, rngs = image + share * jnp.roll(image, 1, 0), nnx.Rngs(dropout=dropout_key)
        logits = jnp.exp(model.scale[...]) * model(image, rngs) @ model(batch["other"], rngs).T
        valid = batch.get("valid", jnp.ones(len(image), bool))
        near = batch["place"] @ batch["place"].T > np.cos(self.settings.same_within_km / EARTH_RADIUS_KM)
        own = jnp.eye(len(image), dtype=bool)
        logits = jnp.where(own | (~near & valid & valid[:, None]), logits, -1e9)
        losses = -(jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))) / 2
        right = logits.argmax(1) == jnp.arange(len(image))
        return jnp.average(losses, weights=valid), {"accuracy": jnp.average(right, weights=valid)}


@dataclasses.dataclass(frozen=True)
class ScorerSettings:
    """hidden: width of the layer that bends the features, 0 for none. dropout: rate on it."""

    hidden: int
    dropout: float


class Scorer(nnx.Module):
    """Features of candidates -> logits of their being within each of THRESHOLDS_KM."""

    def __init__(self, settings: ScorerSettings, moments: Float[np.ndarray, "2 F"], *, rngs: nnx.Rngs):
        """moments: mean and standard deviation of the features."""
        f, v = moments.shape[1], len(THRESHOLDS_KM)
        self.moments = Measured(jnp.asarray(moments, jnp.float32))
        self.linear = nnx.Linear(f, v, rngs=rngs)
        self.layers = nnx.List([])
        if settings.hidden:
            self.layers.extend([nnx.Linear(f, settings.hidden, rngs=rngs), nnx.Linear(settings.hidden, v, rngs=rngs)])
        self.dropout = nnx.Dropout(settings.dropout)

    def __call__(self, features: Float[Array, "B K F"], rngs: nnx.Rngs | None = None) -> Float[Array, "B K 5"]:
        """rngs: source of dropout; None is evaluation, without it."""
        mean, deviation = self.moments[...]
        x = jnp.clip((features - mean) / (deviation + 1e-3), -5, 5)
        found = self.linear(x)
        if self.layers:
            hidden = self.dropout(jax.nn.gelu(self.layers[0](x)), deterministic=rngs is None, rngs=rngs)
            found = found + self.layers[1](hidden)
        return found


class ScorerTask:
    """Learns which candidates of a pool are within each threshold. `batch` specifies its batch."""

    def __init__(self, settings: ScorerSettings, moments: Float[np.ndarray, "2 F"]):
        self.settings, self._moments = settings, moments
        self.flops = 0.0  # next to nothing

    def batch(self, size: int, candidates: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        features [B, K, F]: of each candidate. km [B, K]: each candidate's distance from the photo. Both float32.
        Evaluation adds valid [B] bool: False for examples that only fill the batch up.
        """
        features = (candidates, self._moments.shape[-1])
        return spec(size, features=(features, jnp.float32), km=((candidates,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> Scorer:
        return Scorer(self.settings, self._moments, rngs=rngs)

    def loss(
        self, model: Scorer, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss of `listwise`, and the accuracy of what is chosen at each threshold."""
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return listwise(model(batch["features"], rngs), batch["km"], batch.get("valid"))


def listwise(
    logits: Float[Array, "B K 5"], km: Float[Array, "B K"], valid: Array | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of choosing from pools, in nats, and the share of photos whose choice is within each threshold.

    Of each threshold minus the log of the probability, by a softmax over the pool, of a candidate within it, where one
    is; and the cross-entropy of every candidate on its own, a tenth as heavy, which makes probabilities of logits.
    """
    within = km[..., None] <= jnp.asarray(THRESHOLDS_KM, jnp.float32)
    log_p = jax.nn.log_softmax(logits, 1)
    hit = jax.nn.logsumexp(jnp.where(within, log_p, -1e9), 1)
    losses = jnp.where(within.any(1), -hit, 0).mean(-1)
    alone = optax.sigmoid_binary_cross_entropy(logits, within.astype(jnp.float32)).mean((1, 2))
    taken = jnp.take_along_axis(within, choose(logits)[:, None, None], 1)[:, 0]
    found = {f"within_{limit}_km": jnp.average(taken[:, t], weights=valid) for t, limit in enumerate(THRESHOLDS_KM)}
    return jnp.average(0.9 * losses + 0.1 * alone, weights=valid), found


def choose(logits: Float[Array, "B K 5"]) -> Float[Array, " B"]:
    """Returns the index of the candidate with the most expected accuracy, over all thresholds alike."""
    return jax.nn.softmax(logits, 1).sum(-1).argmax(1)
