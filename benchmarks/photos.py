"""Measures `geotoken prepare` on a generated MP16-Pro. Prints one JSON line.

The default is 20,000 tiny photos in 19 parts of one tar, with all traps of benchmarks/mp16.py. With `--side=405`, JPEGs
have 80 KB, as in the real data set. The files are in the page cache; a slow disk would lower the rates.

`--kills=20` prepares the same data a second time, and kills all processes (SIGKILL) 20 times at random moments. The
last run completes. Then the SHA-256 of all files are compared with the first preparation. A large run is
`--photos=200000 --kills=20`.
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
#: Seconds between two measurements of the processes' memory.
_POLL_S = 0.05


def generate(folder: Path, photos: int, side: int) -> mp16.Ledger:
    """Writes the data set in 19 parts and returns its ledger. The last part is half as long as the others."""
    sample = min(photos, 1000)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        mp16.generate(Path(name), sample, 1 << 40, side, keep=False)
        length = sum(part.stat().st_size for part in Path(name).glob("mp-*")) * photos / sample
    # File sizes vary by up to 869 bytes, or photos / 50 bytes if that is more. The mean grows by half the difference.
    length += photos * max(0, photos // 50 - 869) / 2
    return mp16.generate(folder, photos, int(length / (PARTS - 0.5)), side, keep=False)


def command(data: Path, work: Path, options: argparse.Namespace) -> list[str]:
    """Returns the command line of `geotoken prepare` for the data set."""
    changes = {
        "source": "mp16_pro",
        "workers": options.workers,
        "max_dropped": 0.5,
        "mp16_pro.folder": data,
        "mp16_pro.validation": 0.05,
        "mp16_pro.photos_per_shard": options.photos_per_shard,
        "mp16_pro.placeholder.hashes": f'("{dhash(mp16.flickr()):016x}",)',
        # Less than the number of photos with identical bytes, so that these are dropped.
        "mp16_pro.placeholder.identical": min(100, options.photos // 200),
        "duplicates.keep": True,  # the data set has 50 different pictures
    }
    arguments = [f"--config.photos.{key}={value}" for key, value in changes.items()]
    return [
        *(sys.executable, "-m", "geotoken_jax", "prepare", f"--config={common.__file__}", f"--workdir={work}"),
        *arguments,
    ]


def begin(arguments: list[str], log: Path) -> subprocess.Popen:
    """Starts a command as the leader of a new process group, with its output appended to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True)


def group(leader: int) -> dict[int, dict[str, int]]:
    """Returns process -> bytes of current memory (VmRSS) and peak memory (VmHWM), for all processes of a group."""
    processes = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                # A zombie process has no memory entries.
                memory = {name: 1024 * int(lines.get(name, "0").split()[0]) for name in ("VmRSS", "VmHWM")}
                processes[int(process.name)] = memory
        except (FileNotFoundError, ProcessLookupError):
            continue
    return processes


def whole(arguments: list[str], work: Path, log: Path) -> dict[str, Any]:
    """Runs a command to its end. Returns the seconds of each phase, the number of shards, and the peak memory in GB.

    `peak_gb` is the peak memory of the largest process. `together_gb` is the peak of the sum over all processes. Raises
    SystemExit with the end of the log if the command fails.
    """
    began, survey_began, largest, total = time.time(), 0.0, 0, 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = begin(arguments, log)
    while process.poll() is None:
        memory = group(process.pid).values()
        largest = max([largest, *(one["VmHWM"] for one in memory)])
        total = max(total, sum(one["VmRSS"] for one in memory))
        survey_began = survey_began or ((work / "photos" / "survey").exists() and time.time())
        time.sleep(_POLL_S)
    if process.returncode:
        raise SystemExit(f"geotoken prepare ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    ended, surveyed = time.time(), (work / "photos" / "survey" / "files.json").stat().st_mtime
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": ended - began,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "start_seconds": survey_began - began,
        "survey_seconds": surveyed - survey_began,
        "shards_seconds": ended - surveyed,
        "shards": _shards(work / "photos"),
        "peak_gb": largest / 1e9,
        "together_gb": total / 1e9,
    }


def kill(arguments: list[str], work: Path, log: Path, kills: int, unbroken: dict[str, Any]) -> list[int]:
    """Starts a command and kills it, `kills` times. Returns the number of shards at each kill, -1 during the survey.

    A quarter of the kills are spread evenly over the survey's time, with a random offset. The others are spread evenly
    over the shards, at a random moment within a shard.
    """
    rng, shards_when_killed = random.Random(0), []
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
        shards_when_killed.append(_shards(folder))
    return shards_when_killed


def _shards(folder: Path) -> int:
    """Returns the number of complete shards; -1 if the survey is not complete."""
    return len(list(folder.glob("ledgers/*.json"))) if (folder / "survey" / "files.json").exists() else -1


def digests(folder: Path) -> dict[str, str]:
    """Returns file -> SHA-256, for all files under a folder."""
    hashes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            hashes[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepares the generated data set, and with --kills a second time with kills. Returns all figures."""
    data, work, log = folder / "data", folder / "work", folder / "log"
    ledger = generate(data, options.photos, options.side)
    parts = [path.stat().st_size for path in data.glob("mp-*")]
    unbroken = whole(command(data, work, options), work, log)
    manifest = json.loads((work / "photos" / "manifest.json").read_text())
    figures = {
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
        figures["shards_when_killed"] = kill(command(data, again, options), again, log, options.kills, unbroken)
        whole(command(data, again, options), again, log)
        figures["identical"] = digests(work) == digests(again)
    return figures


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=16, help="side of a photo, in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--photos_per_shard", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


if __name__ == "__main__":
    main()
