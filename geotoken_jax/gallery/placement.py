"""Where the gallery's table lies while the decoder trains: on the host, whole on each device, or split over them.

With 15 neighbors a batch from the host carries 69 KB of embeddings a photo; where the table is on the devices it
carries 60 bytes of row numbers, and the compiled step gathers. The model sees the same numbers in all three.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, BFloat16, Int, Int32

from geotoken_jax import sharding
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import Scheme

PLACEMENTS = ("host", "replicated", "sharded")

#: A batch, with the arrays of `resident` -> embeddings [B, M, 3, C] bfloat16 and tokens [B, M, T] int32 of neighbors.
Lookup = Callable[[Mapping[str, Array]], tuple[Array, Array]]

#: Of the neighbors that all devices together ask for, a device holds at most so many bytes at a time, or one photo's of
#: each device: 1,900 photos' at 15 neighbors and C = 768, and 0.8 % of the memory of the smallest chip (16 GiB).
SLICE_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class GallerySettings:
    """placement: "host" (the input pipeline reads the memory-mapped table), "replicated" (4.7 KB a photo of the gallery
    on every device), or "sharded" (that divided by the number of devices; every step moves the whole batch's neighbors
    between them)."""

    placement: str

    def __post_init__(self):
        if self.placement not in PLACEMENTS:
            raise ValueError(f"config.gallery.placement is {self.placement!r}: choose one of {', '.join(PLACEMENTS)}")

    @property
    def on_device(self) -> bool:
        return self.placement != "host"


def layout(n: int, width: int, cells: Scheme, settings: GallerySettings, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what `resident` makes of a table of n rows and of C = width, as shapes, types and shardings.

    gallery_embeddings [N, 3 C] bfloat16; gallery_tokens [N, T] of the smallest integer that holds the vocabulary.
    Sharded, N is n filled up to divide over the devices. A row is flat because a TPU lays [N, 3, C] out otherwise than
    its gather reads it: in every step it would copy the whole table.
    """
    if not settings.on_device:
        return {}
    spread = settings.placement == "sharded"
    rows = n + -n % mesh.size if spread else n
    lies = NamedSharding(mesh, PartitionSpec(mesh.axis_names) if spread else PartitionSpec())
    token = np.min_scalar_type(max(cells.vocab_sizes) - 1)
    return {
        "gallery_embeddings": jax.ShapeDtypeStruct((rows, 3 * width), jnp.bfloat16, sharding=lies),
        "gallery_tokens": jax.ShapeDtypeStruct((rows, cells.length), token, sharding=lies),
    }


def resident(table: Table, cells: Scheme, settings: GallerySettings, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the arrays that lie on the devices over all steps, of `layout`; none for "host".

    Each process reads the rows of its own devices, a device's after another's.
    """
    read = {
        "gallery_embeddings": lambda rows: table.embeddings(rows).reshape(-1, 3 * table.width),
        "gallery_tokens": lambda rows: cells.of_stored(table.tokens(rows), table.coordinates(rows)),
    }
    target = layout(len(table), table.width, cells, settings, mesh)
    return {name: _put(read[name], len(table), wanted) for name, wanted in target.items()}


def _put(read: Callable[[slice], np.ndarray], n: int, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """jax.make_array_from_callback would hold the rows of all of a process's devices at once."""
    parts, values, held = [], np.empty(0), None
    where = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    for device, (rows, *_) in where.items():  # pyright: ignore[reportGeneralTypeIssues]
        first, last, _ = rows.indices(wanted.shape[0])
        if first != held:  # replicated, all devices have the same rows
            found = read(slice(first, min(last, n))).astype(wanted.dtype, copy=False)
            missing = last - first - len(found)
            values = np.pad(found, ((0, missing), (0, 0))) if missing else found
            held = first
        parts.append(jax.device_put(values, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, parts)


def lookup(settings: GallerySettings, mesh: Mesh) -> Lookup:
    """Returns the function that finds a batch's neighbors where `settings` puts them; for use in a compiled step.

    On the host they are in the batch as `neighbors` and `neighbor_tokens`; on the devices the batch has `neighbor_rows`
    [B, M], where a missing one (-1) reads as row 0, as it does on the host.
    """
    if not settings.on_device:
        return lambda batch: (batch["neighbors"], batch["neighbor_tokens"])
    gather = _exchange(mesh) if settings.placement == "sharded" else _gather

    def find(batch: Mapping[str, Array]) -> tuple[Array, Array]:
        rows = jnp.maximum(batch["neighbor_rows"], 0)
        embeddings, tokens = gather(batch["gallery_embeddings"], batch["gallery_tokens"], rows)
        return embeddings.reshape(*rows.shape, 3, -1), tokens

    return find


def _gather(
    embeddings: BFloat16[Array, "N E"], tokens: Int[Array, "N T"], rows: Int32[Array, "*rows"]
) -> tuple[BFloat16[Array, "*rows E"], Int32[Array, "*rows T"]]:
    return embeddings[rows], tokens[rows].astype(jnp.int32)


def _exchange(mesh: Mesh) -> Callable:
    """Returns `_gather` for a table split over all axes of the mesh, and rows over those of the batch.

    Every device looks up the rows that it has of those that any device asks for, and a sum brings each its own. All
    addends but one are zero, so the sum is exact in bfloat16 too (of a negative zero it makes a zero).
    """
    batch_axes = sharding.RULES["batch"]
    other_axes = tuple(axis for axis in mesh.axis_names if axis not in batch_axes)
    devices = math.prod(mesh.shape[axis] for axis in batch_axes)

    def on_each_device(embeddings: Array, tokens: Array, rows: Array) -> tuple[Array, Array]:
        b, m = rows.shape
        first = jax.lax.axis_index(mesh.axis_names) * len(embeddings)

        def exchange(rows: Int32[Array, " n"]) -> tuple[Array, ...]:
            at = jax.lax.all_gather(rows, batch_axes, tiled=True) - first
            here = (at >= 0) & (at < len(embeddings))
            parts = (jnp.where(here[:, None], part, 0) for part in _gather(embeddings, tokens, jnp.where(here, at, 0)))
            own = (jax.lax.psum_scatter(part, batch_axes, tiled=True) for part in parts)
            return tuple(jax.lax.psum(part, other_axes) for part in own)

        photo_bytes = m * embeddings.shape[1] * embeddings.itemsize
        at_once = max(
            (n for n in range(1, b + 1) if b % n == 0 and n * devices * photo_bytes <= SLICE_BYTES), default=1
        )
        found = jax.lax.map(exchange, rows.reshape(-1, at_once * m))
        return tuple(part.reshape(b, m, -1) for part in found)

    table, batch = PartitionSpec(mesh.axis_names), sharding.spec("batch")
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=(table, table, batch), out_specs=(batch, batch))
