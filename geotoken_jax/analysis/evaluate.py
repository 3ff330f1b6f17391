"""Accuracy of predictions against the truth, from files alone, so that it scores anybody's predictions.

Every photo of the truth counts: one without a prediction is wrong at every threshold. Intervals are 95 % percentile
bootstrap intervals over authors where authors are known, because photos of one author are not independent; every
method sees the same resamples, so differences between methods are paired.
"""

import csv
import dataclasses
import io
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from geotoken_jax import bootstrap, records, settings
from geotoken_jax.analysis import overlap, places, reliability
from geotoken_jax.analysis.reliability import Claims
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config, EvaluateSettings
from geotoken_jax.geo import distance

#: What a missing prediction is off by: half the Earth's circumference.
FARTHEST_KM = math.pi * distance.EARTH_RADIUS_KM

#: Accepted names of the three columns, in lower case.
_COLUMNS = {"id": ("id", "img_id"), "latitude": ("latitude", "lat"), "longitude": ("longitude", "lon", "lng")}


class PointsError(ValueError):
    """A file of points cannot be scored; the message names the file, the line and the fix."""


@dataclasses.dataclass(frozen=True)
class Points:
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


def read_predictions(workdir: Workdir, options: EvaluateSettings) -> tuple[dict[str, Points], dict[str, list[Method]]]:
    """Returns truth and methods by split, in the order to show: what is called test comes first.

    `extra` of the truth holds the author and the place names.
    """
    truths, methods = {}, {}
    for split in sorted(workdir.asked, key=lambda name: (not name.startswith("test"), name)):
        truth = truths[split] = read_truth(workdir, split)
        found = []
        for variant in workdir.answered():
            if (file := workdir.answers(variant, split)).exists():
                points = read_points(file)
                found += methods_of(points, truth, variant, options.labels.get(variant, variant), options.earth)
        methods[split] = in_order(found, options.reference)
    return truths, methods


def figures(
    truths: Mapping[str, Points], methods: Mapping[str, Sequence[Method]], known: Mapping[str, Any], config: Config
) -> dict[str, Any]:
    """Returns the numbers of a report. known: split -> which photos leak from the gallery (overlap.find)."""
    options, scores = config.evaluate, {}
    _check_pairs(methods, options)
    for split, truth in truths.items():
        scores[split] = _score_split(methods[split], truth, options)
        scores[split]["clean"] = _clean(methods[split], truth, known[split], options)
    return _metrics(scores, options) | {"cosine_above": config.audit.leakage.cosine_above}


def compare_files(
    predictions: Sequence[epath.PathLike], truth: epath.PathLike, options: EvaluateSettings
) -> dict[str, Any]:
    """Returns the metrics of files of predictions against a file of truth. A file's path is its variant's name."""
    points = read_points(truth)
    found = []
    for path in map(str, predictions):
        label = options.labels.get(path, epath.Path(path).stem)
        found += methods_of(read_points(path), points, path, label, options.earth)
    found, split = in_order(found, options.reference), epath.Path(truth).stem
    _check_pairs({split: found}, options)
    return _metrics({split: _score_split(found, points, options)}, options)


def _check_pairs(methods: Mapping[str, Sequence[Method]], options: EvaluateSettings) -> None:
    """Raises SettingsError if a pair to compare names a method that no split has."""
    names = {name: None for found in methods.values() for name in _names(found)}
    for name in (name for pair in options.compare for name in pair):
        if name not in names:
            raise settings.SettingsError(f"there is no method {name!r} to compare: use one of {', '.join(names)}")


def _metrics(scores: Mapping[str, Any], options: EvaluateSettings) -> dict[str, Any]:
    made = {name: getattr(options, name) for name in ("resamples", "seed", "earth", "strict")}
    return {**made, "splits": scores}


def _score_split(methods: Sequence[Method], truth: Points, options: EvaluateSettings) -> dict[str, Any]:
    """Returns every number of one split that comes from predictions and truth alone."""
    scores = score(
        methods, truth, options.reference, options.resamples, options.seed, options.strict, tuple(options.compare)
    )
    main = next((m for m in methods if m.main and m.variant == options.reference), None)
    return scores | {
        "continents": _continents(methods, truth, options),
        "uncertainty": main and reliability.figures(main, truth.coordinates, options.strict),
    }


def _continents(methods: Sequence[Method], truth: Points, options: EvaluateSettings) -> list[dict[str, Any]]:
    """Scores each variant's own choice on the photos of each continent, those with most photos first."""
    names = [
        places.continent({key: str(row.get(key) or "") for key in ("country", "continent")}) for row in truth.extra
    ]
    methods, found = [m for m in methods if m.main], []
    for name in sorted(set(names), key=lambda name: (-names.count(name), name)):
        rows = np.flatnonzero(np.array(names) == name)
        found.append({"name": name, **score_part(methods, truth, rows, options)})
    return found if len(found) > 1 or names[0] != places.UNKNOWN else []


