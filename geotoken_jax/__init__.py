"""Where was this photo taken? Coordinates with an honest uncertainty, by predicting S2 cells token by token."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geotoken_jax.geo.cells import CellScheme
    from geotoken_jax.predict.predictor import GeoToken

__version__ = "0.1.0"
__all__ = ["CellScheme", "GeoToken"]

_HOME = {"CellScheme": "geotoken_jax.geo.cells", "GeoToken": "geotoken_jax.predict.predictor"}


def __getattr__(name: str) -> Any:
    # On first use, so that `import geotoken_jax` takes milliseconds and not JAX's second.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
