"""The image tower of a backbone as a function."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Tower(NamedTuple):
    """The image tower of a backbone as a function, for programs that run without this package.

    side: side of a prepared photo, in pixels. model: module with the tower's parameters; None if it has none. features:
    function of the model and of prepared photos [B, side, side, 3] uint8 that returns their features [B, C] float32,
    inside a jax transformation.
    """

    side: int
    model: Any
    features: Callable[[Any, Any], Any]