def _clean(methods: Sequence[Method], truth: Points, known: overlap.Found, options: EvaluateSettings) -> dict[str, Any]:
    """Scores each variant's own choice on the photos whose author and picture the gallery does not know; `methods` is
    empty where no photo is left."""
    kinds = ("same id", "near-duplicate", "same author")
    rows = np.flatnonzero(~known.leaked(*kinds))
    left_out = {kind: int(known.leaked(kind).sum()) for kind in kinds}
    own = [m for m in methods if m.main]
    scores = score_part(own, truth, rows, options) if len(rows) else {"photos": 0, "methods": []}
    return {"left_out": left_out, **scores}


def score_part(
    methods: Sequence[Method], truth: Points, rows: Int[np.ndarray, "n"], options: EvaluateSettings
) -> dict[str, Any]:
    """Returns the scores of the methods on some rows of the truth, one or more."""
    part = dataclasses.replace(
        truth,
        ids=[truth.ids[row] for row in rows],
        coordinates=truth.coordinates[rows],
        candidates=truth.candidates[rows],
        extra=[truth.extra[row] for row in rows],
    )
    seen = [dataclasses.replace(m, coordinates=m.coordinates[rows], km=m.km[rows], claims=None) for m in methods]
    return score(seen, part, options.reference, options.resamples, options.seed, options.strict)


