"""Predicts where photos were taken with the model in this folder, without geotoken_jax.

`pip install jax flatbuffers`, then `python standalone.py FEATURES.npy [TARGET] > answers.jsonl`

TARGET is a folder that `geotoken export --target` made, such as targets/onnx. Its programs replace the jax programs.
They need only numpy and onnxruntime, or only numpy and tensorflow.

FEATURES.npy contains the backbone's image features of n photos, [n, C]. For the backbone `thumbnail` it may contain
thumbnails instead, [n, side, side, 3] uint8: the central square of each photo, upright, resized bicubically. This
folder has no program for other backbones: compute their features with the backbone itself.

Neighbors come from exact search in the whole gallery. The prediction is the candidate with the highest probability
under the distribution that candidates were sampled from. Predictions of `GeoToken.load` in geotoken_jax can differ:
- it searches the export's index, which may be approximate;
- it merges equal samples;
- it chooses the prediction with the selector `predict.choice` of config.json;
- it estimates the radii of a prediction;
- it uses a photo's capture time, which is unknown to this file.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

#: Photos per embedding batch. The size is constant because matrix products of other shapes round differently.
_BATCH = 256
#: Gallery photos per block of the search: 75 MB, at 2304 numbers per photo.
_BLOCK = 8192
#: Number of extra neighbors that the float32 search keeps. Float64 scores can move them up among the nearest.
_SPARE = 8
_TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "U32": np.uint32}
#: Tables of the Hilbert curve of S2 cells. A cell has two integer coordinates on its face. Each quad appends bit i to
#: one and bit j to the other, with 2 * i + j = _IJ[orientation, quad]. Then _TURN[quad] is XORed to the orientation.
#: The first orientation is face & 1.
_IJ = np.array([[0, 1, 3, 2], [0, 2, 3, 1], [3, 2, 0, 1], [3, 1, 0, 2]])
_TURN = np.array([1, 0, 0, 3])


class Model:
    """The model of an export: computes features, neighbors, candidates and predictions.

    Vectors are float32 with values rounded to bfloat16, as in geotoken_jax.
    """

    def __init__(self, folder, target=None):
        """target: folder with programs for another runtime; if None, the jax programs run."""
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        model = self.config["model"]
        self.level, self.group, self.count = model["level"], model["group"], model["neighbors"]
        run = _runtime(Path(target)) if target else _program
        self._embed, self._decode = (run(Path(target or folder), name) for name in ("align", "geotoken"))
        gallery = folder / "gallery"
        self._columns = {name: _shards(gallery, name) for name in ("coordinates", "tokens", "ids", "embeddings")}
        if self._columns["embeddings"][0].dtype == np.int8:
            self._columns["scales"] = _shards(gallery, "scales")
        self._starts = np.cumsum([0, *(len(part) for part in self._columns["ids"])])

    def features(self, thumbnails):
        """Returns the features [n, C] of the backbone `thumbnail` from thumbnails [n, side, side, 3] uint8."""
        pixels = thumbnails.astype(np.float32)
        return _unit((pixels - pixels.mean((1, 2), keepdims=True)).reshape(len(pixels), -1), 1e-12)

    def vectors(self, features):
        """Returns the image, location and text vectors [n, 3, C] of photos from features [n, C]."""
        features = _rounded(np.asarray(features, np.float32))
        blocks = (features[first : first + _BATCH] for first in range(0, len(features), _BATCH))
        outputs = [self._embed(features=_padded(block, _BATCH))["vectors"][: len(block)] for block in blocks]
        return _rounded(_unit(np.concatenate(outputs), 1e-12))

    def neighbors(self, vectors):
        """Returns gallery rows and scores [n, M] of the M nearest gallery photos, best first.

        M is config["model"]["neighbors"]. If the gallery has fewer than M photos, the remaining rows are -1 and their
        scores -inf.
        """
        queries = _index_vectors(vectors)
        rows = np.zeros((len(queries), 0), np.int64)
        scores = np.zeros((len(queries), 0), np.float32)
        for first in range(0, self._starts[-1], _BLOCK):
            block = np.arange(first, min(first + _BLOCK, self._starts[-1]))
            products = queries @ _index_vectors(self.embeddings(block)).T
            k = min(self.count + _SPARE, len(block))
            nearest = np.argpartition(-products, k - 1, axis=1)[:, :k]
            rows = np.concatenate([rows, block[nearest]], 1)
            scores = np.concatenate([scores, np.take_along_axis(products, nearest, 1)], 1)
            best = np.lexsort((rows, -scores))[:, : self.count + _SPARE]
            rows, scores = np.take_along_axis(rows, best, 1), np.take_along_axis(scores, best, 1)
        best_rows = np.full((len(queries), self.count), -1)
        best_scores = np.full((len(queries), self.count), -np.inf, np.float32)
        for i, row in enumerate(rows):
            score = (_index_vectors(self.embeddings(row)).astype(float) @ queries[i].astype(float)).astype(np.float32)
            order = np.lexsort((row, -score))[: self.count]
            best_rows[i, : len(order)], best_scores[i, : len(order)] = row[order], score[order]
        return best_rows, best_scores

    def candidates(self, vectors, rows, numbers):
        """Returns a dict with the candidates' tokens [n, K, T], log_probability and tempered_log_probability [n, K].

        rows: gallery rows of the neighbors [n, M]; -1 stands for no neighbor. numbers: seed per photo [n].
        """
        valid = np.maximum(rows, 0)
        arguments = {
            "query": vectors,
            "neighbors": self.embeddings(valid),
            "neighbor_tokens": self.cell_tokens(self._take("tokens", valid)),
            "neighbor_count": (rows >= 0).sum(1).astype(np.int32),
            "numbers": np.asarray(numbers, np.uint32),
        }
        size, parts = self.config["predict"]["batch_size"], []
        for first in range(0, len(rows), size):
            n = min(size, len(rows) - first)
            part = {name: values[first : first + n] for name, values in arguments.items()}
            output = self._decode(**{name: _padded(values, 1 << (n - 1).bit_length()) for name, values in part.items()})
            parts.append({name: values[:n] for name, values in output.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def answers(self, inputs):
        """Returns one prediction per photo, as a dict with fields of geotoken_jax.Prediction.

        Every sample is one candidate, even if two samples are equal. inputs: features [n, C], or thumbnails
        [n, side, side, 3] uint8 for the backbone `thumbnail`.
        """
        vectors = self.vectors(self.features(inputs) if inputs.ndim == 4 else inputs)
        rows, scores = self.neighbors(vectors)
        candidates = self.candidates(vectors, rows, np.zeros(len(rows)))
        centers = self.centers(candidates["tokens"])
        best = candidates["tempered_log_probability"].argmax(1)
        answers = []
        for i, row in enumerate(rows):
            listed = [
                {**_place(at), "probability": math.exp(p), "log_probability": float(p), "tokens": t.tolist()}
                for at, p, t in zip(centers[i], candidates["log_probability"][i], candidates["tokens"][i])  # noqa: B905
            ]
            neighbors, neighbor_scores = row[row >= 0], scores[i][row >= 0]
            ids, places = self._take("ids", neighbors), self._take("coordinates", neighbors)
            answers.append(
                {
                    **_place(centers[i][best[i]]),
                    "choice": "log_probability",
                    "choices": {"greedy": 0, "log_probability": int(best[i])},
                    "candidates": listed,
                    "neighbors": [
                        {"id": name.decode(), **_place(at), "score": float(score), "row": int(row)}
                        for row, name, at, score in zip(neighbors, ids, places, neighbor_scores)  # noqa: B905
                    ],
                }
            )
        return answers

    def embeddings(self, rows):
        """Returns the vectors [..., 3, C] of gallery photos. rows: gallery rows [...]."""
        values = self._take("embeddings", rows)
        if "scales" not in self._columns:
            return _widened(values.view(np.uint16))
        return _rounded(values.astype(np.float32) * self._take("scales", rows)[..., None])

    def cell_tokens(self, quads):
        """Returns the model's tokens [..., T]. quads: the gallery's tokens, a face followed by one quad per level."""
        groups = quads[..., 1 : 1 + self.level].astype(np.int32).reshape(*quads.shape[:-1], -1, self.group)
        powers = 4 ** np.arange(self.group - 1, -1, -1, dtype=np.int32)
        return np.concatenate([quads[..., :1].astype(np.int32), groups @ powers], -1)

    def centers(self, tokens):
        """Returns the centers of S2 cells as latitude and longitude [..., 2], in degrees."""
        shifts = 2 * np.arange(self.group - 1, -1, -1)
        quads = (tokens[..., 1:, None] >> shifts & 3).reshape(*tokens.shape[:-1], self.level)
        face = tokens[..., 0]
        orientation, i, j = face & 1, np.zeros_like(face), np.zeros_like(face)
        for quad in np.moveaxis(quads, -1, 0):
            ij = _IJ[orientation, quad]
            i, j, orientation = 2 * i + (ij >> 1), 2 * j + (ij & 1), orientation ^ _TURN[quad]
        u, v = (_uv((k + 0.5) / 2**self.level) for k in (i, j))
        one = np.ones_like(u)
        x = np.choose(face, [one, -u, -u, -one, v, v])
        y = np.choose(face, [u, one, -v, -v, -one, u])
        z = np.choose(face, [v, v, one, -u, -u, -one])
        return np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], -1))

    def _take(self, name, rows):
        parts = self._columns[name]
        if len(parts) == 1:
            return parts[0][rows]
        values = np.empty((*rows.shape, *parts[0].shape[1:]), parts[0].dtype)
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for s in np.unique(shard):
            values[shard == s] = parts[s][rows[shard == s] - self._starts[s]]
        return values


def read_safetensors(file):
    """Returns the arrays of a safetensors file by name. bfloat16 is converted to float32."""
    data = Path(file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind = _TYPES.get(entry["dtype"], np.uint16)
            offset = 8 + size + entry["data_offsets"][0]
            values = np.frombuffer(data, kind, int(np.prod(entry["shape"])), offset).reshape(entry["shape"])
            arrays[name] = _widened(values) if entry["dtype"] == "BF16" else values
    return arrays


def _program(folder, name):
    """Returns a function that runs {name}.stablehlo with {name}.safetensors. It compiles once per batch size."""
    import jax

    exported = deserialize((folder / f"{name}.stablehlo").read_bytes())
    call = jax.jit(exported.call)
    (wanted, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    stored = read_safetensors(folder / f"{name}.safetensors")
    parameters = jax.device_put({name: stored[name].astype(aval.dtype) for name, aval in wanted.items()})

    def run(**arguments):
        avals = exported.in_avals[-len(arguments) :]
        output = call(
            parameters,
            *(values.astype(aval.dtype) for values, aval in zip(arguments.values(), avals)),  # noqa: B905
        )
        return {
            key: np.asarray(value) for key, value in (output if name == "geotoken" else {"vectors": output}).items()
        }

    return run


def _runtime(target):
    """Returns the function that loads a target's programs: _onnx or _savedmodel, according to its files."""
    if (target / "align.onnx").exists():
        return _onnx
    if (target / "align" / "saved_model.pb").exists():
        return _savedmodel
    raise FileNotFoundError(
        f"{target} has no programs: make ONNX programs with `geotoken export --from=FOLDER --target=onnx`, "
        "or SavedModels with --target=savedmodel"
    )


