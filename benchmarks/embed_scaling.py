"""Measures how the stage `embed` scales over processes and decoding threads. Prints a JSON line per combination.

The backbone is `thumbnail`, so nearly all time is spent on reading and decoding JPEGs. They are as large as in
MP16-Pro. Processes divide the shards as they do on several machines. They start at the same moment, after their
imports. If the machine has fewer cores than there are threads, the line measures the cost of too many threads.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.embed import Jpegs
from configs import common
from data_prep import embed, photos
from geotoken_jax import manifests
from geotoken_jax.configuration import read
from geotoken_jax.workdir import Workdir


def work(index: int, count: int, threads: int, folder: str, shard: int, start: Any) -> None:
    """Runs the stage as process `index` of `count`. start: barrier of all processes and of the one that measures."""
    if count > 1:  # no process connects to the address, because the stage does not communicate
        os.environ["JAX_COORDINATOR_ADDRESS"] = "nobody:1"
        os.environ |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
    embed._SHARD = shard
    config: Any = common.get_config()
    config.embed.update(backbone="thumbnail", threads=threads)
    settings = read(config)
    start.wait()
    embed.run(settings, Workdir(folder))


def measure(folder: Path, processes: int, threads: int, total: int) -> dict[str, Any]:
    """Returns the photos per second of one combination. folder: work directory with photos/ only."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes + 1)
    arguments = (processes, threads, str(folder), max(1, total // 8), start)
    workers = [context.Process(target=work, args=(index, *arguments)) for index in range(processes)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process has failed: its error is above")
    rate = round((total + 1) / seconds, 1)
    return {"processes": processes, "threads": threads, "photos": total, "embedded_per_second": rate}


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=4096)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "made"
        photos.make(manifests.begin(made, "photos", {}, ()), Jpegs(options.photos), workers=1, max_dropped=0.0)
        for processes in options.processes:
            for threads in options.threads:
                folder = Path(name) / f"{processes}-{threads}"
                folder.mkdir()
                (folder / "photos").symlink_to(made / "photos")
                line = measure(folder, processes, threads, options.photos)
                print(json.dumps({**line, "cores": machine()["machine"]}), flush=True)


if __name__ == "__main__":
    main()
