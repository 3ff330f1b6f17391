"""Frozen backbones: photos and texts in, feature rows out. Each is named in `config.embed.backbone`."""

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

__all__ = ["Backbone", "BackboneSettings", "HuggingFaceSettings", "ThumbnailSettings", "made_with", "make"]

#: Bytes at either end of a file by which it is known again.
_END = 1 << 20


class Backbone(Protocol):
    """width: C, of image and text features. min_side: shortest side of a photo, in pixels, that suffices.

    Decoding is apart from the tower, so that threads can do the one while a device does the other. All three may be
    called by several threads at once.
    """

    width: int
    min_side: int

    def prepare(self, photo: Any) -> UInt8[ndarray, "h w 3"]:
        """Returns what the tower takes of a photo (anything that `preprocess.open_image` takes); on the host.

        All photos give one shape. Raises ImageError on a bad one.
        """
        ...

    def images(self, prepared: UInt8[ndarray, "B h w 3"]) -> Float32[ndarray, "B C"]:
        """Returns the features of prepared photos."""
        ...

    def texts(self, texts: Sequence[str]) -> Float32[ndarray, "B C"]:
        """Returns the features of texts, zeros for an empty one."""
        ...


def made_with(settings: BackboneSettings) -> dict[str, Any]:
    """Returns what features depend on, wherever a checkpoint lies and however many photos are embedded at a time.

    Raises SettingsError if there is no checkpoint.
    """
    if settings.backbone != "huggingface":
        return {"backbone": settings.backbone, settings.backbone: getattr(settings, settings.backbone, None)}
    chosen = settings.huggingface
    return {
        "backbone": settings.backbone,
        "huggingface": {"checkpoint": _fingerprint(pathlib.Path(chosen.path)), "dtype": chosen.dtype},
    }


def _fingerprint(folder: pathlib.Path) -> str:
    """Returns a hash of the files that a backbone reads, of large ones by their sizes and ends: all would take seconds,
    and other parameters differ there too."""
    files = sorted(path for ending in ("*.json", "*.txt", "*.safetensors") for path in folder.glob(ending))
    if not files:
        raise SettingsError(
            f"config.embed.huggingface.path = {str(folder)!r} holds no checkpoint: name a folder with a CLIP or "
            "SigLIP 2 checkpoint"
        )
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            found.update(f"{path.name} {size} ".encode() + file.read(_END))
            file.seek(max(0, size - _END))
            found.update(file.read(_END))
    return found.hexdigest()


def make(settings: BackboneSettings, mesh: "Mesh | None" = None) -> Backbone:
    """Returns the backbone that the settings name. Raises SettingsError if there is none of that name.

    mesh: of devices of this process, for a backbone that computes on any; None for the first device.
    """
    if settings.backbone == "thumbnail":
        return Thumbnail(settings.thumbnail)
    if settings.backbone == "huggingface":
        from geotoken_jax.backbone.huggingface import HuggingFace  # its imports take a second

        return HuggingFace(settings.huggingface, mesh)
    raise SettingsError(f"config.embed.backbone is {settings.backbone!r}: choose thumbnail or huggingface")
