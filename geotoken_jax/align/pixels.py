"""Alignment from pixels: every step encodes photos with the backbone's image tower, which can be trained too."""

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
from geotoken_jax.backbone import checkpoint as published
from geotoken_jax.backbone.huggingface import HuggingFace, ImageTower
from geotoken_jax.batch import Spec, spec
from geotoken_jax.settings import Runtime, SettingsError

TOWERS = ("cached", "frozen", "trained")


@dataclasses.dataclass(frozen=True)
class PixelsSettings:
    """Whether alignment trains on stored features or on photos. If tower is "cached", the other keys have no effect.

    tower: "cached": trains on the stored features/. "frozen": encodes photos with the backbone's image tower in every
    step. "trained": trains the image tower too.
    augment: if true, every use of a photo is a new random view, with the settings of config.embed.views.
    learning_rate: step size of a trained tower, as a multiple of the learning rate of the heads.
    remat: activations that the backward pass keeps per layer of a trained tower, a key of stack.REMAT.
    """

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
                f"config.align.pixels.learning_rate is {self.learning_rate}: it must be above 0; to keep "
                "the tower fixed, set config.align.pixels.tower=frozen"
            )


def _open_tower(settings: BackboneSettings, remat: str, mesh: Mesh | None = None) -> ImageTower:
    """Returns the image tower of the backbone. mesh: devices to place it on; all local devices if None."""
    if settings.backbone != "huggingface":
        raise SettingsError(
            f"config.embed.backbone is {settings.backbone!r}, which has no image tower to train with: set "
            "config.embed.backbone=huggingface; or set config.align.pixels.tower=cached, and config.embed.views.count "
            "above 0 to train on augmented views"
        )
    return ImageTower(HuggingFace(settings.huggingface, mesh), remat)


class PixelsTask(AlignTask):
    """Trains the heads and the location encoder on photos and, if pixels.tower is "trained", the image tower.

    The train loop adds the published parameters of the tower to every batch, as `tower`. The parameters of a trained
    tower are the published parameters plus `learning_rate` times a change. The optimizer trains the change, which is
    zero at first, so training starts exactly at the published parameters. The tower's learning rate is `learning_rate`
    times the rate of the heads, since Adam's steps do not depend on the size of gradients. Weight decay draws the tower
    back to the published parameters (L2-SP, Li et al. 2018).
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
        """Raises SettingsError if the backbone has no image tower or its checkpoint cannot be read."""
        #: Prepares photos. Its parameters are the `tower` of every batch.
        self.tower = _open_tower(backbone, pixels.remat, mesh)
        super().__init__(settings, self.tower.width, loss, start)
        self._pixels, self._backbone = pixels, backbone

    @property
    def flops(self) -> float:
        """Floating-point operations of a training step per photo. For a frozen tower, only the forward pass counts."""
        return super().flops + self.tower.flops * (3 if self._trained else 1)

    @property
    def _trained(self) -> bool:
        return self._pixels.tower == "trained"

    def batch(self, size: int) -> Spec:
        """Returns AlignTask's specification, in which `image` contains prepared photos, [B, h, w, 3] uint8."""
        return super().batch(size) | spec(size, image=((self.tower.side, self.tower.side, 3), jnp.uint8))

    def init(self, rngs: nnx.Rngs) -> AlignModel:
        """Returns a new model. If the tower is trained, `model.tower` is the change of its parameters, all zeros."""
        model: Any = super().init(rngs)
        if self._trained:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.tower.parameters)
            model.tower = self.tower.module(zeros)
        return model

    def loss(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes the photos with the image tower, and returns AlignTask's loss and metrics."""
        parameters = batch["tower"]
        if self._trained:
            parameters = self._with_change(parameters, nnx.to_pure_dict(nnx.state(model.tower)))
        return super().loss(model, {**batch, "image": self.tower.features(parameters, batch["image"])}, key)

    def _with_change(self, published: Any, change: Any) -> Any:
        rate = np.float32(self._pixels.learning_rate)
        return jax.tree.map(lambda p, c: p + rate * c, published, change)

    def write_tower(self, folder: epath.Path) -> None:
        """Moves a trained tower from folder/parameters.safetensors to the checkpoint folder folder/backbone.

        The other files of folder/backbone are copies from the original checkpoint folder. If the tower is not trained,
        nothing changes. After an interruption the train loop writes parameters.safetensors again, so that this method
        can be repeated.
        """
        if not self._trained:
            return
        stored = safetensors.numpy.load((folder / "parameters.safetensors").read_bytes())
        change = {tuple(name.split("/")[1:]): stored.pop(name) for name in list(stored) if name.startswith("tower/")}
        # The published parameters are read from disk again, because in training several processes can each have a part.
        tower = _open_tower(self._backbone, "none")
        changed = self._with_change(jax.tree.map(np.asarray, tower.parameters), traverse_util.unflatten_dict(change))
        source = published.folder(self._backbone.huggingface.path)
        published.write_module(pathlib.Path(folder / "backbone"), source, tower.module(changed))
        checkpoint.write_parameters(folder / "parameters.safetensors", stored)
