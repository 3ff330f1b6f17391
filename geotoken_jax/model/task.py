"""The decoder's training task: what the loop needs to know of it."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from geotoken_jax.model import loss
from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
from geotoken_jax.model.memory import Neighbors


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights of the first (face) and the last level; 2.0 and 1.0 in the paper, equal for a plain loss."""

    first_weight: float
    last_weight: float


class GeoTokenTask:
    """Learns p(tokens | photo, neighbors).

    A batch holds query [B, 3, C], neighbors [B, M, 3, C], neighbor_tokens [B, M, T], neighbor_count [B], tokens [B, T].
    """

    def __init__(self, model: ModelSettings, settings: LossSettings):
        self.model, self.settings = model, settings

    def init(self, rngs: nnx.Rngs) -> GeoTokenModel:
        return GeoTokenModel(self.model, rngs)

    def loss(
        self, model: GeoTokenModel, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the weighted loss; each level's own, in nats; and the share of photos with every token right."""
        neighbors = Neighbors(batch["neighbors"], batch["neighbor_tokens"], batch["neighbor_count"])
        log_probabilities = model(batch["query"], neighbors, batch["tokens"], key)
        losses = loss.cross_entropy(log_probabilities, batch["tokens"])
        weights = loss.level_weights(losses.shape[1], self.settings.first_weight, self.settings.last_weight)
        right = jnp.all(jnp.argmax(log_probabilities, -1) == batch["tokens"], -1)

        def mean(values: Float[Array, " B"]) -> Float[Array, ""]:
            return jnp.average(values, weights=batch.get("valid"))

        levels = {f"loss_level_{t}": mean(losses[:, t]) for t in range(losses.shape[1])}
        return mean(loss.weighted(losses, weights)), {**levels, "exact": mean(right)}
