"""Trained selectors: what opens each by its name, from a work directory or from an export."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from geotoken_jax.align.heads import AlignModel
from geotoken_jax.gallery.table import Table
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.predict.reward import Reward
from geotoken_jax.predict.select import TRAINED, Selector
from geotoken_jax.predict.verify import Verifier


def selector_loader(
    sections: Mapping[str, Any],
    folder: Callable[[str], epath.Path],
    gallery: Table,
    model: GeoTokenModel,
    aligned: Callable[[], AlignModel],
) -> Callable[[str], Selector]:
    """Returns what opens a trained selector by its name; selectors of one folder share their work.

    sections: name in TRAINED -> its model's settings. folder: -> where its parameters are.
    """

    @functools.cache
    def verifier() -> Verifier:
        return Verifier(folder("verifier"), sections["verifier"], gallery, aligned())

    def opened(name: str) -> Selector:
        if name in TRAINED["verifier"]:
            return verifier().selector(name)
        return Reward(folder("reward"), sections["reward"], model)

    return opened
