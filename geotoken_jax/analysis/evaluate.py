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

from geotoken_jax import records, settings
from geotoken_jax import workdir as stages
from geotoken_jax.analysis import report
from geotoken_jax.geo import distance

#: What a missing prediction is off by: half the Earth's circumference.
FARTHEST_KM = math.pi * distance.EARTH_RADIUS_KM

#: Accepted names of the three columns, in lower case.
_COLUMNS = {"id": ("id", "img_id"), "latitude": ("latitude", "lat"), "longitude": ("longitude", "lon", "lng")}


class PointsError(ValueError):
    """A file of points cannot be scored; the message names the file, the line and the fix."""


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """config.evaluate. resamples: of the bootstrap. reference: the variant that the others are compared with. labels:
    variant -> the name that people read."""

    resamples: int
    seed: int
    reference: str
    labels: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Points:
    """Coordinates by id, in degrees.

    candidates: other places that were weighed, NaN where a photo has fewer than K (0 where nobody has any). generated:
    they were, token by token. extra: the other columns of each row, names in lower case. ranked: candidates have
    probabilities; those that are not generated are neighbors where they have none.
    """

    source: str
    ids: list[str]
    coordinates: Float[np.ndarray, "n 2"]
    candidates: Float[np.ndarray, "n K 2"]
    generated: bool
    extra: list[dict[str, Any]]
    ranked: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to a coordinate, in the order of the truth's photos.

    choice: its name within the variant, "" where the file names none. main: the file's own choice. baseline: its
    candidates are not generated. bound: knows the truth, so nothing can choose better. coordinates: NaN where there is
    no prediction, and `km` is FARTHEST_KM.
    """

    variant: str
    choice: str
    name: str
    main: bool
    baseline: bool
    bound: bool
    coordinates: Float[np.ndarray, "n 2"]
    km: Float[np.ndarray, "n"]

    @property
    def missing(self) -> int:
        """The number of photos without a prediction."""
        return int(np.isnan(self.coordinates[:, 0]).sum())


def run(config: Any, workdir: epath.PathLike) -> stages.Manifest:
    """Scores every variant under predictions/ on every split, and writes report/metrics.json and report/index.html.

    Both are made again, whole, where there are predictions that an earlier report did not know.
    """
    workdir = epath.Path(workdir)
    options = settings.read(EvaluateSettings, config.evaluate, "evaluate")
    folders = predicted(workdir, options)
    for name in ("manifest.json", "begun.json"):
        earlier = workdir / "report" / name
        if earlier.exists() and not set(folders) <= json.loads(earlier.read_text())["inputs"].keys():
            earlier.unlink()
    stage = stages.begin(workdir, "report", {"name": config.name, "evaluate": options}, ["photos", "gallery", *folders])
    if stage.manifest:
        return stage.manifest
    truths, methods = read_predictions(workdir, folders, options)
    scores = {
        split: score(methods[split], truth, options.reference, options.resamples, options.seed)
        for split, truth in truths.items()
    }
    metrics = {"resamples": options.resamples, "seed": options.seed, "splits": scores}
    stages.write_json(stage.path / "metrics.json", metrics)
    page = report.page(workdir, config.name, metrics, truths, methods, options)
    stages.write_bytes(stage.path / "index.html", page.encode())
    return stage.finish({"variants": len(folders), **{split: len(truth.ids) for split, truth in truths.items()}})


def predicted(workdir: epath.Path, options: EvaluateSettings) -> list[str]:
    """Returns the folders of predictions. Raises StageError if the reference is not among them."""
    folder = workdir / "predictions"
    variants = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
    if options.reference not in variants:
        raise stages.StageError(
            f"config.evaluate.reference is {options.reference!r}, and {folder} holds "
            f"{', '.join(variants) or 'nothing'}: run `geotoken predict` for it first, or name one that is there"
        )
    return [f"predictions/{variant}" for variant in variants]


def read_predictions(
    workdir: epath.Path, folders: Sequence[str], options: EvaluateSettings
) -> tuple[dict[str, Points], dict[str, list[Method]]]:
    """Returns truth and methods by split, in the order to show: what is called test comes first.

    `extra` of the truth holds the author and the place names.
    """
    files = {(path.stem, path.parent.name): path for folder in folders for path in (workdir / folder).glob("*.jsonl")}
    truths, methods = {}, {}
    for split in sorted({split for split, _ in files}, key=lambda name: (not name.startswith("test"), name)):
        truth = truths[split] = _photos(workdir, split)
        found = []
        for variant in (folder.split("/")[1] for folder in folders):
            if (split, variant) in files:
                points = read_points(files[split, variant])
                found += methods_of(points, truth, variant, options.labels.get(variant, variant))
        methods[split] = in_order(found, options.reference)
    return truths, methods


def compare_files(
    predictions: Sequence[epath.PathLike], truth: epath.PathLike, resamples: int, seed: int
) -> dict[str, Any]:
    """Returns the metrics of files of predictions against a file of truth; the first file is the reference."""
    points = read_points(truth)
    found = [m for path in predictions for m in methods_of(read_points(path), points, str(path), epath.Path(path).stem)]
    reference = str(predictions[0])
    scores = score(in_order(found, reference), points, reference, resamples, seed)
    return {"resamples": resamples, "seed": seed, "splits": {epath.Path(truth).stem: scores}}


def read_points(path: epath.PathLike) -> Points:
    """Reads JSON lines or CSV with a header: id, latitude, longitude (also lat, lon, lng, IMG_ID; any case), and more.

    Raises PointsError with file, line and fix on a missing column, a duplicate id, or a coordinate out of range.
    """
    source = str(path)
    first_line, ids, coordinates, candidates, extra = {}, [], [], [], []
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
            row["choices"] = {choice: int(k) for choice, k in row.get("choices", {}).items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            raise PointsError(
                f"{where}: candidates must be a list of objects with latitude and longitude, and choices an object of "
                "names and their index into candidates: mend them, or leave both out"
            ) from None
        extra.append(row)
    if not ids:
        raise PointsError(f"{path} holds no points: write one row a photo with id, latitude and longitude")
    return Points(source, ids, np.array(coordinates), _padded(candidates), generated, extra, ranked)


def methods_of(points: Points, truth: Points, variant: str, label: str) -> list[Method]:
    """Returns the methods in one file of predictions: its own choice, its other choices, its best candidate (a bound).

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
        chosen.setdefault(choice, candidates[each, _choice(points, choice)])

    def method(choice: str, name: str, coordinates: Float[np.ndarray, "p 2"], bound: bool = False) -> Method:
        placed = np.full((len(truth.ids), 2), np.nan)
        placed[rows] = coordinates
        return Method(
            variant, choice, name, not bound and choice == main, baseline, bound, placed, off_km(placed, truth)
        )

    named = len(chosen) > 1 or not baseline
    methods = [
        method(choice, f"{label}: {choice.replace('_', ' ')}" if named and choice else label, coordinates)
        for choice, coordinates in chosen.items()
    ]
    if count > 1:
        here = truth.coordinates[rows, None]
        off = distance.great_circle_km(candidates[..., 0], candidates[..., 1], here[..., 0], here[..., 1])
        nearest = np.nan_to_num(off, nan=np.inf).argmin(axis=1)
        most = f"up to {count}" if np.isnan(candidates).any() else str(count)  # samples that agree are one candidate
        is_neighbors = baseline and not points.ranked
        name = f"Best of {most} neighbors" if is_neighbors else f"{label}: ideal of {most} candidates"
        methods.append(method("ideal", name, candidates[each, nearest], bound=True))
    return methods


