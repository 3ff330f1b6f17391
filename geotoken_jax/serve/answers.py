"""Answers as the service writes them: JSON, and GeoJSON (RFC 7946) for whoever draws maps."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve.levels import LeveledPrediction

GEOJSON = "application/geo+json"


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is wrong, in one sentence."""

    error: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of each photo, in their order, where it was taken, or what is wrong with it."""

    answers: list[LeveledPrediction | Prediction | Failure]


def geojson(answers: Sequence[Prediction | Failure]) -> dict[str, Any]:
    """Returns a FeatureCollection of points, each with the number of its photo, from 0, and its kind.

    A feature has the fields of its answer, candidate, cell (at its center) or neighbor, but lists. `errors` lists the
    photos that could not be read.
    """
    features, errors = [], []
    for photo, answer in enumerate(answers):
        if isinstance(answer, Failure):
            errors.append({"photo": photo, "error": answer.error})
            continue
        places = [("answer", answer)]
        places += [(kind, place) for kind in _KINDS for place in getattr(answer, f"{kind}s")]
        features += [_feature(photo, kind, place) for kind, place in places]
    return {"type": "FeatureCollection", "features": features, "errors": errors}


_KINDS = ("candidate", "cell", "neighbor")


def _feature(photo: int, kind: str, place: Any) -> dict[str, Any]:
    values = {field.name: getattr(place, field.name) for field in dataclasses.fields(place)}
    point = [values.pop("longitude"), values.pop("latitude")]
    own = {name: value for name, value in values.items() if value is not None and not isinstance(value, tuple)}
    return {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": point},
        "properties": {"photo": photo, "kind": kind, **own},
    }


#: The form of `geojson`, for the OpenAPI document.
GEOJSON_SCHEMA = {
    "type": "object",
    "required": ["type", "features", "errors"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "geometry", "properties"],
                "properties": {
                    "type": {"const": "Feature"},
                    "geometry": {
                        "type": "object",
                        "required": ["type", "coordinates"],
                        "properties": {
                            "type": {"const": "Point"},
                            "coordinates": {
                                "type": "array",
                                "items": {"type": "number"},
                                "minItems": 2,
                                "maxItems": 2,
                            },
                        },
                    },
                    "properties": {
                        "type": "object",
                        "required": ["photo", "kind"],
                        "properties": {
                            "photo": {"type": "integer"},
                            "kind": {"enum": ["answer", *_KINDS]},
                        },
                    },
                },
            },
        },
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["photo", "error"],
                "properties": {"photo": {"type": "integer"}, "error": {"type": "string"}},
            },
        },
    },
}
