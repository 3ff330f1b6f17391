"""Exact search of the model's distribution: the most probable cells of a photo, in a partition of the Earth.

The search is best-first over the tree of cells. A node is a cell, given by a prefix of tokens, with the model's
probability of that prefix. A leaf is a node with the full number of tokens. An open node is neither a leaf nor expanded
into its children yet. No cell inside a node is more probable than the node. Leaves are therefore proven to be the most
probable of all once every open node is less probable than they are.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model.geotoken import Cache, GeoTokenModel, Memory
from geotoken_jax.predict.pool import PlaceDistribution

#: Largest number of coarse cells per photo. Coarse cells sum up the cells that a distribution does not list one by one.
_COARSE = 64


class SearchResult(NamedTuple):
    """The F most probable cells per photo at the end of a search, most probable first.

    A search ends with a partition of the Earth, so the probabilities sum to 1 unless there are more than F cells.

    tokens: `depth` tokens of each cell, then zeros. depth: number of a cell's tokens: 0 for the whole Earth, the
    argument `length` of `search` for a leaf, a number in between for a cell that was left open. log_probability: nats;
    -inf for padding if there are fewer than F cells. proven: number P of leaves that are proven to be the most
    probable. These are the first P cells.
    """

    tokens: Int[Array, "B F T"]
    depth: Int[Array, "B F"]
    log_probability: Float[Array, "B F"]
    proven: Int[Array, " B"]


class _State(NamedTuple):
    """State of the search between two iterations: up to E expanded nodes, with their children's log-probabilities."""

    iteration: Int[Array, ""]
    cache: Cache
    tokens: Int[Array, "B E T"]
    depth: Int[Array, "B E"]
    seen: Bool[Array, "B E E"]  # [b, i, j]: node i attends to node j, which is an ancestor or itself
    agree: Bool[Array, "B E M"]  # see Cache
    children: Float[Array, "B E V"]  # log-probability of each child; -inf once that child has itself been expanded


def search(
    model: GeoTokenModel,
    memory: Memory,
    count: int,
    *,
    length: int | None = None,
    temperature: float = 1.0,
    width: int = 8,
    expansions: int = 128,
    capacity: int = 256,
) -> SearchResult:
    """Searches until the `count` most probable leaves are proven, or expansions run out. Returns the most probable
    cells.

    length: number of tokens of a leaf; T, the number of all tokens, if None. At group 2, leaves of 7 tokens are cells
    of level 12, 2 km wide. Choose T only if the model is certain of its last tokens. Otherwise all leaves have similar
    probabilities, and the search uses up its expansions on coarser cells. temperature: temperature of the distribution
    that is searched; log p / temperature is normalized again at each token. width: number of nodes expanded per photo
    and step, the most probable ones. expansions: largest number of nodes expanded per photo, a multiple of width.
    capacity: F, number of cells returned per photo; fewer if `expansions` nodes have fewer children.

    A photo whose search is finished waits until its whole batch is finished. All descendants of a node share its keys
    and values, so the cache has 2 * decoder layers * decoder width * expansions numbers per photo: 2.6 MB in bfloat16
    for the paper's model and 128 expansions, or 1.3 GB for 512 photos. For 512 photos, two copies of the encoder memory
    add 2.2 GB each, and everything else adds 50 MB.

    Raises ValueError if expansions is not a positive multiple of width, or if count is above capacity.
    """
    if expansions % width or expansions <= 0:
        raise ValueError(
            f"config.predict.search.expansions is {expansions}: set it to a positive multiple of "
            f"config.predict.search.width, {width}"
        )
    if capacity < count:
        raise ValueError(
            f"config.predict.search.leaves is {count}: set it to at most {capacity}, the number of cells that the "
            "search keeps"
        )
    length = length or model.settings.cells.length
    options = _Options(length, count, temperature, width, expansions)
    state = jax.lax.while_loop(
        lambda state: (state.iteration * width < expansions) & ~_done(state, length, count).all(),
        lambda state: _expand(model, memory, options, state),
        _start(model, memory, width, expansions),
    )
    return _result(state, length, capacity)


