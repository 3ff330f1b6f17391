"""The comparator: a network that recognizes photos of the same place, even if the photos differ in style.

It maps image embeddings to vectors. The channel "comparator" searches the gallery with them (predict/channels.py).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from geotoken_jax import randomness, sharding
from geotoken_jax.batch import Spec, spec
from geotoken_jax.geo.distance import EARTH_RADIUS_KM
from geotoken_jax.vectors import unit


@dataclasses.dataclass(frozen=True)
class ComparatorSettings:
    """Settings of the comparator (config.channels.comparator).

    hidden: width of the hidden layer. width: width of the output vectors. dropout: dropout rate of the image
    embedding, which is the input. noise: largest multiple of another photo's embedding that
    training adds to an embedding. same_within_km: distance in km up to which two photos count as photos of the same
    place.
    """

    hidden: int
    width: int
    dropout: float
    noise: float
    same_within_km: float


class Statistic(nnx.Variable):
    """A statistic of the training data. It is saved with the weights. Optimizers change only variables of type
    nnx.Param, so they leave it as it is."""


class Comparator(nnx.Module):
    """Maps image embeddings to unit vectors that are close for photos of the same place."""

    def __init__(self, settings: ComparatorSettings, mean: Float[np.ndarray, " C"], *, rngs: nnx.Rngs):
        """mean: mean image embedding of the training data."""
        c = len(mean)
        self.mean = Statistic(jnp.asarray(mean, jnp.float32))
        self.hidden = sharding.linear(c, settings.hidden, ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(settings.hidden, settings.width, ("mlp", "embed"), rngs=rngs)
        self.dropout = settings.dropout
        self.scale = nnx.Param(jnp.float32(np.log(10)))  # logarithm of the factor on cosines in the loss

    def __call__(self, image: Float[Array, "B C"], key: Key[Array, ""] | None = None) -> Float[Array, "B D"]:
        """Returns a unit vector per image embedding. key: random key for dropout; if None, there is no dropout."""
        # Components of unit vectors have a size of about 1 / sqrt(C). The initial weights are made for a size of 1.
        x = (unit(image) - self.mean[...]) * np.sqrt(image.shape[-1])
        x = randomness.dropout(x, self.dropout, randomness.words(key, x.shape[0]))
        return unit(self.output(jax.nn.gelu(self.hidden(x))))


class ComparatorTask:
    """Trains the comparator with symmetric InfoNCE over the batch (van den Oord et al. 2018)."""

    def __init__(self, settings: ComparatorSettings, mean: Float[np.ndarray, " C"]):
        self.settings, self._mean = settings, mean
        self.flops = 12.0 * settings.hidden * (len(mean) + settings.width)

    def batch(self, size: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        image, other [B, C] float32: embeddings of two images of the same place. place [B, 3] float32: unit vector of
        the place. Batches of evaluation also have `valid` [B] bool, which the specification leaves out. It is False for
        examples that do not count, such as padding.
        """
        features = ((len(self._mean),), jnp.float32)
        return spec(size, image=features, other=features, place=((3,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> Comparator:
        return Comparator(self.settings, self._mean, rngs=rngs)

    def loss(
        self, model: Comparator, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss in nats, and the metric `accuracy`.

        The loss compares each `image` with the `other` of its own pair, and with the `other` of every pair from another
        place. Accuracy is the share of images that are most similar to the `other` of their own pair.

        key: random key for dropout and noise; None in evaluation, which has neither. Noise is a random multiple of
        another photo's embedding, added to each `image`. Without noise the comparator relies on fine detail, which
        photos of another style lack. On EarthView's validation photos, the share with a most similar photo within 25 km
        is 50.6 % after training with noise, and 51.3 % after training without noise. If 0.7 times
        another photo's embedding is added to each validation photo, the shares are 33 % and 24 %.
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
