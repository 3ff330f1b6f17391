"""The paper's configuration for MP16-Pro with a stronger backbone: SigLIP 2 instead of CLIP ViT-L/14.

`--config=configs/mp16_siglip2.py:giant` selects one of BACKBONES. The default is `so400m`.

Published results on IM2GPS3K show how strong the giant backbone is. With its features and no training at all, the first
neighbor is within 25 km for 37.6 % of the photos. GeoToken with CLIP, as published, is within 25 km for 39.6 %.

docs/data.md lists the cost of each backbone. Nobody has trained on these backbones with this code yet.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import mp16_pro

#: Name of a backbone -> its name on the Hugging Face hub, and the width of its features.
BACKBONES = {
    "so400m": ("google/siglip2-so400m-patch14-384", 1152),
    "giant": ("google/siglip2-giant-opt-patch16-384", 1536),
}


def get_config(backbone: str = "so400m") -> ConfigDict:
    """Returns the paper's configuration for MP16-Pro with the given backbone, one of BACKBONES."""
    config: Any = mp16_pro.get_config()
    config.name = "mp16_siglip2"
    set_backbone(config, backbone)
    return config


def set_backbone(config: Any, backbone: str) -> None:
    """Sets the backbone in a configuration, and the width of its features. backbone: one of BACKBONES."""
    if backbone not in BACKBONES:
        raise ValueError(
            f"backbone {backbone!r} is unknown: use one of {', '.join(BACKBONES)}, as in `--config=FILE:so400m`"
        )
    config.embed.huggingface.path, config.model.backbone_width = BACKBONES[backbone]
