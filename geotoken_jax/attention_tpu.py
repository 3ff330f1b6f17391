"""Fused attention on TPUs, as Pallas kernels for sequences whose rows fit into on-chip memory (VMEM).

The kernels read and write arrays [B, S, H * d], the layout of the projections, so no array is transposed in memory. A
program handles a few photos and all heads. It holds the scores of one group of heads at a time, so softmax needs no
second pass. The backward kernel computes the scores again, transposed: sums over keys are then sums over rows, which
the vector unit adds without moving numbers between lanes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from geotoken_jax import sharding

#: Whether the kernels run as plain jax operations, on any platform. Only tests set it.
INTERPRET = False
#: Numbers in a row of a TPU's vector register.
_LANES = 128
#: On-chip bytes that every kernel may use without asking for more, on all TPUs.
_VMEM = 16 * 2**20
#: Most scores of a program (heads x queries x keys). Heads are unrolled, so a program's size and its time to compile
#: grow with them; 16 heads of SigLIP's 729 positions would be 8.5 million.
_SCORES = 2**20 + 2**18
#: Most photos a program handles, and fewest programs, so that copies of the next program's arrays overlap with
#: computation.
_PHOTOS, _PROGRAMS = 8, 4
_HIDDEN = -1e30  # added to the scores of padding

# Dimensions of two matrices that a product sums over: a b^T, a b, a^T b.
_NT, _NN, _TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))


def attention(
    q: Float[Array, "B T H d"], k: Float[Array, "B S H d"], v: Float[Array, "B S H d"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B T H d"]:
    """Returns softmax attention to the first `lengths` keys, or to all S keys if None, on the mesh in use."""
    b, t, heads, d = q.shape
    if lengths is None:
        lengths = jnp.full(b, k.shape[1], jnp.int32)
    spec = sharding.spec("batch", None, "heads")
    local = jax.shard_map(
        lambda n, *xs: _attention(n, *xs, d),
        in_specs=(sharding.spec("batch"), spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    flat = (x.reshape(b, x.shape[1], heads * d) for x in (q, k, v))
    return local(lengths.astype(jnp.int32), *flat).reshape(b, t, heads, d)


def fits(queries: int, keys: int, heads: int, d: int) -> bool:
    """Returns whether a program's arrays fit into on-chip memory and its code has a reasonable size.

    heads: number of heads on a device. d: width of a head.
    """
    return heads * queries * keys <= _SCORES and _bytes(1, queries, keys, heads * d) <= _VMEM


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(lengths: Array, q: Array, k: Array, v: Array, d: int) -> Array:
    (result,) = _call(_forward, lengths, (q, k, v), (q,), d, products=2)
    return result


def _attention_forward(lengths: Array, q: Array, k: Array, v: Array, d: int) -> tuple[Array, Any]:
    return _attention(lengths, q, k, v, d), (lengths, q, k, v)


def _attention_backward(d: int, saved: Any, gradient: Array) -> tuple[None, Array, Array, Array]:
    lengths, q, k, v = saved
    dq, dk, dv = _call(_backward, lengths, (q, k, v, gradient.astype(q.dtype)), (q, k, v), d, products=5)
    return None, dq, dk, dv


_attention.defvjp(_attention_forward, _attention_backward)


def _call(
    kernel: Callable, lengths: Array, arrays: Sequence[Array], results: Sequence[Array], d: int, products: int
) -> Sequence[Array]:
    """Runs a kernel for all photos. results: arrays with the shapes of the results. products: number of products of the
    size of the scores' product."""
    (b, queries, width), keys = arrays[0].shape, arrays[1].shape[1]
    photos = _photos(b, queries, keys, width)

    def block(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((photos, *x.shape[1:]), lambda program, lengths: (program, 0, 0))

    scores = b * (width // d) * queries * keys
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *results))
    return pl.pallas_call(
        functools.partial(kernel, photos=photos, d=d),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(b // photos,), in_specs=list(map(block, arrays)),
            out_specs=list(map(block, results)),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=2 * products * scores * d, transcendentals=scores, bytes_accessed=moved),
        interpret=INTERPRET,
        name=kernel.__name__.strip("_") + "_attention",
    )(lengths, *arrays)  # fmt: skip


