"""Whether answers are as sure as they say: reliability, radii, abstention, and recall against the area searched."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from geotoken_jax.analysis import charts, frame
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import MAX_LEVEL, CellScheme
from geotoken_jax.predict.uncertainty import MASSES

if TYPE_CHECKING:
    from geotoken_jax.analysis.evaluate import Method

#: Of predicted probabilities.
_BINS = 10
#: Shares of the photos that are answered, the surest first.
_ANSWERED = np.arange(1, 21) / 20
#: Areas in square kilometers at which recall is written down; a city has some hundred, the Earth 510 million.
_AREAS = 10.0 ** np.arange(9)
#: Threshold whose probability says which photos are surest.
_SUREST = distance.THRESHOLDS_KM.index(25)
#: Photos whose cells are compared with the truth at once: 64 cells of level 20 are 11 MB of tokens.
_BLOCK = 2048
#: A cell's names where it is an object.
_CELL = ("level", "latitude", "longitude", "probability")
_EARTH_KM2 = 4 * math.pi * distance.EARTH_RADIUS_KM**2


@dataclasses.dataclass(frozen=True)
class Claims:
    """How sure answers say they are; NaN where one says nothing.

    within: probabilities that the truth is within each of THRESHOLDS_KM. radius_km: around the answer, of each of
    MASSES percent. cells: level, latitude, longitude and probability of S2 cells.
    """

    within: Float[np.ndarray, "n 5"]
    radius_km: Float[np.ndarray, "n 2"]
    cells: Float[np.ndarray, "n F 4"]

    def at(self, rows: np.ndarray, n: int) -> "Claims":
        """Returns the claims of n photos of which these are some rows."""
        placed = []
        for values in (self.within, self.radius_km, self.cells):
            placed.append(np.full((n, *values.shape[1:]), np.nan))
            placed[-1][rows] = values
        return Claims(*placed)


def read(row: dict[str, Any]) -> Claims:
    """Removes from a row, and returns, what it says of how sure it is (n = 1).

    JSON: `within` {"25": p}, `radius_km` {"50": km} or a number (of 50 %), `cells` [[level, latitude, longitude, p]];
    and as `geotoken predict --json` has it: `radius_90_km` beside it, cells as objects. CSV: columns within_25,
    radius_km_50, radius_km. Raises ValueError with the fix on anything else.
    """
    within, radius, cells = row.pop("within", {}), row.pop("radius_km", {}), row.pop("cells", ())
    if not isinstance(radius, Mapping):
        radius = {str(MASSES[0]): radius}
        if "radius_90_km" in row:
            radius["90"] = row.pop("radius_90_km")
    if not isinstance(within, Mapping):
        raise ValueError(f'within is {within!r}: write an object of km and probability, as in {{"25": 0.5}}')
    shares = [_value(row, within, "within", km, 1) for km in distance.THRESHOLDS_KM]
    radii = [_value(row, radius, "radius_km", mass, math.inf) for mass in MASSES]
    try:
        cells = [[cell[name] for name in _CELL] if isinstance(cell, Mapping) else cell for cell in cells]
        table = np.array(cells, np.float64).reshape(-1, 4)
        CellScheme(1, 1).encode(table[:, 1], table[:, 2])  # looks at the degrees
        if not ((table[:, 0] >= -1) & (table[:, 0] <= MAX_LEVEL) & (table[:, 3] >= 0) & (table[:, 3] <= 1)).all():
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"cells must be a list of [level -1..{MAX_LEVEL}, latitude, longitude, probability]: mend or remove it"
        ) from None
    return Claims(np.array([shares]), np.array([radii]), table[None])


def _value(row: dict[str, Any], held: Mapping[str, Any], name: str, key: int, most: float) -> float:
    """Returns what is under a key, or in the column NAME_KEY; NaN for neither."""
    value = held.get(str(key), row.pop(f"{name}_{key}", None))
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= most:
        raise ValueError(f"{name} of {key} is {value!r}: give a number from 0 to {most:g}, or leave it out")
    return number


def gathered(claims: Sequence[Claims]) -> Claims | None:
    """Returns the claims of single rows as one; None where no row has any."""
    cells = np.full((len(claims), max(claim.cells.shape[1] for claim in claims), 4), np.nan)
    for n, claim in enumerate(claims):
        cells[n, : claim.cells.shape[1]] = claim.cells[0]
    within, radius = (np.concatenate([getattr(c, name) for c in claims]) for name in ("within", "radius_km"))
    found = Claims(within, radius, cells)
    return None if all(np.isnan(values).all() for values in dataclasses.astuple(found)) else found


def figures(method: "Method", truth: Float[np.ndarray, "n 2"], strict: bool) -> dict[str, Any] | None:
    """Returns every number of how sure a method is, as JSON holds it; None where it says nothing.

    truth: degrees. reliability: for each threshold, bins of predicted probability with the share that was within, and
    the expected calibration error, which is their mean absolute difference, weighted by photos. radii: what share of
    the truth each holds. abstention: accuracy and GeoScore of the surest photos; one without a prediction is the least
    sure. area: the share of photos whose truth is in a searched area, in km2: of a circle around the answer, and of the
    cells, those with most probability a km2 first. Intervals are Wilson's, of 95 %, and take photos as independent.
    """
    claims = method.claims
    if claims is None:
        return None
    near = distance.within(method.km[:, None], strict)
    circle, cells = _searched_km2(method, truth)
    return {
        "name": method.name,
        "reliability": [
            _reliability(km, claims.within[:, i], near[:, i]) for i, km in enumerate(distance.THRESHOLDS_KM)
        ],
        "radii": [_radius(mass, claims.radius_km[:, i], method.km) for i, mass in enumerate(MASSES)],
        "abstention": {name: _abstention(sure, near, method.km) for name, sure in _orders(claims).items()},
        "area": [
            {
                "km2": float(area),
                "circle": round(float((circle <= area).mean()), 6),
                "cells": None if cells is None else round(float((cells <= area).mean()), 6),
            }
            for area in _AREAS
        ],
    }


def _reliability(km: int, predicted: Float[np.ndarray, "n"], near: Bool[np.ndarray, "n"]) -> dict[str, Any] | None:
    known = np.flatnonzero(~np.isnan(predicted))
    if not len(known):
        return None
    predicted, near = predicted[known], near[known]
    which = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    bins = []
    for k in range(_BINS):
        rows = which == k
        if rows.any():
            mean = round(float(predicted[rows].mean()), 6)
            bins.append({"photos": int(rows.sum()), "predicted": mean, "observed": _share(near[rows])})
    error = sum(b["photos"] * abs(b["predicted"] - b["observed"]["value"]) for b in bins) / len(known)
    return {
        "km": km,
        "photos": len(known),
        "predicted": round(float(predicted.mean()), 6),
        "observed": _share(near),
        "error": round(error, 6),
        "bins": bins,
    }


def _radius(mass: int, radius: Float[np.ndarray, "n"], km: Float[np.ndarray, "n"]) -> dict[str, Any] | None:
    known = np.flatnonzero(~np.isnan(radius))
    if not len(known):
        return None
    median = round(float(np.median(radius[known])), 6)
    return {"percent": mass, "photos": len(known), "median_km": median, "holds": _share(km[known] <= radius[known])}


def _orders(claims: Claims) -> dict[str, Float[np.ndarray, "n"]]:
    """Returns what says how sure a photo is, by name; the surest is greatest."""
    orders = {
        f"probability within {distance.THRESHOLDS_KM[_SUREST]} km": claims.within[:, _SUREST],
        f"radius of {MASSES[0]} %": -claims.radius_km[:, 0],
    }
    return {name: sure for name, sure in orders.items() if not np.isnan(sure).all()}


def _abstention(
    sure: Float[np.ndarray, "n"], near: Bool[np.ndarray, "n 5"], km: Float[np.ndarray, "n"]
) -> list[dict[str, Any]]:
    order = np.argsort(-np.nan_to_num(sure, nan=-np.inf), kind="stable")
    right, points = near[order].cumsum(0), np.asarray(distance.geoscore(km[order])).cumsum()
    rows = []
    for answered in _ANSWERED:
        count = math.ceil(round(answered * len(km), 6))
        accuracy = [round(float(share), 6) for share in right[count - 1] / count]
        rows.append(
            {"answered": float(answered), "accuracy": accuracy, "geoscore": round(points[count - 1] / count, 6)}
        )
    return rows


def _searched_km2(
    method: "Method", truth: Float[np.ndarray, "n 2"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"] | None]:
    """Returns the area searched until the truth is found: by a growing circle, and by cells (None where nobody has
    any; infinite where the truth is in none)."""
    circle = _EARTH_KM2 * np.sin(np.minimum(method.km / (2 * distance.EARTH_RADIUS_KM), math.pi / 2)) ** 2
    every = method.claims.cells if method.claims else np.empty((0, 0, 4))
    if not every.shape[1]:
        return circle, None
    found = np.full(len(truth), np.inf)
    depth = max(1, int(np.nanmax(every[..., 0])))
    scheme = CellScheme(depth, 1)
    for first in range(0, len(truth), _BLOCK):
        level, *center, probability = np.moveaxis(every[first : first + _BLOCK], -1, 0)
        own = np.asarray(scheme.encode(*truth[first : first + _BLOCK].T))[:, None]
        common = np.cumprod(own == np.asarray(scheme.encode(*np.nan_to_num(center))), -1).sum(-1)
        holds = common > level  # a cell of level n is told by 1 + n tokens, and the whole Earth, -1, by none
        area = _EARTH_KM2 * np.where(level < 0, 1, 4.0**-level / 6)  # the mean of its level
        order = np.argsort(-probability / area, axis=1, kind="stable")
        holds, area = (np.take_along_axis(values, order, 1) for values in (holds, area))
        rows = np.flatnonzero(holds.any(1))
        found[first + rows] = area.cumsum(1)[rows, holds[rows].argmax(1)]
    return circle, found


def _share(hits: Bool[np.ndarray, "n"]) -> dict[str, float]:
    """Returns a share with Wilson's interval of 95 %."""
    n, value, z = len(hits), float(hits.mean()), 1.959964
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {
        "value": round(value, 6),
        "low": round(max(0.0, middle - half), 6),
        "high": round(min(1.0, middle + half), 6),
    }


