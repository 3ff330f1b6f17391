"""The contrastive losses of alignment, computed over the whole batch on any number of devices.

The rows of the similarity matrix are photos; the columns are targets, which are texts or locations. Every device
compares its photos with `chunk` targets at a time, and adds up the sums of the loss in both directions, photos to
targets and targets to photos. So it never holds more than `chunk` columns of its rows of the matrix.

If a device's targets are large, they travel from device to device in a ring, and a device never holds more than its
share of them. If they are small, all devices gather all targets, because most of a ring's time would be spent waiting
for messages. The backward pass does the same again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from geotoken_jax import sharding
from geotoken_jax.geo.distance import EARTH_RADIUS_KM, to_unit_vectors
from geotoken_jax.settings import Runtime, SettingsError
from geotoken_jax.vectors import unit

KINDS = ("info_nce", "sigmoid")
#: Size of a device's targets below which all devices gather them. For smaller targets, the latency of the six messages
#: in a turn of the ring (1.5 us each: 5,632 messages took an estimated 6 to 11 ms on 256 devices) is longer than the
#: time to move them at 100 GB/s.
_TURN_BYTES = 750_000
#: Largest size of all gathered targets: 1.6 % of the smallest chip's memory (16 GiB).
_GATHERED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Settings of the contrastive loss.

    kind: "info_nce", the loss of G3, or "sigmoid", the loss of SigLIP.
    chunk: columns of the similarity matrix that a device holds at a time.
    queue: number of coordinates of past batches that serve as additional negatives (GeoCLIP). If 0, there are none.
    same_within_km: distance in km. Photos up to this distance apart are not negatives of each other. If 0, this holds
    only for photos with the same coordinates.
    """

    kind: str
    chunk: Runtime[int]
    queue: int
    same_within_km: float

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"config.align.loss.kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.chunk < 1:
            raise ValueError(f"config.align.loss.chunk is {self.chunk}: it must be at least 1")
        if self.queue < 0:
            raise ValueError(f"config.align.loss.queue is {self.queue}: it must be 0 or more")
        if not 0 <= self.same_within_km < math.pi * EARTH_RADIUS_KM:
            raise ValueError(
                f"config.align.loss.same_within_km is {self.same_within_km}: choose a distance from 0 to below "
                "20,015 km, half the Earth's circumference"
            )


class Targets(NamedTuple):
    """Texts or locations that photos are compared with.

    vectors: embeddings, which the losses normalize. key: numbers that identify a target. Two targets count as the same
    if the distance between their keys is at most `reach`, an argument of the losses. A target that counts as the same
    as a photo's own target is no negative of that photo. present: False for targets that are left out, as positives and
    as negatives.
    """

    vectors: Float[Array, "N C"]
    key: Float[Array, "N K"]
    present: Bool[Array, "N"]


