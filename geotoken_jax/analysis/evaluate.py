"""Accuracy of predictions, computed from files of predictions and files of true coordinates.

The files may come from any program.

Every photo of the truth counts: a photo without a prediction is wrong at every threshold. Intervals are 95 % percentile
bootstrap intervals. Authors are resampled if they are known, because photos of one author are not independent. All
methods use the same resamples, so differences between methods are paired.
"""

import csv
import dataclasses
import io
import json
import operator
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from geotoken_jax import bootstrap, settings
from geotoken_jax.analysis import overlap, regions, reliability
from geotoken_jax.analysis.coordinates import CoordinateTable, Method, in_order, methods_of, read_coordinates
from geotoken_jax.configuration import EvaluateSettings
from geotoken_jax.geo import distance
from geotoken_jax.tables import TableError


def compare_files(
    predictions: Sequence[epath.PathLike], truth: epath.PathLike, options: EvaluateSettings
) -> dict[str, Any]:
    """Returns the metrics of files of predictions against a file of true coordinates.

    The path of a file is the name of its variant. Raises TableError if a file cannot be scored or is given
    twice, SettingsError if options.compare names a method that no file has.
    """
    points = read_coordinates(truth)
    methods = []
    for path, label in _labels([str(path) for path in predictions]).items():
        predicted = read_coordinates(path, predicted=True)
        _refuse_truth(predicted, points)
        methods += methods_of(predicted, points, path, options.labels.get(path, label), options.earth)
    methods, split = in_order(methods, options.reference), epath.Path(truth).stem
    _check_pairs({split: methods}, options)
    return _metrics({split: _score_split(methods, points, options)}, options)


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """Returns path -> name in tables: the file's name without ending if it is unique, else the path.

    Raises TableError if a path is repeated.
    """
    stems = [epath.Path(path).stem for path in paths]
    for path in paths:
        if paths.count(path) > 1:
            raise TableError(f"--predictions={path} is given more than once: give it once")
    return {path: stem if stems.count(stem) == 1 else path for path, stem in zip(paths, stems, strict=True)}


def _refuse_truth(predicted: CoordinateTable, truth: CoordinateTable) -> None:
    """Raises TableError if every prediction is equal to the truth, because the file is then a copy of the truth."""
    true = dict(zip(truth.ids, truth.coordinates.tolist(), strict=True))
    if len(predicted.ids) > 1 and all(map(operator.eq, map(true.get, predicted.ids), predicted.coordinates.tolist())):
        raise TableError(
            f"{predicted.source} has exactly the coordinates of {truth.source} for all {len(predicted.ids)} photos, "
            "so it has the truth and no predictions: give the file of predictions"
        )


def score_splits(
    truths: Mapping[str, CoordinateTable],
    methods: Mapping[str, Sequence[Method]],
    known: Mapping[str, overlap.Leaks],
    options: EvaluateSettings,
) -> dict[str, Any]:
    """Returns the metrics of every split. All mappings are by split.

    known: leaked photos, from `overlap.find_leaks`. Raises SettingsError if options.compare names a method that no
    split has.
    """
    _check_pairs(methods, options)
    scores = {}
    for split, truth in truths.items():
        scores[split] = _score_split(methods[split], truth, options)
        scores[split]["clean"] = _clean_scores(methods[split], truth, known[split], options)
    return _metrics(scores, options)


def _check_pairs(methods: Mapping[str, Sequence[Method]], options: EvaluateSettings) -> None:
    """Raises SettingsError if options.compare names a method that no split has."""
    names = {name: None for listed in methods.values() for name in _names(listed)}
    for name in (name for pair in options.compare for name in pair):
        if name not in names:
            raise settings.SettingsError(
                f"there is no method {name!r} to compare: use one of {', '.join(names)} in --compare or "
                "config.evaluate.compare"
            )


def _metrics(scores: Mapping[str, Any], options: EvaluateSettings) -> dict[str, Any]:
    shown = {name: getattr(options, name) for name in ("resamples", "seed", "earth", "strict")}
    return {**shown, "splits": scores}


def _score_split(methods: Sequence[Method], truth: CoordinateTable, options: EvaluateSettings) -> dict[str, Any]:
    """Returns the metrics of one split that need neither gallery nor photos: scores, continents and uncertainty."""
    scores = score(
        methods, truth, options.reference, options.resamples, options.seed, options.strict, tuple(options.compare)
    )
    stated = {
        m.variant: figures
        for m in methods
        if m.main and (figures := reliability.figures(m, truth.coordinates, options.strict))
    }
    return scores | {
        "continents": _by_continent(methods, truth, options),
        "uncertainty": stated.pop(options.reference, None),
        "other_uncertainty": list(stated.values()),
    }


def _by_continent(methods: Sequence[Method], truth: CoordinateTable, options: EvaluateSettings) -> list[dict[str, Any]]:
    """Returns scores of the main methods per continent. The continent with the most photos comes first.

    The result is empty if no continent is known.
    """
    names = [
        regions.continent({key: str(row.get(key) or "") for key in ("country", "continent")}) for row in truth.extra
    ]
    methods, scores = [m for m in methods if m.main], []
    for name in sorted(set(names), key=lambda name: (-names.count(name), name)):
        rows = np.flatnonzero(np.array(names) == name)
        scores.append({"name": name, **score_subset(methods, truth, rows, options)})
    return scores if len(scores) > 1 or names[0] != regions.UNKNOWN else []


