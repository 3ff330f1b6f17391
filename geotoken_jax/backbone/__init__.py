"""Frozen backbones, which encode photos and texts as feature vectors. `config.embed.backbone` names the one used."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float32, UInt8
from numpy import ndarray

from geotoken_jax.backbone.settings import BackboneSettings, HuggingFaceSettings
from geotoken_jax.backbone.thumbnail import Thumbnail, ThumbnailSettings
from geotoken_jax.settings import SettingsError

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = ["Backbone", "BackboneSettings", "HuggingFaceSettings", "ThumbnailSettings", "feature_settings", "make"]

#: Bytes at the start and at the end of a file that its fingerprint covers.
_END = 1 << 20


class Backbone(Protocol):
    """Encodes photos and texts as vectors of one width.

    width: C, the width of image and text features. min_side: shorter side, in pixels, at which a photo may be
    decoded for this backbone (see preprocess.open_image).

    `prepare` is a separate step before `images`, so that threads can decode photos while a device computes features.
    Several threads can call all three methods at once.
    """

    width: int
    min_side: int

    def prepare(self, photo: Any) -> UInt8[ndarray, "h w 3"]:
        """Returns a photo decoded, resized and cropped for the image tower, computed on the host.

        photo: any source that `preprocess.open_image` reads. All photos result in the same shape. Raises ImageError if
        the photo cannot be read.
        """
        ...

    def images(self, prepared: UInt8[ndarray, "B h w 3"]) -> Float32[ndarray, "B C"]:
        """Returns the features of prepared photos."""
        ...

    def texts(self, texts: Sequence[str]) -> Float32[ndarray, "B C"]:
        """Returns the features of texts; zeros for an empty text."""
        ...


def feature_settings(settings: BackboneSettings) -> dict[str, Any]:
    """Returns the settings that features depend on.

    For the backbone "huggingface" these are the type of products and a hash of the checkpoint, instead of its path.
    Raises SettingsError if that backbone's path has no checkpoint.
    """
    if settings.backbone != "huggingface":
        return {"backbone": settings.backbone, settings.backbone: getattr(settings, settings.backbone, None)}
    section = settings.huggingface
    return {
        "backbone": settings.backbone,
        "huggingface": {"checkpoint": _fingerprint(pathlib.Path(section.path)), "dtype": section.dtype},
    }


def _fingerprint(folder: pathlib.Path) -> str:
    """Returns a hash of the JSON, text and safetensors files of a checkpoint folder.

    Of every file, its name, its size and its first and last 1 MiB are hashed. Whole files would take seconds, and
    checkpoints with other parameters differ in these bytes too.
    """
    files = sorted(path for ending in ("*.json", "*.txt", "*.safetensors") for path in folder.glob(ending))
    if not files:
        raise SettingsError(
            f"config.embed.huggingface.path is {str(folder)!r}, where there is no checkpoint: set it to a folder with "
            "a CLIP or SigLIP 2 checkpoint"
        )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode() + file.read(_END))
            file.seek(max(0, size - _END))
            digest.update(file.read(_END))
    return digest.hexdigest()


def make(settings: BackboneSettings, mesh: "Mesh | None" = None) -> Backbone:
    """Returns the backbone named in the settings. Raises SettingsError if it is unknown or cannot be read.

    mesh: local devices on which a Hugging Face backbone runs. If None, all local devices compute a share of the batch.
    """
    if settings.backbone == "thumbnail":
        return Thumbnail(settings.thumbnail)
    if settings.backbone == "huggingface":
        from geotoken_jax.backbone.huggingface import HuggingFace  # its imports take a second

        return HuggingFace(settings.huggingface, mesh)
    raise SettingsError(f"config.embed.backbone is {settings.backbone!r}: choose thumbnail or huggingface")
