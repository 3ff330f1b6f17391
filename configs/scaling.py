"""How loss falls with size, data, neighbors and gallery, on the demo's data: `geotoken scaling` (analysis/scaling.py).

Cells end at level 12 (2 km) and every token counts the same: past it tokens are noise here, and a loss that is half
noise would hardly move. Ten neighbors and no dropout: a run costs a quarter of the demo's, so that all fit in an hour.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo, ladder

_NOTE = (
    "EarthView's photos, 16 x 16 pixels as features; the demo's decoder with ten neighbors, no dropout and tokens "
    "to level 12 (2 km), where every token counts the same. What was changed on the way: examples and averaging "
    "were set after a first run, 5K was added after a fit of the first 15 runs put a at its bound, the reference "
    "was 369K before it was 82K, and a second budget, 20 neighbors and a held-out run on all photos were given up "
    "for time; the forecast came after all of that, and was not touched again."
)

_LIMITS = (
    "The photos are satellite tiles seen as 16 x 16 pixels, 32,000 of them. MP16-Pro has 4.1 million photos taken "
    "by people, seen by a CLIP tower; what a photo tells of its place, and so E, B and b, is another matter "
    "there.",
    "The data is saturated: the first neighbor of nearly half of the photos lies within 200 km, and of the others "
    "the decoder learns little. So a larger size brings hundredths of a nat, no more than another seed does, and "
    "the exponent a is not determined: its interval reaches both bounds that the fit has, 0 and 4. To "
    "say that a size will do as the largest before it does forecasts the held-out run better than the law.",
    "At 2,000 and 5,000 photos the larger models are worse, as they know them by heart sooner; a law that adds a "
    "term of size and one of data cannot say so.",
    "Sizes span 5,000 to 1.5 million weights, at most a thirtieth of the paper's. At one to three layers a "
    "model's shape and learning rate matter as much as its size; nothing here says that the law holds for 52 "
    "million.",
    "Compute is not 6 N D: most of it goes into reading neighbors and projecting features, which N does not "
    "count. The frontier is of these features, this number of neighbors and this many passes over the data.",
    "At equal compute the smallest size wins where the largest has 68 steps: with more compute than this study "
    "spends the order is another.",
    "A run is one seed, its best moment is chosen on the photos that give its loss, and each size had one "
    "learning rate, from a rule with two points checked.",
    "The gallery is cut down at test time only, for a decoder that was trained with all of it.",
    "What should transfer is the procedure: the same commands with another configuration, an array job, and a "
    "forecast that is written down before it is paid for.",
)


def get_config() -> ConfigDict:
    """Returns the demo's configuration with the study."""
    config: Any = demo.get_config()
    config.name = "scaling"
    config.model.update(level=12, neighbors=10, dropout=0.0)
    # Parameters averaged over about 50 steps: else the best of a run would be where its learning rate is low, not where
    # it begins to know its photos by heart.
    config.train.ema = 0.98
    config.loss.update(first_weight=1.0, last_weight=1.0)
    others = set(config.variants) - {"geotoken"}
    config.evaluate.labels = {name: label for name, label in config.evaluate.labels.items() if name not in others}
    config.variants = dict(geotoken=dict())
    config.predict.update(samples=30, selectors=("greedy", "log_probability"), choice="greedy")
    config.predict.search.expansions = 0
    config.scaling = dict(
        sizes=tuple((name, ladder.SIZE[name]) for name in ("5K", "20K", "46K", "82K", "369K", "655K", "1536K")),
        held_out="1536K",
        held_out_photos=12_800,
        # Twice the examples for 2.5 times the photos: of 24,000 examples of 2,000 photos the smallest size was best
        # after 12,000, and knew them by heart from there on.
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