def _clean_scores(
    methods: Sequence[Method], truth: CoordinateTable, known: overlap.Leaks, options: EvaluateSettings
) -> dict[str, Any]:
    """Returns scores of the main methods on clean photos.

    A photo is clean if the gallery has no photo with the same id or author and no near-duplicate. In the result,
    `methods` is empty if there is no clean photo.
    """
    kinds = ("same id", "near-duplicate", "same author")
    rows = np.flatnonzero(~known.leaked(*kinds))
    left_out = {kind: int(known.leaked(kind).sum()) for kind in kinds}
    main = [m for m in methods if m.main]
    scores = score_subset(main, truth, rows, options) if len(rows) else {"photos": 0, "methods": []}
    return {"left_out": left_out, **scores}


def score_exclusion(
    methods: Sequence[Method],
    under: Mapping[str, Sequence[Method]],
    truth: CoordinateTable,
    options: EvaluateSettings,
) -> list[dict[str, Any]]:
    """Returns the scores of each main method without and with each set of exclusion rules, ready for JSON.

    Methods that search no neighbors are left out, because exclusion rules do not affect them. In the result, `change`
    is the accuracy with the rules minus the accuracy without them, with an interval of the paired bootstrap.

    methods: methods predicted without exclusion rules. under: name of a set of rules -> the same methods, predicted
    with these rules.
    """
    clusters = bootstrap.clusters([str(row.get("author") or "") for row in truth.extra], truth.ids)
    rows = []
    for method in (method for method in methods if method.main):
        found = {
            rules: other
            for rules, listed in under.items()
            for other in listed
            if (other.variant, other.choice, other.bound) == (method.variant, method.choice, False)
        }
        if not found:
            continue
        outcomes = np.stack([bootstrap.outcomes(m.km, options.strict) for m in (method, *found.values())], axis=1)
        values, samples = outcomes.mean(axis=0), bootstrap.resample(outcomes, clusters, options.resamples, options.seed)
        rows.append(
            {
                **{name: getattr(method, name) for name in ("variant", "choice", "name")},
                **bootstrap.estimates(values[0], samples[:, 0]),
                "rules": {
                    rules: {
                        **bootstrap.estimates(values[i], samples[:, i]),
                        "change": bootstrap.estimates(values[i] - values[0], samples[:, i] - samples[:, 0], p=True),
                    }
                    for i, rules in enumerate(found, 1)
                },
            }
        )
    return rows


def score_subset(
    methods: Sequence[Method], truth: CoordinateTable, rows: Int[np.ndarray, "n"], options: EvaluateSettings
) -> dict[str, Any]:
    """Returns the scores of the methods on a subset of the photos. rows: rows of `truth`, at least one."""
    subset = dataclasses.replace(
        truth,
        ids=[truth.ids[row] for row in rows],
        coordinates=truth.coordinates[rows],
        candidates=truth.candidates[rows],
        extra=[truth.extra[row] for row in rows],
    )
    cut = [dataclasses.replace(m, coordinates=m.coordinates[rows], km=m.km[rows], claims=None) for m in methods]
    return score(cut, subset, options.reference, options.resamples, options.seed, options.strict)


