"""CLIP's and SigLIP 2's towers, tokenizers and image processors beside those of transformers.

Run by `make test-interop`, where torch and transformers are; without them these are skipped.
"""

import gzip
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from geotoken_jax import sharding  # noqa: E402
from geotoken_jax.backbone import checkpoint  # noqa: E402
from geotoken_jax.backbone.clip import Clip  # noqa: E402
from geotoken_jax.backbone.preprocess import Processor  # noqa: E402
from geotoken_jax.backbone.siglip import Siglip  # noqa: E402
from geotoken_jax.backbone.tokenizer import Tokenizer  # noqa: E402
from tests import checkpoints  # noqa: E402
from tests.interop.make_backbone_golden import values  # noqa: E402

TOWER = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**TOWER, "vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97, "eos_token_id": 98}
IMAGE = {**TOWER, "image_size": 30, "patch_size": 7}
#: One L/14 tower pair of true shape: 24 and 12 layers, 257 positions, 428 million parameters.
LARGE = {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768,
    },
    "projection_dim": 768,
}  # fmt: skip
CLIPS = {
    "quick_gelu": {"projection_dim": 20},
    "gelu": {"projection_dim": 64, "text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "gelu"}},
    "towers differ": {
        "text_config": {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1, "layer_norm_eps": 1e-3},
        "vision_config": {"image_size": 32, "patch_size": 16, "intermediate_size": 17},
    },
    "largest id ends": {"text_config": {"eos_token_id": 2}},
    "one patch": {"vision_config": {"image_size": 8, "patch_size": 8}},
}
SIGLIPS = {
    "patch 7": {},
    "patch 16": {"vision_config": {"image_size": 48, "patch_size": 16}},
    "towers differ": {
        "text_config": {"hidden_size": 24, "num_attention_heads": 2, "projection_size": 32, "hidden_act": "gelu"},
        "vision_config": {"num_hidden_layers": 1, "layer_norm_eps": 1e-3},
    },
}


def differences(ours, theirs, folder, batch=3):
    """Returns the largest relative error of image and text features; theirs gets random parameters first."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        if "norm.weight" in name or "layrnorm.weight" in name or "norm1.weight" in name or "norm2.weight" in name:
            parameter.data += 1
    theirs.eval().save_pretrained(folder)
    config = checkpoint.read_json(folder, "config.json")
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1])
    model = checkpoint.read_module(folder, lambda rngs: ours(config, jnp.dtype("float32"), rngs), mesh)
    rng = np.random.default_rng(0)
    side, shape = model.image_shape.image_size, model.text_shape
    pixels = rng.normal(size=(batch, side, side, 3)).astype(np.float32)
    ids = rng.integers(3, shape.vocab_size - 1, (batch, shape.max_position_embeddings))
    for row, end in enumerate(rng.integers(1, ids.shape[1], batch)):
        ids[row, end:] = shape.vocab_size - 1
    with torch.no_grad():
        image = theirs.get_image_features(torch.tensor(pixels).permute(0, 3, 1, 2)).pooler_output.numpy()
        text = theirs.get_text_features(torch.tensor(ids)).pooler_output.numpy()
    found = model.image_features(jnp.array(pixels)), model.text_features(jnp.array(ids))
    assert image.shape == text.shape == (batch, model.width)
    return [float((np.abs(a - b).max(1) / np.abs(b).max(1)).max()) for a, b in zip(found, (image, text), strict=True)]


def merged(kind, changes):
    parts = {"text_config": {**TEXT, **changes.get("text_config", {})}}
    parts["vision_config"] = {**IMAGE, **changes.get("vision_config", {})}
    return kind(**{**changes, **parts})


@pytest.mark.parametrize("case", CLIPS)
def test_clip_has_the_features_of_transformers(tmp_path, case):
    theirs = transformers.CLIPModel(merged(transformers.CLIPConfig, CLIPS[case]))
    assert max(differences(Clip, theirs, tmp_path)) < 1e-5


@pytest.mark.parametrize("case", SIGLIPS)
def test_siglip_has_the_features_of_transformers(tmp_path, case):
    theirs = transformers.SiglipModel(merged(transformers.SiglipConfig, SIGLIPS[case]))
    assert max(differences(Siglip, theirs, tmp_path)) < 1e-5


@pytest.mark.parametrize("kind", checkpoints.CONFIGS)
def test_stored_values_are_those_of_transformers(tmp_path, kind):
    stored = np.load(pathlib.Path(__file__).parents[1] / "golden" / "backbones.npz")
    for name, value in values(kind, tmp_path).items():
        if name == "shapes":
            assert json.loads(value) == json.loads(str(stored[f"{kind}/shapes"]))
        else:
            np.testing.assert_allclose(value, stored[f"{kind}/{name}"], atol=1e-5)


def test_the_large_clip_has_the_features_of_transformers(tmp_path):
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**LARGE))
    assert sum(p.numel() for p in theirs.parameters()) == 427_616_513
    found = differences(Clip, theirs, tmp_path, batch=2)
    print(f"L/14: relative error of images {found[0]:.1e}, of texts {found[1]:.1e}")
    assert max(found) < 1e-4


def test_shards_and_half_precision_are_read_alike(tmp_path):
    theirs = transformers.CLIPModel(merged(transformers.CLIPConfig, {})).bfloat16().float()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1])
    config = checkpoint.read_json(tmp_path / "whole", "config.json")
    ids = np.array([[97, 5, 98, 98, 98, 98, 98, 98, 98, 98, 98, 98]])
    whole, shards = (
        checkpoint.read_module(tmp_path / name, lambda rngs: Clip(config, jnp.dtype("float32"), rngs), mesh)
        for name in ("whole", "shards")
    )
    np.testing.assert_array_equal(whole.text_features(ids), shards.text_features(ids))


@pytest.mark.parametrize("kind", checkpoints.CONFIGS)
def test_a_folder_written_is_read_by_transformers(tmp_path, kind):
    stored = np.load(pathlib.Path(__file__).parents[1] / "golden" / "backbones.npz")
    source = checkpoints.write(tmp_path / "source", kind, json.loads(str(stored[f"{kind}/shapes"])))
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1])
    config = checkpoint.read_json(source, "config.json")
    ours = {"clip": Clip, "siglip": Siglip}[kind]
    model = checkpoint.read_module(source, lambda rngs: ours(config, jnp.dtype("float32"), rngs), mesh)
    nnx.update(model, jax.tree.map(lambda x: 0.9 * x + 0.02, nnx.state(model)))
    checkpoint.write_module(tmp_path / "written", source, model)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "written").eval()
    pixels = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs.get_image_features(torch.tensor(pixels).permute(0, 3, 1, 2)).pooler_output.numpy()
    np.testing.assert_allclose(model.image_features(jnp.array(pixels)), wanted, rtol=1e-4, atol=1e-5)


PIECES = [
    "A street view photo taken in São Paulo, Brazil", "Zürich", "it's we'll I'VE they'd", "東京都 渋谷区", "北京市",
    "서울", "Москва, Россия", "Αθήνα ΣΊΣΥΦΟΣ", "القاهرة", "ירושלים", "नई दिल्ली", "กรุงเทพมหานคร", "ዲስ አበባ", "თბილისი",
    "Երևան", "İstanbul", "Łódź", "Đà Nẵng", "e\u0301 u\u0308", "ﬁne ½ ²", "🗼", "👨\u200d👩\u200d👧", "🇫🇷🇯🇵", "🏔️☀",
    "12345 3.14", "___", "a\tb\nc\u00a0d\u3000e", "   ", "!!! ... ,,,", "<|endoftext|>", "<eos>", "http://x.org/?q=1&r=%20",
    "CamelCase", "\u200bzero\u200dwidth", "ñandú", "மதுரை", "ལྷ་ས", "ⵜⵉⴼⵉⵏⴰⵖ", "l'été d'une", "\ufeffBOM",
]  # fmt: skip


def strings():
    """Returns 200 texts, most of them short, some far too long, one empty."""
    rng = np.random.default_rng(0)
    mixed = [" ".join(rng.choice(PIECES, n)) for n in rng.integers(1, 30, 200 - len(PIECES) - 1)]
    return [*PIECES, *mixed, ""]


def clip_files(folder):
    """Writes vocab.json and merges.txt from the list of merges that OpenAI published."""
    package = importlib.util.find_spec("clip")
    if package is None or package.origin is None:
        pytest.skip("CLIP's vocabulary is not installed: make clean test-interop")
    data = (pathlib.Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(data).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    assert len(vocabulary) == 49408
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return vocabulary, [tuple(merge.split()) for merge in merges]


def test_clip_tokens_are_those_of_transformers(tmp_path):
    vocabulary, merges = clip_files(tmp_path)
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    theirs.save_pretrained(tmp_path / "saved")
    wanted = theirs(strings(), padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert max(map(len, theirs(strings())["input_ids"])) > 77  # some are cut
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    for folder in (tmp_path, tmp_path / "saved"):
        np.testing.assert_array_equal(Tokenizer(folder, 77, "clip")(strings()), wanted)


def gemma(folder, kind):
    """Returns a tokenizer of Gemma's form with a vocabulary made from the texts themselves."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    small = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    small.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    small.train_from_iterator(
        [piece.lower() for piece in PIECES[:22]],
        tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=marks, show_progress=False),
    )
    model = json.loads(small.to_str())["model"]
    made = kind(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], add_eos_token=True, padding_side="right"
    )
    made.save_pretrained(folder)
    return made


