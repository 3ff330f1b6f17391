"""From embeddings to candidates: the compiled decoder, and one photo's answer as what is written down."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.model.geotoken import GeoTokenModel
from geotoken_jax.model.memory import Neighbors
from geotoken_jax.predict.sample import Candidates, sample
from geotoken_jax.predict.select import SELECTORS


@dataclasses.dataclass(frozen=True)
class PredictSettings:
    """samples: drawn beside the greedy candidate. temperature: they are drawn at. choice: the selector whose candidate
    is the answer. batch_size: photos decoded at once. seed: of the samples."""

    samples: int
    temperature: float
    choice: str
    batch_size: int
    seed: int

    def __post_init__(self):
        if self.choice not in SELECTORS:
            raise ValueError(f"config.predict.choice is {self.choice!r}: choose one of {', '.join(SELECTORS)}")
        if self.temperature <= 0:
            raise ValueError(f"config.predict.temperature is {self.temperature}: it must be above 0")


class Decoder:
    """A model's candidates for batches of photos, compiled once for each of a few batch sizes."""

    def __init__(self, model: GeoTokenModel, settings: PredictSettings):
        self.settings = settings
        self.cells: CellScheme = model.settings.cells
        graph, self._state = nnx.split(model)
        key = jax.random.key(settings.seed)

        def run(state: Any, batch: Mapping[str, jax.Array], numbers: jax.Array) -> Candidates:
            model = nnx.merge(graph, state)
            neighbors = Neighbors(batch["neighbors"], batch["neighbor_tokens"], batch["neighbor_count"])
            keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
            return sample(model, model.encode(batch["query"], neighbors), keys, settings.samples, settings.temperature)

        self._run = jax.jit(run)

    def __call__(self, batch: Mapping[str, np.ndarray], numbers: np.ndarray) -> Candidates:
        """Returns the candidates of b photos; see data.join for the batch.

        numbers: [b], one a photo, which with the seed decide its samples, whatever batch it is in.
        """
        b = len(numbers)
        size = min(1 << (b - 1).bit_length(), max(self.settings.batch_size, b))
        names = ("query", "neighbors", "neighbor_tokens", "neighbor_count")
        padded = {name: _pad(batch[name], size) for name in names}
        found = self._run(self._state, padded, jnp.asarray(_pad(numbers, size), jnp.uint32))
        return jax.tree.map(lambda part: np.asarray(part)[:b], found)


def _pad(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.repeat(values[:1], size - len(values), 0)]) if len(values) < size else values


def answers(candidates: Candidates, cells: CellScheme, choice: str) -> list[dict[str, Any]]:
    """Returns each photo's answer as JSON has it in predictions/: latitude, longitude, choice, choices, candidates.

    Equal candidates are one, with their count; the greedy one comes first, the others by falling log-probability.
    """
    # With the greedy candidate alone there is nothing to choose.
    selectors = SELECTORS if candidates.tokens.shape[1] > 1 else {choice: SELECTORS[choice]}
    chosen = {name: select(candidates) for name, select in selectors.items()}
    found = []
    for i, tokens in enumerate(candidates.tokens):
        unique, first, inverse, counts = np.unique(
            tokens, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        log_p = candidates.log_probability[i][first]
        order = np.lexsort((-log_p, first != 0))
        latitude, longitude = cells.decode(unique[order])
        listed = [
            {
                "latitude": round(float(latitude[n]), 7),
                "longitude": round(float(longitude[n]), 7),
                "log_probability": round(float(log_p[j]), 5),
                "tempered_log_probability": round(float(candidates.tempered_log_probability[i][first[j]]), 5),
                "count": int(counts[j]),
                "tokens": unique[j].tolist(),
            }
            for n, j in enumerate(order)
        ]
        place = np.argsort(order)[inverse.reshape(-1)]  # index in the pool -> index in the list
        choices = {name: int(place[index[i]]) for name, index in chosen.items()}
        best = listed[choices[choice]]
        found.append(
            {
                "latitude": best["latitude"],
                "longitude": best["longitude"],
                "choice": choice,
                "choices": choices,
                "candidates": listed,
            }
        )
    return found
