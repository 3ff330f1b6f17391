"""Tells where photos were taken, with the model in this folder and without geotoken_jax.

pip install -r standalone-requirements.txt        # jax, numpy, pillow and flatbuffers; pillow-heif for HEIC photos
python standalone.py PHOTO_OR_FOLDER... [--json] [--target=targets/onnx]

It prints a line per photo: the place, and the radius that contains the photo's place with a probability of 50 %. With
--json a line is a JSON object with the fields of geotoken_jax.Prediction. --target names a folder that `geotoken export
--target` made; its program replaces the jax program and needs onnxruntime, or tensorflow, instead of jax.

In Python: `Model(FOLDER).predict([PHOTO, ...])` returns the JSON objects.

The answers are the same as with `GeoToken.load(FOLDER)` and exact search in the whole gallery. Capture times are not
read.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np

if (Path(__file__).parent / "preprocess.py").exists():
    sys.path.insert(0, str(Path(__file__).parent))
    import preprocess
else:  # in the package
    from geotoken_jax.backbone import preprocess

#: Photos per batch, at most. Fewer photos are padded to a power of two, so that few batch sizes are compiled.
BATCH = 32
_THRESHOLDS_KM = (1, 25, 200, 750, 2500)
_TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "U32": np.uint32}


class Model:
    """The model of one exported folder."""

    def __init__(self, folder, target=None):
        """target: folder with a program for another runtime. The jax program runs if None."""
        folder = Path(folder)
        self.signature = signature(folder)
        self.choice = _read(folder, "config.json")["predict"]["choice"]
        self.ids = _column(folder / "gallery", "ids")
        self.gallery = arrays(folder)
        self.run = _program(folder, self.gallery) if target is None else _target(Path(target), self.gallery)

    def predict(self, photos):
        """Returns a prediction per photo, a dict with the fields of geotoken_jax.Prediction.

        photos: list of paths, bytes of image files, PIL images or uint8 arrays [h, w, 3]. Raises preprocess.ImageError,
        a sentence that names the photo, if one cannot be read.
        """
        return [answer for _, answer in self.stream(photos, raises=True)]

    def stream(self, photos, raises=False):
        """Yields each photo with its prediction, in order, or with its ImageError if `raises` is False."""
        batch = []
        for photo in photos:
            try:
                batch.append((photo, self.prepare(photo)))
            except preprocess.ImageError as error:
                if raises:
                    raise
                batch.append((photo, error))
            if len(batch) == BATCH:
                yield from self._answered(batch)
                batch = []
        yield from self._answered(batch)

    def prepare(self, photo):
        """Returns a photo as the program's input: decoded, resized and cropped, [h, w, 3] uint8."""
        if self.signature["prepare"] is None:
            raise ModelError(
                "this export does not contain its backbone's checkpoint: pass features to `answers`, or export again "
                "with --config.export.weights=True"
            )
        return preprocess.prepare(photo, self.signature["prepare"])

    def answers(self, inputs):
        """Returns a prediction per row of `inputs`: prepared photos, or features [n, C] without a backbone."""
        answers = []
        for first in range(0, len(inputs), BATCH):
            part = inputs[first : first + BATCH]
            n = len(part)
            padded = np.concatenate([part, np.repeat(part[:1], (1 << (n - 1).bit_length()) - n, 0)])
            outputs = self.run(padded)
            answers += [self._answer({name: values[i] for name, values in outputs.items()}) for i in range(n)]
        return answers

    def _answered(self, batch):
        read = [pixels for _, pixels in batch if not isinstance(pixels, preprocess.ImageError)]
        answers = iter(self.answers(np.stack(read)) if read else ())
        return [(photo, one if isinstance(one, preprocess.ImageError) else next(answers)) for photo, one in batch]

    def _answer(self, output):
        """Returns a prediction from the outputs for one photo. Equal candidates are merged, as in the package."""
        places = {}
        if "places" in output:
            listed = zip(output["places"], output["place_probability"])  # noqa: B905
            places = {"places": [{**_place(at), "probability": float(p)} for at, p in listed if p > 0]}
        candidates = {}
        for at, tokens, p in zip(output["candidates"], output["cell_tokens"].tolist(), output["log_probability"]):  # noqa: B905
            one = {**_place(at), "log_probability": float(p), "count": 0, "tokens": tokens}
            candidates.setdefault(tuple(tokens), one)["count"] += 1
        first, *others = candidates.values()
        present = output["neighbors"] >= 0
        return {
            **_place(output["coordinates"]),
            "radius_km": float(output["radius_km"][0]),
            "radius_90_km": float(output["radius_km"][1]),
            "within": {str(km): float(p) for km, p in zip(_THRESHOLDS_KM, output["within"])},  # noqa: B905
            "choice": self.choice,
            "candidates": [first, *sorted(others, key=lambda one: -one["log_probability"])],
            "neighbors": [
                {"id": bytes(self.ids[row]).decode(), **_place(self.gallery["coordinates"][row]), "score": float(score)}
                for row, score in zip(output["neighbors"][present], output["neighbor_scores"][present])  # noqa: B905
            ],
            **places,
        }


class ModelError(Exception):
    """The export cannot be used. The message is one sentence: what is wrong, where, and how to mend it."""


def signature(folder):
    """Returns the inputs and outputs of an export's program, and how photos are prepared for it."""
    return _read(folder, "signature.json")


