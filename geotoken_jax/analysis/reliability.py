"""Quality of stated uncertainty: calibration of probabilities and radii, abstention, and recall by searched area."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from geotoken_jax.analysis.claims import Claims
from geotoken_jax.analysis.coordinates import Method
from geotoken_jax.geo import distance
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.predict.uncertainty import MASSES

#: Number of bins of predicted probability, of equal width.
_BINS = 10
#: Shares of the photos that are answered, most certain first: 5 to 100 %.
_ANSWERED = np.arange(1, 21) / 20
#: Areas in square kilometers at which recall is reported; a city has some hundred, the Earth 510 million.
_AREAS = 10.0 ** np.arange(9)
#: Index of 25 km in THRESHOLDS_KM: the stated probability of this distance orders photos by certainty.
_SUREST = distance.THRESHOLDS_KM.index(25)
#: Photos per block when cells are compared with the truth: with 64 cells of level 20 each, tokens are 11 MB.
_BLOCK = 2048
_EARTH_KM2 = 4 * math.pi * distance.EARTH_RADIUS_KM**2


def figures(method: Method, truth: Float[np.ndarray, "n 2"], strict: bool) -> dict[str, Any] | None:
    """Returns the quality of a method's stated uncertainty, ready for JSON; None if the method states none.

    truth: true coordinates in degrees. The result has these keys:

    - `reliability`: per threshold, bins of predicted probability with the observed share of photos within the
      threshold, and the expected calibration error: the mean absolute difference between both, weighted by photos.
    - `radii`: the share of photos whose truth is within the stated radius, for the 50 % radius and the 90 % radius.
    - `abstention`: accuracy and GeoScore of the most certain photos; photos without stated certainty come last.
    - `area`: per area in km2, the share of photos whose truth is found if this area is searched. It is either a circle
      around the answer, or the stated cells with the highest probability per km2.

    Shares in `reliability` and `radii` have 95 % Wilson intervals, which assume independent photos.
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
    error = calibration_error((b["photos"], b["predicted"], b["observed"]["value"]) for b in bins)
    return {
        "km": km,
        "photos": len(known),
        "predicted": round(float(predicted.mean()), 6),
        "observed": _share(near),
        "error": error,
        "bins": bins,
    }


def calibration_error(bins: Iterable[tuple[int, float, float]]) -> float:
    """Returns the expected calibration error, rounded to 6 digits.

    The error is the mean over bins of |probability - observed share|, weighted by photos. bins: number of photos, mean
    probability and observed share per bin.
    """
    photos, predicted, observed = zip(*bins, strict=True)
    off = sum(n * abs(p - share) for n, p, share in zip(photos, predicted, observed, strict=True))
    return round(off / sum(photos), 6)


def _radius(mass: int, radius: Float[np.ndarray, "n"], km: Float[np.ndarray, "n"]) -> dict[str, Any] | None:
    known = np.flatnonzero(~np.isnan(radius))
    if not len(known):
        return None
    median = round(float(np.median(radius[known])), 6)
    return {"percent": mass, "photos": len(known), "median_km": median, "holds": _share(km[known] <= radius[known])}


def _orders(claims: Claims) -> dict[str, Float[np.ndarray, "n"]]:
    """Returns measures of certainty: name -> a number per photo, larger for more certain answers.

    Measures that no photo has are left out.
    """
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
    method: Method, truth: Float[np.ndarray, "n 2"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"] | None]:
    """Returns two areas in km2 per photo that must be searched to find the truth.

    The first area is a circle around the answer. The second area is the sum of the photo's cells, most probable per km2
    first, up to the cell with the truth. It is infinite if no cell contains the truth, and None if the method states no
    cells.
    """
    circle = _EARTH_KM2 * np.sin(np.minimum(method.km / (2 * distance.EARTH_RADIUS_KM), math.pi / 2)) ** 2
    every = method.claims.cells if method.claims else np.empty((0, 0, 4))
    if not every.shape[1]:
        return circle, None
    by_cells = np.full(len(truth), np.inf)
    depth = max(1, int(np.nanmax(every[..., 0])))
    scheme = CellScheme(depth, 1)
    for first in range(0, len(truth), _BLOCK):
        level, *center, probability = np.moveaxis(every[first : first + _BLOCK], -1, 0)
        true = np.asarray(scheme.encode(*truth[first : first + _BLOCK].T))[:, None]
        common = np.cumprod(true == np.asarray(scheme.encode(*np.nan_to_num(center))), -1).sum(-1)
        holds = common > level  # a cell of level n has 1 + n tokens; the whole Earth is level -1 and has none
        area = _EARTH_KM2 * np.where(level < 0, 1, 4.0**-level / 6)  # mean area of the level's cells
        order = np.argsort(-probability / area, axis=1, kind="stable")
        holds, area = (np.take_along_axis(values, order, 1) for values in (holds, area))
        rows = np.flatnonzero(holds.any(1))
        by_cells[first + rows] = area.cumsum(1)[rows, holds[rows].argmax(1)]
    return circle, by_cells


def _share(hits: Bool[np.ndarray, "n"]) -> dict[str, float]:
    """Returns the share of true values with its 95 % Wilson interval."""
    n, value, z = len(hits), float(hits.mean()), 1.959964
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {
        "value": round(value, 6),
        "low": round(max(0.0, middle - half), 6),
        "high": round(min(1.0, middle + half), 6),
    }


def lines(split: str, uncertainty: Mapping[str, Any]) -> list[str]:
    """Returns the quality of stated uncertainty as lines of up to 100 columns. uncertainty: result of `figures`."""
    known = {of["km"]: of for of in uncertainty["reliability"] if of}
    rows = {
        "predicted within, %": {km: f"{100 * of['predicted']:.1f}" for km, of in known.items()},
        "actually within, %": {km: f"{100 * of['observed']['value']:.1f}" for km, of in known.items()},
        "calibration error, points": {km: f"{100 * of['error']:.1f}" for km, of in known.items()},
    }
    for curve in list(uncertainty["abstention"].values())[:1]:
        half = next(row for row in curve if row["answered"] == 0.5)["accuracy"]
        rows["surest half: within, %"] = {
            km: f"{100 * value:.1f}" for km, value in zip(distance.THRESHOLDS_KM, half, strict=True)
        }
    text = [*textwrap.wrap(f"{split}: stated uncertainty of {uncertainty['name']}", 100), "-" * 100]
    for name, cells in rows.items():
        if cells:
            text.append(f"{name:26}" + "".join(f"{cells.get(km, ''):>11}" for km in distance.THRESHOLDS_KM))
    for of in filter(None, uncertainty["radii"]):
        value, low, high = (100 * of["holds"][part] for part in ("value", "low", "high"))
        text.append(
            f"The {of['percent']} % radius contains the truth of {value:.1f} % ({low:.1f}-{high:.1f}) of "
            f"{of['photos']:,} photos; median {of['median_km']:,.1f} km"
        )
    return text
