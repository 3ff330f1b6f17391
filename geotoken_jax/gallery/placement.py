"""Placement of the gallery's table during decoder training: on the host, whole on every device, or split over devices.

With 15 neighbors and C = 768, a batch from the host contains 69 KB of embeddings per photo. If the table is on the
devices, the batch contains 60 bytes of row numbers per photo, and the compiled step gathers the embeddings.
The model reads the same values from all three placements.
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

#: Function of a batch, which includes the arrays of `device_arrays`. It returns the neighbors' embeddings
#: [B, M, 3, C] bfloat16 and their tokens [B, M, T] int32.
Lookup = Callable[[Mapping[str, Array]], tuple[Array, Array]]

#: Bytes of neighbors' embeddings that a device gathers at a time, for photos of all devices. If one photo per device
#: takes more, one photo per device is gathered. The bytes hold 1,900 photos with 15 neighbors and C = 768. They are
#: 0.8 % of the smallest chip's memory (16 GiB).
SLICE_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class GallerySettings:
    """Placement of the gallery's table.

    placement: "host": the input pipeline reads the memory-mapped table. "replicated": every device has the whole table,
    4.7 KB per gallery photo at C = 768. "sharded": the table is split over the devices, and every step moves the
    neighbors of the whole batch between them.
    """

    placement: str

    def __post_init__(self):
        if self.placement not in PLACEMENTS:
            raise ValueError(f"config.gallery.placement is {self.placement!r}: choose one of {', '.join(PLACEMENTS)}")

    @property
    def on_device(self) -> bool:
        return self.placement != "host"


def layout(n: int, width: int, cells: Scheme, settings: GallerySettings, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings of the arrays that `device_arrays` returns; none if placement is "host".

    gallery_embeddings: [N, 3 C] bfloat16. Rows are flat because a TPU stores [N, 3, C] in another layout than its
    gather reads, and would copy the whole table in every step.
    gallery_tokens: [N, T], of the smallest unsigned integer type that holds the vocabulary.
    N is n; if sharded, n padded to a multiple of the number of devices.

    n: number of rows of the table. width: C, the width of each embedding.
    """
    if not settings.on_device:
        return {}
    sharded = settings.placement == "sharded"
    rows = n + -n % mesh.size if sharded else n
    placed = NamedSharding(mesh, PartitionSpec(mesh.axis_names) if sharded else PartitionSpec())
    token = np.min_scalar_type(max(cells.vocab_sizes) - 1)
    return {
        "gallery_embeddings": jax.ShapeDtypeStruct((rows, 3 * width), jnp.bfloat16, sharding=placed),
        "gallery_tokens": jax.ShapeDtypeStruct((rows, cells.length), token, sharding=placed),
    }


def device_arrays(table: Table, cells: Scheme, settings: GallerySettings, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the gallery's arrays on the devices, as `layout` describes them; none if placement is "host".

    They stay there over all steps. Each process reads only the rows of its local devices.
    """
    read = {
        "gallery_embeddings": lambda rows: table.embeddings(rows).reshape(-1, 3 * table.width),
        "gallery_tokens": lambda rows: cells.from_stored(table.tokens(rows), table.coordinates(rows)),
    }
    target = layout(len(table), table.width, cells, settings, mesh)
    return {name: _put(read[name], len(table), wanted) for name, wanted in target.items()}


def _put(read: Callable[[slice], np.ndarray], n: int, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a table column on the devices, padded with zeros, read for one device at a time.

    jax.make_array_from_callback would keep the rows of all local devices in host memory at once.
    """
    shards, values, loaded = [], np.empty(0), None
    slices = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    for device, (rows, *_) in slices.items():  # pyright: ignore[reportGeneralTypeIssues]
        first, last, _ = rows.indices(wanted.shape[0])
        if first != loaded:  # if replicated, all devices have the same rows
            stored = read(slice(first, min(last, n))).astype(wanted.dtype, copy=False)
            missing = last - first - len(stored)
            values = np.pad(stored, ((0, missing), (0, 0))) if missing else stored
            loaded = first
        shards.append(jax.device_put(values, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, shards)


def lookup(settings: GallerySettings, mesh: Mesh) -> Lookup:
    """Returns the function that reads the neighbors of a batch in a compiled step.

    With placement "host" the batch contains them as `neighbors` and `neighbor_tokens`. Otherwise the batch contains
    `neighbor_rows` [B, M], and they are gathered from the table. A missing neighbor (-1) reads row 0, as on the host.
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
    """Returns a function like `_gather`, for a table split over all mesh axes.

    The row numbers are split over the batch's mesh axes.

    Every device receives all requested row numbers and reads those in its part of the table; other rows are zeros.
    A sum over devices then returns to each device the rows it requested. All addends but one are zero, so the sum is
    exact in bfloat16 (except that a negative zero becomes zero).
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
            local = (jnp.where(here[:, None], x, 0) for x in _gather(embeddings, tokens, jnp.where(here, at, 0)))
            requested = (jax.lax.psum_scatter(x, batch_axes, tiled=True) for x in local)
            return tuple(jax.lax.psum(x, other_axes) for x in requested)

        photo_bytes = m * embeddings.shape[1] * embeddings.itemsize
        photos = max((n for n in range(1, b + 1) if b % n == 0 and n * devices * photo_bytes <= SLICE_BYTES), default=1)
        gathered = jax.lax.map(exchange, rows.reshape(-1, photos * m))
        return tuple(x.reshape(b, m, -1) for x in gathered)

    table, batch = PartitionSpec(mesh.axis_names), sharding.spec("batch")
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=(table, table, batch), out_specs=(batch, batch))
