"""The stage `align`: trains the heads that map images, texts and coordinates to one embedding space."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from geotoken_jax.align.pixels import PixelsTask
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import views
from geotoken_jax.configuration import Config
from geotoken_jax.data.join import Concatenation, Features
from geotoken_jax.data.pixels import Pixels
from geotoken_jax.interop import geoclip
from geotoken_jax.manifests import Manifest, StageError
from geotoken_jax.sharding import make_mesh
from geotoken_jax.stages import training
from geotoken_jax.workdir import GALLERY, VALIDATION, Workdir

#: Largest number of photos that whitening is fitted to.
_SAMPLE = 100_000


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Trains the alignment model and writes align/.

    Training reads features/. If config.align.pixels.tower is not "cached", training reads photos/ as well.
    """
    keys, inputs, more_sections = [f"align.{name}" for name in ("model", "loss", "init", "train")], ["features"], {}
    from_pixels = config.align.pixels.tower != "cached"
    if from_pixels:
        keys, inputs = [*keys, "align.pixels", "embed.views"], [*inputs, "photos"]
    else:
        more_sections = {"align": {**config.select(*keys)["align"], "pixels": {"tower": "cached"}}}
    finished = workdir.finished("align")
    mesh = make_mesh(config.mesh)
    # Invalid settings must fail before begin(), because a folder that has begun accepts no other settings.
    parts = None if finished else aligner(config, workdir, mesh)
    stage = training.begin(workdir, config, "align", keys, inputs, **more_sections)
    if stage.manifest or not parts:
        return [workdir.manifest("align")]
    task, splits, resident = parts
    result = training.fit(task, config, "align.train", splits, stage.path, "align", mesh, resident)
    after = task.write_tower if from_pixels else None
    return [training.finish(workdir, stage, result, "align", after)]


def aligner(config: Config, workdir: Workdir, mesh: Mesh) -> tuple[Any, list, dict[str, Any]]:
    """Returns the alignment task, readers of training and validation photos, and the arrays that stay on the mesh."""
    options = config.align
    start = geoclip.start(options.init)
    if options.model.whiten:
        start = _start_with_whitening(start, workdir.pairs(GALLERY), options.model.whiten)
    if options.pixels.tower != "cached":
        return _aligner_from_pixels(config, workdir, mesh, start)
    splits = [Concatenation([workdir.pairs(split) for split in workdir.training_splits]), workdir.pairs(VALIDATION)]
    return AlignTask(options.model, workdir.width, options.loss, start), splits, {}


def _start_with_whitening(start: Callable | None, photos: Features, added: float) -> Callable:
    """Returns a function that initializes a new alignment model: it calls `start`, then fits the whitening.

    photos: training photos; up to 100,000 are read. added: variance that whitening adds (config.align.model.whiten).
    """
    image = photos(np.unique(np.linspace(0, len(photos) - 1, _SAMPLE).astype(int)))["image"]

    def initialize(model: Any) -> None:
        if start:
            start(model)
        model.whitening.fit(image, added)

    return initialize


def _aligner_from_pixels(
    config: Config, workdir: Workdir, mesh: Mesh, start: Callable | None
) -> tuple[Any, list, dict[str, Any]]:
    """Returns the same as `aligner`, with readers of decoded photos instead of cached features.

    Raises StageError if a photo of the training or validation split has no features.
    """
    workdir.check_backbone(config.embed)
    photos, features = workdir.manifest("photos"), workdir.manifest("features")
    for split in (views.SOURCE_SPLIT, VALIDATION):
        if features.counts[split] != photos.counts[split]:
            raise StageError(
                f"{workdir.path / 'features'} has {features.counts[split]:,} of the {photos.counts[split]:,} photos of "
                f"{split}, but config.align.pixels.tower = {config.align.pixels.tower!r} reads every photo: "
                "prepare photos/ again without the photos that `embed` could not read, or set "
                "config.align.pixels.tower to 'cached'"
            )
    task = PixelsTask(config.align.model, config.align.loss, start, config.align.pixels, config.embed, mesh)

    def read(split: str, augmentation: views.ViewsSettings | None) -> Pixels:
        pairs, source = workdir.pairs(split), workdir.photos(split)
        return Pixels(pairs, source, task.tower, config.embed.threads, augmentation, config.align.train.seed)

    augmentation = config.embed.views if config.align.pixels.augment else None
    return task, [read(views.SOURCE_SPLIT, augmentation), read(VALIDATION, None)], {"tower": task.tower.parameters}
