"""The stage `embed`: shards of several processes, runs after an interruption, and texts encoded once."""

import concurrent.futures
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_prep import embed, gallery, neighbors, sharded, tokens
from geotoken_jax import backbone, configuration, manifests, partition, records
from geotoken_jax.gallery import table
from geotoken_jax.workdir import Workdir
from tests import sample, tiny


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return sample.prepared(tmp_path_factory.mktemp("embed"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(embed, "_BATCH", 4)
    monkeypatch.setattr(embed, "_SHARD", 8)  # five photos of `train`, one of `validation`
    monkeypatch.setattr(sharded, "_START_S", 0)  # no other process starts


def run(path, process=0, processes=1):
    with pytest.MonkeyPatch.context() as patch:
        if processes > 1:
            patch.setenv("JAX_COORDINATOR_ADDRESS", "nobody:1")  # no process connects to it
            patch.setenv("JAX_NUM_PROCESSES", str(processes))
            patch.setenv("JAX_PROCESS_ID", str(process))
        return [made.counts for made in embed.run(configuration.read(tiny.get_config()), Workdir(path))]


def copied(prepared, to):
    shutil.copytree(prepared / "photos", to / "photos")
    return to


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in (path / "features").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    path = copied(prepared, tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "_BATCH", 4)
        patch.setattr(embed, "_SHARD", 8)
        run(path)
    return contents(path)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_shards_and_the_last_one_completes_the_folder(prepared, whole, tmp_path, order):
    path = copied(prepared, tmp_path)
    *first, last = order
    assert [run(path, process, 3) for process in first] == [[], []]
    with pytest.raises(manifests.StageError, match="is not complete"):
        manifests.read_manifest(path, "features")
    assert run(path, last, 3) == [{"train": 39, "validation": 5, "train_views": 39}]
    assert contents(path) == whole


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupted_run_makes_only_what_is_missing(prepared, whole, tmp_path, monkeypatch, threads):
    path = copied(prepared, tmp_path)
    tower = backbone.make(tiny.get_config().embed)
    seen = []

    class Failing:
        width, min_side, prepare, texts = tower.width, tower.min_side, tower.prepare, tower.texts

        def images(self, prepared):
            seen.append(len(prepared))
            if sum(seen) > 20:
                raise MemoryError("as if the machine had gone")
            return tower.images(prepared)

    monkeypatch.setattr(backbone, "make", lambda settings, mesh=None: Failing())
    with pytest.raises(MemoryError):
        run(path)
    made = contents(path)
    assert {name for name in made if "array_record" in name} < whole.keys() and "features/begun.json" in made
    assert not any("partial" in name for name in made)
    monkeypatch.undo()
    monkeypatch.setattr(embed, "_BATCH", 4)
    monkeypatch.setattr(embed, "_SHARD", 8)
    kept = {name: (path / name).stat().st_mtime_ns for name in made if "array_record-" in name}
    assert len(kept) >= 2
    run(path)
    assert {name: (path / name).stat().st_mtime_ns for name in kept} == kept
    assert contents(path) == whole


def test_each_distinct_text_is_embedded_once(prepared, tmp_path, monkeypatch):
    path = copied(prepared, tmp_path)
    kind, asked = type(backbone.make(tiny.get_config().embed)), []
    real = kind.texts
    monkeypatch.setattr(kind, "texts", lambda self, texts: asked.extend(texts) or real(self, texts))
    run(path)
    assert len(asked) == len(set(asked)) == 40  # City 0 ... City 39, of 83 records


def test_work_is_done_ahead_in_order_and_not_without_end():
    begun, running, most = [], threading.Semaphore(0), 3

    def slow(n):
        begun.append(n)
        running.acquire()
        return n * n

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = embed._ahead(pool, slow, iter(range(10)), most)
        for _ in range(10):
            running.release()
        assert next(found) == 0
        assert len(begun) <= most + 1
        assert list(found) == [n * n for n in range(1, 10)]


def test_the_settings_of_a_tower_that_do_not_change_features_may_change(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)

    def made_with(folder, dtype="float32", batch_size=8):
        chosen = backbone.HuggingFaceSettings(str(folder), dtype, batch_size)
        return backbone.feature_settings(backbone.BackboneSettings("huggingface", None, chosen))

    first = made_with(tmp_path)
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    assert made_with(moved, batch_size=64) == first != made_with(tmp_path, "bfloat16")
    (moved / "model.safetensors").write_bytes(b"0" * 99 + b"1")
    assert made_with(moved) != first


#: A process that may open 1,024 files, and no more if it asks; it writes one photo per shard of features.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from data_prep import embed, gallery, neighbors, tokens
from geotoken_jax import cli
embed._SHARD = 1
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_thousand_shards_are_read_by_a_process_that_may_open_1024_files(tmp_path):
    config = Path(tiny.__file__)
    changes = [
        "photos.earthview.train=1007", "embed.views.count=0", "align.train.batch_size=256", "train.batch_size=256",
        "train.examples=2560", "align.train.examples=2560",
    ]  # fmt: skip
    for verb in ("prepare", "embed", "align", "index", "train"):
        command = [verb, f"--config={config}", f"--workdir={tmp_path}", *(f"--config.{change}" for change in changes)]
        run = subprocess.run(
            [sys.executable, "-c", LIMITED, *command], cwd=config.parents[1], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "features").glob("train.array_record-*"))) == 1007


def test_fifteen_million_photos_need_few_files(monkeypatch):
    """The counts of docs/data.md."""
    monkeypatch.undo()  # the shards of the other tests are small
    limits = {"features": embed._SHARD, "tokens": tokens._SHARD, "table": gallery._SHARD, "neighbors": neighbors._SHARD}
    assert {
        photos: {name: len(partition.ranges([photos], limit)) for name, limit in limits.items()}
        for photos in (4_120_000, 15_000_000)
    } == {
        4_120_000: {"features": 252, "tokens": 4, "table": 16, "neighbors": 63},
        15_000_000: {"features": 916, "tokens": 15, "table": 58, "neighbors": 229},
    }
    assert records.feature_layout(768).size == 3245
    # Under a limit of 1,024 files: half of them are shards of records; tables and neighbors stay mapped.
    mapped = 58 * len(table.layout(768).fields), 229 * 2
    assert mapped == (348, 458) and mapped[0] + 512 < 900 and sum(mapped) + 15 < 900
