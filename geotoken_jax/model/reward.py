"""The reward head: the decoder's last output for a candidate says whether it is near the truth (paper, section 3.5).

The paper's has two classes, within 200 km or not, and each candidate saw another slice of the neighbors; ours has one
output for each of the five thresholds, and every candidate sees its own photo's neighbors.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from geotoken_jax import sharding
from geotoken_jax.batch import Spec, spec
from geotoken_jax.geo.distance import THRESHOLDS_KM
from geotoken_jax.model.verifier import listwise


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """hidden: width of the head's one hidden layer, 2048 in the paper. dropout: rate on it."""

    hidden: int
    dropout: float


class RewardHead(nnx.Module):
    """The decoder's last output -> logits of being within each of THRESHOLDS_KM."""

    def __init__(self, settings: RewardSettings, width: int, *, rngs: nnx.Rngs):
        """width: D, of the decoder."""
        self.hidden = sharding.linear(width, settings.hidden, ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(settings.hidden, len(THRESHOLDS_KM), ("mlp", "embed"), rngs=rngs)
        self.dropout = nnx.Dropout(settings.dropout)

    def __call__(self, states: Float[Array, "B K D"], rngs: nnx.Rngs | None = None) -> Float[Array, "B K 5"]:
        """rngs: source of dropout; None is evaluation, without it."""
        hidden = jax.nn.relu(self.hidden(states))
        return self.output(self.dropout(hidden, deterministic=rngs is None, rngs=rngs))


class RewardTask:
    """Learns which candidates are near. `batch` specifies its batch."""

    def __init__(self, settings: RewardSettings, width: int):
        self.settings, self._width = settings, width
        self.flops = 6.0 * settings.hidden * (width + len(THRESHOLDS_KM))  # of one candidate

    def batch(self, size: int, candidates: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        states [B, K, D]: the decoder's last outputs. km [B, K]: each candidate's distance from the photo. Both float32.
        Evaluation adds valid [B] bool: False for examples that only fill the batch up.
        """
        return spec(size, states=((candidates, self._width), jnp.float32), km=((candidates,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> RewardHead:
        return RewardHead(self.settings, self._width, rngs=rngs)

    def loss(
        self, model: RewardHead, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss of `listwise`, and the accuracy of what is chosen at each threshold."""
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return listwise(model(batch["states"], rngs), batch["km"], batch.get("valid"))
