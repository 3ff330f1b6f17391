"""Exports: programs run without the package, files keep their contents, and a damaged export is an error."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import common
from geotoken_jax import GeoToken, backbone, configuration, settings
from geotoken_jax.backbone import preprocess
from geotoken_jax.export import standalone
from geotoken_jax.gallery import index, table
from geotoken_jax.gallery.table import IndexVectors, Table
from geotoken_jax.predict import bundle
from geotoken_jax.stages import export
from tests import checkpoints, exports

#: Kind of the tiny tower -> width of its embeddings.
WIDTHS = {"clip": 12, "siglip": 16}


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a tiny CLIP, and without search."""
    root = tmp_path_factory.mktemp("clip")
    exports.write(root / "export", of_tower(root, "clip", exports.of_samples), program=True)
    return root / "export"


def of_tower(root: Path, kind: str, further: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns a change of the configuration to a tiny tower with random parameters. kind: "clip" or "siglip"."""
    golden = np.load(Path(__file__).parent / "golden" / "backbones.npz")
    tower = checkpoints.write(root / "tower", kind, json.loads(str(golden[f"{kind}/shapes"])))

    def change(config: Any) -> None:
        further(config)
        config.embed.backbone, config.embed.huggingface.path = "huggingface", str(tower)
        config.model.backbone_width = WIDTHS[kind]

    return change


@pytest.mark.slow
def test_programs_answer_as_the_package(tmp_path: Path, with_clip: Path):
    """From pixels to radii: with SigLIP 2, the reranker and an int8 gallery, and with CLIP and without search."""
    exports.write(tmp_path / "siglip", of_tower(tmp_path, "siglip", exports.of_channels), program=True)
    for folder in (tmp_path / "siglip", with_clip):
        found = standalone.Model(folder).predict(exports.photos())
        exports.compare(found, GeoToken.load(folder).predict(exports.photos()))
        assert len({(one["latitude"], one["longitude"]) for one in found}) > 1
    assert b".py" not in (with_clip / "program.stablehlo").read_bytes()  # nor paths of the machine that made it


@pytest.mark.slow
def test_standalone_runs_without_the_package_and_goes_on_after_a_bad_photo(tmp_path: Path, with_clip: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, photo in enumerate(exports.photos(2)):
        Image.fromarray(photo).save(folder / f"{i}.png")
    (folder / "2.jpg").write_bytes(b"no photo")
    run = (
        "import runpy, sys; sys.argv[:] = sys.argv[1:]\n"
        "sys.modules.update(dict.fromkeys(['geotoken_jax', 'flax', 'etils', 'jaxtyping', 'pillow_heif']))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", run, with_clip / "standalone.py"]
    done = subprocess.run(
        [*command, "--json", folder, tmp_path / "none.jpg"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["id"] for one in found] == [str(folder / "0.png"), str(folder / "1.png")]
    exports.compare(found, GeoToken.load(with_clip).predict(exports.photos(2)))
    assert len(done.stderr.splitlines()) == 2 and "2.jpg" in done.stderr and "none.jpg" in done.stderr


@pytest.mark.slow
def test_standalone_says_in_one_sentence_what_is_missing(tmp_path: Path, with_clip: Path, capsys):
    export = Path(shutil.copytree(with_clip, tmp_path / "export"))
    for damage, message in (
        (lambda: (export / "signature.json").unlink(), "has no signature.json: give the folder that `geotoken export`"),
        (lambda: next((export / "gallery").glob("tokens-00001*")).unlink(), "lacks files of tokens: copy the whole"),
    ):
        damage()
        with pytest.raises(standalone.ModelError, match=message):
            standalone.Model(export)
        shutil.copytree(with_clip, export, dirs_exist_ok=True)
    with pytest.raises(standalone.ModelError, match="has no program: make one with `geotoken export --from=FOLDER"):
        standalone.Model(export, tmp_path)
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"")
    with pytest.raises(preprocess.ImageError, match=r"photo\.png"):
        standalone.Model(export).predict([str(photo)])


@pytest.mark.slow
def test_an_export_without_its_tower_takes_features(tmp_path: Path):
    change = of_tower(tmp_path, "clip", exports.of_samples)

    def without(config: Any) -> None:
        change(config)
        config.embed.huggingface.path = ""

    exports.write(tmp_path / "export", without, program=True)
    model = standalone.Model(tmp_path / "export")
    assert model.signature["photos"] == {"name": "features", "shape": ["B", 12], "type": "float32"}
    features = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    assert len(model.answers(features)) == 3
    with pytest.raises(standalone.ModelError, match="does not contain its backbone's checkpoint: pass features"):
        model.predict(exports.photos(1))


def test_a_broken_export_names_the_file(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "large.npy").write_bytes(b"numbers")
    with pytest.raises(ValueError, match="has no SHA256SUMS"):
        bundle.check(tmp_path, everything=False)
    sums = "".join(f"{bundle.sha256(tmp_path / name)}  {name}\n" for name in ("config.json", "large.npy"))
    (tmp_path / "SHA256SUMS").write_text(sums)
    bundle.check(tmp_path, everything=True)
    (tmp_path / "large.npy").write_bytes(b"others!")
    bundle.check(tmp_path, everything=False)
    with pytest.raises(ValueError, match=r"large\.npy does not match its sum in SHA256SUMS"):
        bundle.check(tmp_path, everything=True)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json does not match"):
        bundle.check(tmp_path, everything=False)
    (tmp_path / "large.npy").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacks large\.npy"):
        bundle.check(tmp_path, everything=False)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """A table of 300 photos in two shards, whose vectors have very different lengths."""
    rng = np.random.default_rng(0)
    for shard, n in enumerate((200, 100)):
        vectors = rng.normal(size=(n, 3, 32)) * 10.0 ** rng.integers(-3, 3, (n, 3, 1))
        columns = {
            "embeddings": vectors.astype(ml_dtypes.bfloat16),
            "coordinates": rng.uniform(-80, 80, (n, 2)),
            "tokens": rng.integers(0, 4, (n, 21)).astype(np.uint8),
            "ids": np.array([f"{shard}-{i}".encode() for i in range(n)]),
            "authors": np.array([b""] * n),
        }
        table.write_shard(tmp_path / "gallery", shard, 2, columns)
    return tmp_path / "gallery"


def test_an_int8_gallery_is_half_as_large_and_reads_as_before(gallery: Path):
    files = sorted(gallery.glob("embeddings-*"))
    before, size = Table(gallery).embeddings(np.arange(300)), sum(f.stat().st_size for f in files)
    table.quantize(gallery)
    after, rows = Table(gallery), np.array([[0, 299], [199, 200]])
    found = after.embeddings(rows)
    assert found.dtype == ml_dtypes.bfloat16 and found.shape == (2, 2, 3, 32)
    was, now = before[rows].astype(np.float32), found.astype(np.float32)
    scale = np.abs(was).max(-1, keepdims=True) / 127
    # Half a quantization step, and the rounding of the sum to bfloat16.
    assert (np.abs(now - was) <= 0.501 * scale + np.abs(now) / 256).all()
    np.testing.assert_array_equal(after.embeddings(), after.embeddings(np.arange(300)))
    assert sum(f.stat().st_size for f in gallery.glob("[es]*-*")) < 0.65 * size  # a small file has a large header


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_an_int8_index_is_a_third_as_large_and_finds_what_it_should(gallery: Path, tmp_path: Path, kind: str):
    if kind == "scann":
        pytest.importorskip("scann")
    search = dict(common.get_config().index.search) | {"kind": kind, "components": 96, "min_recall": 0.9}
    vectors, sizes = IndexVectors(Table(gallery)), {}
    for dtype in ("float32", "int8"):
        made = {**search, "reorder_dtype": dtype}
        index.build(vectors, settings.read(index.IndexSettings, made, "index.search"), epath.Path(tmp_path / dtype))
        stored = [f for f in (tmp_path / dtype).rglob("*.npy") if f.stem in ("dataset", "int8_dataset", "vectors")]
        sizes[dtype] = sum(f.stat().st_size for f in stored)
    assert 0 < sizes["int8"] < 0.3 * sizes["float32"]
    rows, scores = index.load(tmp_path / "int8", threads=1).search(vectors[:50], 5)
    assert (rows[:, 0] == np.arange(50)).all()
    wanted, _ = index.exact(vectors, vectors[:50], 5)
    assert index.recall(rows, wanted) > 0.9
    np.testing.assert_allclose(scores[:, 0], 3, atol=0.03)


def test_a_backbone_travels_with_the_export_or_is_asked_for_by_name(tmp_path: Path):
    golden = np.load(Path(__file__).parent / "golden" / "backbones.npz")
    shapes = json.loads(str(golden["clip/shapes"]))
    source = checkpoints.write(tmp_path / "models--org--tiny-clip" / "snapshots" / "c0ffee", "clip", shapes)
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    config = common.get_config()
    config.embed.backbone, config.embed.huggingface.path = "huggingface", str(source)
    features = []
    for weights, given in ((True, None), (False, source)):
        folder = epath.Path(tmp_path / f"export-{weights}")
        folder.mkdir()
        section, referred = export.copy_backbone(folder, configuration.read(config).embed, weights)
        assert (
            referred
            and (referred["name"], referred["commit"]) == ("org/tiny-clip", "c0ffee")
            and str(tmp_path) not in json.dumps([section, referred])
        )
        assert set(referred["sha256"]) == {
            "config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt",
            "tokenizer_config.json",
        }  # fmt: skip
        found = bundle.backbone(folder, section, referred, given)
        made = backbone.make(settings.read(backbone.BackboneSettings, found, "backbone"))
        features.append(made.images(np.stack([made.prepare(photo) for photo in checkpoints.images()])))
    np.testing.assert_array_equal(*features)
    assert set(referred["sha256"]) == {p.name for p in (tmp_path / "export-True" / "backbone").iterdir()}
    with pytest.raises(
        bundle.ExportError, match=r"does not contain its backbone org/tiny-clip@c0ffee: .* --backbone=DIR"
    ):
        bundle.backbone(folder, section, referred, None)
    (source / "model.safetensors").write_bytes(b"of another model")
    with pytest.raises(bundle.ExportError, match=r"model\.safetensors does not match its SHA-256 sum"):
        bundle.backbone(folder, section, referred, source)
