"""Runs that differ in a few settings: experiments make each in a work directory of its own, a scaling study in one.

A run's work directory holds links into another for the folders that its settings leave as they are, so that only what
differs is made again, and what was interrupted goes on.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.stages import predict, selectors, train
from geotoken_jax.workdir import Manifest, OtherSettingsError, StageError


def _index(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    del variant
    try:
        index = importlib.import_module("data_prep.index")  # only a clone has it
    except ModuleNotFoundError:
        raise StageError("preparing data needs a clone of the repository: the package has no data_prep") from None
    return index.run(config, workdir)


#: Verb -> its stage.
STAGES: dict[str, Callable[[Config, Workdir, str], list[Manifest]]] = {
    "index": _index,
    "train": train.run,
    "learn": selectors.run,
    "predict": predict.run,
}


def make(config: Config, workdir: Workdir, variant: str, verbs: Iterable[str]) -> None:
    """Runs stages, in the order of the path. For a linked folder that the configuration does not leave as it is,
    another run's is linked that it does; where there is none the folder is made anew."""
    for verb in verbs:
        others: dict[Path, list[Path]] = {}
        while True:
            try:
                STAGES[verb](config, workdir, variant)
                break
            except OtherSettingsError as error:
                linked = Path(error.path)
                if not linked.is_symlink():
                    raise
                _relink(linked, Path(workdir.path), others)
                workdir = Workdir(workdir.path)  # what is open may be of the folder that was linked


def _relink(linked: Path, place: Path, others: dict[Path, list[Path]]) -> None:
    folder = linked.relative_to(place)
    if folder not in others:
        found = sorted(place.parents[1].glob(f"*/*/{folder}/manifest.json"), reverse=True)
        others[folder] = [file.parent for file in found if file.parent != linked]
    linked.unlink()
    if others[folder]:
        linked.symlink_to(others[folder].pop().resolve())
    else:
        # A folder in the place of the link, so that what is interrupted here is not linked again.
        linked.mkdir()


def link(base: Path, place: Path, folders: Sequence[str]) -> None:
    """Links into a run's work directory whatever is complete in another one, and not there yet."""
    for folder in folders:
        found = place / folder
        if (base / folder / "manifest.json").exists() and not found.exists():
            found.parent.mkdir(parents=True, exist_ok=True)
            found.unlink(missing_ok=True)
            found.symlink_to(base / folder)
