"""What the verbs of `geotoken` do with a work directory: the stages of the path, audits, experiments and studies."""

import argparse
import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Sequence

from geotoken_jax import processes
from geotoken_jax.analysis import evaluate as scores
from geotoken_jax.artifacts import TOP1, Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.pages import scaling as scaling_page
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import (
    align,
    audit,
    baselines,
    evaluate,
    experiments,
    export,
    predict,
    scaling,
    selectors,
    train,
)
from geotoken_jax.workdir import Manifest, StageError

#: Configuration, work directory and variants -> the manifests of the folders that were made, or kept.
Stage = Callable[[Config, Workdir, Sequence[str]], Iterable[Manifest]]


def _stages(stages: Sequence[Stage]) -> Callable[[argparse.Namespace, Config | None], None]:
    """Returns what runs stages one after the other, and prints a line for each folder that they made or kept."""

    def run(options: argparse.Namespace, config: Config | None) -> None:
        if config is None or options.workdir is None:
            raise SettingsError(f"give --config=FILE and --workdir=DIR, as in `{_EXAMPLE.format(options.verb)}`")
        if processes.count() > 1 and options.verb not in _TOGETHER + _APART:
            raise SettingsError(f"`geotoken {options.verb}` is the work of one process: start it alone")
        with contextlib.ExitStack() as stack:
            if options.verb in _TOGETHER:
                stack.enter_context(processes.watched(config.watch))
                processes.start()
            for stage in stages:
                folder = Workdir(options.workdir)
                for manifest in stage(config, folder, getattr(options, "variant", None) or list(config.variants)):
                    _report(manifest, manifest.folder in folder.made)

    return run


#: Verbs that several processes run as one, and those that each runs on its share of the shards.
_TOGETHER, _APART = ("align", "train"), ("embed",)
_EXAMPLE = "geotoken {} --config=configs/demo.py --workdir=runs/demo"


def _report(manifest: Manifest, made: bool) -> None:
    counts = ", ".join(f"{name} {n:,}" if isinstance(n, int) else f"{name} {n}" for name, n in manifest.counts.items())
    dropped = "".join(f"; dropped {n:,}: {reason}" for reason, n in manifest.dropped.items())
    print(f"{'made' if made else 'kept'} {manifest.folder + '/':32} {counts}{dropped}", flush=True)


def _once(run: Callable[[Config, Workdir], list[Manifest]]) -> Stage:
    """Returns a stage that does not depend on the variant."""
    return lambda config, folder, variants: run(config, folder)


def _each(run: Callable[[Config, Workdir, str], list[Manifest]]) -> Stage:
    """Returns a stage that runs for each variant."""
    return lambda config, folder, variants: (made for variant in variants for made in run(config, folder, variant))


def _preparation(module: str) -> Stage:
    """Returns a stage that lives in data_prep: it is found by name, because only a clone has it."""

    def run(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
        try:
            stage = importlib.import_module(f"data_prep.{module}")
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] == "data_prep":
                raise StageError(
                    "preparing data needs a clone of the repository: the package has no data_prep"
                ) from None
            raise
        found = stage.run(config, folder)
        if not found:
            print("made this process's shards; whoever makes the last completes the folder", flush=True)
        return found

    return run


def _predict_all(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
    yield from baselines.run(config, folder, TOP1)
    for variant in variants:
        yield from predict.run(config, folder, variant)


def _evaluate_all(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
    yield from evaluate.run(config, folder)
    print(scores.table(folder.metrics()))
    print(f"open {folder.path / 'report' / 'index.html'}")


def _evaluate(options: argparse.Namespace, config: Config | None) -> None:
    """Scores a work directory, where each --method answers first."""

    def answer(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
        for name in options.method:
            yield from baselines.run(config, folder, name)

    _stages([answer, _evaluate_all])(options, config)


def _audit(options: argparse.Namespace, config: Config | None) -> None:
    """Makes one audit of a work directory, and prints what matters most of it."""

    def run(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
        yield from audit.run(config, folder, options.audit)
        made = folder.path / "audit" / options.audit
        print(audit.TABLES[options.audit](json.loads((made / "figures.json").read_text())))
        print(f"open {made / 'index.html'}")

    options.verb += f" {options.audit}"
    _stages([run])(options, config)


def _experiment(options: argparse.Namespace, config: Config | None) -> None:
    """Makes one experiment's runs and prints its tables, or prints the page of all that are there."""
    if config is None or options.workdir is None or not (options.experiment or options.document):
        raise SettingsError(
            "give a NAME, --config=FILE and --workdir=DIR, as in "
            "`geotoken experiment beam --config=configs/experiments.py --workdir=runs/demo`"
        )
    folder = Workdir(options.workdir)
    if options.document:
        print(experiments.document(config, folder), end="")
        return
    print(scores.table(experiments.run(config, folder, options.experiment)))


def _scaling(options: argparse.Namespace, config: Config | None) -> None:
    """Trains the runs of config.scaling, one or all; fits the law to those that are there; or draws the page."""
    if config is None or options.workdir is None or config.scaling is None:
        raise SettingsError(
            "give --config=FILE with a section `scaling` and --workdir=DIR, as in "
            "`geotoken scaling run --config=configs/scaling.py --workdir=runs/demo`"
        )
    folder = Workdir(options.workdir)
    if options.part == "run":
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        scaling.run(config, folder, int(task) if options.index is None and task else options.index)
    elif options.part == "fit":
        print(scaling_page.summary(scaling.fit(config, folder)))
    elif options.document:
        print(scaling_page.document(config, folder), end="")
    else:
        print(f"open {scaling_page.plot(config, folder)}")


#: The path, in its order: verb -> what it runs for a work directory.
_PATH: dict[str, Stage] = {
    "prepare": _preparation("photos"),
    "embed": _preparation("embed"),
    "align": _once(align.run),
    "index": _preparation("index"),
    "train": _each(train.run),
    "learn": _each(selectors.run),
    "predict": _predict_all,
    "evaluate": _evaluate_all,
    "export": _once(export.run),
}
#: Verb -> what it does with a work directory.
VERBS: dict[str, Callable[[argparse.Namespace, Config | None], None]] = {
    **{verb: _stages([stage]) for verb, stage in _PATH.items()},
    "all": _stages(list(_PATH.values())),
    "evaluate": _evaluate,
    "audit": _audit,
    "experiment": _experiment,
    "scaling": _scaling,
}
