"""Coordinates by photo, read from anybody's files: the truth, and the methods that each file of predictions holds."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import records
from geotoken_jax.analysis.claims import Claims, concatenate, pop_claims
from geotoken_jax.artifacts import Workdir
from geotoken_jax.geo import distance

#: What a missing prediction is off by: half the Earth's circumference.
FARTHEST_KM = math.pi * distance.EARTH_RADIUS_KM

#: Accepted names of the three columns, in lower case.
_COLUMNS = {"id": ("id", "img_id"), "latitude": ("latitude", "lat"), "longitude": ("longitude", "lon", "lng")}


class TableError(ValueError):
    """A file of predicted cannot be scored; the message names the file, the line and the fix."""


@dataclasses.dataclass(frozen=True)
class CoordinateTable:
    """Coordinates by id, in degrees.

    candidates: other places that were weighed, NaN where a photo has fewer than K (0 where nobody has any). generated:
    they were, token by token. extra: the other columns of each row, names in lower case. ranked: candidates have
    probabilities; those that are not generated are neighbors where they have none. claims: how sure each row is, None
    where no row says.
    """

    source: str
    ids: list[str]
    coordinates: Float[np.ndarray, "n 2"]
    candidates: Float[np.ndarray, "n K 2"]
    generated: bool
    extra: list[dict[str, Any]]
    ranked: bool = False
    claims: Claims | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to a coordinate, in the order of the truth's photos.

    choice: its name within the variant, "" where the file names none. main: the file's own choice. baseline: its
    candidates are not generated. bound: knows the truth, so nothing can choose better. coordinates: NaN where there is
    no prediction, and `km` is FARTHEST_KM. claims: how sure the main one is, where its file says.
    """

    variant: str
    choice: str
    name: str
    main: bool
    baseline: bool
    bound: bool
    coordinates: Float[np.ndarray, "n 2"]
    km: Float[np.ndarray, "n"]
    claims: Claims | None = None

    @property
    def missing(self) -> int:
        """The number of photos without a prediction."""
        return int(np.isnan(self.coordinates[:, 0]).sum())


