"""Apache Beam makes the bytes that this machine's processes make.

Run by `make test-interop`, where Beam is; without it these are skipped.
"""

import dataclasses

import pytest

pytest.importorskip("apache_beam")

from benchmarks import mp16
from data_prep import photos
from data_prep.beam import BeamSettings
from geotoken_jax import manifests
from geotoken_jax.manifests import StageError
from tests.test_mp16_pro import config, prepare
from tests.test_photos import Sample

TWO_PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


def files(work):
    return {str(file.relative_to(work)): file.read_bytes() for file in work.rglob("*") if file.is_file()}


def test_beam_and_processes_make_the_same_bytes_and_go_on_where_the_other_stopped(tmp_path):
    mp16.generate(tmp_path / "data", 400, 300_000, trapped=False)
    wanted = prepare(config(tmp_path / "data"), tmp_path / "processes")
    by_beam = config(tmp_path / "data")
    by_beam.photos.beam.update(runner="DirectRunner", options=TWO_PROCESSES)
    assert prepare(by_beam, tmp_path / "beam") == wanted
    assert files(tmp_path / "beam") == files(tmp_path / "processes")

    folder = tmp_path / "beam" / "photos"  # as a run leaves it that was killed
    (folder / "manifest.json").rename(folder / "begun.json")
    shards = sorted(folder.glob("*/*/*.array_record-*"))
    shards[1].unlink()
    (folder / "ledgers" / f"{shards[2].name}.json").unlink()
    (folder / "attempts" / "0123").mkdir(parents=True)
    (folder / "attempts" / "0123" / shards[1].name).write_bytes(b"half a shard")
    before = {shard: shard.stat().st_mtime_ns for shard in shards if shard.exists()}
    assert prepare(by_beam, tmp_path / "beam") == wanted
    assert [shard for shard, time in before.items() if shard.stat().st_mtime_ns != time] == [shards[2]]
    assert files(tmp_path / "beam") == files(tmp_path / "processes")


@dataclasses.dataclass(frozen=True)
class Damaged(Sample):
    def read(self, split, shard):
        raise StageError("mp-16-images07 at byte 5 is gone")


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (Damaged(), BeamSettings("DirectRunner", TWO_PROCESSES), r"DirectRunner did not .*images07 at byte 5 is gone"),
        (Damaged(), BeamSettings("DirectRunner", ()), r"DirectRunner did not make .*images07 at byte 5 is gone"),
        (Sample(), BeamSettings("NoRunner", ()), r"NoRunner did not make .*Valid values are .*FlinkRunner"),
    ],
)
def test_what_a_runner_raises_is_said_in_one_line(tmp_path, source, settings, message):
    stage = manifests.begin(tmp_path, "photos", {"photos": {"source": "sample"}}, inputs=())
    with pytest.raises(StageError, match=message) as raised:
        photos.make(stage, source, 1, 0.0, settings)
    assert "\n" not in str(raised.value)