def test_siglip_tokens_are_those_of_transformers(tmp_path):
    theirs = gemma(tmp_path, transformers.GemmaTokenizer)
    texts = [text.lower() for text in strings() if "Σ" not in text]  # of which Python lowers the last in another way
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    assert wanted[0][-1] == 0 and any(row[-1] == 1 for row in wanted)  # padded right; cut ones keep their end
    found = Tokenizer(tmp_path, 64, "siglip")
    np.testing.assert_array_equal(found(texts), wanted)
    np.testing.assert_array_equal(found([text.upper() for text in PIECES[:2]]), found([t.lower() for t in PIECES[:2]]))


def test_siglip_2_tokens_are_those_of_transformers(tmp_path):
    theirs = gemma(tmp_path, transformers.Siglip2Tokenizer)
    wanted = theirs(strings(), padding="max_length", truncation=True, max_length=64)["input_ids"]
    np.testing.assert_array_equal(Tokenizer(tmp_path, 64, "siglip")(strings()), wanted)


SIZES = [
    (1, 1), (1, 400), (400, 1), (2, 3), (3, 2), (7, 5), (31, 97), (97, 31), (223, 225), (224, 224), (225, 223),
    (224, 500), (335, 337), (640, 427), (427, 641), (1001, 333), (333, 1001), (799, 3), (1919, 1081), (2, 1203),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "clip 336", "siglip", "siglip bicubic"])
def test_pixels_are_those_of_transformers(tmp_path, kind):
    theirs = {
        "clip": lambda: transformers.CLIPImageProcessorPil(),
        "clip 336": lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
        "siglip": lambda: transformers.SiglipImageProcessorPil(size={"height": 256, "width": 256}, resample=2),
        "siglip bicubic": lambda: transformers.SiglipImageProcessorPil(),
    }[kind]()
    theirs.save_pretrained(tmp_path)
    side = (theirs.crop_size or theirs.size)["height"]
    ours = Processor.read(checkpoint.read_json(tmp_path, "preprocessor_config.json"), side)
    rng = np.random.default_rng(0)
    level = 1 / 255 / np.array(theirs.image_std)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        wanted = np.asarray(theirs(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
        found = ours.normalize(ours.fit(image))
        assert found.shape == wanted.shape == (side, side, 3) and found.dtype == np.float32
        assert (np.abs(found - wanted) / level).max() < 1.001, (width, height)
