"""A small set of photos, and the stages that compute features of it."""

import dataclasses
import io
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from data_prep import embed, images, photos
from data_prep.sources import UNKNOWN, Photo
from geotoken_jax import checkpoint, configuration, disk, manifests, records
from geotoken_jax.align.task import AlignTask
from geotoken_jax.workdir import Workdir
from tests import tiny


def scene(width=64, height=48, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Ten authors with four photos each, all alike, in `train`, the fourth of them unreadable; five in `validation`."""

    name = "sample"
    provenance = UNKNOWN
    splits = types.MappingProxyType({"train": 1, "validation": 1})

    def read(self, split, shard):
        for n in range({"train": 40, "validation": 5}[split]):
            file = io.BytesIO()
            scene(seed=n // 4 + (100 if split == "validation" else 0)).save(file, "JPEG", quality=80 + n % 4)
            image = b"no photo" if (split, n) == ("train", 3) else file.getvalue()
            yield Photo(f"{split}-{n}", f"author {n // 4}", image, n, n + 1, city=f"City {n}")


def prepared(path: Path) -> Path:
    """Makes photos/ without checking images, so that one unreadable photo is in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "drop_reason", lambda image: "")
        photos.make(manifests.begin(path, "photos", {}, inputs=()), Sample(), workers=1, max_dropped=0.0)
    return path


def interruptible(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes a KeyboardInterrupt possible at each file. Returns a function that sets after how many files it comes."""
    commit, left = disk.commit, 0

    def interrupted(temporary, final):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        commit(temporary, final)

    def interrupt_after(files: int) -> None:
        nonlocal left
        left = files

    monkeypatch.setattr(disk, "commit", interrupted)
    return interrupt_after


def embedded(prepared: Path, to: Path, count: int = 0, threads: int = 2) -> Path:
    """Makes features/ with `count` views of each photo."""
    shutil.copytree(prepared / "photos", to / "photos")
    config = tiny.get_config()
    config.embed.views.count, config.embed.threads = count, threads
    embed.run(configuration.read(config), Workdir(to))
    return to


def aligned(path: Path, config: configuration.Config) -> configuration.Config:
    """Makes align/ with random parameters, and returns the configuration."""
    task = AlignTask(config.align.model, 48)
    made_with = {"align": {**config.select("align.model")["align"], "pixels": {"tower": "cached"}}}
    stage = manifests.begin(path, "align", made_with, ["features"])
    parameters = nnx.to_pure_dict(nnx.state(task.init(nnx.Rngs(0))))
    checkpoint.write_parameters(stage.path / "parameters.safetensors", parameters)
    stage.finish({})
    return config


def features(path: Path, split: str) -> records.Records:
    return records.Records(path / "features", split, records.feature_layout(48))
