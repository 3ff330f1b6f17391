"""HTML page of `geotoken predict`: a map of all answers, and a card per photo, the most certain photo first."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from geotoken_jax.pages import frame, photos, worldmap

#: Longer side of a photo on a card, in pixels.
_SIDE = 240


def page(answers: Sequence[tuple[Mapping[str, Any], Any]]) -> str:
    """Returns the page as HTML.

    answers: a pair per photo: its answer (see folder.outputs.Answer), and its path or the bytes of its file.
    """
    certain_first = sorted(answers, key=lambda one: one[0]["radius_km"])
    known = [answer for answer, _ in answers if not answer.get("unknown")]
    at = np.array([(answer["latitude"], answer["longitude"]) for answer in known]).reshape(-1, 2)
    unknown = len(answers) - len(known)
    rest = f" Unknown, because too uncertain: {unknown:,} of {len(answers):,}." if unknown else ""
    headline = (
        f"<h1>Where {len(answers):,} photos were taken</h1><p>A model's answers. With a probability of 50 % a photo "
        "was taken within the first distance of the answer, and with 90 % within the second. Each name is the name of "
        f"the city nearest to the answer (GeoNames, CC BY 4.0).{rest}</p>"
    )
    cards = "".join(_card(answer, photo) for answer, photo in certain_first)
    sections = [
        frame.Section("where", "Map", "All answers", [worldmap.dot_map({"b1": at}, "Map of all answers")]),
        frame.Section(
            "photos", "Photos", "Photos, the smallest 50 % radius first", [f'<div class="grid">{cards}</div>']
        ),
    ]
    return frame.page("GeoToken: answers", headline, sections)


def radii(answer: Mapping[str, Any]) -> str:
    """Returns the radii of an answer as words."""
    return f"50 % within {answer['radius_km']:,.0f} km, 90 % within {answer['radius_90_km']:,.0f} km"


def place(answer: Mapping[str, Any]) -> str:
    """Returns the coordinates of an answer and the name of the nearest city as words."""
    if answer.get("unknown"):
        return "unknown"
    name = f"  {answer['place']}" if "place" in answer else ""
    return f"{answer['latitude']:.5f}, {answer['longitude']:.5f}{name}"


def _card(answer: Mapping[str, Any], photo: Any) -> str:
    name, small = escape(str(answer["id"])), ""
    if not answer.get("unknown"):
        point = np.array([(answer["latitude"], answer["longitude"])])
        small = worldmap.small_map({"halo": point, "guess": point}, f"Map around the answer for {name}", ["guess"])
    at = "<br>".join(escape(place(answer)).split("  "))
    return (
        f'<article class="card"><header><h4>{name}</h4></header><p class="at">{at}<br>{radii(answer)}</p>'
        f'<div class="pair"><img alt="{name}" '
        f'src="{photos.data_uri(photo, _SIDE)}">{small}</div></article>'
    )
