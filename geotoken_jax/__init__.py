"""Predicts where a photo was taken, and within which radius the prediction is likely to be right.

The model generates tokens that name an S2 cell, a cell of a hierarchical grid on the globe.

    from geotoken_jax import GeoToken

    model = GeoToken.load("runs/demo/export")  # the folder that `geotoken export` made
    p = model.predict("photo.jpg")  # a path, PIL image, array, bytes, or a list of them
    p.latitude, p.longitude, p.radius_km, p.candidates

`predict_async` is `predict` for an event loop. `Prediction` documents the fields of a result. `CellScheme` converts
coordinates to tokens and back.
"""

import importlib
from typing import TYPE_CHECKING, Any

from geotoken_jax.version import __version__

if TYPE_CHECKING:
    from geotoken_jax.geo.cells import CellScheme
    from geotoken_jax.predict.prediction import Prediction
    from geotoken_jax.predict.predictor import GeoToken

__all__ = ["CellScheme", "GeoToken", "Prediction", "__version__"]

#: Public name -> module that defines it.
_MODULES = {
    "CellScheme": "geotoken_jax.geo.cells",
    "GeoToken": "geotoken_jax.predict.predictor",
    "Prediction": "geotoken_jax.predict.prediction",
}


def __getattr__(name: str) -> Any:
    # A module is imported when its name is first used, because importing JAX takes a second. So `import geotoken_jax`
    # takes milliseconds.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    # Lists the lazily imported names for help() and completion.
    return sorted({*globals(), *__all__})