def read_coordinates(path: epath.PathLike) -> CoordinateTable:
    """Reads JSON lines or CSV with a header: id, latitude, longitude (also lat, lon, lng, IMG_ID; any case), and more.

    What a row says of how sure it is: see claims.pop_claims.

    Raises TableError with file, line and fix on a missing column, a duplicate id, or a coordinate out of range.
    """
    source = str(path)
    first_line, ids, coordinates, candidates, claims, extra = {}, [], [], [], [], []
    generated = ranked = False
    for line, row in _rows(epath.Path(path)):
        where = f"{source}, line {line}"
        taken = _take(row, where)
        name = str(taken["id"]).strip()
        if name in first_line:
            raise TableError(f"{where}: id {name!r} is on line {first_line[name]} too: keep one row an id")
        first_line[name] = line
        ids.append(name)
        coordinates.append((_degrees(taken, "latitude", 90, where), _degrees(taken, "longitude", 180, where)))
        # Only what is scored is kept: 30 candidates of 7,000 photos are 300 MB as dictionaries, and 3 MB as arrays.
        row.pop("neighbors", None)
        try:
            weighed = row.pop("candidates", ())
            generated = generated or any("tokens" in c for c in weighed)
            ranked = ranked or any("probability" in c for c in weighed)
            candidates.append([(float(c["latitude"]), float(c["longitude"])) for c in weighed])
            row["choices"] = {choice: _choice(made, candidates[-1]) for choice, made in row.get("choices", {}).items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            raise TableError(
                f"{where}: candidates must be a list of objects with latitude and longitude, and choices an object of "
                "names and an index into candidates or a point [latitude, longitude]: mend them, or leave both out"
            ) from None
        try:
            claims.append(pop_claims(row))
        except ValueError as error:
            raise TableError(f"{where}: {error}") from None
        extra.append(row)
    if not ids:
        raise TableError(f"{path} holds no predicted: write one row a photo with id, latitude and longitude")
    return CoordinateTable(
        source, ids, np.array(coordinates), _padded(candidates), generated, extra, ranked, concatenate(claims)
    )


def methods_of(
    predicted: CoordinateTable, truth: CoordinateTable, variant: str, label: str, earth: str = "sphere"
) -> list[Method]:
    """Returns the methods in one file of predictions: its own choice, its other choices, its best candidate (a bound).

    earth: of distance.EARTHS.

    Raises TableError if it predicts a photo that the truth does not hold.
    """
    row_of = {name: row for row, name in enumerate(truth.ids)}
    unknown = [name for name in predicted.ids if name not in row_of]
    if unknown:
        raise TableError(
            f"{predicted.source} predicts {unknown[0]!r} (one of {len(unknown)}), which {truth.source} does not hold:"
            " score it against the photos it was made for, or remove the rows"
        )
    rows = np.array([row_of[name] for name in predicted.ids])
    first = predicted.extra[0]
    candidates, count = predicted.candidates, predicted.candidates.shape[1]
    each = np.arange(len(rows))
    baseline = not predicted.generated
    main = first.get("choice", "")
    chosen = {main: predicted.coordinates}
    for choice in first["choices"]:
        chosen.setdefault(choice, _chosen(predicted, choice))

    def method(choice: str, name: str, coordinates: Float[np.ndarray, "p 2"], bound: bool = False) -> Method:
        placed = np.full((len(truth.ids), 2), np.nan)
        placed[rows] = coordinates
        own = not bound and choice == main
        claims = predicted.claims.at(rows, len(truth.ids)) if own and predicted.claims else None
        km = off_km(placed, truth, earth)
        return Method(variant, choice, name, own, baseline, bound, placed, km, claims)

    named = len(chosen) > 1 or not baseline
    methods = [
        method(choice, f"{label}: {choice.replace('_', ' ')}" if named and choice else label, coordinates)
        for choice, coordinates in chosen.items()
    ]
    if count > 1:
        here = truth.coordinates[rows, None]
        off = distance.EARTHS[earth](candidates[..., 0], candidates[..., 1], here[..., 0], here[..., 1])
        nearest = np.nan_to_num(off, nan=np.inf).argmin(axis=1)
        most = f"up to {count}" if np.isnan(candidates).any() else str(count)  # samples that agree are one candidate
        is_neighbors = baseline and not predicted.ranked
        name = f"Best of {most} neighbors" if is_neighbors else f"{label}: ideal of {most} candidates"
        methods.append(method("ideal", name, candidates[each, nearest], bound=True))
    return methods


def off_km(placed: Float[np.ndarray, "n 2"], truth: CoordinateTable, earth: str) -> Float[np.ndarray, "n"]:
    """Returns how far from the truth each photo was placed; NaN is FARTHEST_KM off."""
    return np.nan_to_num(distance.EARTHS[earth](*placed.T, *truth.coordinates.T), nan=FARTHEST_KM)


def in_order(methods: Sequence[Method], reference: str) -> list[Method]:
    """Returns the methods as tables show them: baselines, the reference, the others; bounds last."""
    return sorted(methods, key=lambda m: (m.bound, not m.baseline, m.variant != reference))


def read_truth(workdir: Workdir, split: str) -> CoordinateTable:
    """Returns the truth of one split of photos/; `extra` holds the author and the place names."""
    photos = workdir.photos(split)
    ids, coordinates, extra = [], [], []
    for row in range(len(photos)):
        photo = photos[row]
        ids.append(photo["id"])
        coordinates.append(photo["coordinates"])
        extra.append({name: photo[name] for name in ("author", *records.PLACE_FIELDS)})
    return CoordinateTable(f"photos/ ({split})", ids, np.array(coordinates), _padded([[]] * len(ids)), False, extra)


def _rows(path: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line number and columns, names in lower case, of JSON lines or CSV."""
    text = path.read_text().removeprefix("\ufeff")
    if not text.lstrip().startswith("{"):
        reader = csv.DictReader(io.StringIO(text))
        for row in reader:
            if None in row:
                raise TableError(f"{path}, line {reader.line_num}: more columns than the header: quote its commas")
            yield reader.line_num, {name.strip().lower(): value for name, value in row.items()}
        return
    for line, data in enumerate(text.split("\n"), start=1):
        if not data.strip():
            continue
        try:
            row = json.loads(data)
        except json.JSONDecodeError as error:
            raise TableError(f"{path}, line {line}: {error}: write one JSON object a line") from None
        if not isinstance(row, dict):
            raise TableError(f"{path}, line {line}: {row!r} is not a JSON object: write one a line")
        yield line, {name.strip().lower(): value for name, value in row.items()}


def _take(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Removes id, latitude and longitude from the row, under any of their names, and returns them."""
    found = {name: [column for column in accepted if column in row] for name, accepted in _COLUMNS.items()}
    for name, columns in found.items():
        if not columns:
            accepted = " or ".join(_COLUMNS[name])
            raise TableError(f"{where}: no column {name} among {', '.join(row)}: name one {accepted}")
    return {name: row.pop(columns[0]) for name, columns in found.items()}


def _degrees(taken: Mapping[str, Any], name: str, limit: int, where: str) -> float:
    try:
        value = float(taken[name])
    except (TypeError, ValueError):
        value = math.nan
    if not -limit <= value <= limit:
        raise TableError(
            f"{where}: {name} of {taken['id']!r} is {taken[name]!r}: give degrees from -{limit} to {limit}, or "
            "leave the photo out (it then counts as wrong)"
        )
    return value


def _padded(lists: Sequence[Sequence[tuple[float, float]]]) -> Float[np.ndarray, "n K 2"]:
    coordinates = np.full((len(lists), max(map(len, lists)), 2), np.nan)
    for row, listed in enumerate(lists):
        if listed:
            coordinates[row, : len(listed)] = listed
    return coordinates


def _choice(made: Any, weighed: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns the point that a choice is: its own, or the candidate whose index it is; NaN for none that is there."""
    if not isinstance(made, Sequence):
        return weighed[int(made)] if 0 <= int(made) < len(weighed) else (math.nan, math.nan)
    latitude, longitude = (float(value) for value in made)
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise ValueError(made)
    return latitude, longitude


def _chosen(predicted: CoordinateTable, choice: str) -> Float[np.ndarray, "n 2"]:
    """Returns the point that a choice is for each photo."""
    chosen = np.array([row["choices"].get(choice, (math.nan, math.nan)) for row in predicted.extra])
    wrong = np.flatnonzero(np.isnan(chosen[:, 0]))
    if wrong.size:
        name = predicted.ids[wrong[0]]
        raise TableError(
            f"{predicted.source}: {name!r} has no candidate for the choice {choice!r}: give every photo one"
        )
    return chosen
