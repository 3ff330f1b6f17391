"""The experiments that the paper leaves open, on the demo's data: `geotoken experiment NAME` (stages/experiments.py).

Those that train see 30,000 examples a run, a fifth of the demo's: a minute each on two cores. What a table says is
in its `note`, written after it was made.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo

_BOTH = ("test", "test_shift")
_GREEDY = dict(samples=0, choice="greedy", selectors=("greedy",), search=dict(expansions=0))


_SHOWN = ("top1_neighbor", "knn", "geoclip", "classifier", "geotoken")


def get_config() -> ConfigDict:
    """Returns the demo's configuration with every experiment."""
    config: Any = demo.get_config()
    config.name = "experiments"
    config.evaluate.labels = {name: label for name, label in config.evaluate.labels.items() if name in _SHOWN}
    config.variants = dict(geotoken=dict())
    goals = ("1_km", "25_km", "200_km", "750_km", "2500_km", "geoscore")
    config.predict.selectors = (
        *("greedy", "log_probability", "similarity", "consensus", "reward", "verifier", "comparator", "likeness"),
        *(f"expected_{goal}" for goal in goals),
        *(f"point_{goal}" for goal in goals),
        *("point_comparator", "point_likeness"),
    )
    experiments = {**_chosen(config), **_read(), **_learned()}
    config.experiments = {name: {"note": "", "splits": _BOTH, **what} for name, what in experiments.items()}
    return config


def _chosen(config: Any) -> dict[str, Any]:
    """Experiments with the demo's own decoder: how candidates are made and chosen."""

    def sampled(temperature: float, samples: int) -> dict:
        return dict(predict=dict(temperature=temperature, samples=samples, choice="log_probability", **_ALONE))

    def beam(width: int) -> dict:
        return dict(predict=dict(beam=width, choice="log_probability", **_ALONE))

    temperatures, sizes = (0.2, 0.4, 0.7, 1.0, 1.4), (1, 10, 100)
    return dict(
        greedy_sanity=dict(
            question="Is greedy decoding as good as the choice among 30 samples, and is either better than the first "
            "neighbor's place?",
            note="Greedy and the most probable of 31 are the same to within half a point, and both are above the first"
            " neighbor by 1.4 points at 25 km and 4.3 at 200 km (README). What the pool holds is far above: 49 "
            "and 64 %.",
            runs=(("greedy", dict(predict=_GREEDY)), ("30 samples", sampled(0.7, 30))),
            choices=("", "ideal"),
        ),
        selection=dict(
            question="One pool of 30 samples and the greedy candidate: which selector finds the best of them?",
            note="Half of the gap between log-probability and the ideal is closed by `point_likeness` alone: 91 and 79"
            " % of it at 25 and 200 km on test, 92 and 61 % on test_shift. It does not choose in the pool: it "
            "looks at the whole gallery and answers with the place around which photos are most alike. Among the "
            "candidates the comparator is best on test (40 and 49 %) and likeness on test_shift (23 and 23 %); "
            "the verifier, which reads all there is as features, is no better than the comparator on test and "
            "helps little on the other map; the reward head is worse than greedy. Expected accuracy under the "
            "model's own distribution gains where its goal is coarse (2,500 km: +2.2 and +0.2) and costs "
            "everywhere else: the model is too unsure of what it gets right. test and test_shift were looked at "
            "while these were made; on a draw of EarthView that was not (seed 1), `point_likeness` closed all of "
            "the gap on test, and 114 and 83 % on test_shift.",
            runs=(("pool", dict(predict=dict(choice="log_probability"))),),
            choices=("", "ideal", *config.predict.selectors),
        ),
        temperature=dict(
            question="How do temperature and the number of samples change the choice by log-probability, and what the "
            "pool holds?",
            note="What is chosen hardly changes. A low temperature and many samples gain a little (T = 0.4, K = 100: "
            "+0.7 at 25 km). What the pool holds grows with K at every temperature, most at 0.7 for small "
            "distances and at 1.4 for large ones: samples are worth what the selector can make of them.",
            runs=tuple(
                (f"T = {temperature}, K = {k}", sampled(temperature, k)) for temperature in temperatures for k in sizes
            ),
            choices=("", "ideal"),
            splits=("test",),
        ),
        beam=dict(
            question="Does a wider beam find better places, or only more probable ones?",
            note="Two are better than one at small distances (+0.9 at 25 km); from four on the answer gets worse at "
            "200 km and beyond, as what is more probable to the last token is no better a place. The pool of a "
            "beam holds less than that of samples: of 30, 44.9 against 48.9 % within 25 km.",
            runs=(("greedy", dict(predict=_GREEDY)), *((f"beam of {n}", beam(n)) for n in (2, 4, 8, 16, 30))),
            choices=("", "ideal"),
        ),
    )


#: One selector, and no search of the distribution, which it does not need.
_ALONE = dict(selectors=("log_probability",), search=dict(expansions=0))