def off_km(placed: Float[np.ndarray, "n 2"], truth: Points) -> Float[np.ndarray, "n"]:
    """Returns how far from the truth each photo was placed; NaN is FARTHEST_KM off."""
    return np.nan_to_num(distance.great_circle_km(*placed.T, *truth.coordinates.T), nan=FARTHEST_KM)


def in_order(methods: Sequence[Method], reference: str) -> list[Method]:
    """Returns the methods as tables show them: baselines, the reference, the others; bounds last."""
    return sorted(methods, key=lambda m: (m.bound, not m.baseline, m.variant != reference))


def score(methods: Sequence[Method], truth: Points, reference: str, resamples: int, seed: int) -> dict[str, Any]:
    """Returns every number of one split, as JSON holds it.

    Accuracies are fractions within each of THRESHOLDS_KM, with 95 % intervals. differences: each other method minus
    the reference variant's own choice, with intervals and two-sided p-values of the same paired bootstrap (the
    smallest that R resamples can show is 2 / (R + 1)).
    """
    authors = [str(row.get("author") or "") for row in truth.extra]
    clusters = np.unique(
        [author or f"\0{name}" for author, name in zip(authors, truth.ids, strict=True)], return_inverse=True
    )[1]
    outcomes = np.stack([_outcomes(method.km) for method in methods], axis=1)
    values = outcomes.mean(axis=0)
    samples = _bootstrap(outcomes, clusters, resamples, seed)
    rows = [
        {
            **{name: getattr(method, name) for name in ("variant", "choice", "name", "main", "baseline", "bound")},
            "missing": method.missing,
            "median_km": _round(np.median(method.km)),
            **_estimates(values[i], samples[:, i]),
        }
        for i, method in enumerate(methods)
    ]
    differences = []
    at = next((i for i, method in enumerate(methods) if method.variant == reference and method.main), None)
    for i, method in enumerate(methods):
        if at is not None and i != at and not method.bound:
            difference = _estimates(values[i] - values[at], samples[:, i] - samples[:, at], p=True)
            differences.append({"variant": method.variant, "choice": method.choice, "name": method.name, **difference})
    return {
        "photos": len(truth.ids),
        "authors": len(set(authors)) if all(authors) else None,
        "methods": rows,
        "reference": None if at is None else methods[at].name,
        "differences": differences,
    }


