"""The contrastive losses of alignment: over the whole batch, however many devices share it.

A device compares its own photos with the targets of all, which travel from device to device in a ring, `chunk` of them
at a time, and both directions are summed on the way. The backward pass goes round once more. So no device ever holds
more of the similarity matrix than its own rows by `chunk` columns, nor more of the targets than its share.
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


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """kind: "info_nce" (G3's) or "sigmoid" (SigLIP's). chunk: columns of the similarity matrix that a device holds at
    a time. queue: coordinates of past batches that are further negatives of every photo, 0 for none (GeoCLIP's).
    same_within_km: of two photos no farther apart than this neither is a negative of the other; 0 for one place."""

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
                f"config.align.loss.same_within_km is {self.same_within_km}: it must be from 0 to under 20,015 km, "
                "half the Earth's circumference"
            )


class Targets(NamedTuple):
    """What photos are compared with; vectors need not be normalized.

    key: two targets whose keys are no farther apart than a loss's `reach` are one target, so neither's photo has the
    other as a negative. present: those that take part; the others are neither positives nor negatives.
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
    """Returns the symmetric InfoNCE loss of the pairs (photo i, target i), and the share of targets whose nearest photo
    is their own.

    log_scale: logarithm of the factor on cosines. queue: further targets, negatives of every photo. Both results are 0
    if no pair is present. (van den Oord et al. 2018; Radford et al. 2021.)
    """
    own, of_photos, of_targets = _compare("info_nce", photos, targets, log_scale, jnp.zeros(()), chunk, reach, queue)
    logs = (most + jnp.log(jnp.exp(own - most) + total) for most, total in (of_photos, of_targets))
    return _mean((sum(logs) - 2 * own) / 2, targets), _mean(own >= of_targets[0], targets)


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
    """Returns what `info_nce` does, of the loss that asks of each pair alone whether it is one.

    bias: added to the scaled cosines. (Zhai et al. 2023, SigLIP.)
    """
    own, (_, total), (most, _) = _compare("sigmoid", photos, targets, log_scale, bias, chunk, reach, queue)
    return _mean(jax.nn.softplus(-own) + total, targets), _mean(own >= most, targets)


def fingerprint(x: Float[Array, "B C"]) -> Float[Array, "B 4"]:
    """Returns keys of rows, equal where the rows are: 64 bits of a hash, as four integers that a float32 holds."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x.astype(jnp.float32)), jnp.uint32)  # -0.0 is 0.0
    # A random number for each position, then the bits mixed (MurmurHash3's finalizer) so that a sum will do.
    mixed = bits ^ jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (2, 1, x.shape[1]), np.uint32))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    sums = (mixed ^ (mixed >> 16)).sum(axis=-1, dtype=jnp.uint32)
    return jnp.concatenate([sums >> 16, sums & 0xFFFF]).T.astype(jnp.float32)


def places(coordinates: Float[Array, "B 2"]) -> Float[Array, "B 3"]:
    """Returns keys of coordinates in degrees: points of the unit sphere, exact to 1 m."""
    return jnp.asarray(to_unit_vectors(*jnp.moveaxis(coordinates, -1, 0)))


def reach(km: float) -> float:
    """Returns how far apart the keys of two places are whose great-circle distance is `km`."""
    return 2 * math.sin(km / (2 * EARTH_RADIUS_KM))


#: For each photo (or target), over its negatives: the largest logit, at least its own; and, measured from that, the sum
#: of exp(logit), or of softplus(logit).
_Sums = tuple[Float[Array, "B"], Float[Array, "B"]]


class _Form(NamedTuple):
    kind: str
    chunk: int
    reach: float


def _compare(
    kind: str, photos: Array, targets: Targets, log_scale: Array, bias: Array, chunk: int, reach: float,
    queue: Targets | None,
) -> tuple[Float[Array, "B"], _Sums, _Sums]:  # fmt: skip
    """Returns the logits of the pairs, and the sums over photos' and over targets' negatives."""
    queue = queue or Targets(*(part[:0] for part in targets))
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape.get(axis, 1) for axis in sharding.RULES["batch"])
    if len(queue.present) % devices:
        raise SettingsError(
            f"config.align.loss.queue = {len(queue.present)} does not divide over data x fsdp = {devices} devices: "
            f"choose a multiple of {devices}"
        )
    x, y, z = jnp.exp(log_scale) * unit(photos), unit(targets.vectors), unit(queue.vectors)
    biases = jnp.broadcast_to(bias, len(x))
    own = (x * y).sum(-1) + biases
    floor = jax.lax.stop_gradient(own)
    targets, queue = targets._replace(vectors=y), queue._replace(vectors=z)
    sums: Any = _sums(_Form(kind, chunk, reach), x, biases, floor, targets, queue)
    return own, *sums


def _mean(values: Array, targets: Targets) -> Float[Array, ""]:
    return jnp.where(targets.present, values, 0).sum() / jnp.maximum(targets.present.sum(), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(form: _Form, x: Array, biases: Array, floor: Array, targets: Targets, queue: Targets) -> Any:
    """Returns the sums over photos' and over targets' negatives; only what is summed has a gradient."""
    return _on_devices(functools.partial(_forward, form), x, biases, floor, targets, queue)


def _sums_forward(form: _Form, *inputs: Any) -> tuple[Any, Any]:
    sums: Any = _sums(form, *inputs)
    x, biases, _, targets, queue = inputs
    return sums, (x, biases, targets, queue, tuple(most for most, _ in sums))


def _sums_backward(form: _Form, kept: Any, slopes: tuple[_Sums, _Sums]) -> tuple:
    # What is summed is measured from `most`, so the result does not depend on it: its own slope is none.
    found = _on_devices(functools.partial(_backward, form), *kept, tuple(slope for _, slope in slopes))
    dx, dbiases, dy, dz = found
    return dx, dbiases, None, Targets(dy, None, None), Targets(dz, None, None)  # pyright: ignore[reportArgumentType]


_sums.defvjp(_sums_forward, _sums_backward)


def _on_devices(function: Callable, *arguments: Any) -> Any:
    """Runs function(axes, *arguments) on every device's rows; axes: of the mesh in use that the batch is split over."""
    if jax.sharding.get_abstract_mesh().empty:
        return function((), *arguments)
    batch = sharding.spec("batch")
    on_each = functools.partial(function, sharding.RULES["batch"])
    return jax.shard_map(on_each, in_specs=batch, out_specs=batch)(*arguments)


def _forward(
    form: _Form, axes: tuple[str, ...], x: Array, biases: Array, floor: Array, targets: Targets, queue: Targets
) -> tuple[_Sums, _Sums]:
    cut = functools.partial(_cut, form.chunk)
    none, past = jnp.zeros_like(floor), jnp.zeros(len(queue.present))

    def add(sums: _Sums, logits: Array, axis: int) -> _Sums:
        most, total = sums
        higher = jnp.maximum(most, logits.max(axis))
        if form.kind == "sigmoid":
            return higher, total + jax.nn.softplus(logits).sum(axis)
        part = jnp.exp(logits - jnp.expand_dims(higher, axis)).sum(axis)
        return higher, total * jnp.exp(most - higher) + part

    def step(of_photos: _Sums, part: tuple[Targets, _Sums]) -> tuple[_Sums, _Sums]:
        columns, of_targets = part
        logits = _logits(form, x, biases, targets, columns)
        return add(of_photos, logits, 1), add(of_targets, logits, 0)

    columns = Targets(*map(cut, targets, queue))
    of_photos, of_targets = _ring(step, (floor, none), columns, (cut(floor, past), cut(none, past)), axes)
    return of_photos, tuple(part.reshape(-1)[: len(x)] for part in of_targets)


def _backward(
    form: _Form, axes: tuple[str, ...], x: Array, biases: Array, targets: Targets, queue: Targets,
    mosts: tuple[Array, Array], slopes: tuple[Array, Array],
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Returns the gradients by x, biases, the targets' vectors and the queue's.

    mosts, slopes: the largest logits, and the sums' gradients, of photos and of targets.
    """
    (photo_most, target_most), (photo_slope, target_slope) = mosts, slopes
    cut = functools.partial(_cut, form.chunk)
    past = jnp.zeros(len(queue.present))

    def slope(logits: Array, most: Array, slopes: Array, axis: int) -> Array:
        most, slopes = jnp.expand_dims(most, axis), jnp.expand_dims(slopes, axis)
        return slopes * (jax.nn.sigmoid(logits) if form.kind == "sigmoid" else jnp.exp(logits - most))

    def step(sums: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], Array]:
        (columns, most, slope_of), dy = part
        logits = _logits(form, x, biases, targets, columns)
        dlogits = slope(logits, photo_most, photo_slope, 1) + slope(logits, most, slope_of, 0)
        dx, dbiases = sums
        return (dx + dlogits @ columns.vectors, dbiases + dlogits.sum(1)), dy + dlogits.T @ x

    columns = Targets(*map(cut, targets, queue))
    # Nothing is summed over the queue's own negatives: from infinity, exp(logit) is 0 there.
    fixed = (columns, cut(target_most, past + jnp.inf), cut(target_slope, past))
    (dx, dbiases), dy = _ring(
        step, (jnp.zeros_like(x), jnp.zeros_like(biases)), fixed, jnp.zeros_like(columns.vectors), axes
    )
    dy = dy.reshape(-1, x.shape[1])
    return dx, dbiases, dy[: len(x)], dy[len(x) : len(x) + len(past)]


def _logits(form: _Form, x: Array, biases: Array, rows: Targets, columns: Targets) -> Float[Array, "B chunk"]:
    """Returns the logits of photos with some targets, -inf where these are no negatives."""
    pairs = zip(rows.key.T, columns.key.T, strict=True)
    apart = sum((row[:, None] - column) ** 2 for row, column in pairs) > form.reach**2
    return jnp.where(rows.present[:, None] & columns.present & apart, x @ columns.vectors.T + biases[:, None], -jnp.inf)


def _cut(chunk: int, own: Array, queue: Array) -> Array:
    """Returns a device's columns as [parts, at most chunk, ...], filled up with zeros, which are not present."""
    columns = jnp.concatenate([own, queue])
    parts = -(-len(columns) // chunk)
    missing = -len(columns) % parts
    return jnp.pad(columns, [(0, missing)] + [(0, 0)] * (columns.ndim - 1)).reshape(parts, -1, *columns.shape[1:])


def _ring(step: Callable, carry: Any, fixed: Any, changing: Any, axes: tuple[str, ...]) -> tuple[Any, Any]:
    """Takes step(carry, (fixed, changing)) -> (carry, changing) through the parts of every device's columns; returns
    the carry, and what has become of this device's `changing`."""
    devices = jax.lax.axis_size(axes) if axes else 1
    ring = [(device, (device + 1) % devices) for device in range(devices)]

    def pass_on(part: Array) -> Array:
        return jax.lax.ppermute(part, axes, ring) if axes else part

    def turn(state: tuple, _: None) -> tuple[tuple, None]:
        carry, fixed, changing = state
        carry, changing = jax.lax.scan(step, carry, (fixed, changing))
        return (carry, *jax.tree.map(pass_on, (fixed, changing))), None

    (carry, _, changing), _ = jax.lax.scan(turn, (carry, fixed, changing), length=devices)
    return carry, changing