def _photos(b: int, queries: int, keys: int, width: int) -> int:
    """Returns the number of photos per program, a divisor of the number b of photos on the device."""
    return max(
        n for n in range(1, _PHOTOS + 1)
        if n == 1 or (b % n == 0 and b // n >= _PROGRAMS and _bytes(n, queries, keys, width) <= _VMEM)
    )  # fmt: skip


def _bytes(photos: int, queries: int, keys: int, width: int) -> int:
    """Returns the on-chip bytes of a backward program, in which tiles are filled up: blocks for two programs (queries
    and keys with their gradients, values, gradients of the result), and six arrays of scores."""
    rows, columns = math.ceil(queries / 16) * 16, math.ceil(keys / 16) * 16
    blocks = 2 * photos * (3 * rows + 4 * columns) * math.ceil(width / _LANES) * _LANES * 2
    return blocks + 6 * columns * math.ceil(queries / _LANES) * _LANES * 4


def _forward(lengths: Any, q: Any, k: Any, v: Any, out: Any, *, photos: int, d: int) -> None:
    """Kernel of the result. lengths: number of keys of each photo. Other arguments: blocks [photos, S, H * d]."""
    first = pl.program_id(0) * photos

    def run(photo: Any, lanes: slice, heads: Sequence[Any]) -> None:
        hidden = _hidden(lengths[first + photo], (1, k.shape[1]))
        qs, ks, vs = q[photo, :, lanes] * _scale(q, d), k[photo, :, lanes], v[photo, :, lanes]
        parts = []
        for own in heads:
            scores = _product(_only(own, qs), ks, _NT) + hidden
            weights = jnp.exp(scores - scores.max(1, keepdims=True))
            parts.append(_product(weights.astype(vs.dtype), vs, _NN) / weights.sum(1, keepdims=True))
        out[photo, :, lanes] = _join(heads, parts).astype(out.dtype)

    _each(photos, q.shape[-1], d, run)


def _backward(*arrays: Any, photos: int, d: int) -> None:
    """Kernel of the gradients. Scores are transposed: keys x queries.

    arrays: lengths, q, k, v and the gradient of the result; then the gradients of q, k and v, which are written.
    """
    lengths, q, k, v, gradient, dq, dk, dv = arrays
    first = pl.program_id(0) * photos

    def run(photo: Any, lanes: slice, heads: Sequence[Any]) -> None:
        hidden = _hidden(lengths[first + photo], (k.shape[1], 1))
        qs, ks, vs = q[photo, :, lanes] * _scale(q, d), k[photo, :, lanes], v[photo, :, lanes]
        gs = gradient[photo, :, lanes]
        parts = []
        for own in heads:
            scores = _product(ks, _only(own, qs), _NT) + hidden
            weights = jnp.exp(scores - scores.max(0, keepdims=True))
            weights = weights * (1 / weights.sum(0, keepdims=True))
            dweights = _product(vs, _only(own, gs), _NT)
            dscores = weights * (dweights - (weights * dweights).sum(0, keepdims=True))
            weights, dscores = weights.astype(vs.dtype), dscores.astype(qs.dtype)
            parts.append((_product(dscores, ks, _TN), _product(dscores, qs, _NN), _product(weights, gs, _NN)))
        dqs, dks, dvs = zip(*parts, strict=True)
        dq[photo, :, lanes] = (_join(heads, dqs) * d**-0.5).astype(dq.dtype)
        dk[photo, :, lanes] = _join(heads, dks).astype(dk.dtype)
        dv[photo, :, lanes] = _join(heads, dvs).astype(dv.dtype)

    _each(photos, q.shape[-1], d, run)


def _each(photos: int, width: int, d: int, run: Callable) -> None:
    """Calls `run(photo, lanes, heads)` for all photos of a program and all groups of heads.

    lanes: slice of a group's numbers. heads: for each head of the group the lanes it owns, bool [1, lanes], or None if
    it owns all. A group has as many heads as fit into a vector register. A product of masked queries with the whole
    group's keys costs as much as one of a head's own 64 lanes, because the matrix unit sums over 128, and takes no
    moves of lanes: for 214 positions the forward kernel has 2,734 instead of 3,597 instructions a photo on v5e.
    """
    together = _LANES // d if _LANES % d == 0 and width % _LANES == 0 else 1
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, together * d), 1)
    heads = [(lane >= n * d) & (lane < (n + 1) * d) for n in range(together)] if together > 1 else [None]

    def one(photo: Any, _: Any) -> None:
        for first in range(0, width, together * d):
            run(photo, slice(first, first + together * d), heads)

    if photos == 1:
        one(0, None)
    else:
        jax.lax.fori_loop(0, photos, one, None)


def _hidden(length: Any, shape: tuple[int, int]) -> Array:
    """Returns 0 for each of a photo's keys and _HIDDEN for its padding, as a row or column of the scores."""
    key = jax.lax.broadcasted_iota(jnp.int32, shape, shape.index(max(shape)))
    return jnp.where(key < length, 0.0, _HIDDEN)


def _scale(q: Any, d: int) -> Array:
    return jnp.asarray(d**-0.5, q.dtype)


def _product(a: Array, b: Array, dimensions: tuple[tuple[int], tuple[int]]) -> Array:
    return jax.lax.dot_general(a, b, (dimensions, ((), ())), preferred_element_type=jnp.float32)


def _only(own: Array | None, x: Array) -> Array:
    return x if own is None else jnp.where(own, x, jnp.zeros_like(x))


def _join(heads: Sequence[Any], parts: Sequence[Array]) -> Array:
    """Returns the lanes of each head from that head's part."""
    joined = parts[0]
    for own, part in zip(heads[1:], parts[1:], strict=True):
        joined = jnp.where(own, part, joined)
    return joined
