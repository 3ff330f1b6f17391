"""The stage `train`: trains the decoder of one variant."""

from typing import Any

import numpy as np

from geotoken_jax import records
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import Concatenation, Subset, choose_rows
from geotoken_jax.gallery import placement
from geotoken_jax.manifests import Manifest
from geotoken_jax.model.geotoken import ModelSettings
from geotoken_jax.model.task import GeoTokenTask
from geotoken_jax.predict import sample
from geotoken_jax.settings import SettingsError
from geotoken_jax.sharding import make_mesh
from geotoken_jax.stages import training
from geotoken_jax.workdir import VALIDATION, Workdir


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Trains a variant's decoder on tokens/, gallery/ and queries/ and writes geotoken/VARIANT.

    Raises SettingsError if the variant's settings do not fit the prepared data.
    """
    variant_config, folder = config.variant(variant), f"geotoken/{variant}"
    check_model(variant_config.model, workdir.width)
    check_context(variant_config, workdir)
    chosen = variant_config.data
    # Without a choice of photos, the manifest has the one key that earlier releases wrote too.
    data = variant_config.select("data") if chosen.photos or chosen.split_validation else {"data": {"photos": 0}}
    stage = training.begin(
        workdir, config, folder, ["model", "loss", "train"], ["tokens", "gallery", "queries"], **data
    )
    if stage.manifest:
        return [stage.manifest]
    mesh = make_mesh(variant_config.mesh)
    task, splits, resident = decoder(variant_config, workdir, mesh)
    result = training.fit(task, variant_config, "train", splits, stage.path, f"train {variant}", mesh, resident)
    return [training.finish(workdir, stage, result, f"train {variant}")]


def check_model(model: ModelSettings, width: int) -> None:
    """Raises SettingsError if the decoder's settings do not fit the backbone's features or the gallery's cells.

    width: width of the backbone's features.
    """
    if model.backbone_width != width:
        raise SettingsError(
            f"config.model.backbone_width is {model.backbone_width}, but the backbone's features have {width} numbers: "
            f"set it to {width}"
        )
    if model.level > records.LEVEL:
        raise SettingsError(
            f"config.model.level is {model.level}, finer than the gallery's cells: set it to {records.LEVEL} or less"
        )


def check_context(config: Config, workdir: Workdir) -> None:
    """Raises SettingsError if config.model.context needs capture times and no photo of the work directory has one."""
    context = config.model.context
    if context != "none" and not workdir.manifest("photos").facts.get("captured"):
        raise SettingsError(
            f"config.model.context is {context!r}, but no photo in {workdir.path / 'photos'} has a capture time: set "
            "the key to 'none', or prepare photos with capture times (docs/data.md)"
        )


def decoder(config: Config, workdir: Workdir, mesh: Any) -> tuple[Any, list, dict[str, Any]]:
    """Returns the decoder's task, readers of the training and validation photos, and the gallery arrays on the mesh
    (none if config.gallery.placement is "host").

    If config.data.split_validation is set, there are three readers: training photos, validation photos that choose the
    best step, and validation photos that do not. config: configuration with the variant's changes applied. Raises
    SettingsError if config.model.neighbors exceeds the neighbors per photo in neighbors/, or if config.data.photos
    exceeds the number of training photos.
    """
    model, options, gallery = config.model, config.gallery, workdir.gallery
    if workdir.neighbor_count < model.neighbors:
        raise SettingsError(
            f"config.model.neighbors is {model.neighbors}, but {workdir.path / 'neighbors'} has "
            f"{workdir.neighbor_count} per photo: set it to at most {workdir.neighbor_count}, or set "
            f"config.index.neighbors.count to at least {model.neighbors} and run `geotoken index` in another --workdir"
        )
    host, names = None if options.on_device else gallery, workdir.training_splits
    train = Concatenation([workdir.tokens(split, model, host) for split in names])
    if config.data.photos:
        train = Subset(train, choose_rows([workdir.table(split).ids() for split in names], config.data))
    validation = workdir.tokens(VALIDATION, model, host)
    splits = [train, validation]
    if config.data.split_validation:
        splits = [train, *(Subset(validation, np.arange(first, len(validation), 2)) for first in (0, 1))]
    task = GeoTokenTask(model, config.loss, placement.lookup(options, mesh), sample.greedy)
    return task, splits, placement.device_arrays(gallery, model.cells, options, mesh)
