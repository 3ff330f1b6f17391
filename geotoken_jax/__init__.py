"""Where was this photo taken? Coordinates with an honest uncertainty, by predicting S2 cells token by token.

    from geotoken_jax import GeoToken

    model = GeoToken.load("runs/demo/export")  # the folder that `geotoken export` made
    p = model.predict("photo.jpg")  # a path, PIL image, array, bytes, or a list of them
    p.latitude, p.longitude, p.radius_km, p.candidates

`predict_async` is the same for an event loop. `Prediction` says what is in an answer. `CellScheme` turns coordinates
into tokens and back.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geotoken_jax.geo.cells import CellScheme
    from geotoken_jax.predict.prediction import Prediction
    from geotoken_jax.predict.predictor import GeoToken

__version__ = "0.1.0"
__all__ = ["CellScheme", "GeoToken", "Prediction"]

_HOME = {
    "CellScheme": "geotoken_jax.geo.cells",
    "GeoToken": "geotoken_jax.predict.predictor",
    "Prediction": "geotoken_jax.predict.prediction",
}


def __getattr__(name: str) -> Any:
    # On first use, so that `import geotoken_jax` takes milliseconds and not JAX's second.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    # So that help() and completion find what is not there yet.
    return sorted({*globals(), *__all__})
