"""What each verb of `geotoken` does. A verb imports what it needs itself: an environment that converts an export lacks
most of what training needs."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geotoken_jax import settings, workdir
from geotoken_jax.interop import targets
from geotoken_jax.serve import limits


def run(options: argparse.Namespace, config: Any) -> int:
    """Runs a verb; returns the exit status. config: a Config, None without --config."""
    return _VERBS.get(options.verb, _on_workdir)(options, config)


def _on_workdir(options: argparse.Namespace, config: Any) -> int:
    from geotoken_jax import workdir_commands

    _quiet()
    workdir_commands.VERBS[options.verb](options, config)
    return 0


def _quiet() -> None:
    """Leaves the warnings of the libraries below, and hides their notes."""
    import logging

    logging.getLogger("absl").setLevel(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _export(options: argparse.Namespace, config: Any) -> int:
    """Makes export/, then each --target in it, and brings it to the hub with --push; a complete one needs no --config,
    and with --from no work directory."""
    further = options.target or options.push
    if options.source is None and (config is not None or not further):
        _on_workdir(options, config)
    if options.source is None and options.workdir is None:
        raise settings.SettingsError("--target and --push need --workdir=DIR, which holds export/, or --from=EXPORT")
    if options.source is None:
        workdir.read_manifest(options.workdir, "export")
    elif not further:
        raise settings.SettingsError(f"--from goes with --push or --target: add --target={'|'.join(targets.TARGETS)}")
    folder = Path(options.source or Path(options.workdir) / "export")
    for name in options.target:
        _quiet()
        print(f"made {targets.make(folder, name)}", flush=True)
    if options.push:
        from geotoken_jax.predict import hub

        print(f"open {hub.push(folder, options.push)}")
    return 0


def _predict(options: argparse.Namespace, config: Any) -> int:
    """Answers for photos with --model or --method, or for a work directory's splits without."""
    if options.model is None and options.method is None:
        if options.photos:
            raise settings.SettingsError("photos need a model: add --model=DIR, a folder that `geotoken export` made")
        return _on_workdir(options, config)
    from geotoken_jax.backbone.preprocess import ImageError

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
            print(json.dumps({"id": photo, **answer.plain()}), flush=True)
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
    from geotoken_jax.backbone.preprocess import ENDINGS

    found = []
    for photo in photos:
        path = Path(photo)
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        found += [str(p) for p in inside]
    return found


def _evaluate(options: argparse.Namespace, config: Any) -> int:
    """Scores files with --predictions, or a work directory without."""
    if not options.predictions:
        if options.compare or options.ellipsoid or options.strict:
            raise settings.SettingsError(
                "--compare, --ellipsoid and --strict go with --predictions: for a work directory set "
                "config.evaluate.compare, earth and strict"
            )
        return _on_workdir(options, config)
    if not options.truth:
        raise settings.SettingsError("--predictions needs --truth=FILE, of id, latitude, longitude")
    from geotoken_jax.analysis import evaluate
    from geotoken_jax.configuration import EvaluateSettings

    chosen = EvaluateSettings(
        resamples=2000,
        seed=0,
        reference=options.predictions[0],
        compare=tuple(map(tuple, options.compare)),
        labels={},
        earth="ellipsoid" if options.ellipsoid else "sphere",
        strict=options.strict,
    )
    print(evaluate.table(evaluate.compare_files(options.predictions, options.truth, chosen)))
    return 0


def _serve(options: argparse.Namespace, config: Any) -> int:
    """Serves until it is told to end."""
    del config
    chosen = limits.ServeSettings(**{name: getattr(options, name) for name in settings.names(limits.ServeSettings)})
    _quiet()
    try:
        from geotoken_jax.predict import hub
        from geotoken_jax.serve import app, batching
    except ModuleNotFoundError as error:
        raise settings.SettingsError(
            f"`geotoken serve` needs {error.name}: pip install 'geotoken-jax[serve]'"
        ) from None
    folder = hub.located(options.model, options.revision)
    return app.run(batching.ServedGeoToken(folder, options.backbone), chosen, folder)


def _plan(options: argparse.Namespace, config: Any) -> int:
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


#: Verbs that do not need a work directory -> what each does.
_VERBS: dict[str, Callable[[argparse.Namespace, Any], int]] = {
    "predict": _predict,
    "evaluate": _evaluate,
    "export": _export,
    "serve": _serve,
    "plan": _plan,
}
