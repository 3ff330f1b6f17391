"""The page of a user's own photos: a map of all answers, and a card per photo, the most certain first."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.pages import frame, photos, worldmap

#: Longer side of a photo on a card, in pixels.
_SIDE = 240


def page(answers: Sequence[tuple[Mapping[str, Any], Any]]) -> str:
    """Returns the page as HTML.

    answers: for each photo the fields of its Prediction with its `id`, and its path or bytes.
    """
    certain_first = sorted(answers, key=lambda one: one[0]["radius_km"])
    known = [answer for answer, _ in answers if not answer.get("unknown")]
    at = np.array([(answer["latitude"], answer["longitude"]) for answer in known]).reshape(-1, 2)
    unknown = len(answers) - len(known)
    rest = f" Too uncertain, and so unknown: {unknown:,} of {len(answers):,}." if unknown else ""
    headline = (
        f"<h1>Where {len(answers):,} photos were taken</h1><p>A model's answers. With a probability of 50 % a photo "
        f"was taken within the first distance of the answer, and with 90 % within the second.{rest}</p>"
    )
    cards = "".join(_card(answer, photo) for answer, photo in certain_first)
    sections = [
        frame.Section("where", "Map", "All answers", [worldmap.dot_map({"b1": at}, "Map of all answers")]),
        frame.Section("photos", "Photos", "Photos, the most certain first", [f'<div class="grid">{cards}</div>']),
    ]
    return frame.page("GeoToken: answers", headline, sections)


def radii(answer: Mapping[str, Any]) -> str:
    """Returns the radii of an answer as words."""
    return f"50 % within {answer['radius_km']:,.0f} km, 90 % within {answer['radius_90_km']:,.0f} km"


def place(answer: Mapping[str, Any]) -> str:
    """Returns the coordinates of an answer as words."""
    return "unknown" if answer.get("unknown") else f"{answer['latitude']:.5f}, {answer['longitude']:.5f}"


def _card(answer: Mapping[str, Any], photo: Any) -> str:
    name, small = escape(str(answer["id"])), ""
    if not answer.get("unknown"):
        point = np.array([(answer["latitude"], answer["longitude"])])
        small = worldmap.small_map({"halo": point, "guess": point}, f"Map around the answer for {name}", ["guess"])
    return (
        f'<article class="card"><header><h4>{name}</h4></header><p class="at">{place(answer)}<br>{radii(answer)}</p>'
        f'<div class="pair"><img alt="{name}" '
        f'src="{photos.data_uri(photo, _SIDE)}">{small}</div></article>'
    )
