"""Compares predictions of an export that runs without this package with predictions of the package.

Three runtimes are measured, each in a new virtual environment: jax with flatbuffers, onnxruntime, and TensorFlow (for
PyTorch see tests/interop/test_torch.py). Both sides start from the backbone's features of a split's photos, and search
the gallery exactly.

Prints one JSON object with three figures per runtime: the number of photos whose candidates have the same tokens on
both sides and, for these photos, the largest difference of coordinates (degrees) and of log-probabilities (nats). The
number of photos for which ScaNN finds the same neighbors as exact search is printed too. For the demo's export this
takes half an hour on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from geotoken_jax import manifests, records
from geotoken_jax.align.heads import embeddings
from geotoken_jax.data.join import neighbors
from geotoken_jax.export.targets import TARGETS
from geotoken_jax.gallery import index
from geotoken_jax.gallery.neighbors import search_neighbors
from geotoken_jax.gallery.table import Table, index_vectors
from geotoken_jax.predict import bundle, predictor

_ROOT = Path(__file__).parents[1]
#: Program that runs another program and forbids it to import some packages. Its first argument lists the packages,
#: separated by commas.
RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
#: Runtime -> packages that it must not import. ml_dtypes is a dependency of TensorFlow.
WITHOUT = {
    "jax": "geotoken_jax,flax",
    "onnx": "geotoken_jax,flax,jax,jaxlib,ml_dtypes",
    "savedmodel": "geotoken_jax,flax,jax,jaxlib",
}


class _Rows:
    """Index vectors of a gallery, computed when they are read."""

    def __init__(self, gallery: Table):
        self._gallery = gallery

    def __len__(self) -> int:
        return len(self._gallery)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return index_vectors(self._gallery.embeddings(rows))


def ours(folder: Path, features: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the package's candidates of all photos, with neighbors by exact search and by ScaNN."""
    model = predictor.GeoToken.load(folder)
    decoder, gallery = model._answerer.decoder, model._gallery
    vectors = embeddings(model._aligned, features)
    queries = index_vectors(vectors)
    rows, scores = index.exact(_Rows(gallery), queries, decoder.neighbors)
    parts = []
    for first in range(0, len(features), model.batch_size):
        part = slice(first, first + model.batch_size)
        batch = {"query": vectors[part], **neighbors(gallery, rows[part], decoder.cells)}
        pool = decoder(batch, rows[part], scores[part], np.zeros(len(rows[part]), np.int64))
        parts.append({**pool.candidates._asdict(), "coordinates": pool.coordinates})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    approximate, _ = search_neighbors(model._index, queries, decoder.neighbors)
    return {**arrays, "rows": rows, "scann_rows": approximate, "ids": gallery.ids(rows)}


def compare(answers: Path, wanted: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns how the answers of standalone.py differ from the answers of the package."""
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    tokens = np.array([[c["tokens"] for c in answer["candidates"]] for answer in lines])
    coordinates = np.array([[(c["latitude"], c["longitude"]) for c in answer["candidates"]] for answer in lines])
    log_p = np.array([[c["log_probability"] for c in answer["candidates"]] for answer in lines])
    neighbor_ids = np.array([[n["id"].encode() for n in answer["neighbors"]] for answer in lines])
    chosen = np.array([answer["tokens"] for answer in lines])
    best = wanted["tempered_log_probability"].argmax(1)
    choice = wanted["tokens"][np.arange(len(best)), best]
    same = (tokens == wanted["tokens"]).all((1, 2))
    log_p_difference = np.abs(log_p - wanted["log_probability"])[same]
    return {
        "photos": len(lines),
        "same_neighbors": int((neighbor_ids == wanted["ids"]).all(1).sum()),
        "same_tokens": int(same.sum()),
        "same_candidates": float((tokens == wanted["tokens"]).all(2).mean()),
        "same_answer": int((chosen == choice).all(1).sum()),
        "coordinates": float(np.abs(coordinates - wanted["coordinates"])[same].max()),
        "log_probability": float(log_p_difference.max()),
    }


def environment(path: Path, packages: str) -> str:
    """Makes a virtual environment with these packages, and returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    pip = [path / "bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    subprocess.run([*pip, *packages.split()], check=True)
    return str(path / "bin/python")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of every requested runtime."""
    folder, scratch = Path(options.export or Path(options.workdir) / "export"), Path(options.scratch)
    source = Path(options.workdir)
    layout = records.feature_layout(manifests.read_manifest(source, "features").facts["width"])
    stored = records.Records(source / "features", options.split, layout)
    photos = min(options.photos, len(stored))
    features = stored[np.arange(photos)]["image"].astype(np.float32)
    np.save(scratch / "features.npy", features)
    begin = time.perf_counter()
    wanted = ours(folder, features)
    figures: dict[str, Any] = {
        "split": options.split,
        "sums": bundle.sha256(folder / bundle.SUMS),
        "same_neighbors_by_scann": int((wanted["rows"] == wanted["scann_rows"]).all(1).sum()),
        "share_of_neighbors_by_scann": index.recall(wanted["scann_rows"], wanted["rows"]),
        "package_seconds": time.perf_counter() - begin,
    }
    versions = f"jax=={jax.__version__} jaxlib=={jax.__version__} numpy=={np.__version__} flatbuffers"
    packages = {"jax": versions, **{name: TARGETS[name][1] for name in TARGETS if name != "pytorch"}}
    for name in options.runtime:
        python = environment(scratch / name, packages[name])
        target = []
        if name != "jax":
            environ = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
            command = ["-m", "geotoken_jax.cli", "export", f"--from={folder}", f"--target={name}"]
            subprocess.run([python, *command], env=environ, check=True)
            target = [folder / "targets" / name]
        answers, begin = scratch / f"{name}.jsonl", time.perf_counter()
        with answers.open("w") as file:
            run = [python, "-I", "-c", RUN, WITHOUT[name], folder / "standalone.py", scratch / "features.npy", *target]
            subprocess.run(run, stdout=file, check=True)
        figures[name] = {**compare(answers, wanted), "seconds": time.perf_counter() - begin}
        print(json.dumps({name: figures[name]}), file=sys.stderr)
    return figures


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--export", help="folder of the export (default: export/ in the work directory)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--photos", type=int, default=1 << 30, help="number of photos, the first ones (default: all)")
    parser.add_argument("--runtime", action="append", choices=tuple(WITHOUT), help="default: all three")
    parser.add_argument(
        "--scratch", help="folder for environments and answers, which stay there (default: a temporary folder)"
    )
    options = parser.parse_args()
    options.runtime = options.runtime or list(WITHOUT)
    with tempfile.TemporaryDirectory() as temporary:
        options.scratch = options.scratch or temporary
        print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
