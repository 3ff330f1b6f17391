"""Runs the verbs of `geotoken`.

Each verb imports its modules when it runs. So an environment that only converts exports need not have the
packages for training.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geotoken_jax import manifests, settings
from geotoken_jax.export import targets
from geotoken_jax.serve import limits


def run(options: argparse.Namespace, config: Any) -> int:
    """Runs a verb and returns the exit status. config: the Config; None without --config."""
    return _VERBS.get(options.verb, _on_workdir)(options, config)


def _on_workdir(options: argparse.Namespace, config: Any) -> int:
    from geotoken_jax import workdir_commands

    _quiet()
    workdir_commands.VERBS[options.verb](options, config)
    return 0


def _quiet() -> None:
    """Hides absl's info messages, and the info messages and warnings of TensorFlow's C++ code."""
    import logging

    logging.getLogger("absl").setLevel(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _export(options: argparse.Namespace, config: Any) -> int:
    """Makes export/, converts it for each --target, and uploads it to the hub with --push.

    If export/ is complete, --target and --push need no --config. With --from, an existing export is used instead of a
    work directory. With --upgrade, this export is first converted to the present format, in a new folder.
    """
    if options.upgrade is not None and options.source is None:
        raise settings.SettingsError("--upgrade has no export: add --from=EXPORT, an export of an earlier release")
    further = options.target or options.push
    if options.source is None and (config is not None or not further):
        _on_workdir(options, config)
    if options.source is None and options.workdir is None:
        raise settings.SettingsError("--target and --push need an export: add --workdir=DIR or --from=EXPORT")
    if options.source is None:
        manifests.read_manifest(options.workdir, "export")
    elif not further and options.upgrade is None:
        raise settings.SettingsError(
            f"--from needs --upgrade, --push=ORG/NAME or --target={'|'.join(targets.TARGETS)}: add one"
        )
    folder = Path(options.source or Path(options.workdir) / "export")
    if options.upgrade is not None:
        folder = _upgraded(options, folder)
    for name in options.target:
        _quiet()
        print(f"made {targets.make(folder, name)}", flush=True)
    if options.push:
        from geotoken_jax.predict import hub

        print(f"open {hub.push(folder, options.push)}")
    return 0


def _upgraded(options: argparse.Namespace, folder: Path) -> Path:
    """Converts the export in the folder of --from. The result has the present format and is in a new folder.

    Returns the new folder.
    """
    _quiet()
    from geotoken_jax.export import upgrade

    made = upgrade.run(folder, options.upgrade or folder.resolve().with_name(f"{folder.resolve().name}-upgraded"))
    print(f"made {made}", flush=True)
    return Path(made)


def _predict(options: argparse.Namespace, config: Any) -> int:
    """Predicts photos if --model or --method is given, else the splits of a work directory."""
    if options.model is None and options.method is None:
        if options.photos:
            raise settings.SettingsError(
                "no model for the photos: add --model=DIR, a folder that `geotoken export` made, or --method=geoclip "
                "for GeoCLIP as published"
            )
        return _on_workdir(options, config)
    if not options.photos:
        raise settings.SettingsError(
            "no photos to predict: name a photo or a folder, as in `geotoken predict --model=DIR photo.jpg`"
        )
    _quiet()
    from geotoken_jax.folder import exclusion, outputs, photos

    min_within = outputs.MinWithin.read(options.min_within) if options.min_within else None
    form = photos.Form(options.output, options.json, min_within, options.xmp, options.dry_run)
    found = photos.find(options.photos)
    tables = options.exclude_author, options.exclude_ids
    if any(tables) and options.method:
        raise settings.SettingsError(
            "--exclude-author and --exclude-ids need --model=DIR: leave them out, because GeoCLIP as published has no "
            "gallery of photos"
        )
    excluded = exclusion.read(list(found.photos), *tables)
    model = _predictor(options)
    if options.exclude_author and not model.knows_authors:
        raise settings.SettingsError(
            f"--exclude-author needs the authors of the gallery's photos, which {options.model} does not contain: make "
            "the export with --config.export.authors=True"
        )
    named = [name for one in excluded.values() for name in one.ids]
    if options.exclude_ids and (missing := model.missing(named)):
        print(
            f"geotoken predict: {len(missing):,} of {len(set(named)):,} ids in {options.exclude_ids} are not in the "
            f"gallery, such as {missing[0]!r}",
            file=sys.stderr,
        )
    identity = " ".join(filter(None, (photos.identity(model.folder), exclusion.digest(tables))))
    with photos.warnings():
        return photos.run(model, identity, found, form, excluded)


def _predictor(options: argparse.Namespace) -> Any:
    """Returns the predictor: an exported model with --model, or GeoCLIP with --method=geoclip."""
    from geotoken_jax import compiled

    compiled.keep()
    if options.method is None:
        from geotoken_jax.predict.predictor import GeoToken

        return GeoToken.load(options.model, revision=options.revision, backbone=options.backbone)
    if options.model:
        raise settings.SettingsError("--model and --method=geoclip name two models: leave out one of them")
    from geotoken_jax.interop import geoclip

    return geoclip.GeoCLIPPredictor(options.clip, options.geoclip or geoclip.HUB)


def _evaluate(options: argparse.Namespace, config: Any) -> int:
    """Scores the files named by --predictions; if there are none, scores a work directory."""
    if not options.predictions:
        if options.output:
            raise settings.SettingsError(
                "--output needs --predictions=FILE: leave it out; the metrics of a work directory are in its file "
                "report/metrics.json"
            )
        if options.compare or options.ellipsoid or options.strict:
            raise settings.SettingsError(
                "--compare, --ellipsoid and --strict need --predictions=FILE: for a work directory set "
                "config.evaluate.compare, config.evaluate.earth and config.evaluate.strict instead"
            )
        return _on_workdir(options, config)
    if not options.truth:
        raise settings.SettingsError("--predictions needs --truth=FILE: add a file with id, latitude and longitude")
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
    output = Path(options.output) if options.output else None
    if output and output.suffix.lower() not in evaluate.FORMATS:
        raise settings.SettingsError(f"--output={output} has no known ending: use {' or '.join(evaluate.FORMATS)}")
    metrics = evaluate.compare_files(options.predictions, options.truth, chosen)
    print(evaluate.table(metrics))
    if output:
        try:
            output.write_text(evaluate.FORMATS[output.suffix.lower()](metrics), encoding="utf-8")
        except OSError as error:
            raise settings.SettingsError(
                f"--output={output} cannot be written ({error.strerror}): choose a file in a folder that exists and "
                "that you may write to"
            ) from None
        print(f"wrote {output}")
    return 0


def _serve(options: argparse.Namespace, config: Any) -> int:
    """Serves an exported model over HTTP until SIGTERM or SIGINT; returns the exit status."""
    del config
    chosen = limits.ServeSettings(**{name: getattr(options, name) for name in settings.names(limits.ServeSettings)})
    _quiet()
    try:
        from geotoken_jax import compiled
        from geotoken_jax.predict.predictor import GeoToken
        from geotoken_jax.serve import app
    except ModuleNotFoundError as error:
        raise settings.SettingsError(
            f"`geotoken serve` needs {error.name}: install it with pip install 'geotoken-jax[serve]'"
        ) from None
    sockets = chosen.bind()  # first, because loading a model takes seconds
    compiled.keep()
    model = GeoToken.load(options.model, revision=options.revision, backbone=options.backbone)
    return app.run(model, chosen, sockets, model.folder)


def _plan(options: argparse.Namespace, config: Any) -> int:
    """Prints the plan of one topology, or docs/scale.md with --document."""
    if config is None or not (options.topology or options.document):
        raise settings.SettingsError(
            f"{'--config=FILE' if config is None else '--topology=CHIP:SHAPE'} is missing: add it, as in "
            "`geotoken plan --config=configs/common.py --topology=v5e:16x16`"
        )
    from geotoken_jax.plan import planning, text, topology

    rows = options.gallery or planning.GALLERY
    if options.document:
        command = f"geotoken plan --document {'--quick ' * options.quick}--config={options.config}"
        print(text.document(config, command, rows, options.quick), end="")
        return 0
    result = planning.run(config, topology.read(options.topology), options.workload, rows, options.quick)
    print(text.table(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


#: Verb that can run without a work directory -> its function.
_VERBS: dict[str, Callable[[argparse.Namespace, Any], int]] = {
    "predict": _predict,
    "evaluate": _evaluate,
    "export": _export,
    "serve": _serve,
    "plan": _plan,
}
