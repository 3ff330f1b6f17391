"""Readers of true and predicted coordinates from tables, and the methods in a file of predictions.

A method is one set of coordinates to score: the answers of a file, the choices of another of its selectors, or the
candidates nearest to the truth.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from geotoken_jax import records, tables
from geotoken_jax.analysis.claims import Claims, concatenate, pop_claims
from geotoken_jax.geo import distance
from geotoken_jax.tables import TableError
from geotoken_jax.workdir import Workdir

#: Error of a missing prediction: half the Earth's circumference, 20,015 km.
FARTHEST_KM = math.pi * distance.EARTH_RADIUS_KM


@dataclasses.dataclass(frozen=True)
class CoordinateTable:
    """Coordinates of n photos, true or predicted, latitude and longitude in degrees.

    source: path or name of the file, for messages. candidates: coordinates of the candidates; K is the largest number
    per photo, and photos with fewer are padded with NaN. generated: whether a decoder generated the candidates token by
    token. extra: all other columns per photo, column names in lower case. claims: stated uncertainty per photo; None if
    the file has none.
    """

    source: str
    ids: list[str]
    coordinates: Float[np.ndarray, "n 2"]
    candidates: Float[np.ndarray, "n K 2"]
    generated: bool
    extra: list[dict[str, Any]]
    claims: Claims | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One set of predicted coordinates to score, in the order of the truth.

    variant: path of the file, or name of the variant, that predicted the coordinates. choice: name of the selector; ""
    if the file has no names. name: label in tables and charts. main: whether these coordinates are the answers of the
    file, and not the choices of another selector. baseline: whether the candidates are not from a decoder. bound:
    whether these coordinates are the candidates nearest to the truth; no selector can be better. coordinates: degrees,
    NaN for a missing prediction. km: distance from the truth, FARTHEST_KM for a missing prediction. claims: stated
    uncertainty; None if the method is not the main one or its file states none.
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
        """Number of photos without a prediction."""
        return int(np.isnan(self.coordinates[:, 0]).sum())


def read_coordinates(path: epath.PathLike, predicted: bool = False) -> CoordinateTable:
    """Returns the coordinates in a table, in a format that `tables.read` reads.

    Required columns, in any case: id (or img_id), latitude (or lat), longitude (or lon, lng). Optional are candidates,
    choices, choice and the uncertainty columns of claims.pop_claims; other columns go to `extra`.

    predicted: whether the file has predictions, so that columns such as LAT_pred take precedence over LAT.

    Raises TableError if the file has no rows, a required column is missing, an id is repeated, or a row or a value has
    another form or is out of range.
    """
    source = str(path)
    first_place, ids, coordinates, candidates, claims, extra = {}, [], [], [], [], []
    generated = False
    for location, row in _rows(path, predicted):
        required = {field: row.pop(field) for field in tables.COLUMNS}
        name = str(required["id"]).strip()
        if name in first_place:
            raise TableError(f"{location}: id {name!r} is on {first_place[name]} too: keep one row per id")
        first_place[name] = location.removeprefix(f"{source}, ")
        ids.append(name)
        coordinates.append(
            (_degrees(required, "latitude", 90, location), _degrees(required, "longitude", 180, location))
        )
        # Of candidates only coordinates are kept: 30 for each of 7,000 photos take 3 MB as an array, 300 MB as
        # dictionaries.
        row.pop("neighbors", None)
        try:
            listed = row.pop("candidates", ())
            generated = generated or any("tokens" in c for c in listed)
            candidates.append([(float(c["latitude"]), float(c["longitude"])) for c in listed])
            row["choices"] = {name: _point(choice, candidates[-1]) for name, choice in row.get("choices", {}).items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            raise TableError(
                f"{location}: candidates or choices is malformed: write candidates as a list of objects with latitude "
                "and longitude, and choices as an object that maps a selector's name to an index into candidates or "
                "to a point [latitude, longitude], or leave both out"
            ) from None
        try:
            claims.append(pop_claims(row))
        except ValueError as error:
            raise TableError(f"{location}: {error}") from None
        extra.append(row)
    if not ids:
        raise TableError(f"{path} has no rows: write one row per photo with id, latitude and longitude")
    return CoordinateTable(
        source, ids, np.array(coordinates), _padded(candidates), generated, extra, concatenate(claims)
    )


def methods_of(
    predicted: CoordinateTable, truth: CoordinateTable, variant: str, label: str, earth: str = "sphere"
) -> list[Method]:
    """Returns the methods in one file of predictions: its answers, the choices of its other selectors, and a bound.

    The bound takes the candidate nearest to the truth. A file with at most one candidate per photo has no bound.

    variant: name of the file or variant. label: name of the variant in tables. earth: key of distance.EARTHS.

    Raises TableError if the file has a photo that the truth does not have, or if a photo lacks a selector's choice.
    """
    row_of = {name: row for row, name in enumerate(truth.ids)}
    unknown = [name for name in predicted.ids if name not in row_of]
    if unknown:
        raise TableError(
            f"{predicted.source} predicts {unknown[0]!r} (one of {len(unknown)}), which {truth.source} does not have:"
            " give the truth of the same photos, or remove these rows from the predictions"
        )
    rows = np.array([row_of[name] for name in predicted.ids])
    first = predicted.extra[0]
    candidates, count = predicted.candidates, predicted.candidates.shape[1]
    photos = np.arange(len(rows))
    baseline = not predicted.generated
    main = first.get("choice", "")
    chosen = {main: predicted.coordinates}
    for choice in first["choices"]:
        chosen.setdefault(choice, _chosen(predicted, choice))

    def method(choice: str, name: str, coordinates: Float[np.ndarray, "p 2"], bound: bool = False) -> Method:
        placed = np.full((len(truth.ids), 2), np.nan)
        placed[rows] = coordinates
        is_main = not bound and choice == main
        claims = predicted.claims.at(rows, len(truth.ids)) if is_main and predicted.claims else None
        km = off_km(placed, truth, earth)
        return Method(variant, choice, name, is_main, baseline, bound, placed, km, claims)

    named = len(chosen) > 1 or not baseline
    methods = [
        method(choice, f"{label}: {choice.replace('_', ' ')}" if named and choice else label, coordinates)
        for choice, coordinates in chosen.items()
    ]
    if count > 1:
        true = truth.coordinates[rows, None]
        off = distance.EARTHS[earth](candidates[..., 0], candidates[..., 1], true[..., 0], true[..., 1])
        nearest = np.nan_to_num(off, nan=np.inf).argmin(axis=1)
        # Photos have different numbers of candidates, because equal samples are one candidate.
        number = f"up to {count}" if np.isnan(candidates).any() else str(count)
        name = f"{label}: ideal of {number} candidates"
        methods.append(method("ideal", name, candidates[photos, nearest], bound=True))
    return methods


def off_km(placed: Float[np.ndarray, "n 2"], truth: CoordinateTable, earth: str) -> Float[np.ndarray, "n"]:
    """Returns the distance in km between prediction and truth per photo; FARTHEST_KM if the prediction is NaN."""
    return np.nan_to_num(distance.EARTHS[earth](*placed.T, *truth.coordinates.T), nan=FARTHEST_KM)


def in_order(methods: Sequence[Method], reference: str) -> list[Method]:
    """Returns the methods in the order of tables: baselines, the reference variant, other variants, then bounds."""
    return sorted(methods, key=lambda m: (m.bound, not m.baseline, m.variant != reference))


def read_truth(workdir: Workdir, split: str) -> CoordinateTable:
    """Returns the true coordinates of a split of photos/; `extra` contains the author and the place names."""
    photos = workdir.photos(split)
    ids, coordinates, extra = [], [], []
    for row in range(len(photos)):
        photo = photos[row]
        ids.append(photo["id"])
        coordinates.append(photo["coordinates"])
        extra.append({name: photo[name] for name in ("author", *records.PLACE_FIELDS)})
    return CoordinateTable(f"photos/ ({split})", ids, np.array(coordinates), _padded([[]] * len(ids)), False, extra)


def _rows(path: epath.PathLike, predicted: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row of a table: its location for messages (e.g. "FILE, line 2") and its columns.

    Raises TableError for a row that cannot be scored.
    """
    for row in tables.read(path, optional=None, predicted=predicted):
        location = f"{path}, {row.place}"
        if row.fault:
            raise TableError(f"{location}: the row {row.fault}")
        texts = [value for value in row.values.values() if isinstance(value, str)]
        if any(map(tables.UNDECODED.search, texts)):
            raise TableError(
                f"{location}: the row is not UTF-8 text, but perhaps Windows-1252, as Excel saves a CSV: save the "
                'table as "CSV UTF-8"'
            )
        name = row.values["id"]
        if isinstance(name, (dict, list, bool)) or name is None or not str(name).strip() or "\n" in str(name):
            raise TableError(f"{location}: the id is {name!r}: give each row the id of its photo")
        yield location, dict(row.values)


