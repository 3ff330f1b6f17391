"""Runs the stages of experiments and scaling studies, whose runs differ in a few settings.

The runs of a scaling study share one work directory. Each run of an experiment has its own, in which folders that do
not depend on the run's changed settings are links into another work directory, so only the other folders are made.
"""

import glob
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest, OtherSettingsError
from geotoken_jax.stages import predict, preparation, selectors, train
from geotoken_jax.workdir import Workdir


def _index(config: Config, workdir: Workdir, variant: str) -> list[Manifest]:
    del variant
    return preparation.run("index", config, workdir)


#: CLI verb -> stage function.
STAGES: dict[str, Callable[[Config, Workdir, str], list[Manifest]]] = {
    "index": _index,
    "train": train.run,
    "learn": selectors.run,
    "predict": predict.run,
}


def make(config: Config, workdir: Workdir, variant: str, verbs: Iterable[str]) -> None:
    """Runs the stages in `verbs` for one run, in this order.

    If a linked folder was made with other settings, it is replaced by a link to the same folder of another run with the
    right settings, or made anew if no run has one.
    """
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
                workdir = Workdir(workdir.path)  # the old object caches data of the replaced folder


def _relink(linked: Path, root: Path, others: dict[Path, list[Path]]) -> None:
    folder = linked.relative_to(root)
    if folder not in others:
        manifests = sorted(root.parents[1].glob(f"*/*/{glob.escape(str(folder))}/manifest.json"), reverse=True)
        others[folder] = [file.parent for file in manifests if file.parent != linked]
    linked.unlink()
    if others[folder]:
        linked.symlink_to(others[folder].pop().resolve())
    else:
        # An existing folder keeps `link` from linking the base folder again after an interruption.
        linked.mkdir()


def link(base: Path, place: Path, folders: Sequence[str]) -> None:
    """Links folders into a run's work directory if they are complete in the base and the run does not have them.

    base: work directory that the links point to. place: the run's work directory.
    """
    for folder in folders:
        target = place / folder
        if (base / folder / "manifest.json").exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(base / folder)
