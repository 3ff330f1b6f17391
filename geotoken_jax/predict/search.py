"""Exact search: the most probable cells of a photo, proven, and all the Earth around them as a partition.

Best first over the tree of cells. A node is a prefix of tokens; its probability is the model's own of that prefix, and
no cell within it is more probable. So leaves are the most probable ones of all as soon as no node that is still open is
as probable as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model.geotoken import Cache, GeoTokenModel, Memory
from geotoken_jax.predict.pool import PlaceDistribution

#: Coarse cells that stand for all that are not told one by one, a photo at most.
_COARSE = 64
#: S2's faces, in degrees: the centers of its cells of level 0.
_FACES = np.array([(0, 0), (0, 90), (90, 0), (0, 180), (0, -90), (-90, 0)], np.float64)


class SearchResult(NamedTuple):
    """What was found of each photo: F disjoint cells, most probable first, with their log-probabilities in nats.

    All that the search ends with is a partition of the Earth: the probabilities sum to 1, less those of the cells that
    F has no room for. tokens: the first `depth` of them, then 0. depth: of a leaf T, or the `length` searched to; less
    of a cell that was left open, 0 of the whole Earth. log_probability: -inf where there are fewer than F. proven: the
    first so many are leaves, and no leaf that is not among them is more probable.
    """

    tokens: Int[Array, "B F T"]
    depth: Int[Array, "B F"]
    log_probability: Float[Array, "B F"]
    proven: Int[Array, " B"]


class _State(NamedTuple):
    """The search between two iterations: the E nodes expanded so far, and what is known of their children."""

    iteration: Int[Array, ""]
    cache: Cache
    tokens: Int[Array, "B E T"]
    depth: Int[Array, "B E"]
    seen: Bool[Array, "B E E"]  # by each node: its ancestors and itself
    agree: Bool[Array, "B E M"]
    children: Float[Array, "B E V"]  # log-probability; -inf of those that are expanded themselves


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
    """Returns the most probable cells once the `count` most probable leaves are proven, or after so many expansions.

    length: tokens at which a node is a leaf, None for all T; at group 2, 7 tokens are cells of level 12, 2 km. Whole
    depth is for models that are sure of their last tokens: where these are noise no leaf stands out, and the budget
    ends the search among coarser cells. temperature: of the distribution searched, log p / temperature renormalized at
    each token. width: nodes of a photo expanded at once, the most probable. expansions: of a photo at most, a multiple
    of width. capacity: F, and no more than the children that there may be.

    A photo that is done waits, unchanged, for the others of its batch. A node's keys and values are kept once, whoever
    descends from it: 2 * L * D * expansions numbers a photo, of the paper's model at the default 2.6 MB in bfloat16,
    1.3 GB for 512 photos, beside twice 2.2 GB of memory and 50 MB of everything else.

    Raises ValueError if expansions is no multiple of width, or capacity is below count.
    """
    if expansions % width or not expansions:
        raise ValueError(f"expansions is {expansions}, which is no multiple of width = {width}: make it one")
    if capacity < count:
        raise ValueError(f"capacity is {capacity}: {count} leaves are asked for, so make it {count} or more")
    length = length or model.settings.cells.length
    rules = _Rules(length, count, temperature, width, expansions)
    state = jax.lax.while_loop(
        lambda state: (state.iteration * width < expansions) & ~_done(state, length, count).all(),
        lambda state: _expand(model, memory, rules, state),
        _start(model, memory, width, expansions),
    )
    return _found(state, length, capacity)


class _Rules(NamedTuple):
    """Arguments of `search`."""

    length: int
    count: int
    temperature: float
    width: int
    expansions: int


def _expand(model: GeoTokenModel, memory: Memory, rules: _Rules, state: _State) -> _State:
    """Returns the state after each photo's most probable open nodes were divided."""
    photos = jnp.arange(len(memory.lengths))[:, None]
    vocabulary, slot = state.children.shape[-1], state.iteration * rules.width
    asked = _open(state, rules.length) & ~_done(state, rules.length, rules.count)[:, None, None]
    log_p, chosen = jax.lax.top_k(jnp.where(asked, state.children, -jnp.inf).reshape(len(photos), -1), rules.width)
    valid = jnp.isfinite(log_p)
    parent, token = (jnp.where(valid, i, 0) for i in (chosen // vocabulary, chosen % vocabulary))
    depth = jnp.where(valid, state.depth[photos, parent] + 1, 0)
    own = slot + jnp.arange(rules.width)
    seen = state.seen[photos, parent] | (own[:, None] == jnp.arange(rules.expansions))
    cache = state.cache._replace(agree=state.agree[photos, parent])
    children, cache = model.step(cache, memory, depth, token, slot, seen)
    if rules.temperature != 1.0:
        children = jax.nn.log_softmax(children / rules.temperature)
    children = jnp.where(valid[..., None], log_p[..., None] + children, -jnp.inf)
    closed = state.children.at[photos, parent, token].min(jnp.where(valid, -jnp.inf, jnp.inf))
    tokens = _tokens(state, parent, token, depth)
    update = jax.lax.dynamic_update_slice
    return _State(
        state.iteration + 1,
        cache,
        update(state.tokens, tokens, (0, slot, 0)),
        update(state.depth, depth, (0, slot)),
        update(state.seen, seen, (0, slot, 0)),
        update(state.agree, cache.agree, (0, slot, 0)),
        update(closed, children, (0, slot, 0)),
    )


def _found(state: _State, length: int, capacity: int) -> SearchResult:
    """Returns the most probable children of a finished search."""
    photos = jnp.arange(len(state.children))[:, None]
    children = state.children.reshape(len(photos), -1)
    log_p, place = jax.lax.top_k(children, min(capacity, children.shape[1]))
    parent, token = place // state.children.shape[-1], place % state.children.shape[-1]
    there = jnp.isfinite(log_p)
    depth = jnp.where(there, state.depth[photos, parent] + 1, 0)
    tokens = jnp.where(there[..., None], _tokens(state, parent, token, depth), 0)
    # Of a leaf and an open node that are equals the node may come first, and the leaf is not said to be proven.
    proven = jnp.cumprod((depth == length) & there, 1, dtype=jnp.int32).sum(1)
    return SearchResult(tokens, depth, log_p, proven)


def _start(model: GeoTokenModel, memory: Memory, width: int, expansions: int) -> _State:
    """Returns the state before anything is expanded: one child, at depth 0, which is the whole Earth."""
    cells, batch = model.settings.cells, len(memory.lengths)
    cache = model.start(memory, width, shared=expansions)
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
    """Says where `count` leaves are more probable than all that is open, or nothing is."""
    open_ = _open(state, length)
    best = jnp.where(open_, state.children, -jnp.inf).max((1, 2))
    proven = (~open_ & (state.children > best[:, None, None])).sum((1, 2))
    return (proven >= count) | jnp.isneginf(best)


def _tokens(state: _State, parent: Array, token: Array, depth: Array) -> Int[Array, "B n T"]:
    """Returns the tokens of nodes [B, n]: their parents', and their own at the end."""
    inherited = state.tokens[jnp.arange(len(parent))[:, None], parent]
    last = jnp.arange(inherited.shape[-1]) == depth[..., None] - 1
    return jnp.where(last, token[..., None], inherited)


def distribution(found: SearchResult, cells: CellScheme, limit: int = 64) -> PlaceDistribution:
    """Returns what was found as places: the centers of the `limit` most probable cells of each photo, best first, and
    behind them what is left of the coarse cells that the others lie in, at most 64.

    A cell that was left open is told by its own center, level and probability, and not by a leaf within it: which of
    its leaves is the most probable is not known, and no point of it is as probable as the cell.
    """
    probability = np.exp(np.asarray(found.log_probability, np.float64))
    probability /= np.maximum(probability.sum(1, keepdims=True), 1.0)  # float32 may sum to 1 + 1e-6
    tokens, depth = np.asarray(found.tokens), np.asarray(found.depth)
    first = slice(None, limit), slice(limit, None)
    kept, others = ((tokens[:, some], depth[:, some], probability[:, some]) for some in first)
    parts = [kept, _coarse(*others, cells)] if others[0].shape[1] else [kept]
    tokens, depth, probability = (np.concatenate(columns, 1) for columns in zip(*parts, strict=True))
    coordinates = np.zeros((*depth.shape, 2))
    for d in np.unique(depth[depth > 0]):
        here, level = depth == d, (d - 1) * cells.group
        if level == 0:
            coordinates[here] = _FACES[tokens[here][:, 0]]
        else:
            coordinates[here] = np.stack(type(cells)(int(level), cells.group).decode(tokens[here][:, :d]), -1)
    level = np.where(depth == 0, -1, (depth - 1) * cells.group)
    return PlaceDistribution(coordinates, np.where(probability > 0, level, 0), probability)


def _coarse(
    tokens: Int[np.ndarray, "B F T"], depth: Int[np.ndarray, "B F"], probability: Float[np.ndarray, "B F"],
    cells: CellScheme,
) -> tuple[Int[np.ndarray, "B n T"], Int[np.ndarray, "B n"], Float[np.ndarray, "B n"]]:  # fmt: skip
    """Returns cells of level 2, or the next that tokens know, with the probability of all that lie in them."""
    d = 1 + -(-2 // cells.group)
    sizes = cells.vocab_sizes[:d]
    number = np.ravel_multi_index(tuple(np.moveaxis(tokens[..., :d], -1, 0)), sizes)
    held = np.zeros((len(tokens), np.prod(sizes)))
    np.add.at(held, (np.arange(len(tokens))[:, None], number), np.where(depth >= d, probability, 0))
    best = np.argsort(-held, 1, kind="stable")[:, :_COARSE]
    found = np.zeros((*best.shape, tokens.shape[-1]), tokens.dtype)
    found[..., :d] = np.stack(np.unravel_index(best, sizes), -1)
    return found, np.full(best.shape, d), np.take_along_axis(held, best, 1)
