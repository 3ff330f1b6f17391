"""The alignment model's batches, initialization and loss, as a task for the train loop."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from geotoken_jax import randomness
from geotoken_jax.align import loss as contrast
from geotoken_jax.align.heads import AlignModel, AlignSettings
from geotoken_jax.align.loss import LossSettings, Targets
from geotoken_jax.batch import Spec, spec


class Queue(nnx.Variable):
    """Coordinates [Q, 2] of the last Q training photos, newest first; rows not yet filled are NaN."""


class TrainedAlignModel(AlignModel):
    """The alignment model with variables that only training needs. Files of trained parameters do not contain them."""

    def __init__(self, settings: AlignSettings, width: int, loss: LossSettings, *, rngs: nnx.Rngs):
        super().__init__(settings, width, rngs=rngs)
        if loss.kind == "sigmoid":  # SigLIP's initial values, since nearly all pairs are negatives
            self.text_scale[...] = self.location_scale[...] = jnp.float32(math.log(10))
            self.text_bias = nnx.Param(jnp.float32(-10), training_only=True)
            self.location_bias = nnx.Param(jnp.float32(-10), training_only=True)
        if loss.queue:
            self.queue = Queue(jnp.full((loss.queue, 2), jnp.nan), training_only=True)


class AlignTask:
    """Trains the heads and the location encoder on stored features of a frozen backbone."""

    def __init__(
        self,
        settings: AlignSettings,
        width: int,
        loss: LossSettings | None = None,
        start: Callable[[AlignModel], None] | None = None,
    ):
        """width: C, the width of the backbone's features. loss: settings of the loss. If None, the task can create a
        model to read parameters into, but not train it. start: function that loads pretrained parameters into a new
        model; if None, the model is initialized at random."""
        self.settings, self.width, self._loss, self._start = settings, width, loss, start

    @property
    def flops(self) -> float:
        """Floating-point operations of a training step per photo: six per parameter, without the similarity matrix."""
        params = nnx.state(nnx.eval_shape(lambda: AlignTask.init(self, nnx.Rngs(0))), nnx.Param)
        return 6.0 * sum(p.size for p in jax.tree.leaves(params))

    def batch(self, size: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        All arrays are float32. image [B, C]: image features. text [B, C]: text features, zeros if a photo has no text.
        coordinates [B, 2]: latitude and longitude in degrees. Batches of evaluation also have `valid` [B] bool, which
        the specification leaves out. It is False for examples that do not count, such as padding.
        """
        features = ((self.width,), jnp.float32)
        return spec(size, image=features, text=features, coordinates=((2,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> AlignModel:
        """Returns a new model. If the task has a loss, the model has the variables that only training needs."""
        if self._loss is None:
            return AlignModel(self.settings, self.width, rngs=rngs)
        model = TrainedAlignModel(self.settings, self.width, self._loss, rngs=rngs)
        if self._start:
            self._start(model)
        return model

    def loss(
        self, model: TrainedAlignModel, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the sum of the text loss and the location loss, and metrics.

        key: random key for dropout. If None, the batch is evaluated: no dropout, and the queue is not used.
        """
        assert self._loss, "this AlignTask has no loss settings, so it cannot train"
        text_key, image_key, place_key = randomness.split(key, 3)
        image, text, coordinates = batch["image"], batch["text"], batch["coordinates"]
        valid = batch.get("valid", jnp.ones(len(image), bool))
        has_text = valid & (text != 0).any(axis=1)
        texts = Targets(model.text(text, text_key), contrast.text_keys(text), has_text)
        text_loss, text_accuracy = self._contrast(model, "text", model.image_to_text(image, image_key), texts)
        places = Targets(model.location(coordinates), contrast.place_keys(coordinates), valid)
        queue = None
        if self._loss.queue and key is not None:
            past = model.queue[...]
            model.queue[...] = jnp.concatenate([coordinates, past])[: self._loss.queue]
            known = jnp.isfinite(past).all(axis=1)
            past = jnp.where(known[:, None], past, 0)
            queue = Targets(model.location(past), contrast.place_keys(past), known)
        location_loss, location_accuracy = self._contrast(
            model, "location", model.image_to_location(image, place_key), places,
            reach=contrast.reach(self._loss.same_within_km), queue=queue,
        )  # fmt: skip
        return text_loss + location_loss, {
            "text_loss": text_loss,
            "location_loss": location_loss,
            "text_accuracy": text_accuracy,
            "location_accuracy": location_accuracy,
        }

    def _contrast(
        self, model: TrainedAlignModel, modality: str, photos: jax.Array, targets: Targets, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        assert self._loss
        scale = getattr(model, f"{modality}_scale")[...]
        if self._loss.kind == "sigmoid":
            bias = getattr(model, f"{modality}_bias")[...]
            return contrast.sigmoid(photos, targets, scale, bias, chunk=self._loss.chunk, **options)
        return contrast.info_nce(photos, targets, scale, chunk=self._loss.chunk, **options)
