"""Compares the answers and the costs of an export in each runtime with the package.

The runtimes are the package itself, standalone.py with jax, with onnxruntime and with TensorFlow, and the SavedModel
from the bytes of image files (`encoded`), for which TensorFlow decodes and resizes. All but the package run in new
virtual environments without it. All read the same image files: the photos of a split, and photos in all formats with
broken files among them (benchmarks/album.py), which `encoded` does not read. All search the gallery exactly, but for
`scann`, which is the package with the index of the export.

Prints one JSON object. For each runtime it has the number of files with the package's answer (the place within 1e-4
degrees, both radii within 1 %, and each probability within 0.01, or no answer for a broken file), the other files, the
shares of photos of the split within the five distances of the truth, the seconds from the start to the first answer,
photos per second one by one and in lists of 64, the peak of the memory, and the size on disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from benchmarks import album
from configs import common
from geotoken_jax import GeoToken, Prediction, settings
from geotoken_jax.export.targets import TARGETS
from geotoken_jax.gallery import index
from geotoken_jax.gallery.table import IndexVectors, Table
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km
from geotoken_jax.predict import bundle
from geotoken_jax.workdir import Workdir

_ROOT = Path(__file__).parents[1]
#: Largest differences of an answer that counts as the package's: degrees, share of a radius, probability.
_DEGREES, _RADIUS, _PROBABILITY = 1e-4, 0.01, 0.01
#: Photos that are timed one by one, and in each of the lists that are timed.
_SINGLE, _LIST = 16, 64
#: Runtime -> packages that it must not import. ml_dtypes is a dependency of TensorFlow.
_WITHOUT = {
    "jax": ("geotoken_jax", "flax"),
    "onnx": ("geotoken_jax", "flax", "jax", "jaxlib", "ml_dtypes"),
    "savedmodel": ("geotoken_jax", "flax", "jax", "jaxlib"),
    "encoded": ("geotoken_jax", "flax", "jax", "jaxlib"),
}
#: Runtime -> target of `geotoken export` that it runs.
_TARGETS = {"onnx": "onnx", "savedmodel": "savedmodel", "encoded": "savedmodel"}
#: Program that answers all photos of a list of files. Its argument is a JSON file.
_RUN = """
import json, resource, sys, time
begin, options = time.perf_counter(), json.load(open(sys.argv[1]))
sys.modules.update(dict.fromkeys(options["without"]))
files = options["files"]
if options["runtime"] in ("package", "scann"):
    from benchmarks.export import ours
    predict = ours(options["export"], exact=options["runtime"] == "package")
elif options["runtime"] == "encoded":
    import tensorflow as tf
    call = tf.saved_model.load(options["target"] + "/program").signatures["encoded"]
    def predict(files):
        outputs = call(encoded=tf.constant([open(file, "rb").read() for file in files]))
        columns = (outputs[name].numpy().tolist() for name in ("coordinates", "radius_km", "within"))
        return [
            {"latitude": at[0], "longitude": at[1], "radius_km": radii[0], "radius_90_km": radii[1],
             "within": dict(enumerate(within))}
            for at, radii, within in zip(*columns)
        ]
else:
    sys.path.insert(0, options["export"])
    from standalone import Model
    model = Model(options["export"], options["target"])
    predict = lambda files: [answer for _, answer in model.stream(files)]
predict(files[:1])
seconds = {"first_answer_s": time.perf_counter() - begin}
def rate(lists):
    predict(lists[0])
    begin = time.perf_counter()
    for photos in lists:
        predict(photos)
    return sum(map(len, lists)) / (time.perf_counter() - begin)
single, many = options["sizes"]
seconds["photos_per_second_1"] = rate([[file] for file in files[:single]])
seconds["photos_per_second_64"] = rate([files[:many], files[-many:]])
with open(options["out"], "w") as out:
    everything = files if options["runtime"] == "encoded" else files + options["odd"]
    for first in range(0, len(everything), many):
        for answer in predict(everything[first : first + many]):
            out.write(json.dumps(answer if isinstance(answer, dict) else {"error": str(answer)}) + "\\n")
