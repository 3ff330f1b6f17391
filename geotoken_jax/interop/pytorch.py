"""An export's decoder under the published names, for the published PyTorch code."""

import dataclasses
import importlib.util
import json

from etils import epath

from geotoken_jax import checkpoint, settings
from geotoken_jax.interop import official
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.settings import SettingsError

_README = """# PyTorch

The decoder's parameters under the published names: `geotoken.safetensors` (`safetensors.torch.load_file`), and
`geotoken.pth` (`torch.load`) where torch was there. Members of the published state dict that its forward pass never
reads are not in it: `load_state_dict(..., strict=False)`.
"""
#: Settings that say how a model was trained or is run, not what it is.
_NOT_ITS_FORM = ("dropout", "neighbor_dropout", "dtype", "remat")


def make(folder: epath.Path, out: epath.Path) -> str:
    """Writes geotoken.safetensors, and geotoken.pth where torch is; returns what README.md is to say.

    Raises SettingsError naming a setting that the published code does not have.
    """
    ours = settings.read(ModelSettings, json.loads((folder / "config.json").read_text())["model"], "model")
    published = official.settings(
        width=ours.width, layers=ours.encoder_layers, heads=ours.heads, feed_forward=ours.feed_forward,
        group=ours.group, level=ours.level, neighbors=ours.neighbors, backbone_width=ours.backbone_width,
    )  # fmt: skip
    for name, value in dataclasses.asdict(published).items():
        if name not in _NOT_ITS_FORM and getattr(ours, name) != value:
            raise SettingsError(
                f"--target=pytorch takes a model of the published form: its config.model.{name} is "
                f"{getattr(ours, name)!r}, which the published code does not have, not {value!r}"
            )
    model = checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(ours, rngs))
    weights = official.to_state_dict(model)
    official.write_weights(out / "geotoken.safetensors", weights)
    if importlib.util.find_spec("torch"):
        official.write_weights(out / "geotoken.pth", weights)
    return _README