def score(
    methods: Sequence[Method],
    truth: CoordinateTable,
    reference: str,
    resamples: int,
    seed: int,
    strict: bool = False,
    compare: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Returns accuracies of the methods and differences between them, ready for JSON.

    Accuracies are fractions within each of THRESHOLDS_KM, with 95 % intervals. `differences` compares every other
    method, except bounds, with the main method of the reference variant: method minus reference, with intervals and
    two-sided p-values of the paired bootstrap. The smallest p-value that R resamples can show is 2 / (R + 1).
    `comparisons` has the same for each pair in `compare` whose methods exist: first minus second. The last five
    arguments are fields of EvaluateSettings.
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
    """Returns name -> index of the method. Every method has the name VARIANT:CHOICE, a main method also VARIANT."""
    names = {method.variant: i for i, method in enumerate(methods) if method.main}
    return names | {f"{method.variant}:{method.choice}": i for i, method in enumerate(methods) if method.choice}


def table(metrics: Mapping[str, Any]) -> str:
    """Returns the metrics as text of at most 100 columns, with each interval below its value."""
    limits = f"{'less than' if metrics['strict'] else 'within'} a distance on the {metrics['earth']}"
    lines = [f"Percent of photos {limits}; below it, the 95 % interval."]
    thresholds = [f"{km:,} km" for km in distance.THRESHOLDS_KM]
    for split, scores in metrics["splits"].items():
        authors = f", {scores['authors']:,} authors" if scores["authors"] else ""
        lines += ["", *_aligned("", [*thresholds, "median km", "GeoScore"], [])]
        lines += [f"{split}: {scores['photos']:,} photos{authors}", "-" * 100]
        for row in scores["methods"]:
            above = [f"{100 * a['value']:.1f}" for a in row["accuracy"]]
            below = [f"{_percent(a['low'])}-{_percent(a['high'])}" for a in row["accuracy"]]
            tail = [f"{row['median_km']:,.1f}", f"{row['geoscore']['value']:,.0f}"]
            lines += _aligned(row["name"] + (" (bound)" if row["bound"] else ""), above + tail, below)
        if any(row["bound"] for row in scores["methods"]):
            lines += ["A bound uses the truth to take the best of the same candidates."]
        if scores["differences"]:
            lines += ["", f"{split}: percentage points above (+) or below (-) {scores['reference']}", "-" * 100]
        for row in scores["differences"]:
            lines += _difference(row["name"], row["accuracy"])
        for row in scores["comparisons"]:
            title = f"{split}: percentage points above (+) or below (-) {row['against']}"
            lines += ["", *textwrap.wrap(title, 100), "-" * 100]
            lines += _difference(row["name"], row["accuracy"])
        if "exclusion" in scores:
            lines += ["", *_exclusion_lines(split, scores)]
        for figures in filter(None, (scores["uncertainty"], *scores.get("other_uncertainty", ()))):
            lines += ["", *reliability.lines(split, figures)]
        for row in scores["methods"]:
            if row["missing"]:
                note = f"{row['name']}: {row['missing']:,} photos have no prediction and count as wrong"
                lines += textwrap.wrap(note, 100)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _exclusion_lines(split: str, scores: Mapping[str, Any]) -> list[str]:
    """Returns the lines on the exclusion rules of a benchmark: counts per set of rules, and accuracies with and without
    each set."""
    exclusion = scores["exclusion"]
    lines = [f"{split}: gallery photos excluded, and percent within each distance without and with exclusion"]
    lines += [f"authors known of {scores['photos'] - exclusion['unknown_authors']:,} of {scores['photos']:,} photos"]
    lines += [f"{'':26}{'photos':>12}{'gallery rows':>14}{'other neighbors':>17}{'too few':>9}", "-" * 100]
    for rules, n in exclusion["rules"].items():
        name = rules.replace("_", " ")
        lines += [f"{name:26}{n['photos']:>12,}{n['gallery']:>14,}{n['neighbors']:>17,}{n['fewer']:>9,}"]
    for method in exclusion["methods"]:
        for name, row in (("no further rule", method), *method["rules"].items()):
            above = [f"{100 * a['value']:.1f}" for a in row["accuracy"]]
            below = [f"{_percent(a['low'])}-{_percent(a['high'])}" for a in row["accuracy"]]
            lines += _aligned(f"{method['name']}: {name.replace('_', ' ')}", above, below)
    return lines


def csv_table(metrics: Mapping[str, Any]) -> str:
    """Returns the metrics as CSV, a row per split and method; accuracies are fractions with their intervals."""
    text = io.StringIO()
    rows = [
        {
            "split": split,
            "photos": scores["photos"],
            **{name: row[name] for name in ("name", "variant", "choice", "bound", "missing")},
            **{f"within_{a['km']}_km{end}": a[part] for a in row["accuracy"] for part, end in _ENDINGS.items()},
            "median_km": row["median_km"],
            **{f"{name}{end}": row[name][part] for name in ("mean_km", "geoscore") for part, end in _ENDINGS.items()},
        }
        for split, scores in metrics["splits"].items()
        for row in scores["methods"]
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


#: Part of an estimate -> ending of its column.
_ENDINGS = {"value": "", "low": "_low", "high": "_high"}
#: Ending of a file -> function from metrics to its text.
FORMATS = {".json": lambda metrics: json.dumps(metrics, indent=1) + "\n", ".csv": csv_table}


def _difference(name: str, accuracy: Sequence[Mapping[str, float]]) -> list[str]:
    above = [f"{100 * a['value']:+.1f}" for a in accuracy]
    below = [f"{_percent(a['low'], '+')}..{_percent(a['high'], '+')}" for a in accuracy]
    return _aligned(name, above, below, width=13)


def _percent(share: float, sign: str = "") -> str:
    """Returns a share in percent with one decimal. 100 has no decimal, because an interval must fit its column."""
    return f"{100 * share:{sign}.{0 if abs(share) >= 0.9995 else 1}f}"


def _aligned(name: str, above: Sequence[str], below: Sequence[str], width: int = 11) -> list[str]:
    """Returns the lines of a table row: the name in 26 columns, then two lines of cells.

    above, below: cells of the two lines. width: width of each of the first five cells in characters; the sixth cell is
    one character narrower, the seventh cell two.
    """
    names = textwrap.wrap(name, 25) or [""]
    cells = ["".join(f"{cell:>{width - max(0, i - 4)}}" for i, cell in enumerate(row)) for row in (above, below)]
    height = max(len(names), 2 if below else 1)
    return [f"{''.join(names[i : i + 1]):26}{''.join(cells[i : i + 1])}" for i in range(height)]
