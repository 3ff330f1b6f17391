"""Pallas kernels for fused attention on TPUs, for sequences that fit into on-chip memory (VMEM) as a whole.

The kernels read and write arrays [B, S, H * d]. The projections before and after attention use the same layout, so no
array is transposed in memory. A kernel runs several programs. A program computes all heads of a few photos, and has the
scores of a head for all keys at once, so softmax takes a single pass. The backward kernel computes the scores again, in
transposed form: keys x queries. Its sums over keys are then sums over rows, which the vector unit adds without moving
numbers between lanes.
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
#: Bytes of on-chip memory that a kernel may use by default, on all TPUs.
_VMEM = 16 * 2**20
#: Largest number of scores (heads x queries x keys) per photo. The loop over heads is unrolled, so the size of the code
#: and the time to compile it grow with this number. SigLIP, with 16 heads and 729 positions, has 8.5 million.
_MAX_SCORES = 2**20 + 2**18
#: Largest number of photos per program, and smallest number of programs if a program has several photos. With several
#: programs, the arrays of the next program are copied while the current program computes.
_MAX_PHOTOS, _MIN_PROGRAMS = 8, 4
_HIDDEN = -1e30  # added to the scores of padding

# Dimensions over which a product of two matrices sums, for the products a b^T, a b and a^T b.
_NT, _NN, _TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))


def attention(
    q: Float[Array, "B T H d"], k: Float[Array, "B S H d"], v: Float[Array, "B S H d"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B T H d"]:
    """Returns softmax attention, computed on the mesh in use. lengths: number of keys per photo; all S keys if None."""
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
    """Returns whether the arrays of one photo fit into on-chip memory, and the code has a reasonable size.

    queries, keys: numbers of positions. heads: number of heads per device. d: width of a head.
    """
    return heads * queries * keys <= _MAX_SCORES and _vmem_bytes(1, queries, keys, heads * d) <= _VMEM


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(lengths: Array, q: Array, k: Array, v: Array, d: int) -> Array:
    (result,) = _call(_forward, lengths, (q, k, v), (q,), d, products=2)
    return result


def _attention_forward(lengths: Array, q: Array, k: Array, v: Array, d: int) -> tuple[Array, Any]:
    """Forward rule of `_attention` for jax.custom_vjp: the result, and the arrays that the backward kernel reads."""
    return _attention(lengths, q, k, v, d), (lengths, q, k, v)


def _attention_backward(d: int, saved: Any, gradient: Array) -> tuple[None, Array, Array, Array]:
    lengths, q, k, v = saved
    dq, dk, dv = _call(_backward, lengths, (q, k, v, gradient.astype(q.dtype)), (q, k, v), d, products=5)
    return None, dq, dk, dv


_attention.defvjp(_attention_forward, _attention_backward)


def _call(
    kernel: Callable, lengths: Array, arrays: Sequence[Array], results: Sequence[Array], d: int, products: int
) -> Sequence[Array]:
    """Runs a kernel for all photos, and returns its results.

    results: arrays with the shapes and types of the results. products: number of matrix products in the kernel, for the
    estimate of its cost; each is as large as the product of queries and keys.
    """
    (b, queries, width), keys = arrays[0].shape, arrays[1].shape[1]
    photos = _photos_per_program(b, queries, keys, width)

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


def _photos_per_program(b: int, queries: int, keys: int, width: int) -> int:
    """Returns the number of photos per program, which divides b, the number of photos per device."""
    return max(
        n for n in range(1, _MAX_PHOTOS + 1)
        if n == 1 or (b % n == 0 and b // n >= _MIN_PROGRAMS and _vmem_bytes(n, queries, keys, width) <= _VMEM)
    )  # fmt: skip


def _vmem_bytes(photos: int, queries: int, keys: int, width: int) -> int:
    """Returns the on-chip bytes of a program of the backward kernel, with all dimensions rounded up to whole tiles.

    The current and the next program each have queries, keys, values, the gradients of these three, and the gradient of
    the result. In addition there are six arrays of scores.
    """
    rows, columns = math.ceil(queries / 16) * 16, math.ceil(keys / 16) * 16
    blocks = 2 * photos * (3 * rows + 4 * columns) * math.ceil(width / _LANES) * _LANES * 2
    return blocks + 6 * columns * math.ceil(queries / _LANES) * _LANES * 4


def _forward(lengths: Any, q: Any, k: Any, v: Any, out: Any, *, photos: int, d: int) -> None:
    """Kernel that computes attention and writes it to `out`.

    lengths: number of keys of each photo on the device. q, k, v, out: blocks of a program, [photos, positions, H * d].
    """
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

    _for_each_group(photos, q.shape[-1], d, run)


def _backward(*arrays: Any, photos: int, d: int) -> None:
    """Kernel that computes the gradients of queries, keys and values. Its scores are transposed: keys x queries.

    arrays: `lengths`, q, k, v and the gradient of the result, as in `_forward`; then the gradients of q, k and v, which
    the kernel writes.
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

    _for_each_group(photos, q.shape[-1], d, run)


def _for_each_group(photos: int, width: int, d: int, run: Callable) -> None:
    """Calls `run(photo, lanes, heads)` for every photo of a program and every group of heads.

    A group contains the heads that fill one row of a vector register, e.g. two heads of width 64. lanes: slice of the
    last axis with the group's numbers. heads: per head, a mask of the head's numbers in this slice, bool [1, lanes];
    None if the group has one head only.

    To multiply the queries of one head by its keys, the kernels set the queries of the group's other heads to 0, and
    multiply by the keys of the whole group. The matrix unit sums over 128 numbers at once, so this costs no more than a
    sum over one head's 64 numbers. It also moves no numbers between lanes: for 214 positions, the forward kernel has
    2,734 instructions per photo on v5e. With a separate product per head, it would have 3,597.
    """
    group = _LANES // d if _LANES % d == 0 and width % _LANES == 0 else 1
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, group * d), 1)
    heads = [(lane >= n * d) & (lane < (n + 1) * d) for n in range(group)] if group > 1 else [None]

    def run_photo(photo: Any, _: Any) -> None:
        for first in range(0, width, group * d):
            run(photo, slice(first, first + group * d), heads)

    if photos == 1:
        run_photo(0, None)
    else:
        jax.lax.fori_loop(0, photos, run_photo, None)


def _hidden(length: Any, shape: tuple[int, int]) -> Array:
    """Returns the numbers that are added to a photo's scores: 0 for its keys, _HIDDEN for padding after them.

    length: number of the photo's keys. shape: [1, keys] for scores queries x keys, [keys, 1] for transposed scores.
    """
    key = jax.lax.broadcasted_iota(jnp.int32, shape, shape.index(max(shape)))
    return jnp.where(key < length, 0.0, _HIDDEN)


def _scale(q: Any, d: int) -> Array:
    return jnp.asarray(d**-0.5, q.dtype)


def _product(a: Array, b: Array, dimensions: tuple[tuple[int], tuple[int]]) -> Array:
    return jax.lax.dot_general(a, b, (dimensions, ((), ())), preferred_element_type=jnp.float32)


def _only(own: Array | None, x: Array) -> Array:
    return x if own is None else jnp.where(own, x, jnp.zeros_like(x))


def _join(heads: Sequence[Any], parts: Sequence[Array]) -> Array:
    """Returns one array for a group of heads: each head's lanes come from this head's array in `parts`."""
    joined = parts[0]
    for own, part in zip(heads[1:], parts[1:], strict=True):
        joined = jnp.where(own, part, joined)
    return joined
