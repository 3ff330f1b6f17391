"""The paper's configuration on MP16-Pro, where it was downloaded: `--config.photos.mp16_pro.folder=DIR`.

The paper's features are CLIP ViT-L/14's: `--config.embed.huggingface.path=clip-vit-large-patch14`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the paper's configuration with MP16-Pro's photos."""
    config: Any = common.get_config()
    config.name = "mp16_pro"
    config.photos.source = "mp16_pro"
    # 4.12 of 4.65 million are left by G3's filter: it drops 11.5 %, and a broken download far more than 15 %.
    config.photos.max_dropped = 0.15
    config.embed.backbone = "huggingface"
    config.embed.threads = 16
    return config
