"""The networks of the verifier, which scores candidates by the gallery photos around them (predict/verifier.py).

The comparator is trained to recognize photos of the same place, whichever camera took them. The scorer reads features
of each candidate, such as the comparator's similarity of the photo to the gallery photos around the candidate.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from geotoken_jax import randomness, sharding
from geotoken_jax.batch import Spec, spec
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, THRESHOLDS_KM
from geotoken_jax.vectors import unit


@dataclasses.dataclass(frozen=True)
class ComparatorSettings:
    """hidden: width of the hidden layer. width: width of the output vector. dropout: dropout rate of the image
    embedding. noise: largest share of another photo's embedding that training adds to an embedding. same_within_km:
    largest distance between photos that count as photos of the same place."""

    hidden: int
    width: int
    dropout: float
    noise: float
    same_within_km: float


class Measured(nnx.Variable):
    """A statistic of the training data. It is saved with the weights. No optimizer changes it: it is no nnx.Param."""


class Comparator(nnx.Module):
    """Maps image embeddings to unit vectors, which are close for photos of the same place."""

    def __init__(self, settings: ComparatorSettings, mean: Float[np.ndarray, " C"], *, rngs: nnx.Rngs):
        """mean: mean image embedding of the training data."""
        c = len(mean)
        self.mean = Measured(jnp.asarray(mean, jnp.float32))
        self.hidden = sharding.linear(c, settings.hidden, ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(settings.hidden, settings.width, ("mlp", "embed"), rngs=rngs)
        self.dropout = settings.dropout
        self.scale = nnx.Param(jnp.float32(np.log(10)))  # logarithm of the factor on cosines in the loss

    def __call__(self, image: Float[Array, "B C"], key: Key[Array, ""] | None = None) -> Float[Array, "B D"]:
        """key: random key for dropout; no dropout if None."""
        # The factor brings the values of each column to a size of about 1, as the initial weights expect.
        x = (unit(image) - self.mean[...]) * np.sqrt(image.shape[-1])
        x = randomness.dropout(x, self.dropout, randomness.words(key, x.shape[0]))
        return unit(self.output(jax.nn.gelu(self.hidden(x))))


class ComparatorTask:
    """Trains the comparator with symmetric InfoNCE over the batch (van den Oord et al. 2018).

    The method `batch` specifies its batches.
    """

    def __init__(self, settings: ComparatorSettings, mean: Float[np.ndarray, " C"]):
        self.settings, self._mean = settings, mean
        self.flops = 12.0 * settings.hidden * (len(mean) + settings.width)

    def batch(self, size: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        image, other [B, C] float32: embeddings of two photos of the same place. place [B, 3] float32: unit vector of
        the place. Batches of evaluation also have valid [B] bool, which is not in the specification: False for examples
        that only pad the batch.
        """
        features = ((len(self._mean),), jnp.float32)
        return spec(size, image=features, other=features, place=((3,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> Comparator:
        return Comparator(self.settings, self._mean, rngs=rngs)

    def loss(
        self, model: Comparator, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss in nats, and `accuracy`: the share of photos that are most similar to their own `other`.

        In training (key is given) a random share of another photo's embedding is added to each `image`. Without this
        noise the comparator relies on fine detail, which photos of another style lack. The noise was measured by the
        share of EarthView's validation photos whose most similar photo is within 25 km. If 0.7 of another photo is
        added to the validation photos, the share is 33 % after training with noise and 24 % after training without.
        For unchanged validation photos it is 50.6 % and 51.3 %.
        """
        image, other = unit(batch["image"]), batch["other"]
        noise_key, image_key, other_key = randomness.split(key, 3)
        if noise_key is not None:
            share = self.settings.noise * jax.random.uniform(noise_key, (len(image), 1))
            image = image + share * jnp.roll(image, 1, 0)
        logits = jnp.exp(model.scale[...]) * model(image, image_key) @ model(other, other_key).T
        valid = batch.get("valid", jnp.ones(len(image), bool))
        same_place = batch["place"] @ batch["place"].T > np.cos(self.settings.same_within_km / EARTH_RADIUS_KM)
        pair = jnp.eye(len(image), dtype=bool)
        logits = jnp.where(pair | (~same_place & valid & valid[:, None]), logits, -1e9)
        losses = -(jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))) / 2
        right = logits.argmax(1) == jnp.arange(len(image))
        return jnp.average(losses, weights=valid), {"accuracy": jnp.average(right, weights=valid)}


@dataclasses.dataclass(frozen=True)
class ScorerSettings:
    """hidden: width of the hidden layer; the scorer is linear if 0. dropout: dropout rate of the hidden layer."""

    hidden: int
    dropout: float


class Scorer(nnx.Module):
    """Maps the features of candidates to their logits of being within each of THRESHOLDS_KM of the truth."""

    def __init__(self, settings: ScorerSettings, moments: Float[np.ndarray, "2 F"], *, rngs: nnx.Rngs):
        """moments: mean and standard deviation of each feature."""
        f, v = moments.shape[1], len(THRESHOLDS_KM)
        self.moments = Measured(jnp.asarray(moments, jnp.float32))
        self.linear = nnx.Linear(f, v, rngs=rngs)
        self.layers = nnx.List([])
        if settings.hidden:
            self.layers.extend([nnx.Linear(f, settings.hidden, rngs=rngs), nnx.Linear(settings.hidden, v, rngs=rngs)])
        self.dropout = settings.dropout

    def __call__(self, features: Float[Array, "B K F"], key: Key[Array, ""] | None = None) -> Float[Array, "B K 5"]:
        """key: random key for dropout; no dropout if None."""
        mean, deviation = self.moments[...]
        x = jnp.clip((features - mean) / (deviation + 1e-3), -5, 5)
        logits = self.linear(x)
        if self.layers:
            words = randomness.words(key, *x.shape[:-1])
            hidden = randomness.dropout(jax.nn.gelu(self.layers[0](x)), self.dropout, words)
            logits = logits + self.layers[1](hidden)
        return logits


class ScorerTask:
    """Trains the scorer to choose candidates near the truth. The method `batch` specifies its batches."""

    def __init__(self, settings: ScorerSettings, moments: Float[np.ndarray, "2 F"]):
        self.settings, self._moments = settings, moments
        self.flops = 0.0  # too few to count

    def batch(self, size: int, candidates: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        features [B, K, F] float32: features of each candidate. km [B, K] float32: distance of each candidate from the
        photo's true place. Batches of evaluation also have valid [B] bool, which is not in the specification: False for
        examples that only pad the batch.
        """
        features = (candidates, self._moments.shape[-1])
        return spec(size, features=(features, jnp.float32), km=((candidates,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> Scorer:
        return Scorer(self.settings, self._moments, rngs=rngs)

    def loss(
        self, model: Scorer, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss and metrics of `listwise`. key: random key for dropout; no dropout if None."""
        return listwise(model(batch["features"], key), batch["km"], batch.get("valid"))


def listwise(
    logits: Float[Array, "B K 5"], km: Float[Array, "B K"], valid: Array | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of choosing from pools, in nats, and the share of photos whose choice is within each threshold.

    A pool is the K candidates of one photo. The loss is 0.9 times a listwise loss plus 0.1 times a pointwise loss, each
    a mean over THRESHOLDS_KM. The listwise loss is minus the log of the probability, by a softmax over the pool, that a
    candidate within the threshold is chosen; 0 if the pool has none. The pointwise loss is the mean binary
    cross-entropy of the candidates. Because of it the logits can also be read as log-odds.

    km: distance of each candidate from the truth. valid [B]: False leaves a photo out; if None, no photo is left out.
    """
    within = km[..., None] <= jnp.asarray(THRESHOLDS_KM, jnp.float32)
    log_p = jax.nn.log_softmax(logits, 1)
    log_within = jax.nn.logsumexp(jnp.where(within, log_p, -1e9), 1)
    listwise_losses = jnp.where(within.any(1), -log_within, 0).mean(-1)
    pointwise_losses = optax.sigmoid_binary_cross_entropy(logits, within.astype(jnp.float32)).mean((1, 2))
    chosen_within = jnp.take_along_axis(within, choose(logits)[:, None, None], 1)[:, 0]
    metrics = {
        f"within_{limit}_km": jnp.average(chosen_within[:, t], weights=valid) for t, limit in enumerate(THRESHOLDS_KM)
    }
    return jnp.average(0.9 * listwise_losses + 0.1 * pointwise_losses, weights=valid), metrics


def choose(logits: Float[Array, "B K 5"]) -> Float[Array, " B"]:
    """Returns the index of the candidate with the highest expected accuracy, averaged over all thresholds."""
    return jax.nn.softmax(logits, 1).sum(-1).argmax(1)
