"""The two parametrizations of the decoder: how initial values, multipliers and learning rates depend on its width.

"standard" has the same learning rate for all parameters, and its best value falls with the width. "mup" is the maximal
update parametrization for Adam (Yang et al. 2022, arXiv 2203.03466, table 3; table 8 is an equivalent form). With it,
one learning rate serves all widths. Let r be base_width / width. These are its differences from "standard":

- Weights that read the width (axes "embed", "heads" or "mlp") have r times the learning rate. These are the matrices of
  attention, feed-forward layers and the copy head, the second layers of the projections and similarities, and the head.
- The output layers, which are the head and the copy head's gate, have r times the initial variance too.
- Queries are multiplied by the square root of base head width / head width. So attention divides their products with
  keys by the head width instead of its square root. The copy head's products are divided by the width in the same way.
- The projections return vectors of norm 1 / sqrt(r), so that their components do not shrink with the width.

All other parameters are the same for all widths: token tables, learned vectors, biases, norms, and weights that read
the backbone's features, the cosines or the time. The feed-forward width must be a fixed multiple of the width.

"mup" also divides the output of each residual branch by depth / base_layers. One learning rate then serves all depths
too (Dey et al. 2025, arXiv 2505.01618, table 1, alpha = 1; for pre-norm). Weight decay is the same for all parameters
and sizes: each step subtracts learning rate x weight_decay x weight, without the factor r (the same table).
"""

import dataclasses

from flax import nnx

PARAMETRIZATIONS = ("standard", "mup")
#: Logical names of axes whose size grows with the width of the model.
_WIDTH_AXES = ("embed", "heads", "mlp")


@dataclasses.dataclass(frozen=True)
class ShapeSettings:
    """Width of the model and its parametrization.

    width: D, width of the layers. heads: number of attention heads. parametrization: "standard" or "mup".
    base_width, base_heads, base_layers: width, number of heads, and number of encoder layers and of decoder layers at
    which "mup" is the same model as "standard". They have no effect with "standard".
    """

    width: int
    heads: int
    parametrization: str
    base_width: int
    base_heads: int
    base_layers: int

    def __post_init__(self):
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"config.model.parametrization is {self.parametrization!r}: choose one of {', '.join(PARAMETRIZATIONS)}"
            )
        for name in ("base_width", "base_heads", "base_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.model.{name} is {getattr(self, name)}: use 1 or more")

    @property
    def width_ratio(self) -> float:
        """base_width / width, or 1 with "standard"."""
        return self.base_width / self.width if self.parametrization == "mup" else 1.0

    @property
    def head_ratio(self) -> float:
        """Base head width / head width, or 1 with "standard"."""
        return self.width_ratio * self.heads / self.base_heads if self.parametrization == "mup" else 1.0

    def depth_ratio(self, layers: int) -> float:
        """Returns base_layers / layers, or 1 with "standard". layers: number of layers in the encoder or decoder."""
        return self.base_layers / layers if self.parametrization == "mup" else 1.0


def set_learning_rates(model: nnx.Module, ratio: float) -> None:
    """Stores `ratio` in the metadata of all parameters that read the width, as the factor of their learning rate.

    The metadata's name is `learning_rate`, which train.step.Trainer reads. ratio: ShapeSettings.width_ratio.
    """
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *_, read, _ = (None, None, *(variable.get_metadata().get("out_sharding") or ()))
        if read in _WIDTH_AXES:
            variable.set_metadata(learning_rate=ratio)
