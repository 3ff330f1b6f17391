"""Compares our decoding with the published decoding in PyTorch, and exact search with sampling. Prints one JSON object.

Both sides use the published model. Our side is compiled. It starts from embeddings of photos and neighbors on the host,
and ends with the coordinates of the greedy candidate and K samples on the host. The reference in PyTorch decodes as in
the published code: it encodes the memory once per batch and then decodes one candidate after another, and each token
reads the whole prefix. All candidates cost the reference the same, so only a few are timed.

The two sides take turns. Each round runs in its own process, and the ratio is the median over rounds. `--torch-python`
names a Python interpreter that has torch. Without torch only our side is measured.

The exact search is timed against K samples from the same memory: to the full depth, and to level 12. The search proves
which cells are most probable. The share of photos for which it succeeds depends on the model's confidence, so
`--workdir` measures the demo's trained model on its `test` photos. Without `--workdir` the weights are random.

The default is a small model on JAX's default device. `--paper` measures the model of configs/common.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from configs import common

_TINY = dict(width=64, heads=4, encoder_layers=2, decoder_layers=2, feed_forward=128)
_LEAVES = 16


def configuration(options: argparse.Namespace) -> Any:
    """Returns the model section of configs/common.py with the sizes and dtype of the options."""
    model: Any = common.get_config().model
    if not options.paper:
        model.update(_TINY)
    if options.dtype:
        model.dtype = options.dtype
    return model


def seconds(run: Callable[[], Any], times: int) -> float:
    """Returns the shortest time of `times` runs after a warm-up: other load on the machine can only add time."""
    took = []
    for _ in range(1 + times):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return min(took[1:])


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Measures one round of our decoding in this process."""
    import jax
    from flax import nnx

    from geotoken_jax.model import batch as contract
    from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
    from geotoken_jax.model.memory import Neighbors
    from geotoken_jax.predict.sample import sample
    from geotoken_jax.settings import read

    config = configuration(options)
    if jax.default_backend() == "cpu" and not options.dtype:
        config.dtype = "float32"
    settings = read(ModelSettings, config, "model")
    model = nnx.jit(lambda: GeoTokenModel(settings, nnx.Rngs(0)))()
    batch = contract.random_batch(settings, options.batch)
    keys = jax.random.split(jax.random.key(0), options.batch)
    graph, state = nnx.split(model)

    @jax.jit
    def decode(state: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graph, state)
        neighbors = Neighbors(batch["neighbors"], batch["neighbor_tokens"], batch["neighbor_count"])
        return sample(model, model.encode(batch["query"], neighbors), keys, options.candidates, 0.7).tokens

    took = seconds(lambda: settings.cells.decode(np.asarray(decode(state, batch))), options.times)
    return {
        "photos_per_second": options.batch / took,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "dtype": settings.dtype,
        "jax": jax.__version__,
    }


