"""The stage `train`: trains the decoder, a folder for each variant."""

from typing import Any

from geotoken_jax import records
from geotoken_jax.artifacts import VALIDATION, Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import Concatenation, Subset, chosen
from geotoken_jax.gallery import placement
from geotoken_jax.model.task import GeoTokenTask
from geotoken_jax.predict import sample
from geotoken_jax.settings import SettingsError
from geotoken_jax.sharding import make_mesh
from geotoken_jax.stages import training
from geotoken_jax.workdir import Manifest


def run(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    """Makes geotoken/VARIANT from tokens/, gallery/ and queries/."""
    own, folder = config.variant(variant), f"geotoken/{variant}"
    features = workdir.finished("features")
    if features and features.facts["width"] != own.model.backbone_width:
        raise SettingsError(
            f"config.model.backbone_width = {own.model.backbone_width} is not the width of these features: set it to "
            f"{features.facts['width']}"
        )
    check_context(own, workdir)
    data = own.select("data") if own.data.photos else {"data": {"photos": 0}}
    stage = training.begin(
        workdir, config, folder, ["model", "loss", "train"], ["tokens", "gallery", "queries"], **data
    )
    if stage.manifest:
        return [stage.manifest]
    mesh = make_mesh(own.mesh)
    task, splits, resident = decoder(own, workdir, mesh)
    result = training.fit(task, own, "train", splits, stage.path, f"train {variant}", mesh, resident)
    return [training.finish(workdir, stage, own.train, result, f"train {variant}")]


def check_context(config: Config, workdir: Workdir) -> None:
    """Raises SettingsError if config.model.context asks for times of which no photo of the work directory has one."""
    asked = config.model.context
    if asked != "none" and not workdir.manifest("photos").facts.get("captured"):
        raise SettingsError(
            f"config.model.context is {asked!r}, and no photo in {workdir.path / 'photos'} says when it was taken: "
            "leave it 'none', or prepare photos that do (docs/data.md)"
        )


def decoder(config: Config, workdir: Workdir, mesh: Any) -> tuple[Any, list, dict[str, Any]]:
    """Returns the decoder's task, its training and validation photos, and the gallery's arrays on the mesh.

    config: with the variant's changes made.
    """
    model, where, gallery = config.model, config.gallery, workdir.gallery
    if workdir.neighbor_count < model.neighbors:
        raise SettingsError(
            f"config.model.neighbors = {model.neighbors} is more than the {workdir.neighbor_count} there are: set "
            "config.index.neighbors.count and index again in another --workdir"
        )
    if model.level > records.LEVEL:
        raise SettingsError(
            f"config.model.level = {model.level} is finer than the gallery's cells: use a level up to {records.LEVEL}"
        )
    host, names = None if where.on_device else gallery, workdir.training_splits
    train = Concatenation([workdir.tokens(split, model, host) for split in names])
    if config.data.photos:
        train = Subset(train, chosen([workdir.table(split).ids() for split in names], config.data))
    splits = [train, workdir.tokens(VALIDATION, model, host)]
    task = GeoTokenTask(model, config.loss, placement.lookup(where, mesh), sample.greedy)
    return task, splits, placement.resident(gallery, model.cells, where, mesh)
