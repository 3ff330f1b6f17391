"""Photos on pages: thumbnails, cards of single photos, and a map of many photos."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from geotoken_jax.analysis import formats
from geotoken_jax.analysis.coordinates import CoordinateTable, Method
from geotoken_jax.analysis.examples import Examples, PhotoLookup, place_name
from geotoken_jax.backbone import preprocess
from geotoken_jax.geo import distance
from geotoken_jax.pages import frame, worldmap
from geotoken_jax.pages.table import Cell, Group, Row, Table
from geotoken_jax.records import Photos

#: Largest number of photos on the map, per split and in total. Each photo adds 2 KB to the page.
_MAP_SPLIT, _MAP_ALL = 300, 1200
#: Largest number of neighbors and of candidates on a card.
NEIGHBORS, _CANDIDATES = 6, 5
#: JPEG quality of photos on a page, 1 to 95. With 75, a photo 64 pixels wide has 2 KB.
_QUALITY = 75


def data_uri(image: bytes, side: int) -> str:
    """Returns a photo as a data URI: a JPEG whose longer side has up to `side` pixels.

    If the photo cannot be decoded, the URI is empty. image: bytes of an image file.
    """
    try:
        small = preprocess.thumbnail(image, side, _QUALITY, side)
    except preprocess.ImageError:
        return "data:,"  # the page shows the alternative text instead
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"


def thumbnail(gallery: PhotoLookup, name: str) -> str:
    """Returns a gallery photo as an HTML element, or an empty square if the photo is missing. name: id of the photo."""
    photo = gallery.photo(name)
    if photo is None:
        return '<span class="none"></span>'
    place = escape(place_name(photo) or name)
    return f'<img alt="{place}" title="{place}" src="{data_uri(photo["image"], 72)}">'


def cards(examples: Examples, gallery: PhotoLookup) -> str:
    """Returns HTML with a card per example photo. gallery: lookup of place names and of photos of neighbors."""
    count = max(map(len, examples.kinds.values()))
    parts = [
        f"<p>The {count} photos of {escape(examples.split)} with the smallest, the median and the largest errors of "
        f"{escape(examples.name)}. Below each photo are its neighbors, the most similar gallery photos, with their "
        "distance from the truth, and its most probable candidates. A name in color after a candidate is the selector "
        "that chose it. Scroll sideways for more.</p>"
        '<p class="key muted"><i style="background:#118a4b"></i>truth <i style="background:#c4174f"></i>prediction '
        '<i style="background:#e3a008"></i>other candidates <i style="background:#777"></i>neighbors</p>'
    ]
    for kind, photos in examples.kinds.items():
        drawn = "".join(_card(photo, examples.predictions[photo["id"]], gallery) for photo in photos)
        row = f'<div class="cards" tabindex="0" role="region" aria-label="The {kind}">{drawn}</div>'
        parts.append(f"<h3>The {len(photos)} {kind}</h3>{row}")
    return "".join(parts)


def _card(photo: Mapping[str, Any], row: Mapping[str, Any], gallery: PhotoLookup) -> str:
    truth, guess = np.asarray(photo["coordinates"]), np.array([row["latitude"], row["longitude"]])
    neighbors, candidates = row.get("neighbors", []), row.get("candidates", [])
    place, guessed_place = place_name(photo), gallery.place_near(guess)
    near = f", near {escape(guessed_place)}" if guessed_place else ""
    points = {
        "neighbor": _coordinates(neighbors),
        "candidate": _coordinates(candidates),
        "halo": np.stack([truth, guess]),
        "truth": truth[None],
        "guess": guess[None],
    }
    small = worldmap.small_map(points, "Map of truth, prediction, candidates and neighbors", ("truth", "guess"))
    strip = "".join(
        f"<li>{thumbnail(gallery, n['id'])}<small>{formats.number(_off(n, truth))}</small></li>"
        for n in neighbors[:NEIGHBORS]
    )
    strip = (
        f'<h5>Neighbors, and their distance from the truth in km</h5><ul class="strip">{strip}</ul>' if strip else ""
    )
    return (
        f'<article class="card"><header><h4>{escape(place or "Place not named")}</h4>'
        f"<b>{formats.km(float(distance.great_circle_km(*truth, *guess)))} off</b></header>"
        f'<p class="at">{_degrees(truth)} &rarr; {_degrees(guess)}{near}<br>'
        f"id {escape(photo['id'])}</p>"
        f'<div class="pair"><img alt="Photo taken at {escape(place) or _degrees(truth)}" '
        f'src="{data_uri(photo["image"], 256)}">{small}</div>{strip}{candidate_table(row, truth, gallery)}</article>'
    )


def candidate_table(row: Mapping[str, Any], truth: Float[np.ndarray, "2"], gallery: PhotoLookup) -> str:
    """Returns an HTML table of the most probable candidates of a photo, or "" if candidates have no probabilities.

    row: the photo's line in the file of predictions. truth: true coordinates, in degrees. gallery: lookup of place
    names.
    """
    candidates = row.get("candidates", [])
    if not candidates or "probability" not in candidates[0]:
        return ""
    # A dict by coordinates, because files of other programs can have the same candidate several times.
    places = {(c["latitude"], c["longitude"]): c["probability"] for c in candidates}
    chosen_by: dict[tuple[float, float], list[str]] = {}
    for choice, k in row.get("choices", {}).items():
        chosen = (candidates[k]["latitude"], candidates[k]["longitude"]) if isinstance(k, int) else tuple(k)
        chosen_by.setdefault(chosen, []).append(choice.replace("_", " "))
    rows = []
    for place in sorted(places, key=lambda place: -places[place])[:_CANDIDATES]:
        probability, at = places[place], np.array(place)
        names = f" <b>{escape(', '.join(chosen_by[place]))}</b>" if place in chosen_by else ""
        meter = f'<meter value="{probability:.6f}" aria-label="probability"></meter> '
        meter += escape(formats.percent(probability))
        off = formats.km(float(distance.great_circle_km(*at, *truth)))
        name = Cell(gallery.place_near(at) or _degrees(at), title=_degrees(at), html=names)
        rows.append(Row(name, [off, Cell(html=meter)]))
    heading = f"<h5>{len(rows)} of {len(places)} candidates: distance from the truth, probability</h5>"
    return heading + Table((), [Group(rows)]).html()


def photo_map(
    truths: Mapping[str, CoordinateTable],
    methods: Mapping[str, Sequence[Method]],
    photos: Mapping[str, Photos],
    reference: str,
    seed: int,
) -> str:
    """Returns HTML of a map of a random sample of photos. The map's data is JSON that is safe inside `<script>`.

    truths, methods, photos: true coordinates, methods and photo records, by split. reference: variant that the map
    shows first. seed: seed of the random sample.
    """
    names = {m.variant: m.name for split in methods.values() for m in split if m.main}
    splits = {}
    for split, truth in truths.items():
        count = min(_MAP_SPLIT, _MAP_ALL // len(truths), len(truth.ids))
        rows = np.sort(np.random.default_rng(seed).choice(len(truth.ids), count, replace=False))
        main = {m.variant: m for m in methods[split] if m.main}
        splits[split] = {
            "total": len(truth.ids),
            "photos": [
                {
                    "id": truth.ids[row],
                    "place": place_name(truth.extra[row]),
                    "truth": _rounded(truth.coordinates[row], 4),
                    "image": data_uri(photos[split][row]["image"], 64),
                    "guesses": [_guess(main.get(variant), row) for variant in names],
                }
                for row in rows.tolist()
            ],
        }
    data = {
        "thresholds": list(distance.THRESHOLDS_KM),
        "methods": list(names.values()),
        "reference": list(names).index(reference),
        "splits": splits,
    }
    listed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return frame.fill("map.html", {"data": listed})


def _guess(method: Method | None, row: int) -> list[float] | None:
    if method is None or np.isnan(method.coordinates[row, 0]):
        return None
    return [*_rounded(method.coordinates[row], 4), *_rounded(method.km[row : row + 1], 3)]


def _coordinates(points: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "n 2"]:
    return np.array([(point["latitude"], point["longitude"]) for point in points]).reshape(-1, 2)


def _off(point: Mapping[str, Any], truth: Float[np.ndarray, "2"]) -> float:
    return float(distance.great_circle_km(point["latitude"], point["longitude"], *truth))


def _degrees(at: Float[np.ndarray, "2"]) -> str:
    return f"{at[0]:.3f}, {at[1]:.3f}".replace("-", "\N{MINUS SIGN}")


def _rounded(values: Float[np.ndarray, "n"], digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
