"""Alignment from pixels: equal to alignment from features for a frozen tower, equal after an interruption and on any
mesh; the tower that it writes; errors."""

import dataclasses
import io
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from data_prep import embed, gallery, photos
from data_prep.sources import UNKNOWN, Photo
from geotoken_jax import backbone, checkpoint, manifests, sharding
from geotoken_jax.align.task import AlignTask
from geotoken_jax.backbone import BackboneSettings, HuggingFaceSettings
from geotoken_jax.backbone.checkpoint import read_json, read_module, write_module
from geotoken_jax.backbone.clip import Clip
from geotoken_jax.backbone.siglip import Siglip
from geotoken_jax.configuration import read as typed
from geotoken_jax.data import pipeline
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import align, training
from geotoken_jax.workdir import Workdir
from tests import checkpoints, sample, tiny
from tests.test_train import Interrupted, Stopping, lines

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "backbones.npz")
TRAINED = {"tower": "trained", "learning_rate": 0.5}
KINDS = {"clip": Clip, "siglip": Siglip}


def published(folder, kind):
    return checkpoints.write(folder / kind, kind, json.loads(str(GOLDEN[f"{kind}/shapes"])))


@dataclasses.dataclass(frozen=True)
class Source:
    """Readable photos of different places."""

    name = "sample"
    provenance = UNKNOWN
    splits = types.MappingProxyType({"train": 1, "validation": 1})

    def read(self, split, shard):
        rng = np.random.default_rng(len(split))
        for n in range({"train": 40, "validation": 13}[split]):
            file = io.BytesIO()
            sample.scene(seed=rng.integers(1 << 30)).save(file, "JPEG")
            yield Photo(f"{split}-{n}", f"a{n}", file.getvalue(), *rng.uniform(-80, 80, 2).tolist(), city=f"City {n}")


def make_config(folder, **pixels):
    config = tiny.get_config()
    config.embed.backbone = "huggingface"
    config.embed.huggingface.update(path=str(folder), dtype="float32", batch_size=8)
    config.embed.views.count = 0
    config.align.model.location.sigmas = (1.0,)
    config.align.train.update(batch_size=16, examples=16 * 6, evaluate_every=2, log_every=1)
    config.align.pixels.update(pixels)
    return config


