"""The training step and its state, for any mesh of devices. The step updates the state in place."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geotoken_jax import randomness, sharding
from geotoken_jax.settings import SettingsError

#: State of a training, a dict of arrays and optax's containers. step: number of steps done. params: variables of the
#: model that the optimizer changes, of type nnx.Param. constants: all other variables of the model, such as statistics
#: of the training data or a queue of earlier photos. The optimizer does not change them, but the loss may, and the next
#: step reads the changed values. optimizer: optax's state. skipped: number of skipped steps, which had no effect
#: because their loss or gradient was not finite. skipped_in_a_row: number of skipped steps since the last step that was
#: not skipped. ema: moving average of params, only if it is used.
State = dict[str, Any]
#: Metrics by name, each a mean over a batch.
Metrics = dict[str, jax.Array]
#: Arrays that stay on the devices over all steps, such as the gallery's embeddings.
Resident = Mapping[str, jax.Array]


class Task(Protocol):
    """A model and its loss."""

    #: Floating-point operations of one example, forward and backward; 0 if unknown.
    flops: float

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the model with its initial parameters.

        Variables that only training needs have `training_only=True` in their metadata, and are not exported.
        """
        ...

    def loss(self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Returns the loss and further metrics, each a mean over the photos of the batch, or over its `valid` photos.

        batch: arrays of the batch and the resident arrays. key: random key for dropout. In evaluation it is None: there
        is no dropout, and changes of the model's variables are discarded.
        """
        ...


class Trainer:
    """Compiled functions `init`, `step` and `evaluate` of a task with an optimizer, on a mesh.

    optimizer: its `update` gets the arguments `rate` and `factors` of train.optimizer. accumulate: number of parts of a
    batch that are processed one after another. The gradients of the parts are averaged. ema: decay of the moving
    average of the parameters, which `evaluate` and `averaged` use; no average if 0. gradient_dtype: type in which
    gradients are summed over devices and parts.
    """

    def __init__(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        accumulate: int = 1,
        ema: float = 0.0,
        gradient_dtype: str = "float32",
    ):
        self.mesh = mesh
        self._task, self._accumulate, self._ema = task, accumulate, ema
        self._optimizer = optax.with_extra_args_support(optimizer)
        self._sums = jnp.dtype(gradient_dtype)
        self._graph, *self._variables = nnx.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))), nnx.Param, ...)
        self._set_shardings()
        self._factors = _learning_rates(self._variables[0])
        shardings = self._state_shardings()
        shapes = jax.eval_shape(self._init, randomness.key(0))
        #: Shapes, types and shardings of the state.
        self.abstract: State = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        self.batch_sharding = sharding.batch_sharding(mesh)
        self.init: Callable[[jax.Array], State] = jax.jit(self._init, out_shardings=shardings)
        self.step = jax.jit(self._on_mesh(self._step), donate_argnums=0, out_shardings=(shardings, None))
        self.evaluate = jax.jit(self._on_mesh(self._evaluate))

    def _set_shardings(self) -> None:
        """Sets four nested dicts with the structure of the parameters.

        _layout, _dtypes: sharding and type in which the model reads each parameter. _updates: sharding in which the
        optimizer stores it. _gradients: type and sharding in which its gradient is summed. The gradient of parameters
        that are stacked over layers is summed inside the loop over layers instead.
        """
        self._layout = sharding.shardings(self._variables[0], self.mesh)
        dtypes, updates, gradients = {}, {}, {}
        alone = all(self.mesh.shape[axis] == 1 for axis in sharding.RULES["batch"])  # nothing is summed over devices
        for path, variable in nnx.to_flat_state(self._variables[0]):
            names = variable.get_metadata().get("out_sharding") or ()
            dtype = variable.get_metadata().get("compute_dtype", variable.dtype)
            update = sharding.update_spec(variable, self.mesh)
            sums = dtype if alone else jnp.promote_types(dtype, self._sums)
            gradient = sharding.Gradient(str(sums), sharding.spec(*names), update)
            dtypes[path], updates[path] = dtype, NamedSharding(self.mesh, update)
            if names[:1] == ("layers",) and update[0] is None:
                # The gradient is summed in the loop over layers, which reads this metadata.
                variable.set_metadata(gradient=gradient)
                gradient = dataclasses.replace(gradient, dtype=str(dtype), layout=update)
            gradients[path] = gradient
        self._dtypes, self._updates, self._gradients = map(traverse_util.unflatten_dict, (dtypes, updates, gradients))

    def _on_mesh(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def traced(*arguments: Any) -> Any:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # sharding.constrain reads it
                return function(*arguments)

        return traced

    def _state_shardings(self) -> State:
        whole = NamedSharding(self.mesh, PartitionSpec())
        params, constants = self._updates, sharding.shardings(self._variables[1], self.mesh)
        moments = jax.eval_shape(self._optimizer.init, nnx.to_pure_dict(self._variables[0]))
        return {
            "step": whole,
            "skipped": whole,
            "skipped_in_a_row": whole,
            "params": params,
            "constants": constants,
            # Moments are split like their parameters. Each device has all counters.
            "optimizer": optax.tree_utils.tree_map_params(
                self._optimizer, lambda _, s: s, moments, params, transform_non_params=lambda _: whole
            ),
            **({"ema": params} if self._ema else {}),
        }

    def _init(self, key: jax.Array) -> State:
        _, *variables = nnx.split(self._task.init(nnx.Rngs(key)), nnx.Param, ...)
        params, constants = map(nnx.to_pure_dict, variables)
        zero = jnp.zeros((), jnp.int32)
        return {
            "step": zero,
            "skipped": zero,
            "skipped_in_a_row": zero,
            "params": params,
            "constants": constants,
            "optimizer": self._optimizer.init(params),
            **({"ema": params} if self._ema else {}),
        }

    def describe(self) -> str:
        """Returns a table of all parameters: name, shape, mesh axes that split it, and size.

        The last row has the shape of the mesh and the total size.
        """
        params: Any = traverse_util.flatten_dict(self.abstract["params"])
        rows = [
            ("/".join(map(str, name)), str(p.shape), str(tuple(p.sharding.spec)), f"{p.size:,}")
            for name, p in params.items()
        ]
        rows.append(("all", "", str(dict(self.mesh.shape)), f"{sum(p.size for p in params.values()):,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "".join(
            f"{name:{widths[0]}}  {shape:{widths[1]}}  {spec:{widths[2]}}  {size:>{widths[3]}}\n"
            for name, shape, spec, size in rows
        )

    def averaged(self, state: State) -> Any:
        """Returns the parameters to evaluate and export: their moving average if there is one, else the newest ones."""
        return state.get("ema", state["params"])

    def exported(self, state: State) -> list[Any]:
        """Returns the parameters and constants that are exported: all except the variables that only training needs."""
        kept = []
        for variables, values in zip(self._variables, (self.averaged(state), state["constants"]), strict=True):
            flat: Any = traverse_util.flatten_dict(values)
            paths = [path for path, v in nnx.to_flat_state(variables) if not v.get_metadata().get("training_only")]
            kept.append(traverse_util.unflatten_dict({path: flat[path] for path in paths}))
        return kept

    def _model(self, *pure: Any) -> nnx.Module:
        states = [jax.tree.map(lambda x: x, variables) for variables in self._variables]
        for state, values in zip(states, pure, strict=True):
            nnx.replace_by_pure_dict(state, values)
        return nnx.merge(self._graph, *states)

    def _for_model(self, params: Any) -> Any:
        """Returns the optimizer's parameters in the types and the sharding in which the model reads them.

        They are cast before they are gathered. So each device casts its share only, and devices send the narrower type.
        """
        cast = jax.tree.map(lambda x, dtype: x.astype(dtype), params, self._dtypes)
        cast = jax.lax.with_sharding_constraint(cast, self._updates)
        return jax.lax.with_sharding_constraint(cast, self._layout)

    def _step(
        self, state: State, batch: Mapping[str, jax.Array], key: jax.Array, rate: jax.Array, resident: Resident
    ) -> tuple[State, Metrics]:
        key = jax.random.fold_in(key, state["step"])
        constants, metrics, gradient = self._gradient(state, batch, key, resident)
        gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, state["params"])
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, optimizer = self._optimizer.update(
            gradient, state["optimizer"], state["params"], rate=rate, factors=self._factors
        )
        params = optax.apply_updates(state["params"], updates)
        updated = {"params": params, "optimizer": optimizer, "constants": constants}
        if self._ema:
            # The decay is small at first. Otherwise the initial parameters would stay in the average for long.
            decay = jnp.minimum(self._ema, (1.0 + state["step"]) / (10.0 + state["step"]))
            updated["ema"] = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state["ema"], params)
        before = {name: state[name] for name in updated}
        return {
            **jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, before),
            "step": state["step"] + 1,
            "skipped": state["skipped"] + ~finite,
            "skipped_in_a_row": jnp.where(finite, 0, state["skipped_in_a_row"] + 1),
        }, {**metrics, "gradient_norm": norm}

    def _gradient(
        self, state: State, batch: Mapping[str, jax.Array], key: jax.Array, resident: Resident
    ) -> tuple[Any, Metrics, Any]:
        """Returns the state's constants after the batch, the batch's metrics with its loss, and the gradient.

        If the batch is processed in parts, each part reads the constants that the part before it has changed. Metrics
        and gradient are means over the parts.
        """

        params = self._for_model(state["params"])

        def part_gradient(
            constants: Any, part: Mapping[str, jax.Array], key: jax.Array
        ) -> tuple[Any, tuple[Metrics, Any]]:
            def mean_loss(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
                attached = jax.tree.map(lambda x, gradient: gradient.attach(x), params, self._gradients)
                model = self._model(attached, constants)
                loss, metrics = self._task.loss(model, {**part, **resident}, key)
                _, _, others = nnx.split(model, nnx.Param, ...)
                return loss, (metrics, nnx.to_pure_dict(others))

            (loss, (metrics, after)), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
            gradient = jax.tree.map(lambda x: x.astype(self._sums), gradient)
            return after, ({"loss": loss, **metrics}, jax.lax.with_sharding_constraint(gradient, self._updates))

        n = self._accumulate
        if n == 1:
            constants, metrics_gradient = part_gradient(state["constants"], batch, key)
            return constants, *metrics_gradient
        size, devices = len(next(iter(batch.values()))), self.batch_sharding.num_devices // self.mesh.shape["tensor"]
        if size % (n * devices):
            raise SettingsError(
                f"batch_size is {size}, which does not divide over accumulate = {n} parts and data x fsdp = {devices} "
                f"devices: set batch_size to a multiple of {n * devices}"
            )

        # A part has every n-th row, so that each device already has its share of every part. With consecutive rows, a
        # part would be on a few devices.
        def cut(x: jax.Array) -> jax.Array:
            return sharding.constrain(x.reshape(size // n, n, *x.shape[1:]).swapaxes(0, 1), None, "batch")

        parts = jax.tree.map(cut, dict(batch))
        keys = jax.random.split(key, n)

        def add(sums: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
            constants, total = sums
            constants, metrics_gradient = part_gradient(constants, *part)
            return (constants, jax.tree.map(jnp.add, total, metrics_gradient)), None

        first = state["constants"], jax.tree.map(lambda x: x[0], parts), key
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part_gradient, *first)[1])
        (constants, total), _ = jax.lax.scan(add, (state["constants"], zeros), (parts, keys))
        return constants, *jax.tree.map(lambda x: x / n, total)

    def _evaluate(self, state: State, batch: Mapping[str, jax.Array], resident: Resident) -> tuple[Metrics, jax.Array]:
        """Returns the sums of loss and metrics over the valid photos of a batch, and the number of these photos."""
        model = self._model(self._for_model(self.averaged(state)), state["constants"])
        loss, metrics = self._task.loss(model, {**batch, **resident}, None)
        n = batch["valid"].sum()
        return {name: value * n for name, value in {"loss": loss, **metrics}.items()}, n


def _learning_rates(params: nnx.State) -> Any:
    """Returns the factor of each parameter's learning rate as nested dicts, or None if all factors are 1.

    A factor is stored in the parameter's metadata as `learning_rate`; without this entry it is 1.
    """
    factors = {path: v.get_metadata().get("learning_rate", 1.0) for path, v in nnx.to_flat_state(params)}
    return None if set(factors.values()) <= {1.0} else traverse_util.unflatten_dict(factors)