def arrays(folder):
    """Returns the gallery's arrays that the program reads, by name. bfloat16 is stored and returned as uint16."""
    config = _read(folder, "config.json")
    columns = {name: _column(folder / "gallery", name) for name in ("embeddings", "coordinates", "tokens")}
    if columns["embeddings"].dtype == np.int8:
        columns["scales"] = _column(folder / "gallery", "scales")
    columns["coordinates"] = columns["coordinates"].astype(np.float32)
    if config["predict"]["choice"] == "reranker":
        for name in config["learned"]["reranker"]["channels"]:
            if name != "index":
                columns.update(_channel(folder / "channels" / name / "index", name))
        columns["owner"] = np.load(folder / "channels" / "owner.npy").astype(np.int32)
        if config["learned"]["reranker"].get("sources"):
            sources = _column(folder / "gallery", "sources")
            columns["source"] = np.unique(sources, return_inverse=True)[1].astype(np.int32)
    return columns


def _read(folder, name):
    if not (folder / name).exists():
        raise ModelError(f"{folder} has no {name}: give the folder that `geotoken export` made")
    return json.loads((folder / name).read_text())


def _column(folder, name):
    files = sorted(folder.glob(f"{name}-*-of-*.npy"))
    if not files or len(files) != int(files[0].stem[-5:]):
        raise ModelError(f"{folder} lacks files of {name}: copy the whole export again")
    return np.concatenate([np.load(file, mmap_mode="r") for file in files])


def _channel(folder, name):
    """Returns the vectors of an index. ScaNN stores the vectors that it scores again whole."""
    files = {"vectors.npy": "scales.npy", "int8_dataset.npy": "int8_multipliers.npy"}
    columns = {}
    for shard in sorted(folder.glob("?????-of-?????")):
        names = [n for n in (*files, "bfloat16_dataset.npy", "dataset.npy") if (shard / n).exists()]
        if not names:
            raise ModelError(f"{shard} lacks its vectors: copy the whole export again")
        values = np.load(shard / names[0])
        columns.setdefault(name, []).append(values.view(np.uint16) if values.dtype == np.int16 else values)
        if values.dtype == np.int8:
            columns.setdefault(f"{name}_scales", []).append(np.load(shard / files[names[0]]))
    return {key: np.concatenate(values) for key, values in columns.items()}


def read_safetensors(file):
    """Returns name -> array of a safetensors file; bfloat16 as uint16."""
    data = Path(file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind, offset = _TYPES.get(entry["dtype"], np.uint16), 8 + size + entry["data_offsets"][0]
            count = int(np.prod(entry["shape"]))
            arrays[name] = np.frombuffer(data, kind, count, offset).reshape(entry["shape"])
    return arrays


def _program(folder, gallery):
    """Returns a function from photos to the outputs, which runs the jax program. It compiles once per batch size."""
    import jax
    from jax import export

    exported = export.deserialize(bytearray((folder / "program.stablehlo").read_bytes()))
    (parameters, stored, _), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)

    def typed(values, avals):
        return {
            name: values[name].view(aval.dtype) if values[name].dtype == np.uint16 else values[name].astype(aval.dtype)
            for name, aval in avals.items()
        }

    parameters = jax.device_put(typed(read_safetensors(folder / "program.safetensors"), parameters))
    stored = jax.device_put(typed(gallery, stored))
    call = jax.jit(exported.call)
    return lambda photos: {name: np.asarray(values) for name, values in call(parameters, stored, photos).items()}


def _target(target, gallery):
    """Returns a function from photos to the outputs, which runs the program of another runtime."""
    if (target / "program.onnx").exists():
        return _onnx(target, gallery)
    if (target / "program" / "saved_model.pb").exists():
        return _savedmodel(target)
    raise ModelError(
        f"{target} has no program: make one with `geotoken export --from=FOLDER --target=onnx` or --target=savedmodel"
    )


def _onnx(target, gallery):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about sizes that depend on the number of photos
    session = onnxruntime.InferenceSession(str(target / "program.onnx"), options)
    outputs = [output.name for output in session.get_outputs()]
    photos = session.get_inputs()[-1].name
    widened = {
        f"gallery_{name}": (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values
        for name, values in gallery.items()
    }
    return lambda batch: dict(zip(outputs, session.run(None, {**widened, photos: batch})))  # noqa: B905


def _savedmodel(target):
    import tensorflow as tf

    call = tf.saved_model.load(str(target / "program")).signatures["serving_default"]
    (photos,) = call.structured_input_signature[1]
    return lambda batch: {name: value.numpy() for name, value in call(**{photos: tf.constant(batch)}).items()}


def _place(at):
    return {"latitude": float(at[0]), "longitude": float(at[1])}


def _photos(paths):
    """Yields the photos of files and folders; a folder's photos in the order of their names."""
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in preprocess.ENDINGS and p.name[:1] != ".")
            if not found:
                print(f"{path} contains no photos: name a folder with files such as .jpg or .png", file=sys.stderr)
            yield from found
        else:
            yield path


def main(arguments=None):
    """Prints the answers of photos. Returns the exit status: 2 if a photo could not be read, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", help="photos, and folders with photos")
    parser.add_argument("--json", action="store_true", help="print a JSON object per photo")
    parser.add_argument("--target", help="folder with the program of another runtime")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    status = 0
    try:
        model = Model(Path(__file__).parent, options.target)
        for path, answer in model.stream(map(str, _photos(options.photos))):
            if isinstance(answer, preprocess.ImageError):
                status = 2
                print(answer, file=sys.stderr)
            elif options.json:
                print(json.dumps({"id": path, **answer}), flush=True)
            else:
                at = "{latitude:.5f}, {longitude:.5f} within {radius_km:.1f} km".format(**answer)
                print(f"{path}: {at}", flush=True)
    except (ModelError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError):
            error = f"{error.name} is not installed: pip install {error.name}"
        print(error, file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
