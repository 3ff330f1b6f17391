"""Softmax attention, and the choice of its kernel: XLA's products, cuDNN on GPUs, a Pallas kernel on TPUs.

Fused kernels keep the scores in on-chip memory. With XLA's products the scores of a training step leave it.
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
#: Fewest queries of a fused kernel, the rows of a float32 tile. The decoder's 11 queries fill one and a half.
_QUERIES = 8
#: Fewest keys of a fused kernel. cuDNN refused the decoder's sequences of 11 and 21 tokens ("Unsupported sequence
#: length"), and accepted 214 keys, the length of the paper's memory at group 2. On TPUs the scores of 11 x 11 tokens
#: fit into on-chip memory anyway: in float32, with tiles filled up, they take 64 KB a photo, so 8 MB for 128 photos.
_KEYS = 64


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
    """Returns softmax attention. Query t attends to the keys s < lengths, and if causal, only to keys s <= t.

    kernel: one of KERNELS (see `choose`). lengths: number of keys per example, at least 1; all S keys if None. There is
    no mask argument, because the fused kernels refuse a mask tensor, or break on it. drop: dropout of the attention
    weights [B, H, T, S], which makes every kernel "xla".

    Raises SettingsError for "cudnn" without a GPU.
    """
    if drop is not None:
        return _dropped(q, k, v, _seen(q, k, causal, lengths), drop)
    chosen = choose(kernel, q, k, causal=causal)
    if chosen == "pallas":
        from geotoken_jax import attention_tpu  # importing Pallas takes half a second, which only TPUs need

        result = attention_tpu.attention(q, k, v, lengths)
    else:
        result = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=chosen
        )
    if chosen == "xla":
        return result
    # A fused kernel is no product. If its result were not kept, the backward pass would run it again.
    return stack.keep(result.reshape(*result.shape[:2], -1)).reshape(result.shape)


def by_head(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B H S d"],
    v: Float[Array, "B H S d"],
    seen: Bool[Array, "#B #H #Q S"],
) -> Float[Array, "B H Q d"]:
    """Returns softmax attention of a few queries to keys and values laid out head by head, for decoding.

    seen: keys that each query attends to. The products read this layout directly. The layout of `attention`,
    [B, S, H, d], would be transposed at every step. With the paper's shape and 31 candidates on a CPU, a layer attends
    to the memory in 1.5 ms (3.2 ms with transposition). config.model.attention has no effect here.
    """
    logits = jnp.einsum("bhqd,bhsd->bhqs", q, k, preferred_element_type=jnp.float32) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30)).astype(v.dtype)
    return jnp.einsum("bhqs,bhsd->bhqd", weights, v)


def choose(requested: str, q: Any, k: Any, *, causal: bool = False) -> Literal["xla", "cudnn", "pallas"]:
    """Returns the kernel for queries q [B, T, H, d] and keys k [B, S, H, d], which are arrays or their shapes.

    "auto" is the fused kernel of the platform if the shapes allow it, else "xla". The platform is read from the
    mesh in use, also if its devices are absent, as in `geotoken plan`. Without a mesh "auto" is "xla", because the
    platform is unknown then, and because XLA cannot divide a Pallas kernel over devices. "cudnn" is "xla" for fewer
    than 64 keys.

    Raises SettingsError for "cudnn" without a GPU.
    """
    queries, keys = q.shape[1], k.shape[1]
    if requested == "cudnn":
        if jax.default_backend() != "gpu":
            raise SettingsError(
                f"config.model.attention is 'cudnn', which needs a GPU, but JAX uses a {jax.default_backend()}: set it "
                "to 'auto'"
            )
        return "cudnn" if keys >= _KEYS else "xla"
    if requested == "xla" or queries < _QUERIES or keys < _KEYS:
        return "xla"
    platform = sharding.platform()
    if platform == "gpu" and _fits_cudnn(q):
        return "cudnn"
    return "pallas" if platform == "tpu" and not causal and _fits_pallas(q, k) else "xla"


def positions(length: int) -> int:
    """Returns the number of positions, at least `length`, to which the platform of the mesh in use pads a sequence.

    TPUs store arrays in tiles of 8 rows. With whole tiles, the arrays of a fused kernel and of matrix products have the
    same layout. Otherwise XLA copies each array between them.
    """
    return -(-length // 8) * 8 if sharding.platform() == "tpu" else length


def _fits_cudnn(q: Any) -> bool:
    """Returns whether cuDNN's fused attention takes these queries on this machine's GPU."""
    # cuDNN needs an NVIDIA GPU of compute capability 8.0 (A100) or more. AMD's GPUs have names such as gfx942.
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    recent = re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8.0
    return recent and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _fits_pallas(q: Any, k: Any) -> bool:
    """Returns whether the mesh divides photos and heads, and their rows fit into a TPU's on-chip memory."""
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind != AxisType.Auto for kind in mesh.axis_types):  # inside another shard_map
        return False
    if not set(mesh.axis_names) >= {*sharding.RULES["batch"], sharding.RULES["heads"]}:
        return False
    photos = int(np.prod([mesh.shape[axis] for axis in sharding.RULES["batch"]]))
    heads = mesh.shape[sharding.RULES["heads"]]
    if q.dtype != jnp.bfloat16 or q.shape[0] % photos or q.shape[2] % heads:
        return False
    from geotoken_jax import attention_tpu

    return attention_tpu.fits(q.shape[1], k.shape[1], q.shape[2] // heads, q.shape[3])


def _seen(q: Array, k: Array, causal: bool, lengths: Array | None) -> Bool[Array, "#B 1 #T S"]:
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    seen = (s <= t if causal else s >= 0)[None, None]
    return seen if lengths is None else seen & (s < lengths[:, None, None, None])


def _dropped(q: Array, k: Array, v: Array, seen: Array, drop: Callable[[Array], Array]) -> Array:
    """Returns attention with `drop` applied to the weights [B, H, T, S]."""
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30)).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", drop(weights), v)
