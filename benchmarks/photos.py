"""Preparation of a generated MP16-Pro, by `geotoken prepare` as a user runs it. Prints one JSON line.

By default 20,000 tiny photos in 19 parts of one tar, every trap among them; `--side=405` makes JPEGs of 80 KB, as the
real ones are. `--kills=20` begins the same preparation again, kills all of its processes with SIGKILL that many times,
at random moments spread over its length, lets it end, and compares the SHA-256 of every file. The issue's size is
`--photos=200000 --kills=20`. The files are in the page cache: a disk that is slower bounds the rates.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import mp16
from configs import common
from data_prep.placeholder import dhash

PARTS = 19
#: Seconds between two looks at the processes' memory.
_LOOK = 0.05


def generate(folder: Path, photos: int, side: int) -> mp16.Ledger:
    """Writes the data set in 19 parts, the last of them half as long as the others."""
    sample = min(photos, 1000)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        mp16.generate(Path(name), sample, 1 << 40, side, keep=False)
        length = sum(part.stat().st_size for part in Path(name).glob("mp-*")) * photos / sample
    # Photos are spread over more lengths the more there are, by 1 byte for 50 of them.
    length += photos * max(0, photos // 50 - 869) / 2
    return mp16.generate(folder, photos, int(length / (PARTS - 0.5)), side, keep=False)


def command(data: Path, work: Path, options: argparse.Namespace) -> list[str]:
    """Returns `geotoken prepare` for the data set."""
    changes = {
        "source": "mp16_pro",
        "workers": options.workers,
        "max_dropped": 0.5,
        "mp16_pro.folder": data,
        "mp16_pro.validation": 0.05,
        "mp16_pro.photos_per_shard": options.photos_per_shard,
        "mp16_pro.placeholder.hashes": f'("{dhash(mp16.flickr()):016x}",)',
        # Below the number of photos with the trap of identical bytes.
        "mp16_pro.placeholder.identical": min(100, options.photos // 200),
    }
    arguments = [f"--config.photos.{key}={value}" for key, value in changes.items()]
    return [
        *(sys.executable, "-m", "geotoken_jax.cli", "prepare", f"--config={common.__file__}", f"--workdir={work}"),
        *arguments,
    ]


def begin(arguments: list[str], log: Path) -> subprocess.Popen:
    """Starts a command as the first of a group of processes."""
    with log.open("ab") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)


def group(leader: int) -> dict[int, dict[str, int]]:
    """Returns process -> bytes of memory now (VmRSS) and at most so far (VmHWM), of a group's processes."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                # One that has ended and waits to be asked for its status has no memory.
                memory = {name: 1024 * int(lines.get(name, "0").split()[0]) for name in ("VmRSS", "VmHWM")}
                found[int(process.name)] = memory
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def whole(arguments: list[str], work: Path, log: Path) -> dict[str, Any]:
    """Runs a command to its end; returns its seconds, of each phase too, its shards, and its peak GB, of a process and
    of all of them together.

    Raises SystemExit with the end of its log if it fails.
    """
    began, at_work, most, together = time.time(), 0.0, 0, 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = begin(arguments, log)
    while process.poll() is None:
        memory = group(process.pid).values()
        most = max([most, *(one["VmHWM"] for one in memory)])
        together = max(together, sum(one["VmRSS"] for one in memory))
        at_work = at_work or ((work / "photos" / "survey").exists() and time.time())
        time.sleep(_LOOK)
    if process.returncode:
        raise SystemExit(f"geotoken prepare ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    ended, surveyed = time.time(), (work / "photos" / "survey" / "files.json").stat().st_mtime
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": ended - began,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "start_seconds": at_work - began,
        "survey_seconds": surveyed - at_work,
        "shards_seconds": ended - surveyed,
        "shards": _shards(work / "photos"),
        "peak_gb": most / 1e9,
        "together_gb": together / 1e9,
    }


def kill(arguments: list[str], work: Path, log: Path, kills: int, unbroken: dict[str, Any]) -> list[int]:
    """Begins a command and kills it, again and again; returns how many shards there were then, -1 in the survey.

    A quarter of the kills are in the survey, at moments of as many equal spans of its time. The others are after as
    many equal spans of the shards have been made, and within the next shard.
    """
    rng, found = random.Random(0), []
    folder, shards = work / "photos", unbroken["shards"]
    for n in range(kills):
        process = begin(arguments, log)
        if n < kills // 4:
            time.sleep(unbroken["start_seconds"] + (n + rng.random()) / (kills // 4) * unbroken["survey_seconds"])
        else:
            wanted = shards * (n - kills // 4 + rng.random()) / (kills - kills // 4)
            while process.poll() is None and _shards(folder) < wanted - 1:
                time.sleep(0.01)
            time.sleep(rng.random() * unbroken["shards_seconds"] / shards)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while any(one["VmRSS"] for one in group(process.pid).values()):
            time.sleep(0.01)
        found.append(_shards(folder))
    return found


def _shards(folder: Path) -> int:
    """Returns how many shards are whole, -1 before there is a survey."""
    return len(list(folder.glob("ledgers/*.json"))) if (folder / "survey" / "files.json").exists() else -1


def digests(folder: Path) -> dict[str, str]:
    """Returns file -> SHA-256, of all files under a folder."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            found[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepares the generated data set, and once more with kills; returns all figures."""
    data, work, log = folder / "data", folder / "work", folder / "log"
    ledger = generate(data, options.photos, options.side)
    parts = [path.stat().st_size for path in data.glob("mp-*")]
    unbroken = whole(command(data, work, options), work, log)
    manifest = json.loads((work / "photos" / "manifest.json").read_text())
    found = {
        **{name: getattr(options, name) for name in ("photos", "side", "workers", "photos_per_shard")},
        "cores": os.cpu_count(),
        "parts": len(parts),
        "bytes_per_photo": round(sum(parts) / options.photos),
        **{name: round(value, 2) for name, value in unbroken.items()},
        "photos_per_second": round(options.photos / unbroken["seconds"]),
        "mb_per_second": round(sum(parts) / unbroken["seconds"] / 1e6, 1),
        "survey_photos_per_second": round(options.photos / unbroken["survey_seconds"]),
        "shards_photos_per_second": round(options.photos / unbroken["shards_seconds"]),
        "shards_mb_per_second": round(sum(parts) / unbroken["shards_seconds"] / 1e6, 1),
        "counts": manifest["counts"],
        "dropped": manifest["dropped"],
        "exact": manifest["dropped"] == ledger.dropped and sum(manifest["counts"].values()) == ledger.photos,
    }
    if options.kills:
        again = folder / "again"
        found["shards_when_killed"] = kill(command(data, again, options), again, log, options.kills, unbroken)
        whole(command(data, again, options), again, log)
        found["identical"] = digests(work) == digests(again)
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=16, help="of a photo, in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--photos_per_shard", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


if __name__ == "__main__":
    main()
