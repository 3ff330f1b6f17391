"""The figures of the documentation are drawn from a work directory, the same bytes each time, and are small."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ("cells", "neighbors", "memory", "decoding", "choosing", "uncertainty")
EXPERIMENTS = ("published_form",)


def draw(workdir: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "docs/figures.py", f"--workdir={workdir}", f"--out={out}", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)


def check(folder: Path, *figures: str) -> None:
    assert {path.name for path in folder.iterdir()} == {
        f"{f}_{theme}.webp" for f in figures for theme in ("light", "dark")
    }
    assert max(path.stat().st_size for path in folder.iterdir()) < 120_000
    assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000


def test_every_figure_is_drawn_for_both_themes(tiny: Path, tmp_path: Path):
    draw(tiny, tmp_path / "all")
    check(tmp_path / "all", *FIGURES)
    draw(tiny, tmp_path / "again", "--only=cells")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "all" / path.name).read_bytes(), path.name


def test_the_committed_figures_are_those():
    check(ROOT / "docs/figures", *FIGURES, *EXPERIMENTS)