def _onnx(target, name):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(target / f"{name}.onnx"))
    outputs = [output.name for output in session.get_outputs()]
    noise = {"noise": np.load(target / "noise.npy")} if name == "geotoken" else {}

    def run(numbers=None, **arguments):
        if np.any(numbers):
            raise ValueError("numbers must be 0: noise.npy contains the noise of number 0 only")
        return dict(zip(outputs, session.run(None, {**arguments, **noise})))  # noqa: B905

    return run


def _savedmodel(target, name):
    import tensorflow as tf

    call = tf.saved_model.load(str(target / name)).signatures["serving_default"]
    kinds = {argument: spec.dtype for argument, spec in call.structured_input_signature[1].items()}

    def run(**arguments):
        output = call(**{key: tf.cast(values, kinds[key]) for key, values in arguments.items()})
        return {key: value.numpy() for key, value in output.items()}

    return run


def deserialize(data):
    """Returns a jax.export.Exported from its serialized bytes."""
    from jax import export

    return export.deserialize(bytearray(data))


def _place(at):
    return {"latitude": float(at[0]), "longitude": float(at[1])}


def _shards(folder, name):
    files = sorted(folder.glob(f"{name}-*-of-*.npy"))
    if not files or len(files) != int(files[0].stem[-5:]):
        raise FileNotFoundError(f"{folder} lacks shards of {name}: copy the whole folder again")
    return [np.load(file, mmap_mode="r") for file in files]


def _index_vectors(vectors):
    return _unit(vectors.astype(np.float32), 1e-12).reshape(len(vectors), -1)


def _rounded(values):
    """Rounds float32 values to the nearest bfloat16 values, ties to even. Returns float32."""
    bits = values.view(np.uint32)
    return ((bits + (bits >> 16 & 1) + 0x7FFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _widened(bfloat16):
    """Converts bfloat16 values, stored as uint16, to float32."""
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def _unit(vectors, least):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), least)


def _uv(s):
    return np.where(s >= 0.5, (4 * s**2 - 1) / 3, (1 - 4 * (1 - s) ** 2) / 3)


def _padded(values, size):
    return np.concatenate([values, np.repeat(values[:1], size - len(values), 0)])


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python standalone.py FEATURES.npy [TARGET] > answers.jsonl")
    for answer in Model(Path(__file__).parent, *sys.argv[2:]).answers(np.load(sys.argv[1])):
        print(json.dumps(answer))
