"""One training step, and the state it carries: created sharded, updated in place, the same on any mesh."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geotoken_jax import sharding

#: {"step": int32, "params": ..., "constants": ..., "optimizer": ...}: pure dicts and optax's own containers.
State = dict[str, Any]


class Task(Protocol):
    """What is learned."""

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the model with its first parameters."""
        ...

    def loss(
        self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss and further metrics, each a mean over the batch's photos (but for those that `valid`, where
        the batch has it, leaves out). A key of None means evaluation: no dropout."""
        ...


class Trainer:
    """A task, an optimizer and a mesh as three compiled functions: `init`, `step`, `evaluate`."""

    def __init__(self, task: Task, optimizer: optax.GradientTransformation, mesh: Mesh):
        self.mesh = mesh
        self._task, self._optimizer = task, optimizer
        abstract = nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))
        self._graph, *self._abstract = nnx.split(abstract, nnx.Param, ...)
        self._shardings = self._state_shardings(*self._abstract)
        self.batch_sharding = sharding.batch_sharding(mesh)
        self.init: Callable[[jax.Array], State] = jax.jit(self._init, out_shardings=self._shardings)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self._shardings, None))
        self.evaluate = jax.jit(self._evaluate)

    def _state_shardings(self, params: nnx.State, constants: nnx.State) -> State:
        whole = NamedSharding(self.mesh, PartitionSpec())
        params_shardings = sharding.shardings(params, self.mesh)
        pure = nnx.to_pure_dict(params)
        moments = jax.eval_shape(self._optimizer.init, pure)
        return {
            "step": whole,
            "params": params_shardings,
            "constants": sharding.shardings(constants, self.mesh),
            # Moments lie as their parameters do; counters are whole everywhere.
            "optimizer": optax.tree_utils.tree_map_params(
                self._optimizer, lambda _, s: s, moments, params_shardings, transform_non_params=lambda _: whole
            ),
        }

    def _init(self, key: jax.Array) -> State:
        _, params, constants = nnx.split(self._task.init(nnx.Rngs(key)), nnx.Param, ...)
        params = nnx.to_pure_dict(params)
        return {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "constants": nnx.to_pure_dict(constants),
            "optimizer": self._optimizer.init(params),
        }

    def model(self, state: State) -> nnx.Module:
        """Returns the module that a state holds."""
        return self._merge(state["params"], state["constants"])

    def _merge(self, *pure: Any) -> nnx.Module:
        states = [jax.tree.map(lambda x: x, abstract) for abstract in self._abstract]
        for state, values in zip(states, pure, strict=True):
            nnx.replace_by_pure_dict(state, values)
        return nnx.merge(self._graph, *states)

    def _step(self, state: State, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state["step"])

        def mean_loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self._task.loss(self._merge(params, state["constants"]), batch, key)

        (loss, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state["params"])
        updates, optimizer = self._optimizer.update(gradient, state["optimizer"], state["params"])
        new = {
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "constants": state["constants"],
            "optimizer": optimizer,
        }
        return new, {"loss": loss, "gradient_norm": optax.tree.norm(gradient), **metrics}

    def _evaluate(self, state: State, batch: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        """Returns sums over the valid photos of a batch, and how many there are."""
        loss, metrics = self._task.loss(self.model(state), batch, None)
        n = batch["valid"].sum()
        return {name: value * n for name, value in {"loss": loss, **metrics}.items()}, n
