"""Measures photos embedded per second by a CLIP tower with random parameters. Prints one JSON object.

Every round times three things on pixels in memory: our tower; the same tower in the package transformers, if that can
be imported; and a large matrix product, which shows the speed that the device can reach. After the rounds, the stage
`embed` runs as for a user, on JPEGs as large as in MP16-Pro. This measures the cost of decoding, and the share of
time in which the tower waits for photos.

    PYTHONPATH=.torch .venv/bin/python -m benchmarks.embed --shape=b32
"""

import argparse
import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from configs import common
from data_prep import embed, photos
from data_prep.sources import UNKNOWN, Photo
from geotoken_jax import backbone, chips, manifests
from geotoken_jax.backbone import checkpoint
from geotoken_jax.backbone.clip import Clip
from geotoken_jax.configuration import read as read_config
from geotoken_jax.workdir import Workdir
from tests import checkpoints

#: Name -> width, layers, heads and patch size of the image tower, and the width of the text tower and the output.
SHAPES = {"b32": (768, 12, 12, 32, 512), "l14": (1024, 24, 16, 14, 768), "tiny": (64, 1, 1, 32, 64)}
#: Special tokens of the tests' tokenizer.
_ENDS = {"bos_token_id": 512, "eos_token_id": 513}
#: Side of a photo in pixels. Its JPEG has about 79 KB, as a photo of MP16-Pro has.
_SIDE = 405


def configuration(shape: str) -> dict[str, Any]:
    """Returns the config.json of a published CLIP of this shape."""
    width, layers, heads, patch, out = SHAPES[shape]
    text = {"hidden_size": out, "intermediate_size": 4 * out, "projection_dim": out}
    return {
        "model_type": "clip",
        "projection_dim": out,
        "text_config": {**text, "num_attention_heads": out // 64, "num_hidden_layers": 12, **_ENDS},
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "patch_size": patch,
            "projection_dim": out,
        },
    }


def flops(shape: str) -> float:
    """Returns the FLOPs of the image tower for one image of 224 x 224 pixels."""
    width, layers, _, patch, out = SHAPES[shape]
    patches = (224 // patch) ** 2
    tokens = patches + 1
    transformer = layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    return transformer + 2 * patches * 3 * patch**2 * width + 2 * width * out


def write(folder: Path, shape: str) -> Path:
    """Writes a checkpoint with random parameters and the tests' tokenizer to a folder, and returns the folder."""
    config = configuration(shape)
    abstract = nnx.state(nnx.eval_shape(lambda: Clip(config, jnp.dtype("float32"), nnx.Rngs(0))))
    empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract)
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.published(empty)}
    checkpoints.write(folder, "clip", shapes)
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**checkpoints.PROCESSORS["clip"], **sizes}))
    return folder


class Jpegs:
    """A source of random photos of noise and gradients, which compress like real photos."""

    name = "jpegs"
    provenance = UNKNOWN

    def __init__(self, n: int):
        self.splits = {"train": 1, "validation": 1}
        self._n = n

    def read(self, split: str, shard: int) -> Iterator[Photo]:
        """Yields n photos for `train`, and one for `validation`. There are up to 16 different files."""
        seeds = range(min(16, self._n)) if split == "train" else [16]  # else `prepare` would find duplicates
        files = [self._file(seed) for seed in seeds]
        for i in range(self._n if split == "train" else 1):
            yield Photo(f"{split} {i}", f"author {i}", files[i % len(files)], 45.0, i % 180, city=f"City {i % 50}")

    def _file(self, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((_SIDE, _SIDE))
        noisy = np.clip(np.asarray(coarse, np.int16) + rng.normal(0, 20, (_SIDE, _SIDE, 3)), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=85)
        return out.getvalue()


def product(dtype: str) -> tuple[float, Callable[[], Any]]:
    """Returns the FLOPs of a large matrix product, and a function that computes the product."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    run = jax.jit(jnp.matmul)
    return 2.0 * n**3, lambda: jax.block_until_ready(run(a, a))


def theirs(shape: str, pixels: np.ndarray, dtype: str) -> Callable[[], Any] | None:
    """Returns a function that embeds the pixels with transformers; None if torch or transformers is missing."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return None
    import torch
    import transformers

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.CLIPModel(transformers.CLIPConfig(**configuration(shape))).eval().to(device, kind)
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device, kind)

    def run():
        with torch.inference_mode():
            return model.get_image_features(pixel_values=batch)

    return run