_SHORT = dict(predict=_GREEDY, train=dict(examples=30_000))


def _runs(*named: tuple[str, dict]) -> tuple:
    return tuple((name, {**_SHORT, **changes}) for name, changes in named)


def _model(**changes: Any) -> dict:
    return dict(model=changes)


#: More neighbors than the demo records.
_RECORDED = dict(index=dict(neighbors=dict(count=30)))


def _masked(km: float) -> dict:
    return dict(index=dict(neighbors=dict(exclude_in_evaluation=dict(within_km=km))))


def _read() -> dict[str, Any]:
    """Experiments that train a decoder a run: what it reads and writes."""
    return dict(
        neighbors_removed=dict(
            question="What do a neighbor's tokens, its embeddings, or both give?",
            note="The neighbors' tokens are nearly everything here: without them the answer is within 200 km for 2 % "
            "of the photos, with their embeddings or without (the head that copies tokens goes with them). The "
            "embeddings, and the similarities that come of them, are worth 2 points at 200 km.",
            runs=_runs(
                ("all", {}),
                ("without neighbor tokens", _model(neighbor_tokens=False, copy_head=False)),
                ("without neighbor embeddings", _model(neighbor_embeddings=False)),
                ("without neighbors", _model(neighbors=0, copy_head=False)),
            ),
            choices=("",),
        ),
        group=dict(
            question="How many quads should one token hold?",
            note="Larger tokens are a little better after so few examples: 4 quads gain 0.9 points at 200 km on test, "
            "5 quads 1.9 on test_shift. Their first token is a finer cell, so the face, where most answers go "
            "wrong (docs/audits.md), is not decided alone.",
            runs=_runs(*((f"group {n}", _model(group=n)) for n in (2, 1, 4, 5))),
            choices=("",),
        ),
        level=dict(
            question="Do finer cells help or hurt the coarse ones?",
            note="Finer cells cost nothing that could be measured, and bring nothing past level 14: a photo lies a "
            "kilometer from its place. Level 10, 8 km wide, cannot answer within 1 km.",
            runs=_runs(*((f"level {n}", _model(level=n)) for n in (20, 14, 10))),
            choices=("",),
        ),
        neighbors=dict(
            question="How many neighbors are worth reading?",
            note="After so few examples only 20 and 30 neighbors let the decoder be more than its first neighbor.",
            runs=_runs(
                *(
                    (f"{n} neighbors", {**_RECORDED, **_model(neighbors=n, copy_head=n > 0)})
                    for n in (20, 0, 1, 5, 10, 30)
                )
            ),
            choices=("",),
        ),
    )


def _learned() -> dict[str, Any]:
    """Experiments that train a decoder a run: what it is told of its errors, its neighbors and its cells."""
    return dict(
        weights=dict(
            question="Is the weighted loss better than the plain one?",
            note="Weights that fall to a tenth are 1.0 points at 200 km above the paper's, these 0.4 above none on "
            "test; on test_shift nothing is beyond its interval.",
            runs=_runs(
                ("2.0 to 0.1", {}),
                ("2.0 to 1.0, the paper's", dict(loss=dict(last_weight=1.0))),
                ("plain", dict(loss=dict(first_weight=1.0, last_weight=1.0))),
            ),
            choices=("",),
        ),
        retrieval_failure=dict(
            question="What is left where the gallery has nothing within 25, 200 or 750 km of a photo, and does it help "
            "to hide a part of the neighbors in training?",
            note="Without anything within 25 km, 20 % are still within 200 km; without anything within 200 km the "
            "decoder is lost. Hiding three in ten neighbors in training costs 1.5 points and does not help "
            "against that.",
            runs=tuple(
                run
                for rate in (0.0, 0.3)
                for run in (
                    (f"hidden {rate}", {**_SHORT, **_model(neighbor_dropout=rate)}),
                    *(
                        (f"hidden {rate}, nothing within {km} km", {**_SHORT, **_masked(km)}, f"hidden {rate}")
                        for km in (25.0, 200.0, 750.0)
                    ),
                )
            ),
            choices=("",),
        ),
        context=dict(
            question="Does it help to know when a photo was taken: the time of year, when one hemisphere has summer "
            "and the other winter, or the hour too, which with the light tells the longitude?",
            runs=_runs(
                ("no time", {}),
                ("time of year", _model(context="season")),
                ("of year and of day", _model(context="time")),
            ),
            choices=("",),
        ),
        cells=dict(
            question="Does it matter how the Earth is cut into tokens?",
            note="S2, its quads without Hilbert order, latitude and longitude, and H3 are alike. Names of places first"
            " are worse on test by 2.2 points at 25 km.",
            runs=_runs(
                ("S2", {}),
                ("S2 without Hilbert order", _model(scheme="s2_grid")),
                ("latitude and longitude", _model(scheme="latlon")),
                ("H3", _model(scheme="h3")),
                ("country, city, offset", _model(scheme="places")),
            ),
            choices=("",),
        ),
    )
