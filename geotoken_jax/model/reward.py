"""The reward head: it predicts how near a candidate is to the truth (paper, section 3.5).

It reads the decoder's output at the candidate's last position. The paper's head has two classes, within 200 km of the
truth or not, and each candidate is decoded from a different slice of the neighbors. Our head has one output per
threshold, five in all, and each candidate is decoded from all neighbors of the photo.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from geotoken_jax import randomness, sharding
from geotoken_jax.batch import Spec, spec
from geotoken_jax.geo.distance import THRESHOLDS_KM


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """hidden: width of the hidden layer, 2048 in the paper. dropout: dropout rate of the hidden layer."""

    hidden: int
    dropout: float


class RewardHead(nnx.Module):
    """Predicts whether each candidate is within each of THRESHOLDS_KM of the truth, as logits.

    It reads a candidate's state, the decoder's output at the candidate's last position (GeoTokenModel.states).
    """

    def __init__(self, settings: RewardSettings, width: int, *, rngs: nnx.Rngs):
        """width: D, width of the decoder."""
        self.hidden = sharding.linear(width, settings.hidden, ("embed", "mlp"), rngs=rngs)
        self.output = sharding.linear(settings.hidden, len(THRESHOLDS_KM), ("mlp", "embed"), rngs=rngs)
        self.dropout = settings.dropout

    def __call__(self, states: Float[Array, "B K D"], key: Key[Array, ""] | None = None) -> Float[Array, "B K 5"]:
        """Returns five logits per candidate. key: random key for dropout; if None, there is no dropout."""
        hidden = jax.nn.relu(self.hidden(states))
        words = randomness.words(key, *states.shape[:-1])
        return self.output(randomness.dropout(hidden, self.dropout, words))


class RewardTask:
    """Trains the reward head to choose candidates near the truth."""

    def __init__(self, settings: RewardSettings, width: int):
        self.settings, self._width = settings, width
        self.flops = 6.0 * settings.hidden * (width + len(THRESHOLDS_KM))  # per candidate

    def batch(self, size: int, candidates: int) -> Spec:
        """Returns the specification of a batch of `size` photos.

        states [B, K, D] float32: the decoder's state of each candidate. km [B, K] float32: distance of each candidate
        from the photo's true place. Batches of evaluation also have `valid` [B] bool, which the specification leaves
        out. It is False for examples that do not count, such as padding.
        """
        return spec(size, states=((candidates, self._width), jnp.float32), km=((candidates,), jnp.float32))

    def init(self, rngs: nnx.Rngs) -> RewardHead:
        return RewardHead(self.settings, self._width, rngs=rngs)

    def loss(
        self, model: RewardHead, batch: Mapping[str, Array], key: jax.Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss and metrics of `listwise`. key: random key for dropout; no dropout if None."""
        return listwise(model(batch["states"], key), batch["km"], batch.get("valid"))


def listwise(
    logits: Float[Array, "B K 5"], km: Float[Array, "B K"], valid: Array | None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of choosing one of each photo's K candidates, in nats, and metrics.

    The metrics are the shares of photos whose chosen candidate is within each of THRESHOLDS_KM. The loss is 0.9 times a
    listwise loss plus 0.1 times a pointwise loss. Both are means over THRESHOLDS_KM. For the listwise loss, a softmax
    over the candidates gives the probability that a candidate within the threshold is chosen; the loss is minus its
    logarithm, or 0 if no candidate is within the threshold. The pointwise loss is the mean binary cross-entropy of the
    candidates. Because of this part, a logit can also be read as the log-odds of being within the threshold.

    km: distance of each candidate from the truth. valid [B]: False leaves a photo out; if None, no photo is left out.
    """
    within = km[..., None] <= jnp.asarray(THRESHOLDS_KM, jnp.float32)
    log_p = jax.nn.log_softmax(logits, 1)
    log_within = jax.nn.logsumexp(jnp.where(within, log_p, -1e9), 1)
    listwise_losses = jnp.where(within.any(1), -log_within, 0).mean(-1)
    pointwise_losses = optax.sigmoid_binary_cross_entropy(logits, within.astype(jnp.float32)).mean((1, 2))
    chosen_within = jnp.take_along_axis(within, choose(logits)[:, None, None], 1)[:, 0]
    metrics = {
        f"within_{limit}_km": jnp.average(chosen_within[:, t], weights=valid) for t, limit in enumerate(THRESHOLDS_KM)
    }
    return jnp.average(0.9 * listwise_losses + 0.1 * pointwise_losses, weights=valid), metrics


def choose(logits: Float[Array, "B K 5"]) -> Float[Array, " B"]:
    """Returns the index of the candidate with the highest expected accuracy, averaged over all thresholds."""
    return jax.nn.softmax(logits, 1).sum(-1).argmax(1)
