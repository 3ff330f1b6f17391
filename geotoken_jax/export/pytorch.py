"""Converts an export's decoder to a state dict for the published PyTorch code."""

import dataclasses
import importlib.util
import json

from etils import epath

from geotoken_jax import checkpoint, settings
from geotoken_jax.interop import official
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.settings import SettingsError

_README = """# PyTorch

The decoder's parameters with the tensor names of the published code: `geotoken.safetensors` for
`safetensors.torch.load_file`, and `geotoken.pth` for `torch.load` if torch was installed. Load them with
`load_state_dict(..., strict=False)`: entries that the published forward pass never reads are left out.
"""
#: Settings of training and execution, and settings that the parametrization "standard" does not use. They do not change
#: the architecture.
_RUNTIME = (
    "attention", "attention_dropout", "dropout", "neighbor_dropout", "dtype", "remat", "base_width", "base_heads",
    "base_layers",
)  # fmt: skip


def make(folder: epath.Path, out: epath.Path) -> str:
    """Writes geotoken.safetensors, and geotoken.pth if torch is installed. Returns the text of README.md.

    Raises SettingsError with the name of a model setting that the published code does not support.
    """
    config = settings.completed(json.loads((folder / "config.json").read_text()))
    ours = settings.read(ModelSettings, config["model"], "model")
    published = official.settings(
        width=ours.width, layers=ours.encoder_layers, heads=ours.heads, feed_forward=ours.feed_forward,
        group=ours.group, level=ours.level, neighbors=ours.neighbors, backbone_width=ours.backbone_width,
    )  # fmt: skip
    for name, value in dataclasses.asdict(published).items():
        if name not in _RUNTIME and getattr(ours, name) != value:
            raise SettingsError(
                f"--target=pytorch needs the published architecture, but config.model.{name} is "
                f"{getattr(ours, name)!r}, not {value!r}: train a model with {value!r}, or choose "
                "another target"
            )
    model = checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(ours, rngs))
    weights = official.to_state_dict(model)
    official.write_weights(out / "geotoken.safetensors", weights)
    if importlib.util.find_spec("torch"):
        official.write_weights(out / "geotoken.pth", weights)
    return _README