def _degrees(row: Mapping[str, Any], name: str, limit: int, location: str) -> float:
    value = tables.number(row[name])
    if value is None or not -limit <= value <= limit:
        raise TableError(
            f"{location}: {name} of {row['id']!r} is {row[name]!r}: give degrees from -{limit} to {limit}, or "
            "remove the row (a photo without a prediction counts as wrong)"
        )
    return value


def _padded(lists: Sequence[Sequence[tuple[float, float]]]) -> Float[np.ndarray, "n K 2"]:
    coordinates = np.full((len(lists), max(map(len, lists), default=0), 2), np.nan)
    for row, listed in enumerate(lists):
        if listed:
            coordinates[row, : len(listed)] = listed
    return coordinates


def _point(choice: Any, candidates: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns the coordinates of a choice, which is a point or an index into `candidates`.

    The coordinates are NaN if no candidate has that index.
    """
    if not isinstance(choice, Sequence):
        return candidates[int(choice)] if 0 <= int(choice) < len(candidates) else (math.nan, math.nan)
    latitude, longitude = (float(value) for value in choice)
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise ValueError(choice)
    return latitude, longitude


def _chosen(predicted: CoordinateTable, choice: str) -> Float[np.ndarray, "n 2"]:
    """Returns the coordinates that a selector chose per photo. Raises TableError if a photo has no such choice."""
    chosen = np.array([row["choices"].get(choice, (math.nan, math.nan)) for row in predicted.extra])
    wrong = np.flatnonzero(np.isnan(chosen[:, 0]))
    if wrong.size:
        name = predicted.ids[wrong[0]]
        raise TableError(
            f"{predicted.source}: {name!r} has no candidate for the choice {choice!r}: add it to `choices` of every "
            "photo, as an index into its candidates or as a point [latitude, longitude]"
        )
    return chosen
