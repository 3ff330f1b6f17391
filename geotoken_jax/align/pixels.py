"""Alignment from pixels: photos go through the backbone's image tower in every step, and may train it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx, traverse_util
from jax.sharding import Mesh

from geotoken_jax import checkpoint, stack
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.loss import LossSettings
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import BackboneSettings
from geotoken_jax.backbone.checkpoint import write_module
from geotoken_jax.backbone.huggingface import HuggingFace, ImageTower
from geotoken_jax.batch import Spec, spec
from geotoken_jax.settings import Runtime, SettingsError

TOWERS = ("cached", "frozen", "trained")


@dataclasses.dataclass(frozen=True)
class PixelsSettings:
    """tower: "cached" trains on features/; "frozen" and "trained", on photos through the backbone's image tower. The
    other keys are theirs. augment: a photo is another view each time, as config.embed.views has them. learning_rate: of
    a trained tower, as a share of the heads'. remat: what the backward pass keeps of its layers (stack.REMAT)."""

    tower: str
    augment: bool
    learning_rate: float
    remat: Runtime[str]

    def __post_init__(self):
        for key, known in (("tower", TOWERS), ("remat", stack.REMAT)):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"config.align.pixels.{key} is {getattr(self, key)!r}: choose one of {', '.join(known)}"
                )
        if self.learning_rate <= 0:
            raise ValueError(
                f"config.align.pixels.learning_rate is {self.learning_rate}: it must be above 0; for a tower that is "
                "not to move set config.align.pixels.tower=frozen"
            )


def _open_tower(settings: BackboneSettings, remat: str, mesh: Mesh | None = None) -> ImageTower:
    """Returns the image tower of the backbone. mesh: None for the first device of this process."""
    if settings.backbone != "huggingface":
        raise SettingsError(
            f"config.embed.backbone is {settings.backbone!r}, which no accelerator runs: set config.embed.backbone="
            "huggingface, or config.align.pixels.tower=cached with config.embed.views.count for its views"
        )
    rows = mesh.size if mesh else 1  # it embeds nothing itself
    return ImageTower(HuggingFace(dataclasses.replace(settings.huggingface, batch_size=rows), mesh), remat)


class PixelsTask(AlignTask):
    """Trains heads and location encoder on photos and, where asked, the image tower.

    `batch` specifies its batch, to which the loop adds `tower`, the published parameters. These stay as they are: a
    trained tower has them plus `learning_rate` times what the optimizer has made of zeros. So it
    begins as published, to the bit; it moves by that share of the heads' rate, for Adam's steps do not depend on the
    size of gradients; and weight decay draws it back to where it began (L2-SP, Li et al. 2018).
    """

    def __init__(
        self,
        settings: AlignSettings,
        loss: LossSettings,
        start: Callable[[AlignModel], None] | None,
        pixels: PixelsSettings,
        backbone: BackboneSettings,
        mesh: Mesh,
    ):
        """Raises SettingsError if the backbone has no tower that an accelerator runs, or it cannot be read."""
        #: What prepares photos; its parameters are the batches' `tower`.
        self.tower = _open_tower(backbone, pixels.remat, mesh)
        super().__init__(settings, self.tower.width, loss, start)
        self._pixels, self._backbone = pixels, backbone

    @property
    def flops(self) -> float:
        """Those of the heads, and of the tower: forward alone where it is frozen."""
        return super().flops + self.tower.flops * (3 if self._trained else 1)

    @property
    def _trained(self) -> bool:
        return self._pixels.tower == "trained"

    def batch(self, size: int) -> Spec:
        """Returns AlignTask's specification with prepared photos, image [B, h, w, 3] uint8, in place of features."""
        return super().batch(size) | spec(size, image=((self.tower.side, self.tower.side, 3), jnp.uint8))

    def init(self, rngs: nnx.Rngs) -> AlignModel:
        model: Any = super().init(rngs)
        if self._trained:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.tower.parameters)
            model.tower = self.tower.module(zeros)
        return model

    def loss(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns what AlignTask.loss does, of the photos' features."""
        parameters = batch["tower"]
        if self._trained:
            parameters = self._moved(parameters, nnx.to_pure_dict(nnx.state(model.tower)))
        return super().loss(model, {**batch, "image": self.tower.features(parameters, batch["image"])}, key)

    def _moved(self, published: Any, change: Any) -> Any:
        rate = np.float32(self._pixels.learning_rate)
        return jax.tree.map(lambda p, c: p + rate * c, published, change)

    def write_tower(self, folder: epath.Path) -> None:
        """Takes a trained tower out of folder/parameters.safetensors and makes it folder/backbone, a checkpoint folder
        like the one that it began from. After an interruption the loop writes the file anew, and this is done again."""
        if not self._trained:
            return
        stored = safetensors.numpy.load((folder / "parameters.safetensors").read_bytes())
        change = {tuple(name.split("/")[1:]): stored.pop(name) for name in list(stored) if name.startswith("tower/")}
        # Read again: what training holds may lie over several processes.
        tower = _open_tower(self._backbone, "none")
        moved = self._moved(jax.tree.map(np.asarray, tower.parameters), traverse_util.unflatten_dict(change))
        source = pathlib.Path(self._backbone.huggingface.path)
        write_module(pathlib.Path(folder / "backbone"), source, tower.module(moved))
        checkpoint.write_parameters(folder / "parameters.safetensors", stored)
