"""Input of the decoder: examples a second of token records with 15 neighbors, in one process. Prints one JSON object.

What `geotoken train` reads: generated tables and records on disk, shuffled globally, read in whole batches and joined
by geotoken_jax/data, on grain's threads. `host` gathers every photo's neighbors from the memory-mapped table, 69 KB a
photo at the paper's width; `device` hands over their row numbers, as where config.gallery.placement puts the table on
the devices. The files are in the page cache after the first round, which does not count.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

from absl import flags
from etils import epath

from benchmarks.train_step import write_data
from geotoken_jax import records
from geotoken_jax.data import pipeline
from geotoken_jax.data.join import Tokens
from geotoken_jax.gallery.table import Table
from geotoken_jax.geo.cells import CellScheme


def measure(source: Tokens, batch: int, seconds: float) -> dict[str, float]:
    """Returns the examples a second over some seconds, after as many batches as are read ahead."""
    batches = pipeline.training(len(source), source, batch, seed=0)
    for _ in range(5):
        example = next(batches)
    began, n = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        next(batches)
        n += batch
    batches.close()
    return {"examples_per_second": n / took, "bytes_per_example": sum(v.nbytes for v in example.values()) / batch}


def main() -> None:
    """Prints the medians of rounds in which both take their turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=32_768, help="rows of the gallery, 4.6 KB each at C = 768")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--neighbors", type=int, default=15)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain reads flags
    cells = CellScheme(20, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        write_data(folder, options.photos, options.width, options.neighbors)
        table = Table(folder / "gallery")
        tokens = records.Records(folder / "tokens", "train", records.token_layout(options.neighbors))
        ways = {
            "device": Tokens(tokens, table, None, cells, options.neighbors),
            "host": Tokens(tokens, table, table, cells, options.neighbors),
        }
        measure(ways["host"], options.batch, options.seconds)
        rounds = [
            {way: measure(source, options.batch, options.seconds) for way, source in ways.items()}
            for _ in range(options.rounds)
        ]
    found = {
        way: {key: round(statistics.median(one[way][key] for one in rounds)) for key in rounds[0][way]} for way in ways
    }
    sizes = {name: getattr(options, name) for name in ("photos", "width", "neighbors", "batch")}
    print(json.dumps({**sizes, "cores": os.cpu_count(), **found}))


if __name__ == "__main__":
    main()
