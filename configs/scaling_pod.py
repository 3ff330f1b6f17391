"""A scaling study of decoders with 7 million to 1 billion weights on MP16-Pro, for a pod or for an array of nodes.

Like configs/scaling.py, it is made by `geotoken scaling`; `geotoken scaling plan` prints its cost on a topology. It has
not been run.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import ladder, scaling

_SIZES = ("7M", "24M", "52M", "177M", "419M", "939M")
#: Examples over which the parameters are averaged: a tenth of the 2.6 million examples of the shortest run.
_EMA_EXAMPLES = 260_000

_NOTE = "The data are MP16-Pro's photos, with features from CLIP ViT-L/14. The model is the demo's decoder."

_LIMITS = (
    "The law has no term for overfitting. A model that is large for its photos gets worse when it repeats them, and "
    "only the choice of the best step limits this.",
    "Compute is 15 to 18 times 6 N D, because each example has tokens for 15 neighbors. The best size for an amount of "
    "compute holds only for this number of neighbors.",
    "The gallery and the neighbors at test time are reduced for a decoder that was trained with all of them.",
)


def _changes(size: dict[str, Any]) -> dict[str, Any]:
    """Returns the changes of a size for MP16-Pro. size: a value of ladder.SIZE or ladder.MUP_SIZE."""
    train = {**size["train"], "ema": ladder.ema(size["train"]["batch_size"], _EMA_EXAMPLES)}
    # A parameter's state is split over `data` if an axis divides by the number of chips there. The width 1344 divides
    # by 64 but not by 256. Without fsdp, each of 256 chips would store the whole state of 939M, 15 GB.
    return {**size, "train": train, "mesh": dict(fsdp=4 if size["model"]["width"] % 256 else 1)}


def get_config() -> ConfigDict:
    """Returns the ladder's configuration for MP16-Pro with a scaling study in config.scaling."""
    config: Any = ladder.get_config("52M,mup")
    config.name = "scaling_pod"
    config.loss.update(first_weight=1.0, last_weight=1.0)
    config.predict.update(samples=30, selectors=("greedy", "log_probability"), choice="greedy")
    config.predict.search.expansions = 0
    study: Any = scaling.get_config()
    config.scaling = study.scaling
    config.scaling.update(
        sizes=tuple((name, _changes(ladder.MUP_SIZE[name])) for name in _SIZES),
        held_out="939M",
        reference="52M",
        # With the smallest budget, the largest fitted size reads 2.6 million photos, which are 630 steps. With the
        # largest, the best size is expected inside the range: 52M then reads each photo 26 times.
        budgets=(1e17, 4e17, 1.6e18),
        held_out_budget=6.4e18,  # 4 times the largest budget
        photos=(500_000, 1_500_000, 4_000_000),
        neighbors=(0, 1, 3),
        transfer=tuple(
            (f"{parametrization}_{name}", _changes(sizes[name]))
            for parametrization, sizes in (("standard", ladder.SIZE), ("mup", ladder.MUP_SIZE))
            for name in ("7M", "52M", "419M")
        ),
        rates=(3e-4, 7e-4, 1.6e-3, 3.7e-3, 8.5e-3),
        transfer_examples=4_000_000,
        split="im2gps3k",  # config.benchmarks.photos.im2gps3k.path has to be set
        gallery=(4_000, 40_000, 400_000, 4_000_000),
        test_neighbors=(1, 2, 3, 5, 10, 15),
        note=_NOTE,
        limits=_LIMITS,
    )
    return config
