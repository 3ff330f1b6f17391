"""The compiled decoder: turns embeddings of photos and their neighbors into pools of candidates."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from geotoken_jax import randomness, sharding
from geotoken_jax.batch import padded, padded_size
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import CellScheme, Scheme
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam, search
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.sample import Candidates, sample
from geotoken_jax.predict.select import SEARCHED, SELECTORS, VoteSettings
from geotoken_jax.settings import Runtime, SettingsError

#: Number of cells per photo that a distribution lists one by one. With 64, half of EarthView's photos would have more
#: than half of their probability outside the list.
CELLS = 192
#: Largest number of cells per photo that the search returns.
CAPACITY = 4096


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """Settings of the exact search of the model's distribution over places (config.predict.search).

    The search divides the most probable cells into smaller ones, step by step, down to cells called leaves.

    expansions: largest number of cells divided per photo, a multiple of width; 0 turns the search off. level: S2 level
    of the leaves, a multiple of config.model.group. leaves: number of most probable leaves to find, at most 4096. A
    photo's search ends when these leaves are proven to be the most probable ones, or when `expansions` cells have been
    divided. width: number of cells divided per photo and step.
    """

    expansions: int
    level: int
    leaves: int
    width: int


@dataclasses.dataclass(frozen=True)
class PredictSettings:
    """Settings of decoding and of the choice among candidates (config.predict).

    samples: number of candidates sampled in addition to the greedy one. temperature: temperature of the sampling, above
    0. top_p: probability mass, in (0, 1], of the most probable tokens that samples are drawn from; 1 for all tokens.
    beam: width of a beam search whose sequences replace the greedy candidate and the samples; 0 turns it off. search:
    settings of the search of the model's distribution over places. selectors: names of the selectors whose choices are
    part of predictions. vote: settings of the selector `consensus`. choice: name of the selector whose choice is the
    answer. batch_size: photos per batch, over all local devices. seed: seed of the samples.
    """

    samples: int
    temperature: float
    top_p: float
    beam: int
    search: SearchSettings
    selectors: tuple[str, ...]
    vote: VoteSettings
    choice: str
    batch_size: Runtime[int]
    seed: int

    def __post_init__(self):
        for name in self.selectors:
            if name not in SELECTORS:
                raise ValueError(f"config.predict.selectors has {name!r}: choose among {', '.join(SELECTORS)}")
            if name in SEARCHED and not self.search.expansions:
                raise ValueError(
                    f"config.predict.selectors has {name!r}, but config.predict.search.expansions is 0: set expansions "
                    f"to a positive multiple of config.predict.search.width, or remove {name!r}"
                )
        if self.choice not in self.selectors:
            raise ValueError(
                f"config.predict.choice is {self.choice!r}: choose one of config.predict.selectors, which are "
                f"{', '.join(self.selectors)}"
            )
        if self.temperature <= 0:
            raise ValueError(f"config.predict.temperature is {self.temperature}: it must be above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"config.predict.top_p is {self.top_p}: it must be above 0 and at most 1")


class Decoder:
    """Decodes batches of photos into pools of candidates. Every local device decodes a share of the batch.

    Batches are padded, so that few batch sizes are compiled (see batch.padded_size).
    """

    def __init__(self, model: GeoTokenModel, settings: PredictSettings, gallery: Table):
        """gallery: table of the gallery, which contains the neighbors."""
        self.settings, self.gallery, self.model = settings, gallery, model.settings
        self.cells: Scheme = model.settings.cells
        self.neighbors, self.times = model.settings.neighbors, model.settings.times
        options = settings.search
        if options.expansions and not isinstance(self.cells, CellScheme):
            searched = [name for name in settings.selectors if name in SEARCHED]
            raise SettingsError(
                f"config.model.scheme is {model.settings.scheme!r}, but only S2 cells can be searched: set "
                "config.predict.search.expansions to 0"
                + (f" and remove {', '.join(searched)} from config.predict.selectors" if searched else "")
            )
        if options.expansions and (options.level % self.cells.group or options.level > self.cells.level):
            raise SettingsError(
                f"config.predict.search.level is {options.level}: make it a multiple of config.model.group = "
                f"{self.cells.group}, at most {self.cells.level}"
            )
        graph, state = nnx.split(model)
        key = randomness.key(settings.seed)

        def run(state: Any, batch: Mapping[str, jax.Array], numbers: jax.Array) -> tuple[Candidates, Any]:
            model = nnx.merge(graph, state)
            neighbors = Neighbors(batch["neighbors"], batch["neighbor_tokens"], batch["neighbor_count"])
            keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
            memory = model.encode(batch["query"], neighbors, context=batch.get("context"))
            if settings.beam:
                drawn = beam.search(model, memory, settings.beam)
            else:
                drawn = sample(model, memory, keys, settings.samples, settings.temperature, settings.top_p)
            if not options.expansions:
                return drawn, None
            length = 1 + options.level // self.cells.group
            return drawn, search.search(
                model,
                memory,
                options.leaves,
                length=length,
                width=options.width,
                expansions=options.expansions,
                capacity=CAPACITY,
            )

        self._run, self._devices = sharding.over_local_devices(run, state, [model.settings, settings])

    def __call__(
        self,
        batch: Mapping[str, np.ndarray],
        rows: Int[np.ndarray, "b M"],
        scores: Float[np.ndarray, "b M"],
        numbers: Int[np.ndarray, " b"],
    ) -> Pool:
        """Returns the pool of b photos.

        batch: arrays `query`, `neighbors`, `neighbor_tokens`, `neighbor_count` and, if the model reads capture times,
        `context`, as data.join makes them. rows: gallery rows of the photos' neighbors, -1 if missing. scores: inner
        products of the index vectors of photo and neighbor, ignored if the neighbor is missing. numbers: one number per
        photo. The random draws for a photo depend only on its number and on settings.seed.
        """
        b = len(numbers)
        size = padded_size(b, self.settings.batch_size, self._devices)
        names = ("query", "neighbors", "neighbor_tokens", "neighbor_count", *(("context",) if self.times else ()))
        arguments = {name: padded(batch[name], size) for name in names}
        results = self._run(arguments, padded(numbers, size).astype(np.uint32))
        drawn, searched = jax.tree.map(lambda values: np.asarray(values)[:b], results)
        distribution = None
        if searched and isinstance(self.cells, CellScheme):
            distribution = search.distribution(searched, self.cells, CELLS)
        return Pool(
            drawn,
            np.stack(self.cells.decode(drawn.tokens), -1),
            batch["query"],
            batch["neighbors"],
            self.gallery.coordinates(np.maximum(rows, 0)),
            scores,
            batch["neighbor_count"],
            distribution,
            context=batch.get("context"),
        )
