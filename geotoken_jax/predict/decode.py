"""From embeddings to what answers are chosen from: the compiled decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from geotoken_jax.batch import filled
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import CellScheme, Scheme
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict import beam, search
from geotoken_jax.predict.pool import Pool
from geotoken_jax.predict.sample import Candidates, sample
from geotoken_jax.predict.select import SEARCHED, SELECTORS, VoteSettings
from geotoken_jax.settings import Runtime, SettingsError

#: Cells of a photo told one by one, and all that there may be: with 64 alone half of EarthView's photos would have more
#: than half of their probability elsewhere.
_CELLS, _ALL = 192, 4096


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """Exact search of the model's distribution over places. expansions: of cells, a photo at most; 0 for no search.
    level: at which a cell is not divided any more, of a whole number of tokens. leaves: so many of those, the most
    probable, end the search when they are proven. width: cells of a photo divided at once."""

    expansions: int
    level: int
    leaves: int
    width: int


@dataclasses.dataclass(frozen=True)
class PredictSettings:
    """samples: drawn beside the greedy candidate. temperature, top_p: they are drawn with. beam: 0, or the width of the
    beam search whose sequences are the candidates instead. search: of the model's own
    distribution over places. selectors: that choose, by name. vote: of the neighbors, for `consensus`. choice: the
    selector whose choice is the answer. batch_size: photos decoded at once. seed: of the samples."""

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
                    f"config.predict.selectors has {name!r}, which needs the model's distribution over places: raise "
                    "config.predict.search.expansions, or leave it out"
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
    """A model's candidates and places for batches of photos, compiled once for each of a few batch sizes."""

    def __init__(self, model: GeoTokenModel, settings: PredictSettings, gallery: Table):
        """gallery: the table that the neighbors of every batch are rows of."""
        self.settings, self.gallery, self.model = settings, gallery, model.settings
        self.cells: Scheme = model.settings.cells
        self.neighbors, self.times = model.settings.neighbors, model.settings.times
        asked = settings.search
        if asked.expansions and not isinstance(self.cells, CellScheme):
            raise SettingsError(
                f"config.model.scheme is {model.settings.scheme!r}, and places are searched among S2's cells: set "
                "config.predict.search.expansions to 0, and leave selectors that need it out"
            )
        if asked.expansions and (asked.level % self.cells.group or asked.level > self.cells.level):
            raise SettingsError(
                f"config.predict.search.level is {asked.level}: make it a multiple of config.model.group = "
                f"{self.cells.group}, at most {self.cells.level}"
            )
        graph, self._state = nnx.split(model)
        key = jax.random.key(settings.seed)

        def run(state: Any, batch: Mapping[str, jax.Array], numbers: jax.Array) -> tuple[Candidates, Any]:
            model = nnx.merge(graph, state)
            neighbors = Neighbors(batch["neighbors"], batch["neighbor_tokens"], batch["neighbor_count"])
            keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
            memory = model.encode(batch["query"], neighbors, context=batch.get("context"))
            if settings.beam:
                drawn = beam.search(model, memory, settings.beam)
            else:
                drawn = sample(model, memory, keys, settings.samples, settings.temperature, settings.top_p)
            if not asked.expansions:
                return drawn, None
            length = 1 + asked.level // self.cells.group
            return drawn, search.search(
                model,
                memory,
                asked.leaves,
                length=length,
                width=asked.width,
                expansions=asked.expansions,
                capacity=_ALL,
            )

        self._run = jax.jit(run)

    def __call__(
        self,
        batch: Mapping[str, np.ndarray],
        rows: Int[np.ndarray, "b M"],
        scores: Float[np.ndarray, "b M"],
        numbers: Int[np.ndarray, " b"],
    ) -> Pool:
        """Returns what the answers of b photos are chosen from.

        batch: see data.join. rows, scores: of the neighbors in it; -1 and anything where there is none. numbers: one a
        photo, which with the seed decide its samples, whatever batch it is in.
        """
        b = len(numbers)
        size = min(1 << (b - 1).bit_length(), max(self.settings.batch_size, b))
        names = ("query", "neighbors", "neighbor_tokens", "neighbor_count", *(("context",) if self.times else ()))
        padded = {name: filled(batch[name], size) for name in names}
        found = self._run(self._state, padded, jnp.asarray(filled(numbers, size), jnp.uint32))
        drawn, searched = jax.tree.map(lambda part: np.asarray(part)[:b], found)
        distribution = None
        if searched and isinstance(self.cells, CellScheme):
            distribution = search.distribution(searched, self.cells, _CELLS)
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
