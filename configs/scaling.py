"""The scaling study on the demo's data, made by `geotoken scaling` (analysis/scaling.py).

It measures how the loss depends on the size of the decoder, the number of training photos, the number of neighbors and
the size of the gallery. Cells end at level 12 (2 km), because tokens after level 12 are noise in these data and would
hide the changes of the loss. All tokens have the same weight. With ten neighbors and no dropout, a run takes a quarter
of the demo's time, so all runs together take less than an hour.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo, ladder

_NOTE = (
    "The data are EarthView's photos, with 16 x 16 pixels as features. The model is the demo's decoder with ten "
    "neighbors, no dropout and tokens to level 12 (2 km), all with the same weight in the loss. The study was changed "
    "several times before the forecast: examples and averaging were set after a first run; size 5K was added because "
    "the fit of the first 15 runs put the exponent a at its bound; the reference was first 369K, then 82K; a second "
    "budget, 20 neighbors and a held-out run on all photos were omitted for lack of time. After the forecast nothing "
    "was changed."
)

_LIMITS = (
    "The data are 32,000 map tiles with 16 x 16 pixels as features. MP16-Pro has 4.1 million photos by people, with "
    "features from CLIP. Those photos give other evidence of their place, so E, B and b will differ.",
    "The data are saturated: nearly half of the photos have their first neighbor within 200 km, and the decoder "
    "learns little from the others. So a larger size lowers the loss by hundredths of a nat, no more than another "
    "seed does. The exponent a is not determined: its interval reaches both bounds of the fit, 0 and 4. The loss of "
    "the next smaller size is a better forecast for the held-out run than the law.",
    "With 2,000 and 5,000 photos the larger models are worse, because they overfit sooner. A law that is the sum of "
    "a size term and a data term cannot express this.",
    "Sizes are 5,000 to 1.5 million weights, at most a thirtieth of the paper's model. With one to three layers, "
    "shape and learning rate matter as much as size. Nothing shows that the law holds for 52 million weights.",
    "Compute is not 6 N D: most of it is for reading neighbors and projecting features, which N does not "
    "count. The frontier holds only for these features, this number of neighbors and this number of epochs.",
    "At equal compute the smallest size has the lowest loss, but the largest gets only 68 steps. With more compute "
    "than in this study the order will differ.",
    "Each run has one seed, its best step is chosen on the same photos that give its loss, and each size has one "
    "learning rate, from a rule that was checked at two sizes.",
    "The gallery is reduced only at test time, for a decoder that was trained with the whole gallery.",
    "The procedure should transfer: the same commands with another configuration, an array job, and a forecast that "
    "is written down before the last run is paid for.",
)


def get_config() -> ConfigDict:
    """Returns the demo's configuration with the scaling study in config.scaling."""
    config: Any = demo.get_config()
    config.name = "scaling"
    config.model.update(level=12, neighbors=10, dropout=0.0)
    # A moving average of the parameters over about 50 steps is validated. Without it, a run would have its lowest loss
    # at the end, when the learning rate is low. With it, the lowest loss is where the run begins to overfit.
    config.train.ema = 0.98
    config.loss.update(first_weight=1.0, last_weight=1.0)
    config.predict.update(samples=30, selectors=("greedy", "log_probability"), choice="greedy")
    config.predict.search.expansions = 0
    config.scaling = dict(
        sizes=tuple((name, ladder.SIZE[name]) for name in ("5K", "20K", "46K", "82K", "369K", "655K", "1536K")),
        held_out="1536K",
        held_out_photos=12_800,
        # Pairs of the numbers of photos and of examples: 2.5 times the photos for twice the examples. With 2,000 photos
        # and 24,000 examples, even the smallest size overfitted after 12,000 examples.
        photos=((2_000, 12_000), (5_000, 24_000), (12_800, 48_000), (32_000, 96_000)),
        validations=8,
        reference="82K",
        neighbors=(0, 1, 3),
        seeds=(1, 2),
        budgets=(3e11,),
        gallery=(500, 2_000, 8_000, 32_000),
        candidates=(1, 3, 10, 30),
        split="test",
        resamples=300,
        seed=0,
        note=_NOTE,
        limits=_LIMITS,
    )
    return config
