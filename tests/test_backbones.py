"""A checkpoint folder as a backbone: features equal to transformers, in any batch and on any mesh; errors."""

import concurrent.futures
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from geotoken_jax import backbone, sharding
from geotoken_jax.backbone import BackboneSettings, HuggingFaceSettings, ThumbnailSettings
from geotoken_jax.settings import SettingsError
from tests import checkpoints

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "backbones.npz")


@pytest.fixture(scope="session", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    shapes = json.loads(str(GOLDEN[f"{request.param}/shapes"]))
    return checkpoints.write(tmp_path_factory.mktemp("checkpoint") / request.param, request.param, shapes)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


def opened(folder, mesh=None, dtype="float32", batch_size=8):
    settings = HuggingFaceSettings(str(folder), dtype, batch_size)
    return backbone.make(BackboneSettings("huggingface", ThumbnailSettings(4), settings), mesh)


@pytest.fixture(scope="session")
def tower(folder):
    return opened(folder, sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.local_devices()[:1]))


def features(tower):
    return tower.images(np.stack([tower.prepare(image) for image in checkpoints.images()])), tower.texts(
        checkpoints.TEXTS
    )


def change(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, edit):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def relative(found, wanted):
    return (np.abs(found - wanted).max(1) / np.abs(wanted).max(1)).max()


def test_features_are_those_of_transformers(folder, tower):
    image, text = features(tower)
    assert image.dtype == text.dtype == np.float32
    assert relative(image, GOLDEN[f"{folder.name}/image"]) < 1e-5
    assert relative(text, GOLDEN[f"{folder.name}/text"]) < 1e-5


def test_in_bfloat16_they_are_near(folder):
    image, text = features(opened(folder, dtype="bfloat16"))
    assert 1e-4 < relative(image, GOLDEN[f"{folder.name}/image"]) < 0.05
    assert 1e-4 < relative(text, GOLDEN[f"{folder.name}/text"]) < 0.05


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_features_are_the_same_on_any_mesh(folder, tower, sizes):
    spread = opened(folder, sharding.make_mesh(sharding.MeshSettings(*sizes)))
    kernel = spread.model.vision_model.encoder.layers.mlp.fc1.kernel[...]
    assert kernel.addressable_shards[0].data.size * sizes[1] * sizes[2] == kernel.size
    for found, wanted in zip(features(spread), features(tower), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 13])
def test_all_local_devices_compute_a_share_of_any_batch(folder, tower, rows):
    prepared = np.random.default_rng(0).integers(0, 256, (rows, 16, 16, 3), np.uint8)
    everywhere, results = opened(folder, batch_size=10), []
    compiled = everywhere._images
    everywhere._images = lambda batch: results.append(compiled(batch)) or results[-1]
    np.testing.assert_allclose(everywhere.images(prepared), tower.images(prepared), atol=1e-5)
    for result in results:
        shards = [shard.data.shape[0] for shard in result.addressable_shards]
        assert len(shards) == jax.local_device_count() == 8 and sum(shards) == len(result)


def test_a_batch_may_have_any_number_of_rows(tower):
    prepared = np.random.default_rng(0).integers(0, 256, (19, 16, 16, 3), np.uint8)
    alone = np.concatenate([tower.images(row[None]) for row in prepared])
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for found in pool.map(tower.images, [prepared] * 3):
            np.testing.assert_allclose(found, alone, atol=1e-5)
    assert tower.images(prepared[:0]).shape == (0, tower.width)


def test_texts_are_embedded_once_and_an_empty_one_is_zeros(tower, monkeypatch):
    seen = []
    read = tower.tokenizer.__call__
    monkeypatch.setattr(tower, "tokenizer", lambda texts: seen.extend(texts) or read(texts))
    found = tower.texts(["b", "", "a", "b"])
    assert sorted(seen) == ["a", "b"]
    np.testing.assert_array_equal(found[0], found[3])
    assert np.abs(found[0] - found[2]).max() > 0.01 and not found[1].any()
    assert tower.texts([]).shape == tower.texts([""])[:0].shape == (0, tower.width)


