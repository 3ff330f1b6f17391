"""Placement of the gallery's table during decoder training: on the host, whole on every device, or split over devices.

If the table is on the host, a batch contains the embeddings of the neighbors: 69 KB per photo with 15 neighbors and
C = 768. If the table is on the devices, a batch contains their row numbers, 60 bytes per photo, and the compiled step
gathers the embeddings. The model reads the same values from all three placements.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, BFloat16, Int, Int32

from geotoken_jax import sharding
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import Scheme
from geotoken_jax.settings import Runtime, SettingsError

PLACEMENTS = ("host", "replicated", "sharded")

#: Function of a batch, which includes the arrays of `device_arrays`. It returns the neighbors' embeddings
#: [B, M, 3, C] bfloat16 and their tokens [B, M, T] int32.
Lookup = Callable[[Mapping[str, Array]], tuple[Array, Array]]

#: Largest number of bytes of rows that a device sends per round of an exchange: 0.8 % of the smallest chip's memory
#: (16 GiB).
ROUND_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class GallerySettings:
    """Placement of the gallery's table.

    placement: "host": the input pipeline reads the memory-mapped table. "replicated": every device has the whole table,
    4.7 KB per gallery photo at C = 768. "sharded": the table is split over devices, and in every step each device
    requests its photos' neighbors from the others.
    shards: number of devices that one copy of a sharded table is split over; -1 stands for all devices. The number must
    divide the number of all devices. The devices of a copy are consecutive in the mesh. If `shards` is the number of
    devices per host or per slice, rows move only inside a host or slice.
    """

    placement: str
    shards: Runtime[int]

    def __post_init__(self):
        if self.placement not in PLACEMENTS:
            raise ValueError(f"config.gallery.placement is {self.placement!r}: choose one of {', '.join(PLACEMENTS)}")
        if self.shards < 1 and self.shards != -1:
            raise ValueError(
                f"config.gallery.shards is {self.shards}: set it to the number of devices per copy of the table, or to "
                "-1 for all devices"
            )

    @property
    def on_device(self) -> bool:
        return self.placement != "host"

    def shards_on(self, mesh: Mesh) -> int:
        """Returns the number of devices per copy of a sharded table.

        Raises SettingsError if it does not divide the mesh's number of devices.
        """
        shards = mesh.size if self.shards == -1 else self.shards
        if mesh.size % shards:
            raise SettingsError(
                f"config.gallery.shards is {shards}, which does not divide {mesh.size} devices: choose a divisor of "
                f"{mesh.size}, or -1 for all devices"
            )
        return shards


def layout(n: int, width: int, cells: Scheme, settings: GallerySettings, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings of the arrays that `device_arrays` returns; none if placement is "host".

    gallery_embeddings: [N, 3 C] bfloat16. Rows are flat because a TPU stores [N, 3, C] in another layout than its
    gather reads, and would copy the whole table in every step.
    gallery_tokens: [N, T], of the smallest unsigned integer type that holds the vocabulary.
    If replicated, N is n. If sharded, n is padded to a multiple of the devices per copy, and N is this times the number
    of copies. The array contains the copies one after another. It is split over all devices, so every device has a part
    of one copy.

    n: number of rows of the table. width: C, the width of each embedding.
    """
    if not settings.on_device:
        return {}
    sharded = settings.placement == "sharded"
    shards = settings.shards_on(mesh) if sharded else 1
    rows = (n + -n % shards) * (mesh.size // shards) if sharded else n
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
    copies = mesh.size // settings.shards_on(mesh) if settings.placement == "sharded" else 1
    return {name: _put(read[name], len(table), copies, wanted) for name, wanted in target.items()}


def _put(read: Callable[[slice], np.ndarray], n: int, copies: int, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array on the devices that contains copies of a table column one after another, padded with zeros.

    The rows are read for one device at a time. jax.make_array_from_callback would keep the rows of all local devices
    in host memory at once.

    read: function from a slice of rows to their values. n: number of rows. wanted: shape, type and sharding.
    """
    shards, values, loaded = [], np.empty(0), None
    slices = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    for device, (rows, *_) in slices.items():  # pyright: ignore[reportGeneralTypeIssues]
        start, stop, _ = rows.indices(wanted.shape[0])
        first = start % (wanted.shape[0] // copies)
        if first != loaded:  # if replicated, all devices have the same rows
            stored = read(slice(first, min(first + stop - start, n))).astype(wanted.dtype, copy=False)
            missing = stop - start - len(stored)
            values = np.pad(stored, ((0, missing), (0, 0))) if missing else stored
            loaded = first
        shards.append(jax.device_put(values, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, shards)


def lookup(settings: GallerySettings, mesh: Mesh) -> Lookup:
    """Returns the function that reads the neighbors of a batch in a compiled step.

    With placement "host" the batch contains them as `neighbors` and `neighbor_tokens`. With another placement the batch
    contains `neighbor_rows` [B, M], and the function gathers these rows of the table. For a missing neighbor (-1) it
    reads row 0, as the host does.
    """
    if not settings.on_device:
        return lambda batch: (batch["neighbors"], batch["neighbor_tokens"])
    gather = _exchange(settings.shards_on(mesh), mesh) if settings.placement == "sharded" else _gather

    def find(batch: Mapping[str, Array]) -> tuple[Array, Array]:
        rows = jnp.maximum(batch["neighbor_rows"], 0)
        embeddings, tokens = gather(batch["gallery_embeddings"], batch["gallery_tokens"], rows)
        return embeddings.reshape(*rows.shape, 3, -1), tokens

    return find


def _gather(
    embeddings: BFloat16[Array, "N E"], tokens: Int[Array, "N T"], rows: Int32[Array, "*rows"]
) -> tuple[BFloat16[Array, "*rows E"], Int32[Array, "*rows T"]]:
    return embeddings[rows], tokens[rows].astype(jnp.int32)


class _Hop(NamedTuple):
    """An exchange of rows inside groups of devices. A device gets the rows that it needs in one or two hops.

    groups: for each group, mesh positions of its members. member_rows: number of consecutive rows of the table that
    each member has itself or gets in further hops. capacity: number of rows that a device requests from each member per
    round.
    """

    groups: list[list[int]]
    member_rows: int
    capacity: int


def _exchange(shards: int, mesh: Mesh) -> Callable:
    """Returns a function like `_gather`, for a table whose copies are split over `shards` consecutive devices each.

    The row numbers are split over the batch's mesh axes.
    """
    axes = mesh.axis_names

    def on_each_device(embeddings: Array, tokens: Array, rows: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index(axes) % shards * len(embeddings)
        row_bytes = embeddings[0].nbytes + tokens[0].nbytes
        hops = _hops(mesh.size, shards, len(embeddings), rows.size, row_bytes)
        found = _fetch((embeddings, tokens), rows.reshape(-1), first, axes, hops)
        found_embeddings, found_tokens = (x.reshape(*rows.shape, -1) for x in found)
        return found_embeddings, found_tokens.astype(jnp.int32)

    table, batch = PartitionSpec(axes), sharding.spec("batch")
    # check_vma=False: devices of one `tensor` group fetch the same rows, but JAX's check cannot prove this.
    return jax.shard_map(
        on_each_device, mesh=mesh, in_specs=(table, table, batch), out_specs=(batch, batch), check_vma=False
    )


def _hops(devices: int, shards: int, rows_per_device: int, requests: int, row_bytes: int) -> list[_Hop]:
    """Returns the hops of an exchange: one, or two if two hops move fewer bytes.

    In one hop, a device requests rows from each device that has them. In two hops, it requests rows from one device of
    each group, and that device requests them inside its group. Requests are padded to a hop's capacity. With 120 rows
    per device, two hops are better from 64 devices on: for 256 devices, 120 rows are padded to 1,536 in one hop, and to
    672 in two.

    requests: number of rows that each device needs.
    """

    def capacity(members: int) -> int:
        # The capacity is four standard deviations above the mean of a Poisson distribution, and 2 more for small means.
        # With it, rows drawn at random need a second round in fewer than one of five steps on 256 devices.
        mean = requests / members
        return min(requests, math.ceil(mean + 4 * math.sqrt(mean)) + 2)

    inner = max(n for n in range(1, math.isqrt(shards) + 1) if shards % n == 0)
    options = [[n for n in option if n > 1] for option in ((shards,), (shards // inner, inner))]
    sizes = min(options, key=lambda option: sum(n * capacity(n) for n in option))
    grid = np.arange(devices).reshape(-1, *sizes)
    hops = []
    for axis, members in enumerate(sizes, 1):
        groups = np.moveaxis(grid, axis, -1).reshape(-1, members).tolist()
        largest = max(1, ROUND_BYTES // (members * row_bytes))
        hops.append(_Hop(groups, rows_per_device * math.prod(sizes[axis:]), min(capacity(members), largest)))
    return hops


def _fetch(
    table: tuple[Array, ...], rows: Int32[Array, " n"], first: Array, axes: tuple[str, ...], hops: Sequence[_Hop]
) -> tuple[Array, ...]:
    """Returns rows [n, ...] of the tables, fetched from the devices that have them. Rows of -1 get arbitrary values.

    Every device requests each row once. Requests that exceed a hop's capacity wait for the next round. All devices run
    the number of rounds that the slowest one needs, so any rows can be requested.

    table: this device's part of each table. first: number of the first row of this part. axes: names of all mesh axes.
    """
    if not hops:
        local = jnp.clip(rows - first, 0, len(table[0]) - 1)
        # Without a barrier, XLA's CPU compiler converts the whole table to float32 before the loop over rounds.
        table, local = jax.lax.optimization_barrier((table, local))
        return tuple(x[local] for x in table)
    hop, *further = hops
    members = len(hop.groups[0])

    def swap(x: Array) -> Array:
        # XLA's CPU compiler would send bfloat16 as float32.
        bits = x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x
        return jax.lax.all_to_all(bits, axes, 0, 0, axis_index_groups=hop.groups, tiled=True).view(x.dtype)

    start = first - first % (members * hop.member_rows)  # first row that is reached in this hop
    wanted, at = jnp.unique(rows, return_inverse=True, size=len(rows), fill_value=np.iinfo(np.int32).max)
    bounds = jnp.searchsorted(wanted, start + hop.member_rows * jnp.arange(members + 1), method="compare_all")
    member = jnp.clip((rows - start) // hop.member_rows, 0, members - 1)
    turn, slot = jnp.divmod(at - bounds[member], hop.capacity)
    place = jnp.clip(member * hop.capacity + slot, 0, members * hop.capacity - 1)

    def serve(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        request = bounds[:-1, None] + i * hop.capacity + jnp.arange(hop.capacity)
        request = jnp.where(request < bounds[1:, None], wanted[jnp.minimum(request, len(wanted) - 1)], -1)
        answers = _fetch(table, swap(request).reshape(-1), first, axes, further)
        received = (
            swap(x.reshape(members, hop.capacity, -1)).reshape(len(request) * hop.capacity, -1) for x in answers
        )
        return tuple(jnp.where((turn == i)[:, None], new[place], old) for new, old in zip(received, found, strict=True))

    rounds = jax.lax.pmax(-(-jnp.max(jnp.diff(bounds)) // hop.capacity), axes)
    return jax.lax.fori_loop(0, rounds, serve, tuple(jnp.zeros((len(rows), x.shape[1]), x.dtype) for x in table))