def info_nce(
    photos: Float[Array, "B C"],
    targets: Targets,
    log_scale: Float[Array, ""],
    *,
    chunk: int,
    reach: float = 0.0,
    queue: Targets | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the symmetric InfoNCE loss of the pairs (photo i, target i), and the accuracy of targets.

    Accuracy is the share of targets whose nearest photo is the one they are paired with. Both results are 0 if no pair
    is present. (van den Oord et al. 2018; Radford et al. 2021.)

    log_scale: logarithm of the factor on cosines. chunk: columns of the similarity matrix that a device holds at a
    time. reach: distance between keys up to which two targets count as the same. queue: additional negatives of every
    photo.
    """
    positives, of_photos, of_targets = _compare(
        "info_nce", photos, targets, log_scale, jnp.zeros(()), chunk, reach, queue
    )
    logs = (maximum + jnp.log(jnp.exp(positives - maximum) + total) for maximum, total in (of_photos, of_targets))
    return _mean((sum(logs) - 2 * positives) / 2, targets), _mean(positives >= of_targets[0], targets)


def sigmoid(
    photos: Float[Array, "B C"],
    targets: Targets,
    log_scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    chunk: int,
    reach: float = 0.0,
    queue: Targets | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sigmoid loss of the pairs (photo i, target i), and the accuracy of targets.

    For every photo and every target, the loss classifies whether they are a pair (Zhai et al. 2023, SigLIP).

    bias: number added to the scaled cosines. Other arguments and the accuracy are as in `info_nce`.
    """
    positives, (_, total), (maximum, _) = _compare("sigmoid", photos, targets, log_scale, bias, chunk, reach, queue)
    return _mean(jax.nn.softplus(-positives) + total, targets), _mean(positives >= maximum, targets)


def text_keys(x: Float[Array, "B C"]) -> Float[Array, "B 4"]:
    """Returns a key per row, equal for equal rows: a hash of 64 bits, as four 16-bit integers in float32."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x.astype(jnp.float32)), jnp.uint32)  # -0.0 equals 0.0
    # XOR with a random number per position makes the hash depend on the order of values. MurmurHash3's finalizer mixes
    # the bits of each value, so that their sum is a good hash.
    mixed = bits ^ jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (2, 1, x.shape[1]), np.uint32))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    sums = (mixed ^ (mixed >> 16)).sum(axis=-1, dtype=jnp.uint32)
    return jnp.concatenate([sums >> 16, sums & 0xFFFF]).T.astype(jnp.float32)


def place_keys(coordinates: Float[Array, "B 2"]) -> Float[Array, "B 3"]:
    """Returns keys of coordinates in degrees: points on the unit sphere, accurate to 1 m."""
    return jnp.asarray(to_unit_vectors(*jnp.moveaxis(coordinates, -1, 0)))


def reach(km: float) -> float:
    """Returns the distance between the keys of two places that are `km` apart on a great circle."""
    return 2 * math.sin(km / (2 * EARTH_RADIUS_KM))


#: Two numbers per photo, or per target. The first is the maximum of the logits of its pair and its negatives. The
#: second is the sum over its negatives of exp(logit - maximum) for InfoNCE, or of softplus(logit) for the sigmoid loss.
_Sums = tuple[Float[Array, "B"], Float[Array, "B"]]


class _Options(NamedTuple):
    kind: str
    chunk: int
    reach: float


def _compare(
    kind: str, photos: Array, targets: Targets, log_scale: Array, bias: Array, chunk: int, reach: float,
    queue: Targets | None,
) -> tuple[Float[Array, "B"], _Sums, _Sums]:  # fmt: skip
    """Returns the logits of the pairs, the `_Sums` of photos and the `_Sums` of targets."""
    queue = queue or Targets(*(part[:0] for part in targets))
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape.get(axis, 1) for axis in sharding.RULES["batch"])
    if len(queue.present) % devices:
        raise SettingsError(
            f"config.align.loss.queue is {len(queue.present)}, which does not divide over data x fsdp = {devices} "
            f"devices: choose a multiple of {devices}"
        )
    x, y, z = jnp.exp(log_scale) * unit(photos), unit(targets.vectors), unit(queue.vectors)
    biases = jnp.broadcast_to(bias, len(x))
    positives = (x * y).sum(-1) + biases
    floor = jax.lax.stop_gradient(positives)
    targets, queue = targets._replace(vectors=y), queue._replace(vectors=z)
    sums: Any = _sums(_Options(kind, chunk, reach), x, biases, floor, targets, queue)
    return positives, *sums


def _mean(values: Array, targets: Targets) -> Float[Array, ""]:
    return jnp.where(targets.present, values, 0).sum() / jnp.maximum(targets.present.sum(), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(options: _Options, x: Array, biases: Array, floor: Array, targets: Targets, queue: Targets) -> Any:
    """Returns the `_Sums` of photos and the `_Sums` of targets. Only the sums over negatives have a gradient."""
    return _on_devices(functools.partial(_forward, options), x, biases, floor, targets, queue)


def _sums_forward(options: _Options, *inputs: Any) -> tuple[Any, Any]:
    sums: Any = _sums(options, *inputs)
    x, biases, _, targets, queue = inputs
    return sums, (x, biases, targets, queue, tuple(maximum for maximum, _ in sums))


def _sums_backward(options: _Options, residuals: Any, gradients: tuple[_Sums, _Sums]) -> tuple:
    # The maxima need no gradient: they cancel in the InfoNCE loss, and the sigmoid loss does not use them.
    sum_gradients = tuple(gradient for _, gradient in gradients)
    dx, dbiases, dy, dz = _on_devices(functools.partial(_backward, options), *residuals, sum_gradients)
    return dx, dbiases, None, Targets(dy, None, None), Targets(dz, None, None)  # pyright: ignore[reportArgumentType]


_sums.defvjp(_sums_forward, _sums_backward)


def _on_devices(function: Callable, *arguments: Any) -> Any:
    """Returns function(axes, *arguments) computed on the rows of every device. axes: mesh axes that split the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return function((), *arguments)
    batch = sharding.spec("batch")
    mapped = functools.partial(function, sharding.RULES["batch"])
    return jax.shard_map(mapped, in_specs=batch, out_specs=batch)(*arguments)


def _forward(
    options: _Options, axes: tuple[str, ...], x: Array, biases: Array, floor: Array, targets: Targets, queue: Targets
) -> tuple[_Sums, _Sums]:
    zeros, queue_zeros = jnp.zeros_like(floor), jnp.zeros(len(queue.present))

    def add(sums: _Sums, logits: Array, axis: int) -> _Sums:
        maximum, total = sums
        higher = jnp.maximum(maximum, logits.max(axis))
        if options.kind == "sigmoid":
            return higher, total + jax.nn.softplus(logits).sum(axis)
        part = jnp.exp(logits - jnp.expand_dims(higher, axis)).sum(axis)
        return higher, total * jnp.exp(maximum - higher) + part

    def step(of_photos: _Sums, part: tuple[tuple[Targets, Array], _Sums]) -> tuple[_Sums, _Sums]:
        (columns, _), of_targets = part
        logits = _logits(options, x, biases, targets, columns)
        return add(of_photos, logits, 1), add(of_targets, logits, 0)

    def add_up(sums: _Sums) -> _Sums:
        maximum, total = sums
        highest = jax.lax.pmax(maximum, axes)
        rescaled = total if options.kind == "sigmoid" else total * jnp.exp(maximum - highest)
        n = len(highest) // jax.lax.axis_size(axes)
        own = jax.lax.dynamic_slice_in_dim(highest, jax.lax.axis_index(axes) * n, n)
        return own, jax.lax.psum_scatter(rescaled, axes, tiled=True)

    fixed = (Targets(*map(_join, targets, queue)), _join(floor, queue_zeros))
    of_photos, of_targets = _over_columns(
        step, (floor, zeros), fixed, lambda fixed: (fixed[1], jnp.zeros_like(fixed[1])),
        chunk=options.chunk, axes=axes, add_up=add_up,
    )  # fmt: skip
    return of_photos, tuple(part[: len(x)] for part in of_targets)


def _backward(
    options: _Options, axes: tuple[str, ...], x: Array, biases: Array, targets: Targets, queue: Targets,
    maxima: tuple[Array, Array], gradients: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Returns the gradients with respect to x, biases, the vectors of targets and the vectors of the queue.

    maxima: largest logits of photos and of targets. gradients: gradients with respect to their sums over negatives.
    """
    (photo_maximum, target_maximum), (photo_gradient, target_gradient) = maxima, gradients
    queue_zeros = jnp.zeros(len(queue.present))

    def slope(logits: Array, maximum: Array, gradients: Array, axis: int) -> Array:
        maximum, gradients = jnp.expand_dims(maximum, axis), jnp.expand_dims(gradients, axis)
        return gradients * (jax.nn.sigmoid(logits) if options.kind == "sigmoid" else jnp.exp(logits - maximum))

    def step(sums: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], Array]:
        (columns, maximum, gradient), dy = part
        logits = _logits(options, x, biases, targets, columns)
        dlogits = slope(logits, photo_maximum, photo_gradient, 1) + slope(logits, maximum, gradient, 0)
        dx, dbiases = sums
        return (dx + dlogits @ columns.vectors, dbiases + dlogits.sum(1)), dy + dlogits.T @ x

    def add_up(dy: Array) -> Array:
        return jax.lax.psum_scatter(dy, axes, tiled=True)

    columns = Targets(*map(_join, targets, queue))
    # Targets in the queue have no photo, so they have no sum over negatives. With a maximum of infinity, their
    # exp(logit - maximum) is 0.
    fixed = (columns, _join(target_maximum, queue_zeros + jnp.inf), _join(target_gradient, queue_zeros))
    (dx, dbiases), dy = _over_columns(
        step, (jnp.zeros_like(x), jnp.zeros_like(biases)), fixed, lambda fixed: jnp.zeros_like(fixed[0].vectors),
        chunk=options.chunk, axes=axes, add_up=add_up,
    )  # fmt: skip
    return dx, dbiases, dy[: len(x)], dy[len(x) :]


def _logits(options: _Options, x: Array, biases: Array, rows: Targets, columns: Targets) -> Float[Array, "B chunk"]:
    """Returns the logits of photos and the targets `columns`, -inf if a target is not a negative of a photo.

    rows: the targets that the photos are paired with.
    """
    pairs = zip(rows.key.T, columns.key.T, strict=True)
    apart = sum((row[:, None] - column) ** 2 for row, column in pairs) > options.reach**2
    return jnp.where(rows.present[:, None] & columns.present & apart, x @ columns.vectors.T + biases[:, None], -jnp.inf)


def _join(targets: Array, queue: Array) -> Array:
    return jnp.concatenate([targets, queue])


def _chunks(chunk: int, columns: Array) -> Array:
    """Returns columns [n, ...] as [chunks, columns per chunk, ...], padded with zeros.

    A zero in `Targets.present` is False, so padding does not count.
    """
    parts = -(-len(columns) // chunk)
    missing = -len(columns) % parts
    return jnp.pad(columns, [(0, missing)] + [(0, 0)] * (columns.ndim - 1)).reshape(parts, -1, *columns.shape[1:])


def _over_columns(
    step: Callable, carry: Any, fixed: Any, start: Callable, *, chunk: int, axes: tuple[str, ...], add_up: Callable
) -> tuple[Any, Any]:
    """Runs `step` over the columns (targets) of all devices, chunk by chunk.

    step(carry, (fixed, changing)) returns the new (carry, changing). `fixed` and `changing` are arrays of a chunk's
    columns. `carry` belongs to the photos of this device.

    Returns the last carry, and `changing` of this device's columns after all devices have updated it.

    fixed: arrays of this device's columns, [n, ...]. start: function from `fixed` of some columns to their first
    `changing`. add_up: function that is called if all columns are gathered. It takes `changing` of all columns, which
    has only this device's updates, and returns `changing` of this device's columns with the updates of all devices.
    """
    devices = jax.lax.axis_size(axes) if axes else 1
    columns, turn_bytes = len(jax.tree.leaves(fixed)[0]), sum(leaf.nbytes for leaf in jax.tree.leaves(fixed))
    gathered = devices > 1 and turn_bytes < _TURN_BYTES and turn_bytes * devices <= _GATHERED_BYTES
    if gathered:
        fixed = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), fixed)
    fixed, changing = jax.tree.map(functools.partial(_chunks, chunk), (fixed, start(fixed)))

    ring = [(device, (device + 1) % devices) for device in range(devices)]

    def pass_on(part: Array) -> Array:
        return jax.lax.ppermute(part, axes, ring)

    def turn(state: tuple, _: None) -> tuple[tuple, None]:
        carry, fixed, changing = state
        carry, changing = jax.lax.scan(step, carry, (fixed, changing))
        return (carry, *jax.tree.map(pass_on, (fixed, changing))), None

    if gathered or devices == 1:
        carry, changing = jax.lax.scan(step, carry, (fixed, changing))
    else:
        (carry, _, changing), _ = jax.lax.scan(turn, (carry, fixed, changing), length=devices)
    total = columns * devices if gathered else columns
    changing = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], changing)
    return carry, add_up(changing) if gathered else changing
