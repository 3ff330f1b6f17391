"""The scaling study on the demo's data, made by `geotoken scaling` (analysis/scaling.py).

It measures how the loss depends on the size of the decoder, the compute, the number of training photos, the number of
neighbors and the size of the gallery, and how the best learning rate depends on the width. Cells end at level 12
(2 km), because tokens after level 12 are noise in these data and would hide the changes of the loss. All tokens have
the same weight. The sizes have the parametrization "mup", so one learning rate serves them all. A moving average of
the parameters is validated: without it, a run would have its lowest loss at the end, when the learning rate is low, and
not where it begins to overfit.

With two runs at a time on two cores, the study took 134 minutes of processor time (2026-11-30). Of these, the grid took
46 minutes, the held-out run 12, the runs on fewer photos 8, the seeds 16, the neighbors 6, and the learning rates 46. A
run takes 80 s for compiling, validating and writing, and 35 s (655K) to 140 s (12K, which reads the most photos) per
TFLOP. If JAX_COMPILATION_CACHE_DIR names a folder, models that were compiled before begin 50 s sooner: all runs of a
size and a number of neighbors are one program.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo, ladder

_NOTE = (
    "The data are EarthView's photos, with 16 x 16 pixels as features. The model is the demo's decoder with ten "
    "neighbors, no dropout and tokens to level 12 (2 km), all with the same weight in the loss. The study was changed "
    "once before the forecast, because three runs had taken longer than expected: size 12K replaced 5K and 20K, runs "
    "on 12,000 photos were left out, and the runs for learning rates read 9,600 instead of 12,800 examples. After the "
    "forecast nothing was changed."
)

_LIMITS = (
    "The data are 32,000 map tiles with 16 x 16 pixels as features. MP16-Pro has 4.1 million photos by people, with "
    "features from CLIP. Those photos give other evidence of their place, so E, B and the exponent of data will "
    "differ.",
    "Sizes are 12,000 to 1.5 million weights, at most a thirtieth of the paper's model. With one to three layers, "
    "shape matters as much as size. Nothing shows that the law holds for 52 million weights.",
    "The law has no term for overfitting. A model that is large for its photos gets worse when it repeats them, and "
    "only the choice of the best step limits this.",
    "The effective number of examples counts a view like a photo. R* depends on this choice.",
    "Compute is mostly for reading neighbors and projecting features, which N does not count. The best size for an "
    "amount of compute holds only for these features and this number of neighbors.",
    "The gallery and the neighbors at test time are reduced for a decoder that was trained with all of them.",
    "The best learning rates are for one depth and one number of examples.",
    "The procedure should transfer: the same commands with another configuration, such as configs/scaling_pod.py, an "
    "array job, and a forecast that is written down before the last run is paid for.",
)


def get_config() -> ConfigDict:
    """Returns the demo's configuration with the scaling study in config.scaling."""
    config: Any = demo.get_config()
    config.name = "scaling"
    config.model.update(level=12, neighbors=10, dropout=0.0)
    config.loss.update(first_weight=1.0, last_weight=1.0)
    config.predict.update(samples=30, selectors=("greedy", "log_probability"), choice="greedy")
    config.predict.search.expansions = 0
    config.scaling = dict(
        sizes=tuple((name, ladder.MUP_SIZE[name]) for name in ("12K", "46K", "82K", "369K", "655K", "1536K")),
        held_out="1536K",
        reference="46K",
        # With 3e11 operations, the best of the sizes was the smallest. Three slices that are 3 times apart begin there.
        budgets=(4e11, 1.2e12, 3.6e12),
        held_out_budget=1.44e13,  # 4 times the largest budget
        seeds=(1,),
        validations=8,
        photos=(4_000, 32_000),
        epochs=0,
        neighbors=(0, 1, 3),
        # The widths 32 and 128 of the ladder are left out to save 10 minutes.
        transfer=tuple(
            (f"{parametrization}_{width}", ladder.transfer()[f"{parametrization}_{width}"])
            for parametrization in ("standard", "mup")
            for width in (16, 64, 256)
        ),
        # 2.5 times apart: a parabola needs points on both sides of its optimum, which moves by up to 16 times with the
        # width in the standard parametrization.
        rates=(6e-4, 1.5e-3, 3.75e-3, 9.4e-3, 2.3e-2),
        transfer_examples=9_600,
        split="test",
        gallery=(500, 2_000, 8_000, 32_000),
        test_neighbors=(1, 2, 3, 5, 10),
        candidates=(1, 3, 10, 30),
        resamples=200,
        seed=0,
        note=_NOTE,
        limits=_LIMITS,
    )
    return config
