"""Frozen backbones, which encode photos and texts as feature vectors. `config.embed.backbone` selects one of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float32, UInt8
from numpy import ndarray

from geotoken_jax.backbone.settings import BackboneSettings, HuggingFaceSettings
from geotoken_jax.backbone.thumbnail import Thumbnail, ThumbnailSettings
from geotoken_jax.backbone.tower import Tower
from geotoken_jax.settings import SettingsError

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = [
    "Backbone", "BackboneSettings", "HuggingFaceSettings", "ThumbnailSettings", "Tower", "feature_settings", "make",
]  # fmt: skip


class Backbone(Protocol):
    """Encodes photos and texts as feature vectors. Image and text features have the same width.

    width: C, the width of features. min_side: smallest shorter side, in pixels, to which a photo may be reduced when it
    is decoded (see preprocess.open_image). preparation: how a photo is decoded, resized and cropped, the argument `how`
    of preprocess.prepare.

    `prepare` is a separate step before `images`, because threads decode photos while a device computes features.
    Several threads can call all three methods at once.
    """

    width: int
    min_side: int
    preparation: dict[str, Any]

    def prepare(self, photo: Any) -> UInt8[ndarray, "h w 3"]:
        """Returns a photo decoded, resized and cropped for the image tower. Runs on the CPU.

        All results have the same shape. photo: any source that `preprocess.open_image` reads. Raises ImageError if the
        photo cannot be read.
        """
        ...

    def images(self, prepared: UInt8[ndarray, "B h w 3"]) -> Float32[ndarray, "B C"]:
        """Returns the features of prepared photos."""
        ...

    def texts(self, texts: Sequence[str]) -> Float32[ndarray, "B C"]:
        """Returns the features of texts. The features of an empty text are zeros."""
        ...

    def tower(self) -> Tower:
        """Returns the image tower as a function."""
        ...


def feature_settings(settings: BackboneSettings) -> dict[str, Any]:
    """Returns the settings that features depend on.

    For the backbone "huggingface", the result has `dtype`, and has `checkpoint` instead of `path`: the name and commit
    on the hub, or a hash of a local folder's files. Raises SettingsError if the path has no checkpoint.
    """
    if settings.backbone != "huggingface":
        return {"backbone": settings.backbone, settings.backbone: getattr(settings, settings.backbone, None)}
    from geotoken_jax.backbone import checkpoint  # its imports take a second

    section = settings.huggingface
    return {
        "backbone": settings.backbone,
        "huggingface": {"checkpoint": checkpoint.identity(section.path), "dtype": section.dtype},
    }


def make(settings: BackboneSettings, mesh: "Mesh | None" = None) -> Backbone:
    """Returns the backbone named in the settings. Raises SettingsError if it is unknown or cannot be read.

    mesh: local devices on which a Hugging Face backbone runs. If None, each batch is split over all local devices.
    """
    if settings.backbone == "thumbnail":
        return Thumbnail(settings.thumbnail)
    if settings.backbone == "huggingface":
        from geotoken_jax.backbone.huggingface import HuggingFace  # its imports take a second

        return HuggingFace(settings.huggingface, mesh)
    raise SettingsError(f"config.embed.backbone is {settings.backbone!r}: choose thumbnail or huggingface")
