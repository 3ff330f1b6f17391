"""The experiments that the paper leaves open, on the demo's data: `geotoken experiment NAME` (analysis/experiment.py).

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
    experiments = {**_chosen(config), **_trained()}
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
            runs=(("greedy", dict(predict=_GREEDY)), ("30 samples", sampled(0.7, 30))),
            choices=("", "ideal"),
        ),
        selection=dict(
            question="One pool of 30 samples and the greedy candidate: which selector finds the best of them?",
            runs=(("pool", dict(predict=dict(choice="log_probability"))),),
            choices=("", "ideal", *config.predict.selectors),
        ),
        temperature=dict(
            question="How do temperature and the number of samples change the choice by log-probability, and what the "
            "pool holds?",
            runs=tuple(
                (f"T = {temperature}, K = {k}", sampled(temperature, k)) for temperature in temperatures for k in sizes
            ),
            choices=("", "ideal"),
            splits=("test",),
        ),
        beam=dict(
            question="Does a wider beam find better places, or only more probable ones?",
            runs=(("greedy", dict(predict=_GREEDY)), *((f"beam of {n}", beam(n)) for n in (2, 4, 8, 16, 30))),
            choices=("", "ideal"),
        ),
    )


#: One selector, and no search of the distribution, which it does not need.
_ALONE = dict(selectors=("log_probability",), search=dict(expansions=0))


def _trained() -> dict[str, Any]:
    """Experiments that train a decoder a run."""

    common = dict(predict=_GREEDY, train=dict(examples=30_000))

    def runs(*named: tuple[str, dict]) -> tuple:
        return tuple((name, {**common, **changes}) for name, changes in named)

    def model(**changes: Any) -> dict:
        return dict(model=changes)

    recorded = dict(index=dict(neighbors=dict(count=30)))

    def masked(km: float) -> dict:
        return dict(index=dict(neighbors=dict(exclude_in_evaluation=dict(within_km=km))))

    return dict(
        neighbors_removed=dict(
            question="What do a neighbor's tokens, its embeddings, or both give?",
            runs=runs(
                ("all", {}),
                ("without neighbor tokens", model(neighbor_tokens=False, copy_head=False)),
                ("without neighbor embeddings", model(neighbor_embeddings=False)),
                ("without neighbors", model(neighbors=0, copy_head=False)),
            ),
            choices=("",),
        ),
        group=dict(
            question="How many quads should one token hold?",
            runs=runs(*((f"group {n}", model(group=n)) for n in (2, 1, 4, 5))),
            choices=("",),
        ),
        level=dict(
            question="Do finer cells help or hurt the coarse ones?",
            runs=runs(*((f"level {n}", model(level=n)) for n in (20, 14, 10))),
            choices=("",),
        ),
        neighbors=dict(
            question="How many neighbors are worth reading?",
            runs=runs(
                *(
                    (f"{n} neighbors", {**recorded, **model(neighbors=n, copy_head=n > 0)})
                    for n in (20, 0, 1, 5, 10, 30)
                )
            ),
            choices=("",),
        ),
        weights=dict(
            question="Is the weighted loss better than the plain one?",
            runs=runs(
                ("2.0 to 0.1", {}),
                ("2.0 to 1.0, the paper's", dict(loss=dict(last_weight=1.0))),
                ("plain", dict(loss=dict(first_weight=1.0, last_weight=1.0))),
            ),
            choices=("",),
        ),
        retrieval_failure=dict(
            question="What is left where the gallery has nothing within 25, 200 or 750 km of a photo, and does it help "
            "to hide a part of the neighbors in training?",
            runs=tuple(
                run
                for rate in (0.0, 0.3)
                for run in (
                    (f"hidden {rate}", {**common, **model(neighbor_dropout=rate)}),
                    *(
                        (f"hidden {rate}, nothing within {km} km", {**common, **masked(km)}, f"hidden {rate}")
                        for km in (25.0, 200.0, 750.0)
                    ),
                )
            ),
            choices=("",),
        ),
        cells=dict(
            question="Does it matter how the Earth is cut into tokens?",
            runs=runs(
                ("S2", {}),
                ("S2 without Hilbert order", model(scheme="s2_grid")),
                ("latitude and longitude", model(scheme="latlon")),
                ("H3", model(scheme="h3")),
                ("country, city, offset", model(scheme="places")),
            ),
            choices=("",),
        ),
    )
