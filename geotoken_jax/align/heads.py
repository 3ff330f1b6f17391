"""The alignment model of G3 (Jia et al. 2024): its heads map image embeddings to the spaces of texts and locations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from geotoken_jax import randomness, sharding
from geotoken_jax.align.location_encoder import LocationEncoder, LocationSettings
from geotoken_jax.batch import blocks
from geotoken_jax.vectors import unit


@dataclasses.dataclass(frozen=True)
class AlignSettings:
    """Architecture of the alignment model. G3 has hidden = C = 768 and no dropout.

    hidden: width of the hidden layer of each head. dropout: dropout rate of that layer.
    whiten: regularization of the whitening of image features, as a multiple of the mean variance, at least 0. It is
    added to the variance of each direction. With a small number, all directions come close to equal variance. If 0,
    features are not whitened.
    location: settings of the location encoder.
    """

    hidden: int
    dropout: float
    whiten: float
    location: LocationSettings

    def __post_init__(self):
        if not self.whiten >= 0:
            raise ValueError(
                f"config.align.model.whiten is {self.whiten}: choose a number above 0, or 0 for no whitening"
            )


class AlignModel(nnx.Module):
    """Two image heads, a text head, the location encoder, and learned logit scales for texts and for locations."""

    def __init__(self, settings: AlignSettings, width: int, *, rngs: nnx.Rngs):
        """width: C, the width of the backbone's features."""
        shape = (width, settings.hidden, width)
        self.whitening = Whitening(width) if settings.whiten else None
        self.image_to_text = Head(shape, settings.dropout, self.whitening, rngs=rngs)
        self.image_to_location = Head(shape, settings.dropout, self.whitening, rngs=rngs)
        self.text = Head(shape, settings.dropout, rngs=rngs)
        self.location = LocationEncoder(settings.location, width, rngs=rngs)
        # Logarithms of the scales, which start at exp(3.99) = 54.
        self.text_scale = nnx.Param(jnp.float32(3.99))
        self.location_scale = nnx.Param(jnp.float32(3.99))

    def embed(self, image: Float[Array, "B C"]) -> Float[Array, "B 3 C"]:
        """Returns three vectors per photo, not normalized: image embedding, location head and text head."""
        return jnp.stack([image, self.image_to_location(image), self.image_to_text(image)], axis=1)


class Statistics(nnx.Variable):
    """Mean or whitening matrix. It is saved with the weights. Optimizers change only variables of type nnx.Param, so
    they leave it as it is."""


class Whitening(nnx.Module):
    """Centers image features, brings their directions to similar variance, and scales rows to length 1.

    Without whitening, heads rely on the few directions with most of the variance. On EarthView photos of a map that is
    not in training, whitening raises the share of first neighbors within 25 km from 25.2 % to 29.7 %
    (docs/alignment.md; Jegou and Chum 2012).
    """

    def __init__(self, width: int):
        # Mean and matrix are NaN until they are fitted or read from a file. So training without them fails visibly.
        self.mean = Statistics(jnp.full(width, jnp.nan))
        self.matrix = Statistics(jnp.full((width, width), jnp.nan))

    def fit(self, image: Float[np.ndarray, "N C"], added: float) -> None:
        """Sets mean and matrix from features. added: regularization, see AlignSettings.whiten."""
        covariance = np.cov(image, rowvar=False)
        variances, directions = np.linalg.eigh(covariance)
        matrix = directions / np.sqrt(variances + added * variances.mean()) @ directions.T
        self.mean[...], self.matrix[...] = jnp.float32(image.mean(0)), jnp.float32(matrix)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B C"]:
        x = (x - self.mean[...]) @ self.matrix[...]
        return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-12))


class Head(nnx.Module):
    """MLP with one hidden layer and ReLU."""

    def __init__(
        self, shape: tuple[int, int, int], dropout: float, whitening: Whitening | None = None, *, rngs: nnx.Rngs
    ):
        """shape: widths of input, hidden layer and output. whitening: module that is applied to the input, the same for
        both image heads; if None, the input is not whitened."""
        self.whitening = whitening
        self.hidden = sharding.linear(*shape[:2], ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(*shape[1:], ("mlp", "embed"), rngs=rngs)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "B C"], key: Key[Array, ""] | None = None) -> Float[Array, "B E"]:
        """Returns the outputs for a batch. key: random key for dropout; no dropout if None."""
        if self.whitening:
            x = self.whitening(x)
        hidden = jax.nn.relu(self.hidden(x))
        return self.output(randomness.dropout(hidden, self.dropout, randomness.words(key, x.shape[0])))


#: Rows per compiled call, always the same number. Products of other shapes round differently, but a photo must have the
#: same vectors alone as in a table.
_ROWS = 256


def embeddings(model: AlignModel, image: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B 3 C"]:
    """Returns three unit vectors per photo in bfloat16, as tables store them."""
    graph, state = nnx.split(model)
    image = image.astype(ml_dtypes.bfloat16)  # as in features/, so that a photo has the same vectors as in a table
    parts = (np.asarray(_embed(graph, state, x.astype(np.float32)))[:n] for x, n in blocks(image, _ROWS))
    return unit(np.concatenate(list(parts))).astype(ml_dtypes.bfloat16)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: nnx.GraphDef, state: nnx.State, image: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).embed(image)
