"""Compares our train step with the PyTorch reference of the same shape on the same device. Prints one JSON object.

The two sides take turns. Each round runs in its own process, so that no side shares the device with the other. The
ratio is the median over rounds of our examples per second divided by the reference's examples per second.

Our side runs the parts of `geotoken train` on generated data: input pipeline, Trainer, and the gallery as
config.gallery places it. Both sides wait until every step has ended, and the time of a step includes the wait for its
input. `--torch-python` names a Python interpreter that has torch. Without torch only our side is measured.

The default is a small model on JAX's default device. `--paper` measures the model of configs/common.py at batch 2048.
`--set model.remat=none` changes a key of that configuration.
"""

import argparse
import ast
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from etils import epath

from configs import common

_TINY = dict(width=64, heads=4, encoder_layers=2, decoder_layers=2, feed_forward=128, remat="none")


def configuration(options: argparse.Namespace) -> Any:
    """Returns configs/common.py with the sizes and changes of the options."""
    config: Any = common.get_config()
    if not options.paper:
        config.model.update(_TINY)
        config.train.batch_size = 32
    if options.dtype:
        config.model.dtype = options.dtype
    for change in options.set:
        key, _, value = change.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):  # a value that is no Python literal is a string
            value = ast.literal_eval(value)
        config.update_from_flattened_dict({key: value})
    return config


def write_data(folder: epath.Path, photos: int, width: int, neighbors: int) -> None:
    """Writes a gallery and token records of random photos with random neighbors."""
    import ml_dtypes

    from geotoken_jax import records
    from geotoken_jax.gallery import table

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, [6] + [4] * 20, (photos, 21)).astype(np.uint8)
    columns = {
        "embeddings": rng.standard_normal((photos, 3, width), np.float32).astype(ml_dtypes.bfloat16),
        "coordinates": np.zeros((photos, 2)),
        "tokens": tokens,
        "ids": np.arange(photos).astype("S"),
        "authors": np.full(photos, b""),
    }
    table.write_shard(folder / "gallery", 0, 1, columns)
    neighbor_rows = rng.integers(0, photos, (photos, neighbors))
    rows = {"row": np.arange(photos), "tokens": tokens, "neighbors": neighbor_rows}
    (folder / "tokens").mkdir()
    path = records.shard_path(folder / "tokens", "train", 0, 1)
    records.write_shard(path, records.token_layout(neighbors).encode(rows))


