"""Runs the verbs of `geotoken` that need a work directory: stages, audits, experiments and scaling studies."""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from geotoken_jax import jax_modes, manifests, processes, verification
from geotoken_jax.analysis import evaluate as scores
from geotoken_jax.configuration import Config
from geotoken_jax.manifests import Manifest
from geotoken_jax.pages import coordinate_check as coordinate_check_page
from geotoken_jax.pages import scaling as scaling_page
from geotoken_jax.plan import study, topology
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import (
    align,
    audit,
    baselines,
    check,
    coordinate_check,
    evaluate,
    exclusion,
    experiments,
    export,
    judge,
    predict,
    preparation,
    scaling,
    selectors,
    train,
)
from geotoken_jax.workdir import TOP1, Workdir

#: A function that runs a stage. Its arguments are the configuration, the work directory and the names of the variants.
#: It returns the manifests of the stage's folders, which the stage has made, or kept because they were complete.
Stage = Callable[[Config, Workdir, Sequence[str]], Iterable[Manifest]]


def _verb(stages: Mapping[str, Stage]) -> Callable[[argparse.Namespace, Config | None], None]:
    """Returns the function of a verb that runs some stages in order. stages: name -> stage.

    The function prints a line per folder that was made or kept. If there are several stages, it also prints the number
    and the name of each stage before the stage starts.
    """

    def run(options: argparse.Namespace, config: Config | None) -> None:
        if config is None or options.workdir is None:
            raise SettingsError(
                f"{'--config=FILE' if config is None else '--workdir=DIR'} is missing: add it, as in "
                f"`{_EXAMPLE.format(options.verb)}`"
            )
        if options.verb not in _DISTRIBUTED + _SHARDED:
            _check_single_process(options.verb)
        if getattr(options, "remake", None):
            for folder in Workdir(options.workdir).remove_made_by(options.remake):
                print(f"removing {folder}/", flush=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax_modes.standard())
            if options.verb in _DISTRIBUTED:
                stack.enter_context(_connected(config))
            for number, (name, stage) in enumerate(stages.items(), 1):
                if len(stages) > 1:
                    print(f"stage {number} of {len(stages)}: {name}", flush=True)
                update = getattr(options, "update", False)
                folder = Workdir(options.workdir, update)
                if update and name not in manifests.UPDATED:
                    for outdated in folder.remove_outdated(name):
                        print(f"removing {outdated}/, which was made before photos were added", flush=True)
                for manifest in stage(config, folder, getattr(options, "variant", None) or list(config.variants)):
                    _print_folder(manifest, manifest.folder in folder.made)

    return run


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[None]:
    """Connects this process to the other processes of its job, if there are any, and watches its progress."""
    with processes.watched(config.watch):
        processes.start()
        yield


def _check_single_process(command: str) -> None:
    if processes.count() > 1:
        raise SettingsError(
            f"`geotoken {command}` runs in one process only: start it once, without JAX_COORDINATOR_ADDRESS"
        )


#: Verbs that may be started in several processes. The processes of a verb in _DISTRIBUTED are connected. Those in
#: _SHARDED are not: each process makes shards of its own.
_DISTRIBUTED, _SHARDED = ("align", "train"), ("embed", "index")
_EXAMPLE = "geotoken {} --config=configs/demo.py --workdir=runs/demo"


def _print_folder(manifest: Manifest, made: bool) -> None:
    counts = ", ".join(f"{name} {n:,}" if isinstance(n, int) else f"{name} {n}" for name, n in manifest.counts.items())
    dropped = "".join(f"; dropped {n:,}: {reason}" for reason, n in manifest.dropped.items())
    print(f"{'made' if made else 'kept'} {manifest.folder + '/':32} {counts}{dropped}", flush=True)


def _once(run: Callable[[Config, Workdir], list[Manifest]]) -> Stage:
    """Returns a stage that runs once for all variants."""
    return lambda config, folder, variants: run(config, folder)


def _each(run: Callable[[Config, Workdir, str], list[Manifest]]) -> Stage:
    """Returns a stage that runs once per variant."""
    return lambda config, folder, variants: (made for variant in variants for made in run(config, folder, variant))


def _preparation(module: str) -> Stage:
    """Returns a stage of data preparation. module: name of its module in data_prep."""

    return lambda config, folder, variants: preparation.run(module, config, folder)


def _baseline(config: Config, folder: Workdir, name: str) -> Iterable[Manifest]:
    yield from baselines.run(config, folder, name)
    yield from baselines.run_excluded(config, folder, name)