def lines(split: str, found: Mapping[str, Any]) -> list[str]:
    """Returns the figures that matter most, as text of at most 100 columns."""
    known = {of["km"]: of for of in found["reliability"] if of}
    rows = {
        "said to be within, %": {km: f"{100 * of['predicted']:.1f}" for km, of in known.items()},
        "that were": {km: f"{100 * of['observed']['value']:.1f}" for km, of in known.items()},
        "calibration error, points": {km: f"{100 * of['error']:.1f}" for km, of in known.items()},
    }
    for curve in list(found["abstention"].values())[:1]:
        half = next(row for row in curve if row["answered"] == 0.5)["accuracy"]
        rows["within, % of surest half"] = {
            km: f"{100 * value:.1f}" for km, value in zip(distance.THRESHOLDS_KM, half, strict=True)
        }
    text = [f"{split}: how sure {found['name'][:70]} is", "-" * 100]
    for name, cells in rows.items():
        if cells:
            text.append(f"{name:26}" + "".join(f"{cells.get(km, ''):>11}" for km in distance.THRESHOLDS_KM))
    for of in filter(None, found["radii"]):
        value, low, high = (100 * of["holds"][part] for part in ("value", "low", "high"))
        text.append(
            f"The radius of {of['percent']} % holds {value:.1f} % ({low:.1f}-{high:.1f}) of {of['photos']:,} photos; "
            f"median {of['median_km']:,.1f} km"
        )
    return text


