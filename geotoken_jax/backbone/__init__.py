"""Frozen backbones: photos and texts in, feature rows out. Each is named in `config.embed.backbone`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from jaxtyping import Float32
from numpy import ndarray

from geotoken_jax.backbone.thumbnail import Thumbnail, ThumbnailSettings
from geotoken_jax.settings import SettingsError


class Backbone(Protocol):
    """width: C, of image and text features. min_side: shortest side of a photo, in pixels, that suffices."""

    width: int
    min_side: int

    def images(self, photos: Sequence[Any]) -> Float32[ndarray, "B C"]:
        """Returns the features of photos (anything that `preprocess.open_image` takes); ImageError on a bad one."""
        ...

    def texts(self, texts: Sequence[str]) -> Float32[ndarray, "B C"]:
        """Returns the features of texts, zeros for an empty one."""
        ...


@dataclasses.dataclass(frozen=True)
class BackboneSettings:
    """backbone: name of the one used. thumbnail: its section."""

    backbone: str
    thumbnail: ThumbnailSettings


def make(settings: BackboneSettings) -> Backbone:
    """Returns the backbone that the settings name. Raises SettingsError if there is none of that name."""
    if settings.backbone == "thumbnail":
        return Thumbnail(settings.thumbnail)
    raise SettingsError(f"config.embed.backbone is {settings.backbone!r}: choose thumbnail")