def make_mesh(*sizes):
    return sharding.make_mesh(sharding.MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return published(tmp_path_factory.mktemp("checkpoint"), "clip")


@pytest.fixture(scope="module")
def path(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("pixels")
    photos.make(manifests.begin(path, "photos", {}, inputs=()), Source(), workers=1, max_dropped=0.0)
    embed.run(typed(make_config(clip)), Workdir(path))
    return path


@pytest.fixture
def copied(path, tmp_path):
    return shutil.copytree(path, tmp_path / "work")


def train(path, folder, clip, mesh=(1, 1, 1), **pixels):
    """Runs six steps of alignment in a folder; returns task and metrics."""
    config = make_config(clip, **pixels)
    devices = make_mesh(*mesh)
    task, splits, resident = align.aligner(typed(config), Workdir(path), devices)
    training.fit(task, typed(config), "align.train", splits, folder, "align", devices, resident)
    return task, lines(folder)


def run(path, config):
    """Runs the stage on one device. Returns the folders that were made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "make_mesh", lambda settings: make_mesh(1, 1, 1))
        workdir = Workdir(path)
        align.run(typed(config), workdir)
        return workdir.made


@pytest.fixture(scope="module")
def trained(path, clip, tmp_path_factory):
    """A work directory whose tower has been trained in six steps."""
    found = shutil.copytree(path, tmp_path_factory.mktemp("trained") / "work")
    run(found, make_config(clip, **TRAINED))
    return found


def losses(found, name="train/loss"):
    return np.array([line[name] for line in found if name in line])


def first_loss(path, clip, **pixels):
    """Returns the loss of the first batch of training."""
    task, (read, _), resident = align.aligner(typed(make_config(clip, **pixels)), Workdir(path), make_mesh(1, 1, 1))
    batch = next(pipeline.training(40, read, 16, 0))
    model = task.init(nnx.Rngs(0))
    return float(nnx.jit(task.loss)(model, {**batch, **resident}, None)[0])


@pytest.mark.slow
def test_without_augmentation_a_frozen_tower_trains_as_features_do(path, clip):
    cached = first_loss(path, clip)
    assert first_loss(path, clip, tower="frozen", augment=False) == pytest.approx(cached, rel=2e-3)  # in bfloat16
    assert abs(first_loss(path, clip, tower="frozen", augment=True) / cached - 1) > 4e-3


@pytest.mark.slow
def test_a_frozen_tower_stays_and_a_trained_one_learns_more(path, clip, trained, tmp_path):
    task, frozen = train(path, tmp_path, clip, tower="frozen")
    found = lines(trained / "align")
    assert losses(found)[0] == pytest.approx(losses(frozen)[0], rel=1e-6)  # both start from the published tower
    assert losses(found)[-1] < losses(frozen)[-1] < losses(frozen)[0]
    task.write_tower(tmp_path)
    assert not (tmp_path / "backbone").exists()
    write_module(tmp_path / "after", clip, task.tower.module(task.tower.parameters))
    for name, value in tensors(clip).items():
        np.testing.assert_array_equal(tensors(tmp_path / "after")[name], value)


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_bit_for_bit(copied, clip, trained, monkeypatch):
    made, config = pipeline.training, make_config(clip, **TRAINED)
    monkeypatch.setattr(pipeline, "training", lambda *arguments: Stopping(made(*arguments), 3))
    with pytest.raises(Interrupted):
        run(copied, config)
    monkeypatch.setattr(pipeline, "training", lambda *arguments: Stopping(made(*arguments), 4))  # from step 2
    run(copied, config)
    assert lines(copied / "align") == lines(trained / "align")
    for file in ("manifest.json", "parameters.safetensors", "backbone/model.safetensors"):
        assert (copied / "align" / file).read_bytes() == (trained / "align" / file).read_bytes()


@pytest.mark.slow
def test_eight_devices_train_as_one(path, clip, trained, tmp_path):
    task, spread = train(path, tmp_path, clip, mesh=(2, 2, 2), **TRAINED, remat="full")
    kernel = task.tower.parameters["vision_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    for name in ("train/loss", "train/gradient_norm", "validation/loss"):
        np.testing.assert_allclose(losses(spread, name), losses(lines(trained / "align"), name), rtol=2e-3)


def test_every_example_is_another_view_on_any_number_of_processes(path, clip):
    mesh = make_mesh(1, 1, 1)
    _, (read, validation), _ = align.aligner(typed(make_config(clip, tower="frozen")), Workdir(path), mesh)
    whole = pipeline.training(40, read, 20, 0)
    halves = [pipeline.training(40, read, 20, 0, np.arange(first, first + 10)) for first in (0, 10)]
    seen, still = {}, read(np.arange(40))
    for _ in range(4):  # two epochs
        batch = next(whole)
        parts = [next(half) for half in halves]
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
        for image, place in zip(batch["image"], batch["coordinates"], strict=True):
            seen.setdefault(tuple(place), set()).add(image.tobytes())
    assert len(seen) == 40 and all(len(images) == 2 for images in seen.values())
    for image, place in zip(still["image"], still["coordinates"], strict=True):
        assert image.tobytes() not in seen[tuple(place)]
    np.testing.assert_array_equal(validation(np.arange(3))["image"], validation(np.arange(3))["image"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_written_is_the_folder_read(tmp_path, kind):
    source = published(tmp_path, kind)
    mesh = make_mesh(1, 1, 1)

    def read(folder):
        config = read_json(folder, "config.json")
        return read_module(folder, lambda rngs: KINDS[kind](config, jnp.dtype("float32"), rngs), mesh)

    write_module(tmp_path / "same", source, read(source))
    files = {file.name for file in source.iterdir()}
    assert {file.name for file in (tmp_path / "same").iterdir()} == files
    for name in files - {"model.safetensors"}:
        assert (tmp_path / "same" / name).read_bytes() == (source / name).read_bytes()
    assert tensors(tmp_path / "same").keys() == tensors(source).keys()
    for name, value in tensors(source).items():
        np.testing.assert_array_equal(tensors(tmp_path / "same")[name], value)
    model = read(source)
    state = jax.tree.map(lambda x: x * 1.5 + 0.25, nnx.state(model))
    nnx.update(model, state)
    write_module(tmp_path / "other", source, model)
    for found, wanted in zip(*(jax.tree.leaves(nnx.state(m)) for m in (read(tmp_path / "other"), model)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_the_backbone_left_behind_embeds_as_training_did(trained, clip):
    config = make_config(clip, **TRAINED)
    found, new = tensors(clip), tensors(trained / "align" / "backbone")
    changed = {name for name in found if np.abs(found[name] - new[name]).max() > 1e-3}
    assert found.keys() == new.keys() and len(changed) > 30
    assert {name.split(".")[0] for name in changed} == {"vision_model", "visual_projection"}
    facts = manifests.read_manifest(trained, "align").facts
    # If gradients agree, a step of Adam is as long as the learning rate.
    rates = losses(lines(trained / "align"), "learning_rate")[: facts["best_step"]]
    longest = max(np.abs(new[name] - found[name]).max() for name in found)
    assert longest == pytest.approx(TRAINED["learning_rate"] * rates.sum(), rel=0.3)
    made = HuggingFaceSettings(str(trained / "align" / "backbone"), "float32", 16)
    tower = backbone.make(BackboneSettings("huggingface", None, made))
    task, *_ = align.aligner(typed(make_config(clip)), Workdir(trained), make_mesh(1, 1, 1))
    heads = AlignTask(task.settings, tower.width)
    model = checkpoint.read_module(trained / "align" / "parameters.safetensors", heads.init)
    _, (_, validation), _ = align.aligner(typed(config), Workdir(trained), make_mesh(1, 1, 1))
    batch = next(pipeline.evaluation(13, validation, 13))
    loss, _ = nnx.jit(task.loss)(model, {**batch, "image": tower.images(batch["image"])}, None)
    assert float(loss) == pytest.approx(facts["best_loss"], rel=1e-4)


def test_after_training_the_tower_the_path_goes_on_in_another_folder(trained, clip):
    config = make_config(clip, **TRAINED)
    assert run(trained, config) == set()  # the stage is complete, so nothing runs
    with pytest.raises(manifests.StageError, match=r"has trained the backbone.*huggingface\.path=.*align/backbone"):
        gallery.run(typed(config), Workdir(trained))
    with pytest.raises(manifests.StageError, match=r"config\.align\.pixels.* was made with"):
        run(trained, make_config(clip))


@pytest.mark.slow
def test_a_frozen_tower_leaves_an_align_that_is_indexed(copied, clip):
    config = make_config(clip, tower="frozen")
    run(copied, config)
    assert not (copied / "align" / "backbone").exists()
    config.index.search.sample = 10
    gallery.run(typed(config), Workdir(copied))


def test_what_cannot_be_is_refused_before_the_folder_is_begun(copied, clip, tmp_path):
    def refused(error, match, **changes):
        config = make_config(clip, **{"tower": "trained", **changes.pop("pixels", {})})
        config.embed.update(changes)
        with pytest.raises(error, match=match):
            run(copied, config)
        assert not (copied / "align").exists()

    refused(SettingsError, r"pixels\.tower is 'both': choose one of cached, frozen, trained", pixels={"tower": "both"})
    refused(SettingsError, r"pixels\.remat is 'some': choose one of none, dots, full", pixels={"remat": "some"})
    refused(SettingsError, r"learning_rate is 0\.0: it must be above 0", pixels={"learning_rate": 0.0})
    shutil.copytree(clip, tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text((clip / "config.json").read_text() + " ")
    other = {"path": str(tmp_path / "clip"), "dtype": "float32", "batch_size": 8}
    refused(manifests.StageError, "config.embed has another backbone than .* was made with", huggingface=other)
    manifest = copied / "features" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"train": 40', '"train": 39'))
    refused(manifests.StageError, "has 39 of the 40 photos of train")


def test_the_thumbnail_is_refused(path, tmp_path):
    shutil.copytree(path / "photos", tmp_path / "photos")
    config = tiny.get_config()
    config.align.pixels.tower = "frozen"
    embed.run(typed(config), Workdir(tmp_path))
    with pytest.raises(
        SettingsError, match=r"'thumbnail', which has no image tower to train with: set config\.embed\.backbone="
    ):
        run(tmp_path, config)