def _predict_all(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
    yield from exclusion.run(config, folder)
    yield from _baseline(config, folder, TOP1)
    for variant in variants:
        yield from predict.run(config, folder, variant)
        yield from predict.run_excluded(config, folder, variant)
        yield from judge.run(config, folder, variant)


def _evaluate_all(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
    yield from evaluate.run(config, folder)
    print(scores.table(folder.metrics()))
    print(f"open {folder.path / 'report' / 'index.html'}")


def _evaluate(options: argparse.Namespace, config: Config | None) -> None:
    """Scores a work directory, after each baseline named by --method has made its predictions."""

    def answer(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
        for name in options.method:
            yield from _baseline(config, folder, name)

    _verb({"baselines": answer, "evaluate": _evaluate_all} if options.method else {"evaluate": _evaluate_all})(
        options, config
    )


def _audit(options: argparse.Namespace, config: Config | None) -> None:
    """Makes one audit of a work directory, and prints its table."""

    def run(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
        yield from audit.run(config, folder, options.audit)
        made = folder.path / "audit" / options.audit
        print(audit.TABLES[options.audit](json.loads((made / "figures.json").read_text())))
        print(f"open {made / 'index.html'}")

    options.verb += f" {options.audit}"
    _verb({options.verb: run})(options, config)


def _verify(options: argparse.Namespace, config: Config | None) -> None:
    """Compares all files of a work directory with their checksums. With --mend, makes bad files again.

    Raises StageError if there are bad files, or if there still are after --mend.
    """
    folder = Workdir(options.workdir)
    if not folder.path.is_dir():
        raise SettingsError(f"there is no work directory {folder.path}: correct the path")
    bad = [report for report in map(_print_report, verification.check(folder)) if report.bad]
    if options.mend and bad:
        if config is None:
            raise SettingsError(
                "--config=FILE is missing: --mend needs the configuration that the work directory was made with"
            )
        for verb in verification.MENDED:
            reports = [report for report in bad if report.verb == verb]
            for report in reports:
                manifests.reopen(folder.path, report.folder, report.bad.keys())
            if any(report.complete for report in reports):
                _verb({verb: _STAGES[verb]})(argparse.Namespace(verb=verb, workdir=options.workdir), config)
                bad = [report for report in bad if report not in reports]
                again = [_print_report(verification.check_folder(folder, report.folder)) for report in reports]
                bad += [report for report in again if report.bad]
    if bad:
        raise verification.refusal(folder, bad)


def _print_report(report: verification.Report) -> verification.Report:
    print(*report.lines(), sep="\n", flush=True)
    return report


@jax_modes.standard()
def _experiment(options: argparse.Namespace, config: Config | None) -> None:
    """Makes an experiment's runs and prints its table; with --document, prints docs/experiments.md."""
    if config is None or options.workdir is None or not (options.experiment or options.document):
        missing = "--config=FILE" if config is None else "--workdir=DIR" if options.workdir is None else "NAME"
        raise SettingsError(
            f"{missing} is missing: add it, as in "
            "`geotoken experiment beam --config=configs/experiments.py --workdir=runs/demo`"
        )
    _check_single_process("experiment")
    folder = Workdir(options.workdir)
    if options.document:
        print(experiments.document(config, folder), end="")
        return
    print(scores.table(experiments.run(config, folder, options.experiment)))
    print(f"open {folder.path / 'experiments' / options.experiment / 'index.html'}")


@jax_modes.standard()
def _scaling(options: argparse.Namespace, config: Config | None) -> None:
    """Prints the cost of config.scaling, trains its runs, fits the laws to finished runs, or plots the results."""
    if options.part == "plan" and config is not None and config.scaling is not None:
        _plan_study(options, config)
        return
    if config is None or options.workdir is None or config.scaling is None:
        missing = "--workdir=DIR" if config and config.scaling else "--config=FILE with a section `scaling`"
        raise SettingsError(
            f"{missing} is missing: add it, as in "
            "`geotoken scaling run --config=configs/scaling.py --workdir=runs/demo`"
        )
    folder = Workdir(options.workdir)
    if options.part == "run":
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        with _connected(config):
            scaling.run(config, folder, int(task) if options.index is None and task else options.index)
        return
    _check_single_process(f"scaling {options.part}")
    if options.part == "check":
        print(coordinate_check_page.table(coordinate_check.run(config, folder)))
        return
    if options.part == "fit":
        print(scaling_page.summary(scaling.fit(config, folder)))
    elif options.document:
        print(scaling_page.document(config, folder), end="")
    else:
        print(f"open {scaling_page.plot(config, folder)}")


def _plan_study(options: argparse.Namespace, config: Config) -> None:
    """Prints the cost of every run of config.scaling."""
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise SettingsError(f"--mfu is {options.mfu}: use a share of the peak rate above 0, up to 1")
    mfu = options.mfu or study.MFU
    # The largest pod comes first, because JAX cannot add CPU devices, which stand for chips, after the first plan.
    pods = sorted(map(topology.read, options.topology), key=lambda pod: -pod.size)
    if options.document:
        names = "".join(f" --topology={pod.name}" for pod in pods)
        compiled = " --compile" if options.compile else f" --mfu={mfu}"
        command = f"geotoken scaling plan --document --config={options.config}{names}{compiled}"
        print(study.document(config, pods, command, mfu, options.compile), end="")
        return
    for pod in pods or [None]:
        plan = study.costs(config, pod, mfu, options.compile)
        print(study.table(plan, pod))
    print(f"\n{study.commands(plan, options.config)}", end="")


#: Verb -> its stage, in the order in which `geotoken all` runs them.
_STAGES: dict[str, Stage] = {
    "prepare": _preparation("photos"),
    "check": _once(check.run),
    "embed": _preparation("embed"),
    "align": _once(align.run),
    "index": _preparation("index"),
    "train": _each(train.run),
    "learn": _each(selectors.run),
    "predict": _predict_all,
    "evaluate": _evaluate_all,
    "export": _once(export.run),
}
#: Verb that needs a work directory -> its function.
VERBS: dict[str, Callable[[argparse.Namespace, Config | None], None]] = {
    **{verb: _verb({verb: stage}) for verb, stage in _STAGES.items()},
    "all": _verb(_STAGES),
    "evaluate": _evaluate,
    "audit": _audit,
    "experiment": _experiment,
    "scaling": _scaling,
    "verify": _verify,
}
