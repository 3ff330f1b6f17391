"""The paper's configuration on MP16-Pro with a stronger backbone, SigLIP 2 instead of CLIP ViT-L/14.

`--config=configs/mp16_siglip2.py:giant` selects one of BACKBONES; `so400m` is the default. In published results the
first neighbor by the giant model's features, without any training, has 37.6 % of IM2GPS3K within 25 km; GeoToken as
published, with CLIP, has 39.6 %. docs/data.md has the cost of each backbone. Nobody has trained on them with this code
yet.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import mp16_pro

#: Name -> name on the Hugging Face hub, and width of the features.
BACKBONES = {
    "so400m": ("google/siglip2-so400m-patch14-384", 1152),
    "giant": ("google/siglip2-giant-opt-patch16-384", 1536),
}


def get_config(backbone: str = "so400m") -> ConfigDict:
    """Returns the paper's configuration on MP16-Pro with the given backbone."""
    config: Any = mp16_pro.get_config()
    config.name = "mp16_siglip2"
    set_backbone(config, backbone)
    return config


def set_backbone(config: Any, backbone: str) -> None:
    """Sets the backbone of a configuration, one of BACKBONES, and the width of the decoder's input."""
    if backbone not in BACKBONES:
        raise ValueError(
            f"backbone {backbone!r} is unknown: use one of {', '.join(BACKBONES)}, as in `--config=FILE:so400m`"
        )
    config.embed.huggingface.path, config.model.backbone_width = BACKBONES[backbone]
