"""Measures examples per second of the decoder's input pipeline, in one process. Prints one JSON object.

The pipeline of `geotoken train` runs on generated tables and records: rows are shuffled globally, read in whole
batches, and joined with the table by geotoken_jax/data on grain's threads. There are two figures. For `host`, the
neighbors of every photo are gathered from the memory-mapped table: 69 KB per photo at the paper's width and 15
neighbors. For `device`, only the neighbors' row numbers are passed on, as if config.gallery.placement put the table on
the devices. A first round fills the page cache and does not count.
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
    """Returns examples per second over `seconds`, and bytes per example. The first 5 batches do not count."""
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
    """Prints the medians over rounds, each of which measures `device` and `host`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=32_768, help="rows of the gallery, 4.6 KB each at C = 768")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--neighbors", type=int, default=15)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain reads flags
    cells = CellScheme(20, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        write_data(folder, options.photos, options.width, options.neighbors)
        table = Table(folder / "gallery")
        tokens = records.Records(folder / "tokens", "train", records.token_layout(options.neighbors))
        sources = {
            "device": Tokens(tokens, table, None, cells, options.neighbors),
            "host": Tokens(tokens, table, table, cells, options.neighbors),
        }
        measure(sources["host"], options.batch, options.seconds)
        rounds = [
            {name: measure(source, options.batch, options.seconds) for name, source in sources.items()}
            for _ in range(options.rounds)
        ]
    medians = {
        name: {key: round(statistics.median(one[name][key] for one in rounds)) for key in rounds[0][name]}
        for name in sources
    }
    sizes = {name: getattr(options, name) for name in ("photos", "width", "neighbors", "batch")}
    print(json.dumps({**sizes, "cores": os.cpu_count(), **medians}))


if __name__ == "__main__":
    main()
