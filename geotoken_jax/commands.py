"""What each verb of `geotoken` does. The command line imports this once it knows that there is something to do."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from geotoken_jax import processes, settings
from geotoken_jax.analysis import evaluate as scores
from geotoken_jax.artifacts import TOP1, Workdir
from geotoken_jax.backbone.preprocess import ENDINGS, ImageError
from geotoken_jax.configuration import Config, EvaluateSettings
from geotoken_jax.interop import targets
from geotoken_jax.pages import scaling as scaling_page
from geotoken_jax.predict import hub
from geotoken_jax.serve import limits
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


def _stages(stages: Sequence[Stage]) -> Callable[[argparse.Namespace, Config | None], int]:
    """Returns what runs stages one after the other, and prints a line for each folder that they made or kept."""

    def run(options: argparse.Namespace, config: Config | None) -> int:
        if config is None or options.workdir is None:
            raise settings.SettingsError(
                f"give --config=FILE and --workdir=DIR, as in `{_EXAMPLE.format(options.verb)}`"
            )
        _quiet()
        if processes.count() > 1 and options.verb not in _TOGETHER + _APART:
            raise settings.SettingsError(f"`geotoken {options.verb}` is the work of one process: start it alone")
        with contextlib.ExitStack() as stack:
            if options.verb in _TOGETHER:
                stack.enter_context(processes.watched(config.watch))
                processes.start()
            for stage in stages:
                folder = Workdir(options.workdir)
                for manifest in stage(config, folder, getattr(options, "variant", None) or list(config.variants)):
                    _report(manifest, manifest.folder in folder.made)
        return 0

    return run


#: Verbs that several processes run as one, and those that each runs on its share of the shards.
_TOGETHER, _APART = ("align", "train"), ("embed",)
_EXAMPLE = "geotoken {} --config=configs/demo.py --workdir=runs/demo"


def _quiet() -> None:
    """Leaves the warnings of the libraries below, and hides their notes."""
    import logging

    logging.getLogger("absl").setLevel(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


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


def _export(options: argparse.Namespace, config: Config | None) -> int:
    """Makes export/, then each --target in it, and brings it to the hub with --push; a complete one needs no --config,
    and with --from no work directory."""
    further = options.target or options.push
    if options.source is None and (config is not None or not further):
        _stages([_once(export.run)])(options, config)
    if options.source is None and options.workdir is None:
        raise settings.SettingsError("--target and --push need --workdir=DIR, which holds export/, or --from=EXPORT")
    if options.source is None:
        Workdir(options.workdir).manifest("export")
    elif not further:
        raise settings.SettingsError(f"--from goes with --push or --target: add --target={'|'.join(targets.TARGETS)}")
    folder = Path(options.source or Path(options.workdir) / "export")
    for name in options.target:
        _quiet()
        print(f"made {targets.make(folder, name)}", flush=True)
    if options.push:
        print(f"open {hub.push(folder, options.push)}")
    return 0


def _predict(options: argparse.Namespace, config: Config | None) -> int:
    """Answers for photos with --model or --method, or for a work directory's splits without."""
    if options.model is None and options.method is None:
        if options.photos:
            raise settings.SettingsError("photos need a model: add --model=DIR, a folder that `geotoken export` made")
        return _stages([_predict_all])(options, config)
    if not options.photos:
        raise settings.SettingsError("name at least one photo, or a folder of photos")
    _quiet()
    failed = False
    model = _predictor(options)
    for photo in _expand(options.photos):
        try:
            answer = model.predict(photo)
        except ImageError as error:
            print(f"geotoken predict: {error}", file=sys.stderr)
            failed = True
            continue
        if options.json:
            print(json.dumps({"id": photo, **dataclasses.asdict(answer)}), flush=True)
        else:
            print(
                f"{photo}  {answer.latitude:.5f}, {answer.longitude:.5f}  within {answer.radius_km:,.0f} km", flush=True
            )
    return 2 if failed else 0


def _predictor(options: argparse.Namespace) -> Any:
    """Returns the model that answers: an exported one, or GeoCLIP as published."""
    if options.method is None:
        from geotoken_jax.predict.predictor import GeoToken

        return GeoToken.load(options.model, revision=options.revision, backbone=options.backbone)
    if options.model or not (options.clip and options.geoclip):
        raise settings.SettingsError(
            "--method=geoclip answers with --clip=DIR, a checkpoint of CLIP ViT-L/14, and --geoclip=FILE, the wheel "
            "that `pip download --no-deps geoclip` fetches, and without --model"
        )
    from geotoken_jax.interop import geoclip

    return geoclip.Locator(options.clip, options.geoclip)


