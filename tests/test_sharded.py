"""The stage `index` in several processes: the same bytes for any number of them, interrupted at any file."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import gallery, index, neighbors, sharded, tokens
from geotoken_jax import configuration, disk, partition, records
from geotoken_jax.workdir import Workdir
from tests import sample, tiny

FOLDERS = ("queries", "gallery", "neighbors", "tokens")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes shards of a few photos; there are 39 photos of `train`, 39 views and 5 of `validation`."""
    monkeypatch.setattr(gallery, "_SHARD", 16)
    monkeypatch.setattr(neighbors, "_SHARD", 10)
    monkeypatch.setattr(neighbors, "_BATCH", 4)
    monkeypatch.setattr(tokens, "_SHARD", 12)
    monkeypatch.setattr(sharded, "_START_S", 0)  # no other process starts


def config():
    made: Any = tiny.get_config()
    made.index.search.shard_rows = 14
    made.index.neighbors.exclude_in_evaluation.within_km = 300.0
    return configuration.read(made)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    path = sample.embedded(sample.prepared(folder / "photos"), folder / "aligned", 1)
    sample.aligned(path, config())
    return path


@pytest.fixture
def whole(aligned: Path, tmp_path: Path) -> dict[str, bytes]:
    path = shutil.copytree(aligned, tmp_path / "whole")
    assert [made.folder for made in index.run(config(), Workdir(path))] == list(FOLDERS)
    return contents(path)


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for name in FOLDERS for p in (path / name).rglob("*") if p.is_file()
    }


def run(path: Path, process: int, processes: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COORDINATOR_ADDRESS", "nobody:1")  # no process connects to it
        patch.setenv("JAX_NUM_PROCESSES", str(processes))
        patch.setenv("JAX_PROCESS_ID", str(process))
        try:
            return [made.folder for made in index.run(config(), Workdir(path))]
        finally:
            disk._unlock_all()  # as the system does at the end of a process


@pytest.mark.slow
def test_the_neighbors_are_those_of_one_search(whole: dict[str, bytes], tmp_path: Path):
    folder = Workdir(tmp_path / "whole")
    assert len(folder.index_rows()) == 3 and sum("train.rows" in name for name in whole) == 4
    for split in ("train", "validation", "train_views"):
        rows, scores = folder.neighbors(split)
        vectors = np.asarray(gallery.IndexVectors(folder.table(split))[:], float)
        products = vectors @ np.asarray(gallery.IndexVectors(folder.gallery)[:], float).T
        for rule in folder.exclusions(split)(np.arange(len(rows))):
            products[rule(np.arange(len(rows)), np.arange(39)[None].repeat(len(rows), 0))] = -np.inf
        order = np.argsort(-products, axis=1, kind="stable")[:, :6]
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_allclose(scores, np.take_along_axis(products, order, 1), atol=1e-5)
        np.testing.assert_array_equal(folder.neighbors(split, 3, slice(2, 5))[0], rows[2:5, :3])
        stored = records.Records(folder.path / "tokens", split, records.token_layout(6))[:]
        np.testing.assert_array_equal(stored["neighbors"], rows)
        assert stored["row"].tolist() == list(range(len(rows)))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_in_any_order_make_the_same_bytes(aligned, whole, tmp_path, capsys, processes):
    path = shutil.copytree(aligned, tmp_path / "shared")
    made = []
    for _ in range(4):  # tables, index, neighbors, tokens
        made += [run(path, process, processes) for process in reversed(range(processes))]
    assert made[0] == [] and made[-1] == list(FOLDERS)
    assert "other processes make: when they have ended, run the same command again" in capsys.readouterr().out
    assert contents(path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_at_every_file_it_makes_the_same_bytes(aligned, whole, tmp_path, monkeypatch, processes):
    path = shutil.copytree(aligned, tmp_path / "broken")
    interrupt_after = sample.interruptible(monkeypatch)
    rng, breaks = np.random.default_rng(processes), 0
    for attempt in range(1000):
        interrupt_after(int(rng.integers(1, 12)))
        try:
            if run(path, attempt % processes, processes) == list(FOLDERS):
                break
        except KeyboardInterrupt:
            breaks += 1
    assert breaks > 10
    assert contents(path) == whole


def test_a_process_waits_for_one_that_writes_the_folder(tmp_path, monkeypatch):
    parts = [sharded.Shard(tmp_path, "train", range(4), number, 2) for number in range(2)]
    parts[0].finish([])
    waits = []
    monkeypatch.setattr(disk, "writers", lambda folder: [1] if len(waits) < 5 else [])

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            parts[1].finish([])

    monkeypatch.setattr(sharded.time, "sleep", sleep)
    stage = sharded.Stage(tmp_path, "tokens", {}, {}, None)
    assert sharded.wait(stage, parts) and len(waits) == 3
    shutil.rmtree(tmp_path / "ledgers")
    assert not sharded.wait(stage, parts) and len(waits) >= 5


def test_full_shards_stay_and_small_ones_grow_with_what_is_added():
    assert partition.ranges([12], 5) == [range(5), range(5, 10), range(10, 12)]
    assert partition.ranges([12, 13], 5) == [range(5), range(5, 10), range(10, 12), range(12, 13)]
    assert partition.ranges([12, 14], 5) == [range(5), range(5, 10), range(10, 14)]
    assert partition.ranges([10, 11], 5) == [range(5), range(5, 10), range(10, 11)]
    assert partition.ranges([0, 3], 5) == [range(3)] and partition.ranges([0], 5) == [range(0)]
    assert partition.ranges([3, 3], 5) == [range(3)]
    grown = partition.ranges(range(1, 1001), 100)
    assert len(grown) < 15 and [row for part in grown for row in part] == list(range(1000))
