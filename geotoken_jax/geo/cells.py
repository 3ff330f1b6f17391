"""Converts coordinates to S2 cells as token sequences and back, vectorized.

The cells are the same as in the s2sphere library, which uses S2's quadratic projection. A quad is a digit of 0..3 that
selects one of the four children of a cell.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int32, UInt8, UInt64

Array = np.ndarray | jax.Array

MAX_LEVEL = 30
#: Quads per token, at most: tokens are int32, and 4^16 values do not fit.
MAX_GROUP = 15

#: Number of coordinates that numpy converts at a time. The float64 temporaries of such a block take 128 kB each and
#: stay in a core's second-level cache. Blocks of 4096 take 40 % longer, because numpy spends half a microsecond of
#: overhead on each of a hundred operations.
_BLOCK = 16000
#: Distance from a cell's edge, as a fraction of a face's side. Points closer to an edge than this could get the wrong
#: cell from `_fast_face_ij`, so they are converted by `_face_ij`. The largest error of `_fast_face_ij` over three
#: million random coordinates is 4.4e-16.
_MARGIN = 2e-14
#: Levels of the Hilbert curve per table lookup, at most: a table for 6 levels takes 64 KB.
_MAX_LOOKUP = 6

#: One level of the Hilbert curve, on which a cell has four children. The first table maps (orientation, position on the
#: curve) of a child to 2 * i + j, with one bit each for i and j. The second maps a child's position to the change of
#: orientation inside it. An orientation is 1 if i and j are swapped, plus 2 if both are inverted. A face starts with
#: orientation face & 1.
_POSITION_TO_IJ = np.array([[0, 1, 3, 2], [0, 2, 3, 1], [3, 2, 0, 1], [3, 1, 0, 2]])
_POSITION_TO_TURN = np.array([1, 0, 0, 3])


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    """Base class: converts coordinates to the tokens of nested cells and back.

    Tokens are [..., T], coarse to fine. Each of the T positions has its own vocabulary. For jax arrays and tracers, the
    methods return jax arrays, for all other input numpy arrays. jax computes in float64 too, so float32 input has only
    the error of its own rounding (up to 0.85 m in longitude).

    level: size of the cells, as the level of S2 cells that are about as large, 1..30. group: number of digits per
    token.

    Raises ValueError if level or group is out of range.
    """

    level: int = 20
    group: int = 2

    #: Whether jax can compile encode and decode. If not, they return numpy arrays and accept no tracers.
    traceable: ClassVar[bool] = True

    def __post_init__(self):
        if not 1 <= self.level <= MAX_LEVEL:
            raise ValueError(f"level is {self.level}: use 1..{MAX_LEVEL}")

    @property
    @abc.abstractmethod
    def vocab_sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each of the T token positions."""

    @property
    def length(self) -> int:
        """T, the number of tokens per cell."""
        return len(self.vocab_sizes)

    def encode(
        self, latitude: float | Float[Array, "..."], longitude: float | Float[Array, "..."]
    ) -> Int32[Array, "... T"]:
        """Returns the tokens of the cells that contain the coordinates.

        latitude: degrees in [-90, 90]. longitude: degrees in [-180, 180], broadcast against latitude.

        Raises ValueError if a value is NaN or out of range. Inside a jax transformation values cannot be checked, so
        all tokens of such a coordinate are -1.
        """
        _check_degrees("latitude", latitude, 90)
        _check_degrees("longitude", longitude, 180)
        if self.traceable and _is_jax(latitude, longitude):
            with jax.enable_x64(True):
                return self._encode_jax(latitude, longitude)
        lat, lon = np.broadcast_arrays(np.asarray(latitude, np.float64), np.asarray(longitude, np.float64))
        shape, lat, lon = lat.shape, lat.reshape(-1), lon.reshape(-1)
        tokens = np.empty((lat.size, self.length), np.int32)
        for start in range(0, lat.size, _BLOCK):
            rows = slice(start, start + _BLOCK)
            for k, column in enumerate(self._tokens(lat[rows], lon[rows], np)):
                tokens[rows, k] = column
        return tokens.reshape(*shape, self.length)

    def decode(self, tokens: Int[Array, "... T"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Returns latitude and longitude of the cells' centers, in degrees.

        Both are float64 in numpy, and jax's default float type in jax.

        Raises ValueError if the last dimension is not T or a token is out of range. Inside a jax transformation tokens
        cannot be checked, so the center of a cell with such a token is NaN.
        """
        self._check_tokens(tokens)
        if self.traceable and _is_jax(tokens):
            dtype = jnp.result_type(float)
            with jax.enable_x64(True):
                return self._decode_jax(tokens, dtype)
        flat = np.asarray(tokens).reshape(-1, self.length)
        latitude, longitude = np.empty((2, len(flat)))
        for start in range(0, len(flat), _BLOCK):
            rows = slice(start, start + _BLOCK)
            columns = [flat[rows, k].astype(np.int32) for k in range(self.length)]
            latitude[rows], longitude[rows] = self._center(columns, np)
        return latitude.reshape(tokens.shape[:-1]), longitude.reshape(tokens.shape[:-1])

    def from_stored(
        self, quads: UInt8[np.ndarray, "... Q"], coordinates: Float[np.ndarray, "... 2"]
    ) -> Int32[np.ndarray, "... T"]:
        """Returns this scheme's tokens of photos in a data set, which stores S2 tokens and coordinates.

        Schemes of S2 cells regroup the stored tokens. The others encode the coordinates.

        quads: S2 tokens of group 1. coordinates: latitude and longitude in degrees.
        """
        del quads
        return np.asarray(self.encode(coordinates[..., 0], coordinates[..., 1]))

    @abc.abstractmethod
    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> Sequence[Any]:
        """Returns T columns of tokens. The coordinates are float64, in range, and one-dimensional if xp is numpy."""

    @abc.abstractmethod
    def _center(self, columns: Sequence[Any], xp: ModuleType) -> tuple[Any, Any]:
        """Returns latitude and longitude in degrees from T columns of int32 tokens."""

    @functools.partial(jax.jit, static_argnums=0)
    def _encode_jax(self, latitude, longitude) -> jax.Array:
        lat, lon = jnp.broadcast_arrays(*(jnp.asarray(values).astype(jnp.float64) for values in (latitude, longitude)))
        tokens = jnp.stack(self._tokens(lat, lon, jnp), -1)
        valid = (jnp.abs(lat) <= 90) & (jnp.abs(lon) <= 180)
        return jnp.where(valid[..., None], tokens, -1).astype(jnp.int32)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def _decode_jax(self, tokens, dtype) -> tuple[jax.Array, jax.Array]:
        valid = jnp.all((tokens >= 0) & (tokens < np.array(self.vocab_sizes)), -1)
        latitude, longitude = self._center([tokens[..., k].astype(jnp.int32) for k in range(self.length)], jnp)
        return jnp.where(valid, latitude, jnp.nan).astype(dtype), jnp.where(valid, longitude, jnp.nan).astype(dtype)

    def _check_tokens(self, tokens: Any) -> None:
        if tokens.shape[-1:] != (self.length,):
            raise ValueError(f"tokens have shape {tokens.shape}: {self} needs {self.length} in the last dimension")
        if isinstance(tokens, jax.core.Tracer):
            return
        values = np.asarray(tokens).reshape(-1, self.length)
        wrong = (values < 0) | (values >= np.array(self.vocab_sizes, np.int64))
        if wrong.any():
            row, k = np.argwhere(wrong)[0]
            raise ValueError(
                f"tokens has {wrong.sum()} values out of range for {self}: the first is {values[row, k]} at position "
                f"{k}, which takes 0..{self.vocab_sizes[k] - 1}"
            )


@dataclasses.dataclass(frozen=True)
class CellScheme(Scheme):
    """Converts coordinates to the tokens of S2 cells and back.

    The first token is the face (0..5). Each further token is `group` quads of the Hilbert path, the first quad most
    significant. T = 1 + level / group.

    level: level of the cells, 1..30; a cell of level 20 has an edge of about 8.8 m. group: quads per token, a divisor
    of level up to 15.

    Rounding a million random coordinates to float32 moved 3 % of them to another level-20 cell. On the rounded
    coordinates jax and numpy agreed on every level-20 cell and on all but one level-30 cell. (Compiled float64
    arithmetic may differ in the last bit.) The float64 centers differ from s2sphere's by less than 1e-12 degrees.
    """

    def __post_init__(self):
        super().__post_init__()
        divisors = [n for n in range(1, MAX_GROUP + 1) if self.level % n == 0]
        if self.group not in divisors:
            wrong = "does not divide" if self.level % max(self.group, 1) else f"is not in 1..{MAX_GROUP}, for"
            raise ValueError(f"group is {self.group}, which {wrong} level {self.level}: use one of {divisors}")

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each of the T token positions."""
        return (6, *(self.level // self.group) * (4**self.group,))

    def cell_ids(self, tokens: Int[np.ndarray, "... T"]) -> UInt64[np.ndarray, "..."]:
        """Returns S2 cell ids. Raises ValueError if a token is out of range."""
        self._check_tokens(tokens)
        columns = np.moveaxis(np.asarray(tokens).astype(np.uint64), -1, 0)
        ids = columns[0]
        for column in columns[1:]:
            ids = ids << np.uint64(2 * self.group) | column
        return (ids << np.uint64(1) | np.uint64(1)) << np.uint64(2 * (MAX_LEVEL - self.level))

    def from_cell_ids(self, cell_ids: UInt64[np.ndarray, "..."]) -> Int32[np.ndarray, "... T"]:
        """Returns the tokens of S2 cells. A cell finer than `level` gets the tokens of its parent at `level`.

        Raises ValueError if a cell is coarser than `level` or a number is not an S2 cell id.
        """
        ids = np.asarray(cell_ids, np.uint64)
        lowest = ids & (~ids + np.uint64(1))  # a cell of level n ends in a one and 2 * (30 - n) zeros
        invalid = (ids >> np.uint64(61) > 5) | (lowest & np.uint64(0x5555555555555555) == 0)
        coarse = lowest > np.uint64(1 << 2 * (MAX_LEVEL - self.level))
        for wrong, problem in ((invalid, "no S2 cell ids"), (coarse, f"coarser than level {self.level}")):
            if wrong.any():
                raise ValueError(f"{wrong.sum()} cell_ids are {problem}, the first {int(ids[wrong][0]):#018x}")
        shifts = np.array([61, *range(61 - 2 * self.group, 60 - 2 * self.level, -2 * self.group)], np.uint64)
        masks = np.array([7] + [4**self.group - 1] * (self.length - 1), np.uint64)
        return (ids[..., None] >> shifts & masks).astype(np.int32)

    def prefix_centers(self, tokens: Int[Array, "... T"], depth: Int[Array, "..."]) -> Float[Array, "... 2"]:
        """Returns latitude and longitude, in degrees, of the centers of cells that a prefix of the tokens names.

        depth: number of tokens of each prefix, 0 to T; the rest of the tokens is ignored. Depth 0 is the whole Earth,
        and its center counts as 0, 0. numpy arrays give float64, jax arrays float32.
        """
        xp = jnp if _is_jax(tokens) else np
        coordinates = xp.zeros((*depth.shape, 2))
        for d in range(1, self.length + 1) if xp is jnp else np.unique(depth[depth > 0]).tolist():
            level = (d - 1) * self.group
            here = type(self)(level, self.group) if level else None
            columns = [tokens[..., k] for k in range(d)]
            half = xp.full(depth.shape, 0.5)
            center = here._center(columns, xp) if here else _degrees(columns[0], half, half, xp)
            coordinates = xp.where((depth == d)[..., None], xp.stack(center, -1), coordinates)
        return coordinates

    def regroup(self, quads: UInt8[Array, "... Q"]) -> Int32[Array, "... T"]:
        """Returns this scheme's tokens, down to `level`, from stored tokens of group 1.

        quads: tokens of group 1; data sets store level 20, so Q = 21 (records.py).

        Raises ValueError if the stored tokens are coarser than `level`.
        """
        if quads.shape[-1] <= self.level:
            stored = quads.shape[-1] - 1
            raise ValueError(f"level is {self.level}, but stored tokens end at level {stored}: use 1..{stored}")
        xp = jnp if _is_jax(quads) else np
        columns = [quads[..., k].astype(np.int32) for k in range(1 + self.level)]
        return xp.stack([columns[0], *_resplit(columns[1:], 1, self.group)], -1)

    def from_stored(
        self, quads: UInt8[np.ndarray, "... Q"], coordinates: Float[np.ndarray, "... 2"]
    ) -> Int32[np.ndarray, "... T"]:
        """Returns this scheme's tokens of photos in a data set, regrouped from the stored S2 tokens."""
        del coordinates
        return np.asarray(self.regroup(quads))

    def quads(self, tokens: Int[Array, "... T"]) -> UInt8[Array, "... Q"]:
        """Returns tokens of group 1, Q = 1 + level: the inverse of `regroup`."""
        xp = jnp if _is_jax(tokens) else np
        columns = [tokens[..., k] for k in range(self.length)]
        return xp.stack([columns[0], *_resplit(columns[1:], self.group, 1)], -1).astype(np.uint8)

    @property
    def _lookup(self) -> int:
        """Quads per table lookup: a multiple or a divisor of `group`."""
        return max(n for n in range(1, _MAX_LOOKUP + 1) if n % self.group == 0 or self.group % n == 0)

    @property
    def _depth(self) -> int:
        """`level` rounded up to a multiple of `_lookup`; the quads past `level` are dropped."""
        return self.level + -self.level % self._lookup

    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> list[Any]:
        if xp is np:
            return self._columns(*_fast_face_ij(latitude, longitude, self._depth), np)
        face, i, j = _face_ij(latitude, longitude, self._depth, xp)
        return self._columns(face, face & 1, i, j, xp)

    def _columns(self, face, orientation, i, j, xp: ModuleType) -> list[Any]:
        """Returns T columns of tokens.

        face: 0..5. orientation: the curve's orientation on the face. i, j: coordinates on the face, `_depth` bits each.
        """
        n = self._lookup
        table, side = xp.asarray(_tables(n)[0]), (1 << n) - 1
        state, chunks = orientation << 2 * n, []
        for shift in range(self._depth - n, -1, -n):
            entry = xp.take(table, state | (i >> shift & side) << n | j >> shift & side, mode="wrap")
            chunks.append(entry & (4**n - 1))
            state = entry & (3 << 2 * n)
        return [face, *_resplit(chunks, n, self.group)][: self.length]

    def _center(self, columns: Sequence[Any], xp: ModuleType) -> tuple[Any, Any]:
        n = self._lookup
        table, side = xp.asarray(_tables(n)[1]), (1 << n) - 1
        face, *groups = columns
        groups += [xp.zeros_like(face)] * ((self._depth - self.level) // self.group)
        # Products instead of shifts to the left, because ONNX shifts unsigned integers only.
        state, i, j = (face & 1) * 4**n, 0, 0
        for chunk in _resplit(groups, self.group, n):
            entry = xp.take(table, state | chunk, mode="wrap")
            i, j = i * 2**n | entry >> n & side, j * 2**n | entry & side
            state = entry & (3 << 2 * n)
        extra = self._depth - self.level
        s, t = (((k >> extra) + 0.5) * 0.5**self.level for k in (i, j))
        return _degrees(face, s, t, xp)


@dataclasses.dataclass(frozen=True)
class GridScheme(CellScheme):
    """Converts coordinates to tokens of S2 cells without the Hilbert order, and back.

    A quad is 2 * i + j, with one bit each of the positions i and j along the face's two axes. The cells, their ids and
    the meanings of level, group and `quads` are the same as in CellScheme.
    """

    def cell_ids(self, tokens: Int[np.ndarray, "... T"]) -> UInt64[np.ndarray, "..."]:
        """Returns S2 cell ids. Raises ValueError if a token is out of range."""
        self._check_tokens(tokens)
        return super().cell_ids(self._translate(tokens, _TO_POSITION))

    def from_cell_ids(self, cell_ids: UInt64[np.ndarray, "..."]) -> Int32[np.ndarray, "... T"]:
        """Returns the tokens of S2 cells; see CellScheme.from_cell_ids."""
        return self._translate(super().from_cell_ids(cell_ids), _TO_IJ)

    def regroup(self, quads: UInt8[Array, "... Q"]) -> Int32[Array, "... T"]:
        """Returns this scheme's tokens from stored tokens of group 1; see CellScheme.regroup."""
        return self._translate(super().regroup(quads), _TO_IJ)

    def quads(self, tokens: Int[Array, "... T"]) -> UInt8[Array, "... Q"]:
        """Returns CellScheme's tokens of group 1: the inverse of `regroup`."""
        return super().quads(self._translate(tokens, _TO_POSITION))

    def _tokens(self, latitude: Any, longitude: Any, xp: ModuleType) -> list[Any]:
        return self._translate_columns(super()._tokens(latitude, longitude, xp), _TO_IJ, xp)

    def _center(self, columns: Sequence[Any], xp: ModuleType) -> tuple[Any, Any]:
        return super()._center(self._translate_columns(columns, _TO_POSITION, xp), xp)

    def _translate(self, tokens: Any, table: np.ndarray) -> Any:
        xp = jnp if _is_jax(tokens) else np
        return xp.stack(self._translate_columns([tokens[..., k] for k in range(self.length)], table, xp), -1)

    def _translate_columns(self, columns: Sequence[Any], table: np.ndarray, xp: ModuleType) -> list[Any]:
        """Returns columns of tokens with each quad translated. table: _TO_POSITION or _TO_IJ."""
        face, *groups = columns
        translated, state = [], (face & 1) * 4
        for quad in _resplit(groups, self.group, 1):
            entry = xp.take(xp.asarray(table), state | quad, mode="wrap")
            translated.append(entry & 3)
            state = entry & 12
        return [face, *_resplit(translated, 1, self.group)]


def corners(quads: Int[np.ndarray, "... Q"]) -> Float[np.ndarray, "... 4 2"]:
    """Returns latitude and longitude, in degrees, of the four corners of S2 cells, counterclockwise.

    The edges between the corners are arcs of great circles.

    quads: CellScheme's tokens of group 1, the face and then the quads; Q = 1 + level, and a face alone is level 0.
    """
    face = quads[..., 0].astype(np.int64)
    state, i, j = face & 1, np.zeros_like(face), np.zeros_like(face)
    for quad in np.moveaxis(quads[..., 1:], -1, 0):
        ij = _POSITION_TO_IJ[state, quad]
        i, j, state = i << 1 | ij >> 1, j << 1 | ij & 1, state ^ _POSITION_TO_TURN[quad]
    side = 0.5 ** (quads.shape[-1] - 1)
    s, t = (i[..., None] + np.array([0, 1, 1, 0])) * side, (j[..., None] + np.array([0, 0, 1, 1])) * side
    return np.stack(_degrees(np.broadcast_to(face[..., None], s.shape), s, t, np), -1)


def _is_jax(*values: Any) -> bool:
    return any(isinstance(value, jax.Array) for value in values)


def _check_degrees(name: str, values: Any, limit: float) -> None:
    if isinstance(values, jax.core.Tracer):
        return
    values = np.asarray(values)
    # If any value is NaN, so are min() and max(), and both comparisons fail.
    if values.size == 0 or (values.min() >= -limit and values.max() <= limit):
        return
    wrong = values[~(np.abs(values) <= limit)]
    raise ValueError(
        f"{name} has {wrong.size} of {values.size} values outside [-{limit}, {limit}] degrees, the first {wrong[0]}"
    )


@functools.cache
def _tables(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two lookup tables for n levels of the Hilbert curve.

    The first table maps i and j to the position on the curve: its index is (orientation, i, j), packed into 2 + n + n
    bits, and its values are (new orientation, position), packed into 2 + 2n bits. The second table is the inverse: it
    maps (orientation, position) to (new orientation, i, j), packed in the same way.
    """
    start, position = np.divmod(np.arange(4 << 2 * n), 1 << 2 * n)
    state, i, j = start, 0, 0
    for shift in range(2 * n - 2, -1, -2):
        quad = position >> shift & 3
        ij = _POSITION_TO_IJ[state, quad]
        i, j = i << 1 | ij >> 1, j << 1 | ij & 1
        state = state ^ _POSITION_TO_TURN[quad]
    to_position = np.empty(4 << 2 * n, np.int32)
    to_position[start << 2 * n | i << n | j] = state << 2 * n | position
    return to_position, (state << 2 * n | i << n | j).astype(np.int32)


#: Tables from a quad of the grid (GridScheme) to a quad of the curve (CellScheme), and the inverse.
_TO_POSITION, _TO_IJ = _tables(1)


def _resplit(columns: Sequence[Any], old: int, new: int) -> list[Any]:
    """Returns columns of tokens with `new` quads each, from columns of tokens with `old` quads each.

    One of the two numbers must divide the other.
    """
    if old >= new:
        shifts = range(2 * (old - new), -1, -2 * new)
        return [column >> shift & (4**new - 1) for column in columns for shift in shifts]
    runs = [columns[k : k + new // old] for k in range(0, len(columns), new // old)]
    return [functools.reduce(lambda high, low: high * 4**old | low, run) for run in runs]


def _uv_to_st(u, xp: ModuleType):
    root = 0.5 * xp.sqrt(1 + 3 * xp.abs(u))
    return xp.where(u >= 0, root, 1 - root)


def _st_to_uv(s, xp: ModuleType):
    return (1.0 / 3.0) * xp.where(s >= 0.5, 4 * s * s - 1, 1 - 4 * (1 - s) * (1 - s))


def _choose(number, choices: Sequence[Any], xp: ModuleType):
    """Returns, per element, the array of `choices` that `number` selects. jax.numpy.choose needs known shapes."""
    if xp is np:
        return np.choose(number, choices, mode="clip")
    chosen = choices[-1]
    for k, choice in enumerate(choices[:-1]):
        chosen = xp.where(number == k, choice, chosen)
    return chosen


def _degrees(face, s, t, xp: ModuleType) -> tuple[Any, Any]:
    """Returns latitude and longitude, in degrees, of points on faces. s, t: position along a face's axes, 0..1."""
    u, v = (_st_to_uv(k, xp) for k in (s, t))
    one = xp.ones_like(u)
    x = _choose(face, [one, -u, -u, -one, v, v], xp)
    y = _choose(face, [u, one, -v, -v, -one, u], xp)
    z = _choose(face, [v, v, one, -u, -u, -one], xp)
    return xp.degrees(xp.arctan2(z, xp.sqrt(x * x + y * y))), xp.degrees(xp.arctan2(y, x))


def _face_ij(latitude, longitude, level: int, xp: ModuleType) -> tuple[Any, Any, Any]:
    """Returns the face, and the position (i, j) on it, of the cell at `level`.

    The operations and their order are the same as in s2sphere, so that results are equal to the last bit.
    """
    phi, theta = xp.radians(latitude), xp.radians(longitude)
    x, y, z = xp.cos(theta) * xp.cos(phi), xp.sin(theta) * xp.cos(phi), xp.sin(phi)
    ax, ay, az = xp.abs(x), xp.abs(y), xp.abs(z)
    axis = xp.where(ax > ay, xp.where(ax > az, 0, 2), xp.where(ay > az, 1, 2)).astype(np.int32)
    major = _choose(axis, [x, y, z], xp)
    p, q = xp.where(axis == 0, y, -x) / major, xp.where(axis == 2, -y, z) / major
    far = major < 0  # faces 3, 4 and 5
    s, t = (_uv_to_st(w, xp) for w in (xp.where(far, q, p), xp.where(far, p, q)))
    i, j = (xp.clip(xp.floor(2.0**MAX_LEVEL * w), 0, 2**MAX_LEVEL - 1).astype(np.int32) for w in (s, t))
    return axis + 3 * far.astype(np.int32), i >> (MAX_LEVEL - level), j >> (MAX_LEVEL - level)


#: One number per part of the sphere, at index south * 8 + polar * 4 + quarter. `_fast_face_ij` computes the coordinates
#: a and b. The number's bits describe how these become cell coordinates on a face. Bits 0-2: the face. Bit 3: the
#: curve's orientation at the start. It is face & 1, flipped if a runs along the face's j axis and b along its i axis,
#: because the code does not swap a and b. Bit 4: 1 if a is inverted. Bit 5: 1 if b is inverted.
_FRAMES = np.array(
    [
        face + 8 * (face & 1 ^ swapped) + 16 * inverts_a + 32 * inverts_b
        for face, swapped, inverts_a, inverts_b in (
            *((0, 0, 0, 0), (1, 0, 0, 0), (3, 1, 0, 1), (4, 1, 0, 1)),
            *((2, 1, 1, 1), (2, 0, 0, 1), (2, 1, 0, 0), (2, 0, 1, 0)),
            *((0, 0, 0, 0), (1, 0, 0, 0), (3, 1, 0, 1), (4, 1, 0, 1)),
            *((5, 0, 1, 1), (5, 1, 0, 1), (5, 0, 0, 0), (5, 1, 1, 0)),
        )
    ],
    np.int32,
)


def _fast_face_ij(latitude, longitude, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns face, the curve's orientation on the face, i and j, six times faster than `_face_ij`.

    `_face_ij` spends most of its time on sines and cosines, 40 ns per coordinate. This function uses two tangents.
    Points closer to a cell's edge than _MARGIN (78 in a million at level 30, and all points on an edge of a face) are
    converted by `_face_ij`, so that both functions give equal cells.
    """
    # Quarter turns about the axis bring the longitude into [-45, 45], onto one side of the cube. There a, the tangent
    # of the longitude, is the horizontal coordinate, and b the vertical one. If |b| > 1, the point is on a polar face,
    # and its coordinates on that face replace a and b. Then both are in [-1, 1].
    quarter = np.rint(longitude * (1 / 90))
    a = np.tan((longitude - 90 * quarter) * (np.pi / 180))
    b = np.tan(latitude * (np.pi / 180)) * np.sqrt(a * a + 1)
    polar = np.abs(b) > 1
    with np.errstate(divide="ignore"):  # b is 0 on the equator
        b = np.where(polar, 1 / b, b)
    a = np.where(polar, a * b, a)
    south = latitude < 0
    frame = _FRAMES.take((quarter.astype(np.int32) & 3) | polar.astype(np.int32) << 2 | south.astype(np.int32) << 3)
    half, side = 2.0 ** (level - 1), (1 << level) - 1
    doubtful, ij = False, []
    for w, inverted in ((a, 4), (b, 5)):
        # The next lines turn w into s, the position along the axis in cells (S2's quadratic projection): `half` at the
        # face's middle, more if w is positive and less if w is negative.
        s = np.abs(w)
        s *= 3 * half * half
        s += half * half
        np.sqrt(s, out=s)
        s -= half
        np.copysign(s, w, out=s)
        s += half
        ij.append(s.astype(np.int32) ^ (-(frame >> inverted & 1) & side))
        s -= np.rint(s)
        doubtful |= np.abs(s, out=s) < _MARGIN * 2.0**level
    face, orientation = frame & 7, frame >> 3 & 1
    if doubtful.any():
        face[doubtful], i, j = _face_ij(latitude[doubtful], longitude[doubtful], level, np)
        orientation[doubtful], ij[0][doubtful], ij[1][doubtful] = face[doubtful] & 1, i, j
    return face, orientation, *ij