def seconds(run: Callable[[], Any]) -> float:
    """Returns the wall-clock seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def towers(options: argparse.Namespace, tower: Any) -> dict[str, Any]:
    """Returns the speed of our tower, and its ratios to transformers and the matrix product, as medians over rounds."""
    prepared = np.random.default_rng(0).integers(0, 256, (options.batch, 224, 224, 3), np.uint8)
    work, multiply = product(options.dtype)
    runs = {"ours": lambda: tower.images(prepared), "product": multiply}
    if other := theirs(options.shape, np.asarray(tower.processor.normalize(prepared), np.float32), options.dtype):
        runs["transformers"] = other
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(1 + options.rounds)][1:]

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(one) for one in rounds)

    reached = median(lambda one: options.batch * flops(options.shape) / one["ours"])
    return {
        "images_per_second": round(median(lambda one: options.batch / one["ours"]), 2),
        "flops_per_image": flops(options.shape),
        "gflops_per_second": round(reached / 1e9, 1),
        "share_of_product": round(
            median(lambda one: options.batch * flops(options.shape) / one["ours"] / (work / one["product"])), 3
        ),
        "over_transformers": round(median(lambda one: one["transformers"] / one["ours"]), 3) if other else None,
    }


def stage(options: argparse.Namespace, tower: Any, folder: Path) -> dict[str, Any]:
    """Returns the speed of the stage `embed` on JPEGs, and the share of time in which the tower is idle."""
    photos.make(manifests.begin(folder, "photos", {}, ()), Jpegs(options.photos), workers=1, max_dropped=0.0)
    file = next(Jpegs(1).read("train", 0)).image
    decode = statistics.median(seconds(lambda: tower.prepare(file)) for _ in range(20))
    config: Any = common.get_config()
    config.embed.update(backbone="huggingface", threads=options.threads)
    config.embed.huggingface.update(path=str(options.folder), dtype=options.dtype, batch_size=options.batch)
    busy = []

    class Timed:
        width, prepare, texts, min_side = tower.width, tower.prepare, tower.texts, tower.min_side

        def images(self, prepared: np.ndarray) -> np.ndarray:
            began = time.perf_counter()
            embedded = tower.images(prepared)
            busy.append((began, time.perf_counter()))
            return embedded

    real, backbone.make = backbone.make, lambda settings, mesh=None: Timed()
    try:
        took = seconds(lambda: embed.run(read_config(config), Workdir(folder)))
    finally:
        backbone.make = real
    return {
        "jpeg_bytes": len(file),
        "decode_photos_per_second_per_core": round(1 / decode, 1),
        "threads": options.threads,
        "photos_per_second": round((options.photos + 1) / took, 2),
        "share_of_time_the_tower_waits": round(max(0.0, 1 - _covered(busy) / (busy[-1][1] - busy[0][0])), 4),
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Returns the total length of the union of spans (start, end), in seconds."""
    total, end = 0.0, 0.0
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="b32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None, help="default: float32 on a CPU")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=int, default=512, help="photos that the stage embeds")
    parser.add_argument("--threads", type=int, default=2, help="threads that decode photos")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        options.folder = write(Path(folder) / "checkpoint", options.shape)
        chosen = backbone.HuggingFaceSettings(str(options.folder), options.dtype, options.batch)
        tower: Any = backbone.make(backbone.BackboneSettings("huggingface", None, chosen))  # pyright: ignore[reportArgumentType]
        device = jax.devices()[0].device_kind
        chip = chips.find(device)
        figures = {"shape": options.shape, "dtype": options.dtype, "batch": options.batch, "device": device}
        figures |= {"peak_tflops": chip.flops / 1e12 if chip else None} | towers(options, tower)
        print(json.dumps(figures | stage(options, tower, Path(folder) / "work")))


if __name__ == "__main__":
    main()
