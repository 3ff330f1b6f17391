"""Measures `geotoken predict FOLDER` on a generated album, against `model.predict(list)`. Prints one JSON line.

The album has 1,000 photos in all formats, and 60 files that are broken or no photos (benchmarks/album.py). Both rates
include compilation, but not the loading of the model. `memory_mb` is the resident memory of the command after each
tenth of the photos.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import album

_LIST = """
import json, sys, time
from geotoken_jax.predict.predictor import GeoToken
photos = json.load(sys.stdin)
model = GeoToken(sys.argv[1])
start = time.perf_counter()
answers = model.predict(photos, on_error="return")
print(time.perf_counter() - start)
"""


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/export", help="folder of an export")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--others", type=int, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 1200))
    parser.add_argument("--folder", help="where the album is made, or is from an earlier run; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        root = Path(options.folder or work / "album")
        ledger = album.make(root, options.photos, options.others, (options.size[0], options.size[1]))
        result = _whole(options.model, root, work, ledger)
        paths = [str(root / name) for name in sorted(ledger.answered | ledger.refused)]
        command = [sys.executable, "-c", _LIST, options.model]
        done = subprocess.run(command, input=json.dumps(paths), capture_output=True, text=True, check=True)
        result["list_photos_per_s"] = round(len(paths) / float(done.stdout), 2)
        result["share_of_list"] = round(result["photos_per_s"] / result["list_photos_per_s"], 3)
    print(json.dumps(result))


def _command(model: str, root: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "geotoken_jax", "predict", f"--model={model}", str(root), f"--output={output}"]


def _whole(model: str, root: Path, work: Path, ledger: album.Ledger) -> dict[str, Any]:
    """Predicts the album once. Returns rate, memory, exit status, and whether all files were treated as expected."""
    output, memory = work / "answers.csv", {}
    partial, begun = work / "answers.csv.partial", time.perf_counter()
    with (work / "log").open("w") as log:
        process = subprocess.Popen(_command(model, root, output), stderr=log)
        step = max(1, len(ledger.answered) // 10)
        while process.poll() is None:
            answered = partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0
            if answered // step > len(memory):
                memory[answered] = _resident_mb(process.pid)
            time.sleep(0.05)
    said = (work / "log").read_text()
    if not output.exists():
        raise RuntimeError(f"the command failed: {said}")
    with output.open(encoding="utf-8") as file:
        ids = {row["id"] for row in csv.DictReader(file)}
    seconds = float(re.search(r"predict: [\d,]+ photos in (\d+) s", said)[1])  # pyright: ignore[reportOptionalSubscript]
    photos = len(ledger.answered | ledger.refused)
    left_out = sum(ledger.left_out.values())
    return {
        "photos": photos,
        "exit_status": process.returncode,
        "answered": len(ids),
        "as_in_ledger": ids == ledger.answered
        and all(str(root / name) in said for name in ledger.refused)
        and f"left out {left_out:,} files" in said,
        "refused": len(ledger.refused),
        "left_out": left_out,
        "clutter": ledger.clutter,
        "seconds_with_start": round(time.perf_counter() - begun, 1),
        "photos_per_s": round(photos / seconds, 2),
        "memory_mb": memory,
    }


def _resident_mb(process: int) -> int:
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) // 1024 if found else 0


if __name__ == "__main__":
    main()
