"""The stage `index`: gallery, neighbors and token records, one after the other."""

from typing import Any

from etils import epath

from data_prep import gallery, neighbors, tokens
from geotoken_jax.workdir import Manifest


def run(config: Any, path: epath.PathLike) -> Manifest:
    """Makes queries/, gallery/, neighbors/ and tokens/ from features/ and align/; returns the last manifest."""
    gallery.run(config, path)
    neighbors.run(config, path)
    return tokens.run(config, path)