def html(splits: Mapping[str, Any]) -> str:
    """Returns what the report says of how sure the reference is. splits: figures, None where there are none."""
    known = {split: found for split, found in splits.items() if found}
    if not known:
        return "<p>The predictions of the reference do not say how sure they are.</p>"
    name = next(iter(known.values()))["name"]
    parts = [
        f"<p>How sure <b>{escape(name)}</b> says it is, against what came true. Its radii should hold "
        f"{' and '.join(map(str, MASSES))} % of the photos, and of those it gives 70 % for a distance, 70 % should be "
        "within it: dots on the diagonal. The calibration error is their mean distance from it, in points. Bars and "
        "small figures are 95 % intervals, photos taken as independent.</p>",
        _summary(known),
    ]
    drawn = []
    for split, found in known.items():
        diagrams = "".join(_diagram(split, of) for of in found["reliability"] if of)
        diagrams = f'<h3>Reliability</h3><div class="charts small">{diagrams}</div>' if diagrams else ""
        drawn.append((split, "reliability and abstention", diagrams + _abstention_html(split, found["abstention"])))
    return "".join(parts) + frame.folded(drawn)


def _summary(known: Mapping[str, Any]) -> str:
    columns = ["Split"]
    for mass in MASSES:
        columns += [f"{mass}&nbsp;% radius holds", "its median"]
    columns += [f"error at {km}" for km in frame.thresholds()]
    rows = []
    for split, found in known.items():
        cells = []
        for of in found["radii"]:
            cells.append(
                frame.percents(of["holds"]) + f"<td>{frame.km(of['median_km'])}</td>" if of else "<td></td>" * 2
            )
        cells += [f"<td>{100 * of['error']:.1f}</td>" if of else "<td></td>" for of in found["reliability"]]
        rows.append(frame.row(split, cells))
    return frame.table(columns, [frame.body(len(columns), rows)])


