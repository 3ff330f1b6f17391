"""Exports: programs run without the package, files keep their contents, and a damaged export is an error."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx

from configs import common
from geotoken_jax import backbone, checkpoint, configuration, settings
from geotoken_jax.align.heads import AlignModel, AlignSettings, embeddings
from geotoken_jax.align.location_encoder import LocationSettings
from geotoken_jax.export import stablehlo, standalone
from geotoken_jax.gallery import index, table
from geotoken_jax.gallery.table import IndexVectors, Table
from geotoken_jax.geo.cells import CellScheme
from geotoken_jax.predict import bundle
from geotoken_jax.stages import export
from tests import checkpoints, fixtures, test_decode


def standing(level: int, group: int) -> standalone.Model:
    model = object.__new__(standalone.Model)
    model.level, model.group = level, group
    return model


@pytest.mark.parametrize(("level", "group"), [(20, 2), (20, 4), (12, 3), (5, 1)])
def test_cells_are_those_of_the_package(level: int, group: int):
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(-90, 90, 500), rng.uniform(-180, 180, 500)
    cells, model = CellScheme(level, group), standing(level, group)
    tokens = cells.encode(latitude, longitude)
    np.testing.assert_allclose(model.centers(tokens), np.stack(cells.decode(tokens), -1), atol=1e-9)
    quads = CellScheme(20, 1).encode(latitude, longitude).astype(np.uint8)
    np.testing.assert_array_equal(model.cell_tokens(quads), tokens)


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, standalone
from pathlib import Path
call = standalone._program(Path(sys.argv[1]), "align")
np.save(sys.argv[1] + "/found.npy", call(features=np.load(sys.argv[1] + "/features.npy"))["vectors"])
assert not [name for name in sys.modules if name.split(".")[0] in ("geotoken_jax", "flax")]
"""


def test_a_program_runs_without_the_package(tmp_path: Path):
    location = LocationSettings(projection="mercator", sigmas=(1.0,), fourier=4, hidden=4, out=4)
    model = AlignModel(AlignSettings(8, 0.0, 0.0, location), 6, rngs=nnx.Rngs(0))
    program = stablehlo.embedding(model, 6)
    assert b".py" not in program  # nor paths of the machine that made it
    (tmp_path / "align.stablehlo").write_bytes(program)
    (tmp_path / "standalone.py").write_bytes(Path(standalone.__file__).read_bytes())
    checkpoint.write_parameters(tmp_path / "align.safetensors", nnx.to_pure_dict(nnx.state(model)))
    features = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    subprocess.run([sys.executable, "-I", "-c", RUN, str(tmp_path)], check=True, timeout=300)
    found = np.load(tmp_path / "found.npy")
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, embeddings(model, features).astype(np.float32), atol=0.02)  # bfloat16's precision


def test_a_program_of_a_model_that_reads_times_takes_them_as_unknown():
    model, batch = fixtures.model("ours", context="season"), fixtures.batch(2)
    program = standalone.deserialize(stablehlo.decoding(model, dataclasses.replace(test_decode.SETTINGS, samples=0)))
    parameters = {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    given = [batch[name].astype(ml_dtypes.bfloat16) for name in ("query", "neighbors")]
    found = program.call(parameters, *given, batch["neighbor_tokens"], batch["neighbor_count"], np.zeros(2, np.uint32))
    seen = dict(zip(("query", "neighbors"), given, strict=True))
    unknown = {**batch, **seen, "tokens": found["tokens"][:, 0], "context": np.zeros((2, 3), np.float32)}
    log_p = np.take_along_axis(np.asarray(fixtures.forward(model, unknown)), unknown["tokens"][..., None], -1)
    np.testing.assert_allclose(found["log_probability"][:, 0], log_p.sum((1, 2)), atol=1e-4)


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
    alone = object.__new__(standalone.Model)
    alone._columns = {name: standalone._shards(gallery, name) for name in ("embeddings", "scales")}
    alone._starts = np.array([0, 200, 300])
    np.testing.assert_array_equal(alone.embeddings(rows), found)


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