def measure(config: Any, folder: epath.Path, photos: int, steps: int) -> dict[str, Any]:
    """Returns the figures of one round of our side: medians over the steps after 3 warm-up steps."""
    import jax

    from geotoken_jax import chips, randomness, records, sharding
    from geotoken_jax.data import pipeline
    from geotoken_jax.data.join import Tokens
    from geotoken_jax.gallery import placement
    from geotoken_jax.gallery.table import Table
    from geotoken_jax.model import flops
    from geotoken_jax.model.geotoken import ModelSettings
    from geotoken_jax.model.task import GeoTokenTask, LossSettings
    from geotoken_jax.settings import read
    from geotoken_jax.train.loop import TrainSettings, learning_rates, make_trainer

    model, options = read(ModelSettings, config.model, "model"), read(TrainSettings, config.train, "train")
    gallery = read(placement.GallerySettings, config.gallery, "gallery")
    mesh = sharding.make_mesh(read(sharding.MeshSettings, config.mesh, "mesh"))
    task = GeoTokenTask(model, read(LossSettings, config.loss, "loss"), placement.lookup(gallery, mesh))
    trainer, rates = make_trainer(task, options, mesh), learning_rates(options, 2_000)
    table, layout = Table(folder / "gallery"), records.token_layout(model.neighbors)
    tokens = records.Records(folder / "tokens", "train", layout)
    source = Tokens(tokens, table, None if gallery.on_device else table, model.cells, model.neighbors)
    batches = pipeline.training(photos, source, options.batch_size, options.seed)
    resident = placement.device_arrays(table, model.cells, gallery, mesh)
    key = randomness.key(options.seed)
    state = trainer.init(key)
    took, waited = [], []
    for step in range(3 + steps):
        start = time.perf_counter()
        batch = jax.device_put(next(batches), trainer.batch_sharding)
        jax.block_until_ready(batch)
        waited.append(time.perf_counter() - start)
        state, values = trainer.step(state, batch, key, rates[step], resident)
        jax.block_until_ready((state, values))
        took.append(time.perf_counter() - start)
    batches.close()
    seconds = statistics.median(took[3:])
    device = jax.devices()[0].device_kind
    rate, chip = options.batch_size / seconds, chips.find(device)
    return {
        "examples_per_second": rate,
        "input_wait": statistics.median(waited[3:]) / seconds,
        "flops_per_example": flops.per_example(model),
        "tflops_per_second": rate * flops.per_example(model) / 1e12,
        "share_of_peak": rate * flops.per_example(model) / mesh.size / chip.flops if chip else None,
        "parameters": sum(p.size for p in jax.tree.leaves(state["params"])),
        "device": device,
        "devices": mesh.size,
        "platform": jax.default_backend(),
        "dtype": model.dtype,
        "jax": jax.__version__,
    }


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Measures one round of our train step in this process."""
    import jax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads flags
    config = configuration(options)
    if jax.default_backend() == "cpu" and not options.dtype:
        config.model.dtype = "float32"
    with tempfile.TemporaryDirectory() as folder:
        write_data(epath.Path(folder), options.photos, config.model.backbone_width, config.model.neighbors)
        return measure(config, epath.Path(folder), options.photos, options.steps)


def reference(options: argparse.Namespace, config: Any, device: str, dtype: str) -> dict[str, Any]:
    """Measures one round of the reference in a new process."""
    model = config.model
    values = dict(
        width=model.width, layers=model.encoder_layers, heads=model.heads, feed_forward=model.feed_forward,
        group=model.group, neighbors=model.neighbors, batch=config.train.batch_size, photos=options.photos,
        steps=options.steps, device=device, dtype=dtype,
    )  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return _run([options.torch_python, "-m", "benchmarks.torch_reference", *flags])


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Runs all rounds. Returns the median figures, and the speed of every round."""
    config = configuration(options)
    has_torch = not subprocess.run([options.torch_python, "-c", "import torch"], capture_output=True).returncode
    if not has_torch:
        print(f"{options.torch_python} has no torch: only our side is measured (see --torch-python)", file=sys.stderr)
    rounds, references = [], []
    for _ in range(options.rounds):
        rounds.append(_run([sys.executable, "-m", "benchmarks.train_step", "--round", *arguments]))
        if has_torch:
            device = "cuda" if rounds[0]["platform"] == "gpu" else "cpu"
            references.append(reference(options, config, device, rounds[0]["dtype"]))
    ratios = [a["examples_per_second"] / b["examples_per_second"] for a, b in zip(rounds, references, strict=False)]
    return {
        "model": {name: config.model[name] for name in _TINY} | {"group": config.model.group},
        "batch": config.train.batch_size,
        "ours": _median(rounds),
        "reference": _median(references) if references else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratios": ratios,
    }


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the round of median speed, with the speeds of all rounds under `all`."""
    ordered = sorted(rounds, key=lambda line: line["examples_per_second"])
    return {**ordered[len(ordered) // 2], "all": [line["examples_per_second"] for line in rounds]}


def main() -> None:
    """Prints the comparison, or with --round one round of our side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="measure the model and batch size of configs/common.py")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of configs/common.py"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--photos", type=int, default=8192, help="rows of the gallery")
    parser.add_argument("--steps", type=int, default=5, help="steps that count, per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)  # the first round compiles for all
        print(json.dumps(ours(options) if options.round else compare(options, sys.argv[1:])))


if __name__ == "__main__":
    main()