def test_a_processor_may_lie_beside_others(copied, tower):
    (copied / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads((copied / "preprocessor_config.json").read_text())})
    )
    (copied / "preprocessor_config.json").unlink()
    assert opened(copied).processor == tower.processor


def test_shards_are_read_as_one_file(copied, tower):
    tensors = safetensors.numpy.load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, held in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, copied / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    for found, wanted in zip(*(jax.tree.leaves(nnx.state(t.model)) for t in (opened(copied), tower)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    (copied / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        SettingsError, match=r"has no model-00002-of-00002\.safetensors, which model\.safetensors\.index\.json names"
    ):
        opened(copied)


FC1 = "vision_model.encoder.layers.1.mlp.fc1.weight"
FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no file or folder"),
    "no parameters": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only as a pickle.*convert it with `python"
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        r"model.safetensors is damaged or cut short",
    ),
    "another architecture": (lambda f: change(f, "config.json", model_type="bert"), "of model_type 'bert': choose"),
    "NaFlex": (lambda f: change(f, "config.json", model_type="siglip2"), "of model_type 'siglip2'"),
    "a tensor is missing": (lambda f: rewrite(f, lambda t: t.pop(FC1)), f"has no tensor {FC1}"),
    "a wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({FC1: t[FC1][:, 1:].copy()})), rf"{FC1} has shape \[15, 24\], but "
    ),
    "an unknown tensor": (
        lambda f: rewrite(f, lambda t: t.update({"adapter.weight": t[FC1]})), "1 tensors .* such as adapter.weight"
    ),
    "fewer layers": (
        lambda f: change(f, "config.json", vision_config={**checkpoints.VISION, "num_hidden_layers": 1}),
        r"does not describe, such as vision_model.encoder.layers.1",
    ),
    "an unknown activation": (
        lambda f: change(f, "config.json", vision_config={**checkpoints.VISION, "hidden_act": "relu"}),
        "hidden_act is 'relu': choose a checkpoint with quick_gelu",
    ),
    "no number": (
        lambda f: change(f, "config.json", vision_config={**checkpoints.VISION, "patch_size": "5"}),
        "config.json: vision_config.patch_size is '5': it must be of type int",
    ),
    "heads do not divide": (
        lambda f: change(f, "config.json", vision_config={**checkpoints.VISION, "num_attention_heads": 3}),
        "hidden_size is 16, which does not divide into num_attention_heads = 3",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json cannot be read"),
    "no mean": (
        lambda f: (f / "preprocessor_config.json").write_text('{"size": {"height": 16, "width": 16}}'),
        "preprocessor_config.json lacks 'image_mean'",
    ),
    "another size": (
        lambda f: change(f, "preprocessor_config.json", size={"height": 9, "width": 9}, do_center_crop=False),
        "does not make the 16 x 16 pixels",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for name in ("vocab.json", "tokenizer.json") for path in f.glob(name)],
        "has no tokenizer.json",
    ),
    "no pad": (lambda f: change(f, "tokenizer_config.json", pad_token="<x>"), "its tokenizer has no '<x>'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_a_fault_is_refused(copied, fault):
    spoil, message = FAULTS[fault]
    spoil(copied)
    with pytest.raises(SettingsError, match=message) as raised:
        opened(copied)
    assert "\n" not in str(raised.value)


def test_settings_that_cannot_be_are_refused(folder):
    with pytest.raises(SettingsError, match=r"config\.embed\.huggingface\.path is empty"):
        opened("")
    with pytest.raises(ValueError, match="dtype is 'int8': choose float32 or bfloat16"):
        opened(folder, dtype="int8")
    with pytest.raises(ValueError, match="batch_size is 0"):
        opened(folder, batch_size=0)
    with pytest.raises(SettingsError, match=r"config\.embed\.backbone is 'vgg': choose thumbnail or huggingface"):
        backbone.make(BackboneSettings("vgg", ThumbnailSettings(4), HuggingFaceSettings("", "float32", 1)))
