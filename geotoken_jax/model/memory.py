"""The memory: the sequence that the encoder reads, built from a photo and its neighbors.

Full form (paper, section 3.3): [CLS, image, location, text] of the photo, then [image, location, text, S2 tokens] of
each neighbor; 4 + M (3 + T) positions. Compact form: one position per neighbor, the sum of its vectors; 4 + M positions
(at M = 15 and group 2, 19 instead of 214). If the model reads the capture time, one position for it comes before the
neighbors. Neighbors come best first and padding last. So the number of positions before the padding is enough for
attention to mask the padding.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from geotoken_jax import sharding

#: Kinds of memory position. If config.model.positions is "factored", each kind has a learned vector.
KINDS = ("cls", "image", "location", "text", "token")
#: config.model.context -> number of values that describe a photo's capture time to the model (data.join.context).
CONTEXTS = {"none": 0, "season": 3, "time": 5}


class Neighbors(NamedTuple):
    """Retrieved gallery photos, best first.

    embeddings: image, location and text embedding of each. count: number of real neighbors; the rest of M is padding.
    """

    embeddings: Float[Array, "B M 3 C"]
    tokens: Int[Array, "B M T"]
    count: Int[Array, " B"]


def drop(neighbors: Neighbors, rate: float, key: jax.Array | None) -> Neighbors:
    """Returns the neighbors that are left if each is removed with probability `rate`; all of them if key is None.

    The remaining neighbors move up, and `count` is their number. Training uses this to include photos with few
    neighbors.
    """
    if key is None or rate == 0.0:
        return neighbors
    m = neighbors.tokens.shape[1]
    hidden = jax.random.bernoulli(key, rate, neighbors.tokens.shape[:2]) | (jnp.arange(m) >= neighbors.count[:, None])
    order = jnp.argsort(hidden, axis=1, stable=True)
    embeddings = jnp.take_along_axis(neighbors.embeddings, order[..., None, None], 1)
    tokens = jnp.take_along_axis(neighbors.tokens, order[..., None], 1)
    return Neighbors(embeddings, tokens, jnp.sum(~hidden, 1, dtype=neighbors.count.dtype))


class Projections(nnx.Module):
    """Three two-layer MLPs, one each for image, location and text embeddings. Photo and neighbors share them. Their
    outputs are normalized. norm: norm of the outputs."""

    def __init__(self, backbone_width: int, width: int, dtype: str, rngs: nnx.Rngs, norm: float):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.up = sharding.parameter(rngs.params(), init, (3, backbone_width, width), (None, "features", "mlp"), dtype)
        self.up_bias = sharding.parameter(rngs.params(), nnx.initializers.zeros, (3, width), (None, "mlp"), dtype)
        self.down = sharding.parameter(rngs.params(), init, (3, width, width), (None, "mlp", "embed"), dtype)
        self.down_bias = sharding.parameter(rngs.params(), nnx.initializers.zeros, (3, width), (None, "embed"), dtype)
        self.dtype, self.norm = jnp.dtype(dtype), norm

    def __call__(self, x: Float[Array, "... 3 C"]) -> Float[Array, "... 3 D"]:
        x = sharding.einsum("...ec,ecd->...ed", x.astype(self.dtype), self.up[...])
        x = sharding.constrain(jax.nn.relu(sharding.add_bias(x, self.up_bias[...])), "batch")
        x = sharding.einsum("...ec,ecd->...ed", x, self.down[...])
        x = sharding.add_bias(x, self.down_bias[...]).astype(jnp.float32)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
        unit = x / norm
        return sharding.constrain((unit if self.norm == 1.0 else unit * self.norm).astype(self.dtype), "batch")


@dataclasses.dataclass(frozen=True)
class MemoryForm:
    """The layout of the memory sequence.

    neighbors: M, number of neighbors. tokens: T, number of tokens per neighbor. form: "full" or "compact".
    positions: vectors that are added to positions. "sinusoidal": sines and cosines of the index in the whole sequence,
    as published. "factored": learned vectors for the neighbor's rank and for the kind of position; GeoTokenModel adds a
    vector for the level of a token.
    neighbor_tokens, neighbor_embeddings: False leaves out the neighbors' tokens or embeddings (ablation).
    similarities: whether an MLP maps the three cosines between a neighbor's embeddings and the photo's embeddings to a
    vector, which is added to the neighbor's vectors. (The projections to D do not keep these cosines.) No effect
    without neighbor_embeddings. times: number of values that describe the photo's capture time; if 0, there is no
    position for the time.
    """

    neighbors: int
    tokens: int
    form: str
    positions: str
    neighbor_tokens: bool
    neighbor_embeddings: bool
    similarities: bool
    times: int

    @property
    def head(self) -> int:
        """Number of positions before the first neighbor."""
        return 4 + (self.times > 0)

    @property
    def per_neighbor(self) -> int:
        """Number of positions per neighbor."""
        return 1 if self.form == "compact" else 3 + self.tokens * self.neighbor_tokens

    @property
    def length(self) -> int:
        """S, number of positions of the whole sequence."""
        return self.head + self.neighbors * self.per_neighbor


class MemoryBuilder(nnx.Module):
    """Embeds photos and their neighbors as the memory sequence. norm: norm of the projected embeddings."""

    def __init__(
        self, form: MemoryForm, backbone_width: int, width: int, dtype: str, rngs: nnx.Rngs, norm: float = 1.0
    ):
        normal = nnx.initializers.normal(0.02)
        self.projections = Projections(backbone_width, width, dtype, rngs, norm)
        # The learned vectors are small, so each device keeps a whole copy. If devices split them, XLA would gather the
        # gradients of all photos before splitting their sum.
        self.cls = sharding.parameter(rngs.params(), normal, (width,), (None,))
        self.factored = form.positions == "factored"
        if self.factored:
            self.kinds = sharding.parameter(rngs.params(), normal, (len(KINDS), width), (None, None))
            self.ranks = sharding.parameter(rngs.params(), normal, (form.neighbors + 1, width), (None, None))
        if form.similarities:
            self.similar_up = sharding.linear(3, width, (None, "mlp"), rngs=rngs)
            self.similar_down = sharding.linear(width, width, ("mlp", "embed"), rngs=rngs)
        if form.times:
            self.context = sharding.linear(form.times, width, (None, None), rngs=rngs)
        self.form = form
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        query: Float[Array, "B 3 C"],
        neighbors: Neighbors,
        token_embeddings: Float[Array, "B M T D"] | None,
        context: Float[Array, "B times"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        """Returns the sequence and the number of its positions before the padding, per photo.

        token_embeddings: embeddings of neighbors.tokens; None if the sequence has no tokens. context: numbers that
        describe the photos' capture times (data.join.context); if None, all times count as unknown.
        """
        b, m = neighbors.tokens.shape[:2]
        photo = self.projections(query)
        neighbor = self.projections(neighbors.embeddings)
        if not self.form.neighbor_embeddings:
            neighbor = jnp.zeros_like(neighbor)
        cls = jnp.broadcast_to(self.cls[...].astype(self.dtype), (b, 1, photo.shape[-1]))
        head = jnp.concatenate([cls, photo], 1)
        if self.form.similarities and self.form.neighbor_embeddings:
            similar = jax.nn.gelu(self.similar_up(cosines(query, neighbors.embeddings)))
            neighbor = neighbor + self.similar_down(similar).astype(self.dtype)[:, :, None]
        if self.factored:
            kinds, ranks = self.kinds[...].astype(self.dtype), self.ranks[...].astype(self.dtype)
            head = head + kinds[:4] + ranks[0]
            neighbor = neighbor + kinds[1:4] + ranks[1 : m + 1, None]
        if self.form.times:
            time = self.context(jnp.zeros((b, self.form.times)) if context is None else context)
            head = jnp.concatenate([head, time[:, None].astype(self.dtype)], 1)
        parts = [neighbor]
        if self.form.neighbor_tokens and token_embeddings is not None:
            tokens = token_embeddings.astype(self.dtype)
            if self.factored:
                tokens = tokens + kinds[4] + ranks[1 : m + 1, None]
            parts.append(tokens)
        body = jnp.concatenate(parts, 2)
        if self.form.form == "compact":
            body = body.sum(2, keepdims=True)
        x = jnp.concatenate([head, body.reshape(b, -1, body.shape[-1])], 1)
        if not self.factored:
            x = x + sinusoidal(x.shape[1], x.shape[2]).astype(self.dtype)
        return x, self.form.head + neighbors.count * body.shape[2]

    def first_positions(self, m: int) -> np.ndarray:
        """Returns the index of each neighbor's first position in the sequence. m: number of neighbors."""
        return self.form.head + np.arange(m) * self.form.per_neighbor


def cosines(query: Float[Array, "B 3 C"], neighbors: Float[Array, "B M 3 C"]) -> Float[Array, "B M 3"]:
    """Returns three cosines per photo and neighbor: between their image, location and text embeddings."""
    a, b = query.astype(jnp.float32), neighbors.astype(jnp.float32)
    products = jnp.einsum("bec,bmec->bme", a, b)
    squares = jnp.sum(a * a, -1)[:, None] * jnp.sum(b * b, -1)
    return products * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def sinusoidal(length: int, width: int) -> Float[np.ndarray, "length width"]:
    """Returns position vectors of interleaved sines and cosines, with wavelengths from 2 pi to 10000 x 2 pi."""
    rates = np.exp(-np.log(10000.0) * np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    out = np.zeros((length, width), np.float32)
    out[:, 0::2], out[:, 1::2] = np.sin(angles), np.cos(angles)[:, : width // 2]
    return out
