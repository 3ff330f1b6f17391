"""Fits the reranker to photos whose place is known."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Float

from geotoken_jax.model.reranker import Reranker, RerankerSettings, within_loss


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Settings of the fit (config.reranker.fit).

    photos: largest number of validation photos that are used. folds: number of groups of authors. The photos of each
    group are ranked by a reranker that is fitted to the photos of the other groups. epochs: number of passes over the
    photos. batch_size: photos per step. learning_rate: learning rate of the first step; the rate falls to 0 along a
    cosine. weight_decay: weight decay of AdamW. dropped: share of candidates left out at random in every step. seed:
    random seed of the initial weights, the order of photos and the candidates left out.
    """

    photos: int
    folds: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    dropped: float
    seed: int

    def __post_init__(self):
        for name in ("photos", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use 1 or more")
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}: use 2 or more")
        if not 0 <= self.dropped < 1:
            raise ValueError(f"dropped is {self.dropped}: use a share from 0 to below 1")


def fit(
    settings: RerankerSettings,
    options: FitSettings,
    scale: Float[np.ndarray, " C"],
    features: Float[np.ndarray, "n K F"],
    present: Bool[np.ndarray, "n K"],
    km: Float[np.ndarray, "n K"],
) -> Reranker:
    """Returns a reranker fitted to n photos.

    scale: scale of each channel (model.reranker.scales). features: features of each candidate
    (model.reranker.features). present: False for candidates that do not count. km: distance of each candidate from the
    photo's true place.
    """
    moments = np.stack([features[present].mean(0), features[present].std(0)])
    network = Reranker(settings, moments, scale, rngs=nnx.Rngs(options.seed))
    graph, parameters, rest = nnx.split(network, nnx.Param, ...)
    train_epoch = _Epoch(graph, rest, options, len(features))
    run, data = jax.jit(train_epoch), (jnp.asarray(features), jnp.asarray(present), jnp.asarray(km, jnp.float32))
    carry = parameters, train_epoch.optimizer.init(parameters)
    for epoch in range(options.epochs):
        carry = run(carry, data, jax.random.fold_in(jax.random.key(options.seed), epoch))
    return nnx.merge(graph, carry[0], rest)


class _Epoch:
    """Function that trains the reranker for one epoch, in batches of photos in random order."""

    def __init__(self, graph: Any, rest: Any, options: FitSettings, n: int):
        """graph, rest: the reranker without its parameters, from nnx.split. n: number of photos."""
        self._graph, self._rest, self._dropped = graph, rest, options.dropped
        self._size = min(options.batch_size, n)
        self._steps = n // self._size
        rate = optax.cosine_decay_schedule(options.learning_rate, options.epochs * self._steps)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=options.weight_decay)
        )

    def __call__(self, carry: Any, data: Any, key: jax.Array) -> Any:
        """Returns the parameters and the optimizer's state after an epoch.

        carry: parameters and optimizer's state before. data: features, present and km, see `fit`. key: random key.
        """
        features, present, km = data
        order_key, drop_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(features))

        def loss(parameters: Any, rows: jax.Array, key: jax.Array) -> jax.Array:
            kept = present[rows] & ~jax.random.bernoulli(key, self._dropped, present[rows].shape)
            log_p = nnx.merge(self._graph, parameters, self._rest)(features[rows], kept)
            return within_loss(log_p, km[rows], kept)

        def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
            parameters, optimizer_state = carry
            rows = jax.lax.dynamic_slice_in_dim(order, i * self._size, self._size)
            gradients = jax.grad(loss)(parameters, rows, jax.random.fold_in(drop_key, i))
            updates, optimizer_state = self.optimizer.update(gradients, optimizer_state, parameters)
            return (optax.apply_updates(parameters, updates), optimizer_state), None

        return jax.lax.scan(step, carry, jnp.arange(self._steps))[0]