def _expand(photos: Sequence[str]) -> list[str]:
    """Returns the files named, and the photos in the folders named, in order."""
    found = []
    for photo in photos:
        path = Path(photo)
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        found += [str(p) for p in inside]
    return found


def _evaluate(options: argparse.Namespace, config: Config | None) -> int:
    """Scores files with --predictions, or a work directory without, where each --method answers first."""

    def answer(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
        for name in options.method:
            yield from baselines.run(config, folder, name)

    if not options.predictions:
        if options.compare or options.ellipsoid or options.strict:
            raise settings.SettingsError(
                "--compare, --ellipsoid and --strict go with --predictions: for a work directory set "
                "config.evaluate.compare, earth and strict"
            )
        return _stages([answer, _evaluate_all])(options, config)
    if not options.truth:
        raise settings.SettingsError("--predictions needs --truth=FILE, of id, latitude, longitude")
    chosen = EvaluateSettings(
        resamples=2000,
        seed=0,
        reference=options.predictions[0],
        compare=tuple(map(tuple, options.compare)),
        labels={},
        earth="ellipsoid" if options.ellipsoid else "sphere",
        strict=options.strict,
    )
    print(scores.table(scores.compare_files(options.predictions, options.truth, chosen)))
    return 0


def _audit(options: argparse.Namespace, config: Config | None) -> int:
    """Makes one audit of a work directory, and prints what matters most of it."""

    def run(config: Config, folder: Workdir, variants: Sequence[str]) -> Iterable[Manifest]:
        yield from audit.run(config, folder, options.audit)
        made = folder.path / "audit" / options.audit
        print(audit.TABLES[options.audit](json.loads((made / "figures.json").read_text())))
        print(f"open {made / 'index.html'}")

    options.verb += f" {options.audit}"
    return _stages([run])(options, config)


def _experiment(options: argparse.Namespace, config: Config | None) -> int:
    """Makes one experiment's runs and prints its tables, or prints the page of all that are there."""
    if config is None or options.workdir is None or not (options.experiment or options.document):
        raise settings.SettingsError(
            "give a NAME, --config=FILE and --workdir=DIR, as in "
            "`geotoken experiment beam --config=configs/experiments.py --workdir=runs/demo`"
        )
    _quiet()
    folder = Workdir(options.workdir)
    if options.document:
        print(experiments.document(config, folder), end="")
        return 0
    print(scores.table(experiments.run(config, folder, options.experiment)))
    return 0


def _scaling(options: argparse.Namespace, config: Config | None) -> int:
    """Trains the runs of config.scaling, one or all; fits the law to those that are there; or draws the page."""
    if config is None or options.workdir is None or config.scaling is None:
        raise settings.SettingsError(
            "give --config=FILE with a section `scaling` and --workdir=DIR, as in "
            "`geotoken scaling run --config=configs/scaling.py --workdir=runs/demo`"
        )
    _quiet()
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
    return 0


def _serve(options: argparse.Namespace, config: Config | None) -> int:
    """Serves until it is told to end."""
    del config
    chosen = limits.ServeSettings(**{name: getattr(options, name) for name in settings.names(limits.ServeSettings)})
    _quiet()
    try:
        from geotoken_jax.serve import app, batching
    except ModuleNotFoundError as error:
        raise settings.SettingsError(
            f"`geotoken serve` needs {error.name}: pip install 'geotoken-jax[serve]'"
        ) from None
    folder = hub.located(options.model, options.revision)
    return app.run(batching.ServedGeoToken(folder, options.backbone), chosen, folder)


def _plan(options: argparse.Namespace, config: Config | None) -> int:
    """Plans one topology, or all those of the document."""
    if config is None or not (options.topology or options.document):
        raise settings.SettingsError("give --config=FILE and --topology=CHIP:SHAPE, as in --topology=v5e:16x16")
    from geotoken_jax import plan

    workload = plan.read(config, options.gallery or plan.GALLERY)
    if options.document:
        command = f"geotoken plan --document {'--quick ' * options.quick}--config={options.config}"
        print(plan.document(workload, command, options.quick), end="")
        return 0
    found = plan.run(workload, plan.topology(options.topology), options.quick)
    print(plan.table(found))
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")
    return 0


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
#: Verb -> what it does; returns the exit status.
VERBS: dict[str, Callable[[argparse.Namespace, Config | None], int]] = {
    **{verb: _stages([stage]) for verb, stage in _PATH.items()},
    "all": _stages(list(_PATH.values())),
    "predict": _predict,
    "evaluate": _evaluate,
    "export": _export,
    "audit": _audit,
    "experiment": _experiment,
    "scaling": _scaling,
    "serve": _serve,
    "plan": _plan,
}
