"""Loads trained selectors by name, from a work directory or an export."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from geotoken_jax.align.heads import AlignModel
from geotoken_jax.gallery.table import Table
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.predict.reward import Reward
from geotoken_jax.predict.select import TRAINED, Selector
from geotoken_jax.predict.verifier import Verifier


def selector_loader(
    sections: Mapping[str, Any],
    folder: Callable[[str], epath.Path],
    gallery: Table,
    model: GeoTokenModel,
    aligned: Callable[[], AlignModel],
) -> Callable[[str], Selector]:
    """Returns a function that loads a trained selector by its name.

    All selectors of the verifier share one Verifier. sections: key of TRAINED -> settings of that trained model.
    folder: function from a key of TRAINED to the folder with that model's parameters. model: decoder whose outputs the
    reward head reads. aligned: function that returns the alignment model.
    """

    @functools.cache
    def verifier() -> Verifier:
        return Verifier(folder("verifier"), sections["verifier"], gallery, aligned())

    def load(name: str) -> Selector:
        if name in TRAINED["verifier"]:
            return verifier().selector(name)
        return Reward(folder("reward"), sections["reward"], model)

    return load