def table(metrics: Mapping[str, Any]) -> str:
    """Returns the numbers as text of at most 100 columns: an interval stands below its value."""
    lines = ["Percent of photos within a distance; below it, the 95 % interval."]
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
            above = [f"{100 * a['value']:+.1f}" for a in row["accuracy"]]
            below = [f"{100 * a['low']:+.1f}..{100 * a['high']:+.1f}" for a in row["accuracy"]]
            lines += _aligned(row["name"], above, below, width=13)
        for row in scores["methods"]:
            if row["missing"]:
                note = f"{row['name']}: {row['missing']:,} photos have no prediction and count as wrong"
                lines += textwrap.wrap(note, 100)
    return "\n".join(line.rstrip() for line in lines) + "\n"


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


def _photos(workdir: epath.Path, split: str) -> Points:
    """Returns the truth of one split of photos/; `extra` holds the author and the place names."""
    photos = records.Photos(workdir / "photos", split)
    ids, coordinates, extra = [], [], []
    for row in range(len(photos)):
        photo = photos[row]
        ids.append(photo["id"])
        coordinates.append(photo["coordinates"])
        extra.append({name: photo[name] for name in ("author", *records.PLACE_FIELDS)})
    return Points(f"photos/ ({split})", ids, np.array(coordinates), _padded([[]] * len(ids)), False, extra)


def _padded(lists: Sequence[Sequence[tuple[float, float]]]) -> Float[np.ndarray, "n K 2"]:
    coordinates = np.full((len(lists), max(map(len, lists)), 2), np.nan)
    for row, places in enumerate(lists):
        if places:
            coordinates[row, : len(places)] = places
    return coordinates


def _choice(points: Points, choice: str) -> Int[np.ndarray, "n"]:
    """Returns which candidate a choice takes for each photo."""
    taken = np.array([row["choices"].get(choice, -1) for row in points.extra])
    held = (~np.isnan(points.candidates[..., 0])).sum(axis=1)
    wrong = np.flatnonzero((taken < 0) | (taken >= held))
    if wrong.size:
        name = points.ids[wrong[0]]
        raise PointsError(f"{points.source}: {name!r} has no candidate for the choice {choice!r}: give every photo one")
    return taken


def _outcomes(km: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n 7"]:
    """Returns what is averaged over photos: within each of the five thresholds, GeoScore, kilometers."""
    within = [km <= threshold for threshold in distance.THRESHOLDS_KM]
    return np.stack([*within, distance.geoscore(km), km], axis=-1).astype(np.float64)


def _bootstrap(
    outcomes: Float[np.ndarray, "n methods x"], clusters: Int[np.ndarray, "n"], resamples: int, seed: int
) -> Float[np.ndarray, "R methods x"]:
    """Returns the mean outcomes of R resamples of the clusters, drawn with replacement."""
    n, *shape = outcomes.shape
    count = clusters.max() + 1
    sums = np.zeros((count, math.prod(shape) + 1))
    np.add.at(sums, clusters, np.concatenate([outcomes.reshape(n, -1), np.ones((n, 1))], axis=1))
    rng = np.random.default_rng(seed)
    totals = np.empty((resamples, sums.shape[1]))
    for start in range(0, resamples, 100):  # 100 at a time: at 26,000 photos the counts are 21 MB, not 420
        stop = min(start + 100, resamples)
        drawn = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(start, stop)]
        totals[start:stop] = np.stack(drawn).astype(np.float64) @ sums
    return (totals[:, :-1] / totals[:, -1:]).reshape(resamples, *shape)


def _estimates(value: Float[np.ndarray, "7"], samples: Float[np.ndarray, "R 7"], p: bool = False) -> dict[str, Any]:
    """Returns estimates with 95 % intervals of each outcome, and p-values (against zero) where asked for."""
    low, high = np.percentile(samples, (2.5, 97.5), axis=0)
    tail = 1 + np.minimum((samples <= 0).sum(axis=0), (samples >= 0).sum(axis=0))
    p_value = np.minimum(1.0, 2 * tail / (len(samples) + 1))
    estimates = [
        {"value": _round(value[i]), "low": _round(low[i]), "high": _round(high[i])}
        | ({"p": _round(p_value[i])} if p else {})
        for i in range(len(value))
    ]
    accuracy = [{"km": km, **estimates[i]} for i, km in enumerate(distance.THRESHOLDS_KM)]
    return {"accuracy": accuracy, "geoscore": estimates[-2], "mean_km": estimates[-1]}


def _round(value: Any) -> float:
    """Rounds off what depends on the order of a sum, so that equal inputs give equal files."""
    return round(float(value), 6)