def trained(path: epath.Path, photos: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the demo's trained model, and a batch of the first photos of `test`."""
    from configs import demo
    from geotoken_jax import checkpoint, manifests, records
    from geotoken_jax.data.join import Tokens
    from geotoken_jax.gallery.table import Table
    from geotoken_jax.model.geotoken import GeoTokenModel, ModelSettings
    from geotoken_jax.settings import read

    settings = read(ModelSettings, demo.get_config().model, "model")
    file = path / "geotoken" / "geotoken" / "parameters.safetensors"
    model = checkpoint.read_module(file, lambda rngs: GeoTokenModel(settings, rngs))
    layout = records.token_layout(manifests.read_manifest(path, "tokens").facts["neighbors"])
    tokens = records.Records(path / "tokens", "test", layout)
    queries, gallery = Table(path / "queries" / "test"), Table(path / "gallery")
    return model, Tokens(tokens, queries, gallery, settings.cells, settings.neighbors)(np.arange(photos))


def searches(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the search for 16 leaves against sampling, both from an encoded memory."""
    import jax
    from flax import nnx

    from geotoken_jax.model import batch as contract
    from geotoken_jax.model.geotoken import GeoTokenModel, Memory, ModelSettings
    from geotoken_jax.model.memory import Neighbors
    from geotoken_jax.predict.sample import sample
    from geotoken_jax.predict.search import search
    from geotoken_jax.settings import read

    if options.workdir:
        model, batch = trained(epath.Path(options.workdir), options.batch)
        settings = model.settings
    else:
        config = configuration(options)
        if jax.default_backend() == "cpu" and not options.dtype:
            config.dtype = "float32"
        settings = read(ModelSettings, config, "model")
        model = nnx.jit(lambda: GeoTokenModel(settings, nnx.Rngs(0)))()
        batch = contract.random_batch(settings, options.batch)
    names = ("neighbors", "neighbor_tokens", "neighbor_count")
    neighbors = Neighbors(*(jax.numpy.asarray(batch[name]) for name in names))
    memory = nnx.jit(lambda m, q, n: m.encode(q, n))(model, batch["query"], neighbors)
    keys = jax.random.split(jax.random.key(0), options.batch)
    graph, state = nnx.split(model)

    def timed(run: Callable[[GeoTokenModel, Memory], Any]) -> tuple[float, Any]:
        compiled = jax.jit(lambda state, memory: run(nnx.merge(graph, state), memory))
        return seconds(lambda: jax.block_until_ready(compiled(state, memory)), options.times), compiled(state, memory)

    samples, _ = timed(lambda model, memory: sample(model, memory, keys, options.candidates, 0.7))
    figures: dict[str, Any] = {"weights": "trained" if options.workdir else "random", "seconds_of_samples": samples}
    for name, length in (("whole_depth", None), ("level_12", 1 + 12 // settings.group)):
        took, cells = timed(lambda model, memory, length=length: search(model, memory, _LEAVES, length=length))
        proven = np.asarray(cells.proven)
        probability = np.exp(np.asarray(cells.log_probability, np.float64))
        figures[name] = {
            "seconds": took,
            "ratio_to_samples": took / samples,
            "share_of_photos_proven": float((proven >= _LEAVES).mean()),
            "share_with_the_best_proven": float((proven >= 1).mean()),
            "leaves_proven": float(np.minimum(proven, _LEAVES).mean()),
            "probability_of_64_cells": float(probability[:, :64].sum(1).mean()),
            "probability_of_all_returned": float(probability.sum(1).mean()),
        }
    return figures


def reference(options: argparse.Namespace, device: str, dtype: str) -> dict[str, Any]:
    """Measures one round of the reference in a new process."""
    model = configuration(options)
    values = dict(
        width=model.width, layers=model.encoder_layers, heads=model.heads, feed_forward=model.feed_forward,
        group=model.group, neighbors=model.neighbors, batch=options.batch, candidates=1 + options.candidates,
        steps=options.reference_candidates, device=device, dtype=dtype,
    )  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return _run([options.torch_python, "-m", "benchmarks.torch_reference", *flags])


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Runs all rounds. Returns the median figures, and the speed of every round."""
    has_torch = not subprocess.run([options.torch_python, "-c", "import torch"], capture_output=True).returncode
    if not has_torch:
        print(f"{options.torch_python} has no torch: only our side is measured (see --torch-python)", file=sys.stderr)
    rounds, references = [], []
    for _ in range(options.rounds):
        rounds.append(_run([sys.executable, "-m", "benchmarks.decoding", "--round=decode", *arguments]))
        if has_torch:
            device = "cuda" if rounds[0]["platform"] == "gpu" else "cpu"
            references.append(reference(options, device, rounds[0]["dtype"]))
    pairs = zip(rounds, references, strict=False)
    ratios = [a["photos_per_second"] / b["photos_per_second"] for a, b in pairs]
    model = configuration(options)
    return {
        "model": {name: model[name] for name in (*_TINY, "group", "neighbors")},
        "batch": options.batch,
        "candidates": options.candidates,
        "ours": _median(rounds),
        "reference": _median(references) if references else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratios": ratios,
        "search": _run([sys.executable, "-m", "benchmarks.decoding", "--round=search", *arguments]),
    }


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the round of median speed, with the speeds of all rounds under `all`."""
    ordered = sorted(rounds, key=lambda line: line["photos_per_second"])
    return {**ordered[len(ordered) // 2], "all": [line["photos_per_second"] for line in rounds]}


def main() -> None:
    """Prints the comparison, or with --round one round of our side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="measure the model of configs/common.py")
    parser.add_argument("--batch", type=int, default=8, help="photos per batch (use 512 on an accelerator)")
    parser.add_argument("--candidates", type=int, default=30, help="K, number of samples besides the greedy candidate")
    parser.add_argument(
        "--reference-candidates",
        type=int,
        default=2,
        help="number of candidates timed for the reference; the fastest counts",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--times", type=int, default=3, help="batches per round; the fastest counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--workdir", default="", help="work directory of the demo, for its trained model")
    parser.add_argument("--round", choices=["decode", "search"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.round:
        with tempfile.TemporaryDirectory() as folder:
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)  # the first round compiles for all
            print(json.dumps(compare(options, sys.argv[1:])))
    else:
        print(json.dumps(ours(options) if options.round == "decode" else searches(options)))


if __name__ == "__main__":
    main()
