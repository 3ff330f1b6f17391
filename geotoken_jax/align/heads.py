"""The alignment model: what turns one frozen image embedding into three, each near another modality (G3)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from geotoken_jax import sharding
from geotoken_jax.align.location_encoder import LocationEncoder, LocationSettings
from geotoken_jax.batch import blocks
from geotoken_jax.vectors import unit


@dataclasses.dataclass(frozen=True)
class AlignSettings:
    """Form of the alignment model; G3's has hidden = C = 768 and no dropout.

    hidden: width of the heads' one hidden layer. dropout: rate on it. whiten: 0, or what is added to the variance of
    each direction of the image features, as a multiple of their mean, before the image heads see all of them alike: the
    smaller, the more they are.
    """

    hidden: int
    dropout: float
    whiten: float
    location: LocationSettings

    def __post_init__(self):
        if not self.whiten >= 0:
            raise ValueError(f"config.align.model.whiten is {self.whiten}: it must be above 0, or 0 for none")


class AlignModel(nnx.Module):
    """Two image heads, a text head, the location encoder and a learned logit scale for each pair of modalities."""

    def __init__(self, settings: AlignSettings, width: int, *, rngs: nnx.Rngs):
        """width: C, of the backbone's features."""
        shape = (width, settings.hidden, width)
        self.whitening = Whitening(width) if settings.whiten else None
        self.image_to_text = Head(shape, settings.dropout, self.whitening, rngs=rngs)
        self.image_to_location = Head(shape, settings.dropout, self.whitening, rngs=rngs)
        self.text = Head(shape, settings.dropout, rngs=rngs)
        self.location = LocationEncoder(settings.location, width, rngs=rngs)
        # Logarithms: the scales begin at exp(3.99) = 54.
        self.text_scale = nnx.Param(jnp.float32(3.99))
        self.location_scale = nnx.Param(jnp.float32(3.99))

    def embed(self, image: Float[Array, "B C"]) -> Float[Array, "B 3 C"]:
        """Returns a photo's three vectors: backbone's image embedding, location head, text head; not normalized."""
        return jnp.stack([image, self.image_to_location(image), self.image_to_text(image)], axis=1)


class Statistics(nnx.Variable):
    """What is known of the features: saved with the weights, and no nnx.Param, so no optimizer moves it."""


class Whitening(nnx.Module):
    """Image features less their mean, of alike variance in all directions, as rows of length 1.

    Else heads rely on the few directions with most of the variance: of EarthView's photos of a map that was not trained
    on, 25.2 % then have their first neighbor within 25 km, whitened 29.7 % (docs/alignment.md; Jegou and Chum 2012).
    """

    def __init__(self, width: int):
        # Not a number until fitted or read, so that training without cannot pass for training with.
        self.mean = Statistics(jnp.full(width, jnp.nan))
        self.matrix = Statistics(jnp.full((width, width), jnp.nan))

    def fit(self, image: Float[np.ndarray, "N C"], added: float) -> None:
        """Takes mean and covariance from features; added: AlignSettings.whiten."""
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
        """shape: widths of input, hidden layer and output. whitening: of the input, shared by heads."""
        self.whitening = whitening
        self.hidden = sharding.linear(*shape[:2], ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(*shape[1:], ("mlp", "embed"), rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "B C"], rngs: nnx.Rngs | None = None) -> Float[Array, "B E"]:
        """rngs: source of dropout; None is evaluation, without it."""
        if self.whitening:
            x = self.whitening(x)
        hidden = jax.nn.relu(self.hidden(x))
        return self.output(self.dropout(hidden, deterministic=rngs is None, rngs=rngs))


#: Rows embedded at once, always: a product of another shape rounds otherwise, and a photo must have the same vectors
#: alone as in a table.
_ROWS = 256


def embeddings(model: AlignModel, image: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B 3 C"]:
    """Returns photos' three vectors as tables hold them: bfloat16, each of length 1."""
    graph, state = nnx.split(model)
    image = image.astype(ml_dtypes.bfloat16)  # as features/ keeps them: a photo on its own must be rounded as they are
    parts = (np.asarray(_embed(graph, state, x.astype(np.float32)))[:n] for x, n in blocks(image, _ROWS))
    return unit(np.concatenate(list(parts))).astype(ml_dtypes.bfloat16)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graph: nnx.GraphDef, state: nnx.State, image: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).embed(image)
