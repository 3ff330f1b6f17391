"""Response formats of the service: JSON, and GeoJSON (RFC 7946) for maps."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from geotoken_jax.predict.prediction import Prediction
from geotoken_jax.serve.levels import LeveledPrediction

GEOJSON = "application/geo+json"


@dataclasses.dataclass(frozen=True)
class Failure:
    """The error of a photo or of a request, as one sentence."""

    error: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """One prediction or error per photo, in the order of the request."""

    answers: list[LeveledPrediction | Prediction | Failure]


def geojson(answers: Sequence[Prediction | Failure]) -> dict[str, Any]:
    """Returns a FeatureCollection with one point per answer, candidate, cell center and neighbor.

    The properties of a point are "photo" (index of the photo in the request, from 0), "kind" (e.g. "candidate") and the
    fields of the answer, candidate, cell or neighbor. Fields that are tuples or None are left out. `errors` has one
    entry per photo that could not be read.
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
    fields = {name: value for name, value in values.items() if value is not None and not isinstance(value, tuple)}
    return {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": point},
        "properties": {"photo": photo, "kind": kind, **fields},
    }


#: JSON schema of the result of `geojson`, for the OpenAPI document.
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