seconds["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(seconds))
"""


def ours(folder: str, exact: bool) -> Any:
    """Returns a function from files to the package's answers, as standalone.py writes them. exact: whether the search
    compares all photos of the gallery, in place of the export's index."""
    model = GeoToken(_with_exact_index(Path(folder)) if exact else folder)
    return lambda files: [
        {
            "latitude": p.latitude,
            "longitude": p.longitude,
            "radius_km": p.radius_km,
            "radius_90_km": p.radius_90_km,
            "within": p.within,
        }
        if isinstance(p, Prediction)
        else p
        for p in model.predict(files, on_error="return")
    ]


def _with_exact_index(folder: Path) -> Path:
    """Returns a folder of links to the files of an export, with an index that compares all photos."""
    linked = Path(tempfile.mkdtemp())  # removed by `main` with its scratch folder, which is TMPDIR
    for parent in (folder, folder / "gallery"):
        (linked / parent.relative_to(folder)).mkdir(exist_ok=True)
        for path in parent.iterdir():
            if path.name not in ("gallery", "index", bundle.SUMS):
                (linked / path.relative_to(folder)).symlink_to(path)
    sums = (folder / bundle.SUMS).read_text().splitlines()
    (linked / bundle.SUMS).write_text("".join(f"{line}\n" for line in sums if "  gallery/index/" not in line))
    config: Any = common.get_config()
    options = {**config.index.search, "kind": "exact", "reorder_dtype": "float32"}
    vectors = IndexVectors(Table(epath.Path(folder) / "gallery"))
    index.build(vectors, settings.read(index.IndexSettings, options, "index.search"), linked / "gallery" / "index")
    return linked


def _numbers(answers: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns places [n, 2], radii [n, 2] and probabilities [n, 5] of answers. All are 0 for a file without answer."""
    none = {"latitude": 0, "longitude": 0, "radius_km": 0, "radius_90_km": 0, "within": dict.fromkeys(range(5), 0)}
    answers = [none if "error" in answer else answer for answer in answers]
    return (
        np.array([(a["latitude"], a["longitude"]) for a in answers]),
        np.array([(a["radius_km"], a["radius_90_km"]) for a in answers]),
        np.array([list(a["within"].values()) for a in answers]),
    )


def compare(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]], truth: np.ndarray) -> dict[str, Any]:
    """Returns how answers differ from the package's, and their accuracy.

    truth: places [n, 2] in degrees of the first n files.
    """
    wanted = wanted[: len(found)]
    (place, radius, within), (own_place, own_radius, own_within) = _numbers(found), _numbers(wanted)
    turn = np.abs(place - own_place)
    same = {
        "answered": np.array([("error" in one) == ("error" in own) for one, own in zip(found, wanted, strict=True)]),
        "place": (np.minimum(turn, 360 - turn) <= _DEGREES).all(1),
        "radii": (np.abs(radius - own_radius) <= _RADIUS * own_radius).all(1),
        "within": (np.abs(within - own_within) <= _PROBABILITY).all(1),
    }
    km = np.asarray(great_circle_km(*place[: len(truth)].T, *truth.T))
    return {
        "files": len(found),
        "without_answer": sum("error" in one for one in found),
        **{f"same_{name}": int(equal.sum()) for name, equal in same.items()},
        "others": np.flatnonzero(~np.all(list(same.values()), 0)).tolist(),
        "accuracy": [round(float((km <= limit).mean()), 6) for limit in THRESHOLDS_KM],
    }


def environment(path: Path, packages: str) -> str:
    """Makes a virtual environment with these packages, unless it exists, and returns its Python."""
    if (path / "bin/python").exists():
        return str(path / "bin/python")
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    pip = [path / "bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    subprocess.run([*pip, *packages.split()], check=True)
    return str(path / "bin/python")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of every requested runtime."""
    workdir, scratch = Workdir(epath.Path(options.workdir)), Path(options.scratch)
    export = Path(options.export or Path(options.workdir) / "export").absolute()
    photos = workdir.photos(options.split)
    n = min(options.photos, len(photos))
    (scratch / "photos").mkdir(parents=True, exist_ok=True)
    files, truth = [], np.zeros((n, 2))
    for i in range(n):
        record = photos[i]
        files.append(str(scratch / "photos" / f"{i:06}.jpg"))
        Path(files[-1]).write_bytes(record["image"])
        truth[i] = record["coordinates"]
    made = album.make(scratch / "album", options.odd * 9 // 10, options.odd - options.odd * 9 // 10, (1600, 1200))
    odd = [str(scratch / "album" / name) for name in sorted(made.answered | made.refused)]
    versions = f"jax=={jax.__version__} numpy=={np.__version__} flatbuffers pillow pillow-heif"
    packages = {"jax": versions, **{name: TARGETS[target][1] + " pillow-heif" for name, target in _TARGETS.items()}}
    figures: dict[str, Any] = {"split": options.split}
    answers: dict[str, list[dict[str, Any]]] = {}
    for name in ("package", *options.runtime):
        environ = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(scratch)}
        python, target, size = sys.executable, None, _size(export) - _size(export / "targets")
        if name in _WITHOUT:
            shared = _TARGETS.get(name, name)
            python = options.python.get(shared) or environment(scratch / shared, packages[name])
        if name in _TARGETS:
            made_target = export / "targets" / _TARGETS[name]
            if name != "encoded" or not made_target.exists():
                command = ["-m", "geotoken_jax", "export", f"--from={export}", f"--target={_TARGETS[name]}"]
                subprocess.run([python, *command], env={**environ, "PYTHONPATH": str(_ROOT)}, check=True)
            target, size = str(made_target), _size(made_target)
        told = {
            "runtime": name, "without": _WITHOUT.get(name, ()), "files": files, "odd": odd, "export": str(export),
            "target": target, "sizes": (_SINGLE, _LIST), "out": str(scratch / f"{name}.jsonl"),
        }  # fmt: skip
        request = scratch / "request.json"
        request.write_text(json.dumps(told))
        isolated = ["-I"] if name in _WITHOUT else []
        run = subprocess.run(
            [python, *isolated, "-c", _RUN, request], env=environ, check=True, stdout=subprocess.PIPE, cwd=_ROOT
        )
        answers[name] = [json.loads(line) for line in Path(told["out"]).read_text().splitlines()]
        costs = json.loads(run.stdout.splitlines()[-1])
        figures[name] = {**compare(answers[name], answers["package"], truth), **costs, "size_mb": size / 1e6}
        print(json.dumps({name: figures[name]}), file=sys.stderr, flush=True)
    return figures


def _pair(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    return name, python


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/demo")
    parser.add_argument("--export", help="folder of the export (default: export/ in the work directory)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--photos", type=int, default=1 << 30, help="number of photos, the first ones (default: all)")
    parser.add_argument("--runtime", action="append", choices=("scann", *_WITHOUT), help="default: all five")
    parser.add_argument("--odd", type=int, default=200, help="number of the files in all formats")
    parser.add_argument(
        "--python", action="append", type=_pair, default=[], help="RUNTIME=PYTHON of an environment that exists"
    )
    parser.add_argument(
        "--scratch", help="folder for environments, photos and answers, which stay there (default: a temporary folder)"
    )
    options = parser.parse_args()
    options.runtime, options.python = options.runtime or ["scann", *_WITHOUT], dict(options.python)
    with tempfile.TemporaryDirectory() as temporary:
        options.scratch = os.path.abspath(options.scratch or temporary)
        print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
