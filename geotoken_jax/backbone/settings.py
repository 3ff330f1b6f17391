"""Settings of the frozen backbones."""

import dataclasses

from geotoken_jax.backbone.thumbnail import ThumbnailSettings
from geotoken_jax.settings import Runtime


@dataclasses.dataclass(frozen=True)
class HuggingFaceSettings:
    """Settings of the backbone "huggingface", which has published weights.

    path: folder of the checkpoint, or its name on the Hugging Face hub (see checkpoint.folder). dtype: type in which
    products are computed, "float32" or "bfloat16"; parameters are float32. batch_size: largest number of photos per
    batch, over all local devices.
    """

    path: Runtime[str]
    dtype: str
    batch_size: Runtime[int]

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"config.embed.huggingface.dtype is {self.dtype!r}: choose float32 or bfloat16")
        if self.batch_size < 1:
            raise ValueError(f"config.embed.huggingface.batch_size is {self.batch_size}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class BackboneSettings:
    """Settings of the frozen backbone.

    backbone: name of the backbone, "thumbnail" or "huggingface". thumbnail, huggingface: settings of each backbone.
    Only the settings of the named backbone have an effect.
    """

    backbone: str
    thumbnail: ThumbnailSettings
    huggingface: HuggingFaceSettings
