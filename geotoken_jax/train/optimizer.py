"""AdamW with the paper's exponential schedule, or with a cosine schedule."""

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW and its learning-rate schedule.

    learning_rate: highest learning rate. schedule: "cosine", in which the rate falls to zero at the end of training, or
    "exponential", in which it is multiplied by `decay` after each epoch, as published. warmup: share of all steps, 0 to
    1, in which the rate first rises linearly from 0. weight_decay, b2: arguments of AdamW. clip: largest global norm of
    the gradient; no clipping if 0.
    """

    learning_rate: float
    schedule: str
    decay: float
    warmup: float
    weight_decay: float
    b2: float
    clip: float

    def __post_init__(self):
        if self.schedule not in ("cosine", "exponential"):
            raise ValueError(f"schedule is {self.schedule!r}: choose cosine or exponential")


def make_schedule(settings: OptimizerSettings, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns a function from step to learning rate. steps: number of training steps."""
    warm = round(settings.warmup * steps)
    if settings.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warm else settings.learning_rate, settings.learning_rate, warm, steps
        )
    decay = optax.exponential_decay(settings.learning_rate, steps_per_epoch, settings.decay, staircase=True)
    rise = optax.linear_schedule(0.0, settings.learning_rate, max(warm, 1))
    return optax.join_schedules([rise, decay], [warm]) if warm else decay


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW, with clipping if `settings.clip` > 0. Biases, scales and other vectors have no weight decay.

    Its `update` has two more arguments. `rate` is the learning rate. It is not a constant of the compiled step, so
    trainings of all lengths and rates share one program. `factors` is optional: the factor of each parameter's learning
    rate, in a tree like the parameters. Weight decay does not depend on it: a step subtracts rate x weight_decay x
    parameter.
    """

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(_is_matrix, params)

    adamw = optax.chain(
        _adam(settings.b2),
        optax.add_decayed_weights(settings.weight_decay, matrices),
        _negative_rate(),
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw) if settings.clip else adamw


def _adam(b2: float) -> optax.GradientTransformationExtraArgs:
    """Returns Adam without its learning rate. `update` multiplies the updates with its argument `factors`."""
    adam = optax.scale_by_adam(b2=b2)

    def update(updates: Any, state: Any, params: Any = None, *, factors: Any = None, **_: Any) -> tuple[Any, Any]:
        updates, state = adam.update(updates, state, params)
        return (updates if factors is None else jax.tree.map(lambda x, f: x * f, updates, factors)), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _negative_rate() -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose `update` multiplies the updates with its argument `rate`, negated."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: -extra["rate"] * x, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _is_matrix(path: tuple[Any, ...], parameter: Any) -> bool:
    # Biases and scales of stacked layers have two axes too, because the first one is the layer.
    name = str(getattr(path[-1], "key", path[-1]))
    return parameter.ndim > 1 and not name.endswith(("bias", "scale"))
