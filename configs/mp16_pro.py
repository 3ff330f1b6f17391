"""The paper's configuration on MP16-Pro. Two folders must be set:

- `--config.photos.mp16_pro.folder=DIR`, the folder of the downloaded data set.
- `--config.embed.huggingface.path=DIR`, the folder of the downloaded backbone. The paper's backbone is CLIP ViT-L/14,
  `clip-vit-large-patch14`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the paper's configuration with MP16-Pro's photos and a backbone from Hugging Face."""
    config: Any = common.get_config()
    config.name = "mp16_pro"
    config.photos.source = "mp16_pro"
    # G3's filter leaves 4.12 of 4.65 million photos, so it drops 11.5 %. A broken download drops far more than 15 %.
    config.photos.max_dropped = 0.15
    config.embed.backbone = "huggingface"
    config.embed.threads = 16
    # PyTorch's layers, which the paper uses, drop attention weights at their one dropout rate. No fused kernel does:
    # --config.model.attention_dropout=0 trains with them.
    config.model.attention_dropout = config.model.dropout
    return config
