"""The trained parts of an export, read from its files."""

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath
from flax import nnx

from geotoken_jax import checkpoint, settings
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.model.comparator import ComparatorSettings
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.reranker import RerankerSettings
from geotoken_jax.model.reward import RewardSettings
from geotoken_jax.predict import export_format
from geotoken_jax.predict.decode import PredictSettings
from geotoken_jax.predict.uncertainty import UNCALIBRATED, Calibration

#: Name in `learned` of config.json -> class of the settings of that model.
_LEARNED = {"reward": RewardSettings, "reranker": RerankerSettings, "comparator": ComparatorSettings}


@dataclasses.dataclass(frozen=True)
class Parts:
    """Models and settings of an export, without its backbone and its gallery.

    folder: the export. config: contents of its config.json. learned: settings of the models that the selector needs, by
    name.
    """

    folder: epath.Path
    config: dict[str, Any]
    aligned: AlignModel
    decoder: GeoTokenModel
    predict: PredictSettings
    learned: dict[str, Any]
    calibration: Calibration

    def module(self, name: str, make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
        """Returns a module with the parameters of the file NAME. make: see checkpoint.read_module."""
        return checkpoint.read_module(self.folder / name, make)


def read(folder: epath.PathLike, width: int | None = None, dtype: str | None = None) -> Parts:
    """Returns the parts of an export.

    width: width of the backbone's features; if None, the width in the decoder's settings. dtype: type in which the
    decoder computes; if None, the type that it was trained with.

    Raises ExportError, SettingsError or ParametersError if the export cannot be used.
    """
    folder = epath.Path(folder)
    config = export_format.read_config(folder)
    model = settings.read(ModelSettings, config["model"], "model")
    model = dataclasses.replace(model, dtype=dtype or model.dtype)
    align = AlignTask(settings.read(AlignSettings, config["align"], "align"), width or model.backbone_width)
    calibration = folder / "calibration.json"
    return Parts(
        folder,
        config,
        checkpoint.read_module(folder / "align.safetensors", align.init),
        checkpoint.read_module(folder / "geotoken.safetensors", lambda rngs: GeoTokenModel(model, rngs)),
        settings.read(PredictSettings, config["predict"], "predict"),
        {name: settings.read(_LEARNED[name], part, f"{name}.model") for name, part in config["learned"].items()},
        Calibration.load(calibration) if calibration.exists() else UNCALIBRATED,
    )
