"""Computes softmax attention, and chooses the kernel that computes it.

There are three kernels: XLA's matrix products on any platform, cuDNN's fused kernel on GPUs, and a fused Pallas kernel
on TPUs. A fused kernel keeps the attention scores in on-chip memory. XLA writes the scores of a training step to main
memory.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int

from geotoken_jax import sharding, stack
from geotoken_jax.settings import SettingsError

#: Values of config.model.attention.
KERNELS = ("auto", "xla", "cudnn")
#: Fewest queries for which "auto" chooses a fused kernel: the number of rows in a tile of float32 numbers.
_MIN_QUERIES = 8
#: Fewest keys for which a fused kernel is chosen. cuDNN refused the decoder's self-attention, over sequences of 11 or
#: 21 tokens ("Unsupported sequence length"). It accepted 214 keys, as in the attention of the paper's decoder to the
#: encoded photo and neighbors. On TPUs short sequences need no fused kernel, because XLA can keep their scores in
#: on-chip memory: 11 x 11 float32 scores, padded to whole tiles, take 64 KB per photo, or 8 MB for 128 photos.
_MIN_KEYS = 64


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H d"],
    *,
    kernel: str,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T H d"]:
    """Returns softmax attention. A query attends to the first `lengths` keys. If causal, query t attends to the keys
    s <= t among them.

    kernel: one of KERNELS (see `choose`). lengths: number of keys per example, at least 1; all S keys if None. There is
    no argument for a mask, because the fused kernels do not support one. drop: function that applies dropout to the
    attention weights [B, H, T, S]. With `drop`, XLA's products are used and `kernel` has no effect.

    Raises SettingsError if `kernel` is "cudnn" but there is no GPU.
    """
    if drop is not None:
        return _with_dropout(q, k, v, _mask(q, k, causal, lengths), drop)
    chosen = choose(kernel, q, k, causal=causal)
    if chosen == "pallas":
        from geotoken_jax import attention_tpu  # here, because it imports Pallas, which takes half a second

        result = attention_tpu.attention(q, k, v, lengths)
    else:
        result = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=chosen
        )
    if chosen == "xla":
        return result
    # config.model.remat "dots" stores the results of matrix products only. `keep` also stores the result of a fused
    # kernel, so the backward pass does not run the kernel again.
    return stack.keep(result.reshape(*result.shape[:2], -1)).reshape(result.shape)


def by_head(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B H S d"],
    v: Float[Array, "B H S d"],
    seen: Bool[Array, "#B #H #Q S"],
) -> Float[Array, "B H Q d"]:
    """Returns softmax attention of a few queries, for decoding. In all arrays the axis of heads precedes positions.

    seen: whether each query attends to each key.

    Matrix products read this layout without a copy. Arrays in the layout of `attention`, [B, S, H, d], would be
    transposed in every decoding step. On a CPU, with the paper's model and 31 candidates per photo, a layer attends to
    the encoded photo and neighbors in 1.5 ms (3.2 ms with transposition). The products are always XLA's;
    config.model.attention has no effect here.
    """
    logits = jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=jnp.float32) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30)).astype(v.dtype)
    return jnp.einsum("bhqs,bhsd->bhqd", weights, v)


def choose(requested: str, q: Any, k: Any, *, causal: bool = False) -> Literal["xla", "cudnn", "pallas"]:
    """Returns the kernel to use.

    requested: one of KERNELS. q, k: queries [B, T, H, d] and keys [B, S, H, d], as arrays or ShapeDtypeStructs.

    For "auto", the result is the fused kernel of the platform if the shapes allow it, else "xla". The mesh in use
    decides the platform; its devices need not exist on this machine (as in `geotoken plan`). Without a mesh, "auto"
    gives "xla": the platform is unknown then, and XLA cannot divide a Pallas kernel over devices. For fewer than 64
    keys, "cudnn" gives "xla" too.

    Raises SettingsError if `requested` is "cudnn" but there is no GPU.
    """
    queries, keys = q.shape[1], k.shape[1]
    if requested == "cudnn":
        if jax.default_backend() != "gpu":
            raise SettingsError(
                f"config.model.attention is 'cudnn', which needs a GPU, but JAX uses a {jax.default_backend()}: set it "
                "to 'auto'"
            )
        return "cudnn" if keys >= _MIN_KEYS else "xla"
    if requested == "xla" or queries < _MIN_QUERIES or keys < _MIN_KEYS:
        return "xla"
    platform = sharding.platform()
    if platform == "gpu" and _fits_cudnn(q):
        return "cudnn"
    return "pallas" if platform == "tpu" and not causal and _fits_pallas(q, k) else "xla"


def positions(length: int) -> int:
    """Returns the length to which a sequence of `length` positions is padded: on TPUs the next multiple of 8, elsewhere
    `length` itself.

    TPUs store arrays in tiles of 8 rows. If a sequence fills whole tiles, the fused kernel and XLA's matrix products
    use the same layout in memory. If not, XLA copies each array from one layout to the other.
    """
    return -(-length // 8) * 8 if sharding.platform() == "tpu" else length


def _fits_cudnn(q: Any) -> bool:
    """Returns whether cuDNN's fused attention supports queries q on this machine's GPU."""
    # cuDNN needs an NVIDIA GPU of compute capability 8.0 (A100) or more. AMD's GPUs have names such as gfx942.
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    recent = re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8.0
    return recent and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _fits_pallas(q: Any, k: Any) -> bool:
    """Returns whether the Pallas kernel supports queries q and keys k.

    It does if they are bfloat16, if the mesh divides photos and heads evenly, and if the arrays of one photo fit into a
    TPU's on-chip memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind != AxisType.Auto for kind in mesh.axis_types):  # already inside a shard_map
        return False
    if not set(mesh.axis_names) >= {*sharding.RULES["batch"], sharding.RULES["heads"]}:
        return False
    photos = int(np.prod([mesh.shape[axis] for axis in sharding.RULES["batch"]]))
    heads = mesh.shape[sharding.RULES["heads"]]
    if q.dtype != jnp.bfloat16 or q.shape[0] % photos or q.shape[2] % heads:
        return False
    from geotoken_jax import attention_tpu

    return attention_tpu.fits(q.shape[1], k.shape[1], q.shape[2] // heads, q.shape[3])


def _mask(q: Array, k: Array, causal: bool, lengths: Array | None) -> Bool[Array, "#B 1 #T S"]:
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    seen = (s <= t if causal else s >= 0)[None, None]
    return seen if lengths is None else seen & (s < lengths[:, None, None, None])


def _with_dropout(q: Array, k: Array, v: Array, seen: Array, drop: Callable[[Array], Array]) -> Array:
    """Returns attention with `drop` applied to the weights [B, H, T, S]. seen: mask from `_mask`."""
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30)).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", drop(weights), v)
