"""Alignment as a task of the train loop."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from geotoken_jax.align import loss as contrast
from geotoken_jax.align.heads import AlignModel, AlignSettings


class AlignTask:
    """Trains heads and location encoder on frozen features.

    A batch is a dict of float32 arrays: image [B, C]; text [B, C], zeros where a photo has no text; coordinates [B, 2],
    latitude and longitude in degrees; in evaluation also valid [B], False for what only fills the batch up.
    """

    def __init__(self, settings: AlignSettings, width: int):
        """width: C, of the backbone's features."""
        self.settings, self.width = settings, width

    @property
    def flops(self) -> float:
        """Six for each parameter, which serves once a photo; the products of embeddings left out."""
        params = nnx.state(nnx.eval_shape(lambda: self.init(nnx.Rngs(0))), nnx.Param)
        return 6.0 * sum(p.size for p in jax.tree.leaves(params))

    def init(self, rngs: nnx.Rngs) -> AlignModel:
        return AlignModel(self.settings, self.width, rngs=rngs)

    def loss(
        self, model: AlignModel, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns InfoNCE(text) + InfoNCE(location), and metrics. key: of dropout; None is evaluation."""
        rngs = None if key is None else nnx.Rngs(dropout=key)
        image, text, coordinates = batch["image"], batch["text"], batch["coordinates"]
        valid = batch.get("valid", jnp.ones(len(image), bool))
        text_loss, text_accuracy = contrast.info_nce(
            model.text(text, rngs),
            model.image_to_text(image, rngs),
            model.text_scale[...],
            present=valid & (text != 0).any(axis=1),
            same=contrast.same_rows(text),
        )
        location_loss, location_accuracy = contrast.info_nce(
            model.location(coordinates),
            model.image_to_location(image, rngs),
            model.location_scale[...],
            present=valid,
            same=contrast.same_rows(coordinates),
        )
        return text_loss + location_loss, {
            "text_loss": text_loss,
            "location_loss": location_loss,
            "text_accuracy": text_accuracy,
            "location_accuracy": location_accuracy,
        }
