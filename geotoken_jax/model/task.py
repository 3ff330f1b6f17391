"""The decoder's training task: its model, loss and metrics, as train.step.Task specifies."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from geotoken_jax.gallery import placement
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.model import flops, loss
from geotoken_jax.model.geotoken import GeoTokenModel, Memory, ModelSettings
from geotoken_jax.model.memory import Neighbors


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights of the tokens in the loss.

    first_weight: weight of the first token, 2.0 in the paper. last_weight: weight of the last token, 1.0 in the paper.
    In between, weights change linearly. Equal weights give the plain mean over tokens.
    """

    first_weight: float
    last_weight: float


class GeoTokenTask:
    """Trains p(tokens | photo, neighbors). model/batch.py specifies its batches."""

    def __init__(
        self,
        model: ModelSettings,
        settings: LossSettings,
        lookup: placement.Lookup,
        decode: Callable[[GeoTokenModel, Memory], Any] | None = None,
    ):
        """Makes the task.

        lookup: function that reads the neighbors' embeddings and tokens from a batch and the gallery
        (gallery/placement.py). decode: function that returns an object with `tokens` [B, K, T], the candidates of each
        photo, best first. Evaluation measures the distance of the best candidate from the truth. If decode is None,
        or if jax cannot compile the decoding of the model's cells (Scheme.traceable), it measures no distances.
        """
        self.model, self.settings, self._lookup = model, settings, lookup
        self._decode = decode if model.cells.traceable else None
        self.flops = flops.per_example(model)

    def init(self, rngs: nnx.Rngs) -> GeoTokenModel:
        return GeoTokenModel(self.model, rngs)

    def loss(
        self, model: GeoTokenModel, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the weighted loss and the metrics, losses in nats.

        The metrics are the loss of each token (loss_level_0, ...) and `exact`, the share of photos whose true tokens
        are all the most probable ones, given the true tokens before them. An evaluation (key is None) that measures
        distances also returns the shares of photos decoded within each of THRESHOLDS_KM, and the mean distance in km.
        """
        neighbors = Neighbors(*self._lookup(batch), batch["neighbor_count"])
        context = batch.get("context")
        log_probabilities = model(batch["query"], neighbors, batch["tokens"], key, context)
        losses = loss.cross_entropy(log_probabilities, batch["tokens"])
        weights = loss.level_weights(losses.shape[1], self.settings.first_weight, self.settings.last_weight)
        right = jnp.all(jnp.argmax(log_probabilities, -1) == batch["tokens"], -1)

        def mean(values: Float[Array, " B"]) -> Float[Array, ""]:
            return jnp.average(values, weights=batch.get("valid"))

        levels = {f"loss_level_{t}": mean(losses[:, t]) for t in range(losses.shape[1])}
        metrics = {**levels, "exact": mean(right)}
        if key is None and self._decode:
            memory = model.encode(batch["query"], neighbors, context=context)
            decoded = self._decode(model, memory).tokens[:, 0]
            cells = self.model.cells
            km = jnp.asarray(great_circle_km(*cells.decode(decoded), *cells.decode(batch["tokens"])))
            metrics |= {f"within_{limit}_km": mean(km <= limit) for limit in THRESHOLDS_KM}
            metrics["distance_km"] = mean(km)
        return mean(loss.weighted(losses, weights)), metrics
