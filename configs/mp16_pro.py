"""The paper's configuration: MP16-Pro, and the backbone CLIP ViT-L/14 from the Hugging Face hub.

Set `--config.photos.mp16_pro.folder=DIR` to the folder of the downloaded data set. Without a network, download the
backbone elsewhere, and set `--config.embed.huggingface.path=DIR` to its folder in every command.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the paper's configuration. config.photos.mp16_pro.folder has to be set."""
    config: Any = common.get_config()
    config.name = "mp16_pro"
    config.photos.source = "mp16_pro"
    # The filter of G3 keeps 4.12 of 4.65 million photos: it drops 11.5 %. A broken download drops far more than 15 %.
    config.photos.max_dropped = 0.15
    config.embed.backbone = "huggingface"
    config.embed.huggingface.path = "openai/clip-vit-large-patch14"
    config.embed.threads = 16
    # The paper uses PyTorch's layers, which apply their dropout rate to the attention weights too. Fused attention
    # kernels do not support that. To train with a fused kernel, set --config.model.attention_dropout=0.
    config.model.attention_dropout = config.model.dropout
    return config