def read_points(path: epath.PathLike) -> Points:
    """Reads JSON lines or CSV with a header: id, latitude, longitude (also lat, lon, lng, IMG_ID; any case), and more.

    What a row says of how sure it is: see reliability.read.

    Raises PointsError with file, line and fix on a missing column, a duplicate id, or a coordinate out of range.
    """
    source = str(path)
    first_line, ids, coordinates, candidates, claims, extra = {}, [], [], [], [], []
    generated = ranked = False
    for line, row in _rows(epath.Path(path)):
        where = f"{source}, line {line}"
        taken = _take(row, where)
        name = str(taken["id"]).strip()
        if name in first_line:
            raise PointsError(f"{where}: id {name!r} is on line {first_line[name]} too: keep one row an id")
        first_line[name] = line
        ids.append(name)
        coordinates.append((_degrees(taken, "latitude", 90, where), _degrees(taken, "longitude", 180, where)))
        # Only what is scored is kept: 30 candidates of 7,000 photos are 300 MB as dictionaries, and 3 MB as arrays.
        row.pop("neighbors", None)
        try:
            weighed = row.pop("candidates", ())
            generated = generated or any("tokens" in c for c in weighed)
            ranked = ranked or any("log_probability" in c for c in weighed)
            candidates.append([(float(c["latitude"]), float(c["longitude"])) for c in weighed])
            row["choices"] = {choice: _choice(made, candidates[-1]) for choice, made in row.get("choices", {}).items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            raise PointsError(
                f"{where}: candidates must be a list of objects with latitude and longitude, and choices an object of "
                "names and an index into candidates or a point [latitude, longitude]: mend them, or leave both out"
            ) from None
        try:
            claims.append(reliability.read(row))
        except ValueError as error:
            raise PointsError(f"{where}: {error}") from None
        extra.append(row)
    if not ids:
        raise PointsError(f"{path} holds no points: write one row a photo with id, latitude and longitude")
    return Points(
        source, ids, np.array(coordinates), _padded(candidates), generated, extra, ranked, reliability.gathered(claims)
    )


def methods_of(points: Points, truth: Points, variant: str, label: str, earth: str = "sphere") -> list[Method]:
    """Returns the methods in one file of predictions: its own choice, its other choices, its best candidate (a bound).

    earth: of distance.EARTHS.

    Raises PointsError if it predicts a photo that the truth does not hold.
    """
    row_of = {name: row for row, name in enumerate(truth.ids)}
    unknown = [name for name in points.ids if name not in row_of]
    if unknown:
        raise PointsError(
            f"{points.source} predicts {unknown[0]!r} (one of {len(unknown)}), which {truth.source} does not hold:"
            " score it against the photos it was made for, or remove the rows"
        )
    rows = np.array([row_of[name] for name in points.ids])
    first = points.extra[0]
    candidates, count = points.candidates, points.candidates.shape[1]
    each = np.arange(len(rows))
    baseline = not points.generated
    main = first.get("choice", "")
    chosen = {main: points.coordinates}
    for choice in first["choices"]:
        chosen.setdefault(choice, _chosen(points, choice))

    def method(choice: str, name: str, coordinates: Float[np.ndarray, "p 2"], bound: bool = False) -> Method:
        placed = np.full((len(truth.ids), 2), np.nan)
        placed[rows] = coordinates
        own = not bound and choice == main
        claims = points.claims.at(rows, len(truth.ids)) if own and points.claims else None
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
        is_neighbors = baseline and not points.ranked
        name = f"Best of {most} neighbors" if is_neighbors else f"{label}: ideal of {most} candidates"
        methods.append(method("ideal", name, candidates[each, nearest], bound=True))
    return methods


def off_km(placed: Float[np.ndarray, "n 2"], truth: Points, earth: str) -> Float[np.ndarray, "n"]:
    """Returns how far from the truth each photo was placed; NaN is FARTHEST_KM off."""
    return np.nan_to_num(distance.EARTHS[earth](*placed.T, *truth.coordinates.T), nan=FARTHEST_KM)


def in_order(methods: Sequence[Method], reference: str) -> list[Method]:
    """Returns the methods as tables show them: baselines, the reference, the others; bounds last."""
    return sorted(methods, key=lambda m: (m.bound, not m.baseline, m.variant != reference))


def score(
    methods: Sequence[Method],
    truth: Points,
    reference: str,
    resamples: int,
    seed: int,
    strict: bool = False,
    compare: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Returns accuracies and differences of the methods, as JSON holds them. The arguments are as in EvaluateSettings.

    Accuracies are fractions within each of THRESHOLDS_KM, with 95 % intervals. differences: each other method minus
    the reference variant's own choice, with intervals and two-sided p-values of the same paired bootstrap (the
    smallest that R resamples can show is 2 / (R + 1)). comparisons: the same of each pair of `compare` that is here,
    first minus second.
    """
    authors = [str(row.get("author") or "") for row in truth.extra]
    outcomes = np.stack([bootstrap.outcomes(method.km, strict) for method in methods], axis=1)
    values = outcomes.mean(axis=0)
    samples = bootstrap.resample(outcomes, bootstrap.clusters(authors, truth.ids), resamples, seed)
    rows = [
        {
            **{name: getattr(method, name) for name in ("variant", "choice", "name", "main", "baseline", "bound")},
            "missing": method.missing,
            "median_km": bootstrap.rounded(np.median(method.km)),
            **bootstrap.estimates(values[i], samples[:, i]),
        }
        for i, method in enumerate(methods)
    ]

    def difference(i: int, k: int) -> dict[str, Any]:
        return bootstrap.estimates(values[i] - values[k], samples[:, i] - samples[:, k], p=True)

    at = next((i for i, method in enumerate(methods) if method.variant == reference and method.main), None)
    differences = [
        {"variant": method.variant, "choice": method.choice, "name": method.name, **difference(i, at)}
        for i, method in enumerate(methods)
        if at is not None and i != at and not method.bound
    ]
    names = _names(methods)
    comparisons = [
        {"name": methods[names[a]].name, "against": methods[names[b]].name, **difference(names[a], names[b])}
        for a, b in compare
        if a in names and b in names
    ]
    return {
        "photos": len(truth.ids),
        "authors": len(set(authors)) if all(authors) else None,
        "methods": rows,
        "reference": None if at is None else methods[at].name,
        "differences": differences,
        "comparisons": comparisons,
    }


def _names(methods: Sequence[Method]) -> dict[str, int]:
    """Returns the index of each method by VARIANT:CHOICE, and of each variant's own choice by VARIANT too."""
    names = {method.variant: i for i, method in enumerate(methods) if method.main}
    return names | {f"{method.variant}:{method.choice}": i for i, method in enumerate(methods) if method.choice}


def table(metrics: Mapping[str, Any]) -> str:
    """Returns the numbers as text of at most 100 columns: an interval stands below its value."""
    limits = f"{'less than' if metrics['strict'] else 'within'} a distance on the {metrics['earth']}"
    lines = [f"Percent of photos {limits}; below it, the 95 % interval."]
    thresholds = [f"{km:,} km" for km in distance.THRESHOLDS_KM]
    for split, scores in metrics["splits"].items():
        authors = f", {scores['authors']:,} authors" if scores["authors"] else ""
        lines += ["", *_aligned("", [*thresholds, "median km", "GeoScore"], [])]
        lines += [f"{split}: {scores['photos']:,} photos{authors}", "-" * 100]
        for row in scores["methods"]:
            above = [f"{100 * a['value']:.1f}" for a in row["accuracy"]]
            below = [f"{100 * a['low']:.1f}-{100 * a['high']:.1f}" for a in row["accuracy"]]
            tail = [f"{row['median_km']:,.1f}", f"{row['geoscore']['value']:,.0f}"]
            lines += _aligned(row["name"] + (" (bound)" if row["bound"] else ""), above + tail, below)
        if scores["differences"]:
            lines += ["", f"{split}: points above (+) or below (-) {scores['reference']}", "-" * 100]
        for row in scores["differences"]:
            lines += _difference(row["name"], row["accuracy"])
        for row in scores["comparisons"]:
            lines += ["", *textwrap.wrap(f"{split}: points of {row['name']} above (+) or below (-)", 100), "-" * 100]
            lines += _difference(row["against"], row["accuracy"])
        if scores["uncertainty"]:
            lines += ["", *reliability.lines(split, scores["uncertainty"])]
        for row in scores["methods"]:
            if row["missing"]:
                note = f"{row['name']}: {row['missing']:,} photos have no prediction and count as wrong"
                lines += textwrap.wrap(note, 100)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _difference(name: str, accuracy: Sequence[Mapping[str, float]]) -> list[str]:
    above = [f"{100 * a['value']:+.1f}" for a in accuracy]
    below = [f"{100 * a['low']:+.1f}..{100 * a['high']:+.1f}" for a in accuracy]
    return _aligned(name, above, below, width=13)


def _aligned(name: str, above: Sequence[str], below: Sequence[str], width: int = 11) -> list[str]:
    """Returns a row of the table: the name, wrapped to 26 columns, beside cells in two lines."""
    names = textwrap.wrap(name, 25) or [""]
    cells = ["".join(f"{cell:>{width - max(0, i - 4)}}" for i, cell in enumerate(row)) for row in (above, below)]
    height = max(len(names), 2 if below else 1)
    return [f"{''.join(names[i : i + 1]):26}{''.join(cells[i : i + 1])}" for i in range(height)]


def _rows(path: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line number and columns, names in lower case, of JSON lines or CSV."""
    text = path.read_text().removeprefix("\ufeff")
    if not text.lstrip().startswith("{"):
        reader = csv.DictReader(io.StringIO(text))
        for row in reader:
            if None in row:
                raise PointsError(f"{path}, line {reader.line_num}: more columns than the header: quote its commas")
            yield reader.line_num, {name.strip().lower(): value for name, value in row.items()}
        return
    for line, data in enumerate(text.split("\n"), start=1):
        if not data.strip():
            continue
        try:
            row = json.loads(data)
        except json.JSONDecodeError as error:
            raise PointsError(f"{path}, line {line}: {error}: write one JSON object a line") from None
        if not isinstance(row, dict):
            raise PointsError(f"{path}, line {line}: {row!r} is not a JSON object: write one a line")
        yield line, {name.strip().lower(): value for name, value in row.items()}


def _take(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Removes id, latitude and longitude from the row, under any of their names, and returns them."""
    found = {name: [column for column in accepted if column in row] for name, accepted in _COLUMNS.items()}
    for name, columns in found.items():
        if not columns:
            accepted = " or ".join(_COLUMNS[name])
            raise PointsError(f"{where}: no column {name} among {', '.join(row)}: name one {accepted}")
    return {name: row.pop(columns[0]) for name, columns in found.items()}


def _degrees(taken: Mapping[str, Any], name: str, limit: int, where: str) -> float:
    try:
        value = float(taken[name])
    except (TypeError, ValueError):
        value = math.nan
    if not -limit <= value <= limit:
        raise PointsError(
            f"{where}: {name} of {taken['id']!r} is {taken[name]!r}: give degrees from -{limit} to {limit}, or "
            "leave the photo out (it then counts as wrong)"
        )
    return value


def read_truth(workdir: Workdir, split: str) -> Points:
    """Returns the truth of one split of photos/; `extra` holds the author and the place names."""
    photos = workdir.photos(split)
    ids, coordinates, extra = [], [], []
    for row in range(len(photos)):
        photo = photos[row]
        ids.append(photo["id"])
        coordinates.append(photo["coordinates"])
        extra.append({name: photo[name] for name in ("author", *records.PLACE_FIELDS)})
    return Points(f"photos/ ({split})", ids, np.array(coordinates), _padded([[]] * len(ids)), False, extra)


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


def _chosen(points: Points, choice: str) -> Float[np.ndarray, "n 2"]:
    """Returns the point that a choice is for each photo."""
    chosen = np.array([row["choices"].get(choice, (math.nan, math.nan)) for row in points.extra])
    wrong = np.flatnonzero(np.isnan(chosen[:, 0]))
    if wrong.size:
        name = points.ids[wrong[0]]
        raise PointsError(f"{points.source}: {name!r} has no candidate for the choice {choice!r}: give every photo one")
    return chosen
