"""The paper's configuration on MP16-Pro, with the paper's backbone, CLIP ViT-L/14 from the Hugging Face hub.

The folder of the downloaded data set must be set, `--config.photos.mp16_pro.folder=DIR`. Where there is no network,
`--config.embed.huggingface.path=DIR` can name a folder of the backbone, in every command.
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
    config.embed.huggingface.path = "openai/clip-vit-large-patch14"
    config.embed.threads = 16
    # PyTorch's layers, which the paper uses, drop attention weights at their one dropout rate. No fused kernel does:
    # --config.model.attention_dropout=0 trains with them.
    config.model.attention_dropout = config.model.dropout
    return config
