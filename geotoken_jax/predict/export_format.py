"""Reads the settings of an export, of the present format and of earlier ones."""

import json
from typing import Any

from etils import epath

from geotoken_jax import settings
from geotoken_jax.predict.bundle import ExportError
from geotoken_jax.version import __version__

#: Version of the format of an export. It is raised when earlier releases cannot read new exports. In format 1,
#: config.json has no key `format`; in format 2, it has this key.
FORMAT = 2


def read_format(folder: epath.PathLike) -> int:
    """Returns the format of an export. Raises ExportError if this release cannot read the format."""
    number = _stored(folder).get("format", 1)
    if number not in range(1, FORMAT + 1):
        raise ExportError(
            f"{folder} has format {number}, and this release ({__version__}) reads up to format {FORMAT}: install a "
            "newer geotoken-jax"
        )
    return number


def read_config(folder: epath.PathLike) -> dict[str, Any]:
    """Returns the settings in config.json of an export, converted to the format of this release.

    Only the selector that chooses the answer is kept, with its models. The other selectors would only cost time, and
    this release may not have them.

    Raises ExportError if this release cannot read the format, or does not have the selector that chooses the answer.
    """
    from geotoken_jax.predict.select import SELECTORS  # environments of --target lack its packages

    read_format(folder)
    config = _stored(folder)
    choice = config["predict"]["choice"]
    if choice not in SELECTORS:
        raise ExportError(
            f"{folder} chooses its answers by {choice!r}, a selector that this release ({__version__}) does not have: "
            "export again from the work directory, with `geotoken all --remake=learn`"
        )
    models = ("reranker", "comparator") if choice == "reranker" else (choice,)
    needed = {name: section for name, section in config.get("learned", {}).items() if name in models}
    return {
        **config,
        "format": FORMAT,
        "predict": {**config["predict"], "selectors": [choice]},
        "learned": needed,
    }


def _stored(folder: epath.PathLike) -> dict[str, Any]:
    return settings.completed(json.loads((epath.Path(folder) / "config.json").read_text()))