def _diagram(split: str, of: Mapping[str, Any]) -> str:
    predicted = np.array([100 * b["predicted"] for b in of["bins"]])
    value, low, high = (np.array([100 * b["observed"][part] for b in of["bins"]]) for part in ("value", "low", "high"))
    notes = [
        f"{b['photos']:,} photos: said {x:.1f} %, was {y:.1f} %"
        for b, x, y in zip(of["bins"], predicted, value, strict=True)
    ]
    whole = np.array([0.0, 100.0])
    drawn = charts.chart(
        [
            charts.Series("as sure as it says", 7, "dashed", whole, whole),
            charts.Series("what came true", 0, "solid", predicted, value, low, high, notes),
        ],
        title=f"Percent of photos of {split} within {of['km']:,} km, against the percent that was predicted",
        x_label="percent predicted",
        y_label="percent that were",
    )
    return frame.figure(f"Within {of['km']:,} km: error {100 * of['error']:.1f} points", drawn)


def _abstention_html(split: str, curves: Mapping[str, Any]) -> str:
    if not curves:
        return ""
    first = next(iter(curves))
    accuracy = np.array([row["accuracy"] for row in curves[first]])
    answered = 100 * _ANSWERED
    labels = [f"{km:,} km" for km in distance.THRESHOLDS_KM]
    panels = [
        frame.figure(
            f"Accuracy, surest by {first}",
            charts.chart(
                [charts.Series(label, i, "solid", answered, 100 * accuracy[:, i]) for i, label in enumerate(labels)],
                title=f"Percent of the answered photos of {split} within a distance, against the percent answered",
                x_label="percent answered, the surest first",
                y_label="percent within",
            ),
        ),
        frame.figure(
            "GeoScore, surest by either",
            charts.chart(
                [
                    charts.Series(name, i, "solid", answered, np.array([row["geoscore"] for row in curve]))
                    for i, (name, curve) in enumerate(curves.items())
                ],
                title=f"GeoScore of the answered photos of {split} against the percent answered",
                x_label="percent answered, the surest first",
                y_label="GeoScore",
            ),
        ),
    ]
    legends = [
        frame.legend((label, i, "solid") for i, label in enumerate(labels)),
        frame.legend((f"GeoScore by {name}", i, "solid") for i, name in enumerate(curves)),
    ]
    return f'<h3>Leaving out the least sure</h3>{"".join(legends)}<div class="charts">{"".join(panels)}</div>'


def area_html(splits: Mapping[str, Any]) -> str:
    """Returns the chart of recall against area of each split. splits: figures, None where there are none."""
    panels, rows = [], []
    for split, found in splits.items():
        if not found:
            continue
        area = np.array([of["km2"] for of in found["area"]])
        kinds = {"circle around the answer": "circle", "most probable cells": "cells"}
        kinds = {name: key for name, key in kinds.items() if found["area"][0][key] is not None}
        curves = {name: np.array([100 * of[key] for of in found["area"]]) for name, key in kinds.items()}
        series = [charts.Series(name, i, "solid", area, curve) for i, (name, curve) in enumerate(curves.items())]
        drawn = charts.chart(
            series,
            title=f"Percent of the photos of {split} that were taken in the area searched, against its size",
            x_label="area searched, square kilometers",
            y_label="percent of photos",
            log_x=True,
        )
        panels.append(frame.figure(split, drawn))
        rows += [frame.row(f"{split}: {name}", [f"<td>{y:.1f}</td>" for y in curve]) for name, curve in curves.items()]
    if not panels:
        return "<p>The predictions of the reference say nothing of where else to search.</p>"
    columns = ["Percent found in", *(f"{charts.label(area)}&nbsp;km&sup2;" for area in _AREAS)]
    return (
        "<p>How much of the Earth must be searched until the place is found: by a circle that grows around the answer, "
        "or cell by cell of the model's own distribution, those with the most probability a square kilometer first; "
        "where its curve ends, the truth is in none of the cells listed.</p>"
        + frame.legend([("circle around the answer", 0, "solid"), ("most probable cells", 1, "solid")])
        + f'<div class="charts">{"".join(panels)}</div>'
        + f"<details><summary>In figures</summary>{frame.table(columns, [frame.body(len(columns), rows)])}</details>"
    )