class _Options(NamedTuple):
    """Arguments of `search` that are the same in every iteration."""

    length: int
    count: int
    temperature: float
    width: int
    expansions: int


def _expand(model: GeoTokenModel, memory: Memory, options: _Options, state: _State) -> _State:
    """Returns the state after each photo's most probable open nodes are expanded."""
    photos = jnp.arange(memory.lengths.shape[0])[:, None]
    vocabulary, slot = state.children.shape[-1], state.iteration * options.width
    eligible = _open(state, options.length) & ~_done(state, options.length, options.count)[:, None, None]
    log_p, chosen = jax.lax.top_k(
        jnp.where(eligible, state.children, -jnp.inf).reshape(photos.shape[0], -1), options.width
    )
    valid = jnp.isfinite(log_p)
    parent, token = (jnp.where(valid, i, 0) for i in (chosen // vocabulary, chosen % vocabulary))
    depth = jnp.where(valid, state.depth[photos, parent] + 1, 0)
    cache = state.cache._replace(seen=state.seen[photos, parent], agree=state.agree[photos, parent])
    children, cache = model.step(cache, memory, depth, token, slot)
    if options.temperature != 1.0:
        children = jax.nn.log_softmax(children / options.temperature)
    children = jnp.where(valid[..., None], log_p[..., None] + children, -jnp.inf)
    closed = state.children.at[photos, parent, token].min(jnp.where(valid, -jnp.inf, jnp.inf))
    tokens = _tokens(state, parent, token, depth)
    update = jax.lax.dynamic_update_slice
    return _State(
        state.iteration + 1,
        cache,
        update(state.tokens, tokens, (0, slot, 0)),
        update(state.depth, depth, (0, slot)),
        update(state.seen, cache.seen, (0, slot, 0)),
        update(state.agree, cache.agree, (0, slot, 0)),
        update(closed, children, (0, slot, 0)),
    )


def _result(state: _State, length: int, capacity: int) -> SearchResult:
    """Returns the most probable cells of a finished search."""
    photos = jnp.arange(state.children.shape[0])[:, None]
    children = state.children.reshape(photos.shape[0], -1)
    log_p, child = jax.lax.top_k(children, min(capacity, children.shape[1]))
    parent, token = child // state.children.shape[-1], child % state.children.shape[-1]
    valid = jnp.isfinite(log_p)
    depth = jnp.where(valid, state.depth[photos, parent] + 1, 0)
    tokens = jnp.where(valid[..., None], _tokens(state, parent, token, depth), 0)
    # An open node may come before a leaf of the same probability; the leaf then does not count as proven.
    proven = jnp.cumprod((depth == length) & valid, 1, dtype=jnp.int32).sum(1)
    return SearchResult(tokens, depth, log_p, proven)


def _start(model: GeoTokenModel, memory: Memory, width: int, expansions: int) -> _State:
    """Returns the state before the first expansion. Its only open node is the whole Earth, an entry of `children`."""
    cells, batch = model.settings.cells, memory.lengths.shape[0]
    cache = model.start(memory, width, expansions)
    return _State(
        jnp.int32(0),
        cache,
        jnp.zeros((batch, expansions, cells.length), jnp.int32),
        jnp.full((batch, expansions), -1, jnp.int32),
        jnp.zeros((batch, expansions, expansions), bool),
        jnp.repeat(cache.agree[:, :1], expansions, 1),
        jnp.full((batch, expansions, max(cells.vocab_sizes)), -jnp.inf).at[:, 0, 0].set(0.0),
    )


def _open(state: _State, length: int) -> Bool[Array, "B E V"]:
    return jnp.isfinite(state.children) & (state.depth + 1 < length)[..., None]


def _done(state: _State, length: int, count: int) -> Bool[Array, " B"]:
    """Returns whether each photo's search is finished.

    A search is finished if `count` leaves are more probable than every open node, or if no node is open.
    """
    open_ = _open(state, length)
    best = jnp.where(open_, state.children, -jnp.inf).max((1, 2))
    proven = (~open_ & (state.children > best[:, None, None])).sum((1, 2))
    return (proven >= count) | jnp.isneginf(best)


def _tokens(state: _State, parent: Array, token: Array, depth: Array) -> Int[Array, "B n T"]:
    """Returns the tokens of nodes [B, n]: the tokens of the parent, then the node's own token."""
    inherited = state.tokens[jnp.arange(parent.shape[0])[:, None], parent]
    last = jnp.arange(inherited.shape[-1]) == depth[..., None] - 1
    return jnp.where(last, token[..., None], inherited)


def distribution(result: SearchResult, cells: CellScheme, limit: int = 64) -> PlaceDistribution:
    """Returns the result of a search as a distribution over places: the `limit` most probable cells, then coarse cells.

    There are at most 64 coarse cells per photo. The probability of a coarse cell is the sum over all cells inside it
    that are not listed before. A cell that the search left open is listed like a leaf, with its own center, level and
    probability, because the search has not found the most probable leaf inside it.

    A result in numpy is computed in float64, and a result in jax in float32.
    """
    xp = distance.namespace(result.tokens)
    probability = xp.exp(result.log_probability.astype(np.float64 if xp is np else np.float32))
    probability = probability / xp.maximum(probability.sum(1, keepdims=True), 1.0)  # float32 may sum to 1 + 1e-6
    split = slice(None, limit), slice(limit, None)
    listed, others = ((result.tokens[:, i], result.depth[:, i], probability[:, i]) for i in split)
    groups = [listed, _coarse(*others, cells)] if others[0].shape[1] else [listed]
    tokens, depth, probability = (xp.concatenate(columns, 1) for columns in zip(*groups, strict=True))
    coordinates: Any = cells.prefix_centers(tokens, depth)
    level = xp.where(depth == 0, -1, (depth - 1) * cells.group)
    return PlaceDistribution(coordinates, xp.where(probability > 0, level, 0), probability)


def _coarse(
    tokens: Int[Array, "B F T"], depth: Int[Array, "B F"], probability: Float[Array, "B F"], cells: CellScheme
) -> tuple[Int[Array, "B n T"], Int[Array, "B n"], Float[Array, "B n"]]:
    """Returns tokens, depths and probabilities of the 64 most probable coarse cells.

    The probability of a coarse cell is the sum over the given cells inside it. Coarse cells have level 2, or the next
    finer level at which a token ends. Given cells that are larger than a coarse cell are not counted.
    """
    xp = distance.namespace(tokens)
    d = 1 + -(-2 // cells.group)
    sizes = cells.vocab_sizes[:d]
    steps = np.cumprod([1, *sizes[:0:-1]])[::-1].astype(np.int32)  # of the number of a coarse cell per token
    number = (tokens[..., :d] * steps).sum(-1)
    photos = xp.arange(tokens.shape[0])[:, None]
    counted = xp.where(depth >= d, probability, 0)
    mass = xp.zeros((tokens.shape[0], math.prod(sizes)), probability.dtype)
    if xp is np:
        np.add.at(mass, (photos, number), counted)
    else:
        mass = mass.at[photos, number].add(counted)
    best = xp.argsort(-mass, 1, stable=True)[:, :_COARSE]
    columns = [(best // step % size).astype(tokens.dtype) for step, size in zip(steps.tolist(), sizes, strict=True)]
    rest = xp.zeros((*best.shape, tokens.shape[-1] - d), tokens.dtype)
    coarse = xp.concatenate([xp.stack(columns, -1), rest], -1)
    return coarse, xp.full(best.shape, d), xp.take_along_axis(mass, best, 1)
