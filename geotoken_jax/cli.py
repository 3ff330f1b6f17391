"""`geotoken`: one verb a stage of the path, and the same verbs for a user's own photos and predictions."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geotoken_jax import processes, settings, workdir
from geotoken_jax.interop import targets
from geotoken_jax.serve import limits
from geotoken_jax.workdir import Manifest

#: Exit status of a run that could not do what was asked, for a reason said in one line.
REFUSED = 2
#: Exit status of training that was asked to end and has saved: start the same command again (sysexits' EX_TEMPFAIL).
PREEMPTED = processes.RESTART


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb; exits with 0, with 2 after one line that says what is wrong, or with 75 to be started again."""
    parser = _parser()
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        config = _config(options, rest)
        if getattr(options, "workdir", None) is not None:
            workdir.local(options.workdir)
        sys.exit(options.run(options, config))
    except _errors(("geotoken_jax.train.loop", "Preempted")) as error:
        print(f"geotoken {options.verb}: {error}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except _refusals() as error:
        print(f"geotoken {options.verb}: {error}", file=sys.stderr)
        processes.leave(REFUSED)
    except KeyboardInterrupt:
        print(f"\ngeotoken {options.verb}: interrupted; the same command goes on from here", file=sys.stderr)
        processes.leave(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="geotoken", description="Tells where on Earth a photo was taken.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (stages, what) in STAGES.items():
        verb = verbs.add_parser(name, help=what, description=what, epilog=_EPILOG)
        verb.add_argument("--config", help="configuration file, such as configs/demo.py")
        verb.add_argument("--workdir", help="folder that holds, or will hold, every stage's result")
        verb.set_defaults(run=_stages(stages))
        if name in ("train", "learn", "predict", "all"):
            verb.add_argument("--variant", action="append", help="only this one of config.variants (may be repeated)")
        if name == "predict":
            verb.add_argument("photos", nargs="*", help="with --model or --method: photos, or folders of photos")
            _model(verb, "--model", "answer for PHOTOS instead with ")
            verb.add_argument("--method", choices=("geoclip",), help="answer for PHOTOS with GeoCLIP as published")
            verb.add_argument("--clip", help="with --method=geoclip: folder of a checkpoint of CLIP ViT-L/14")
            verb.add_argument("--geoclip", help="with --method=geoclip: its wheel (pip download --no-deps geoclip)")
            verb.add_argument("--json", action="store_true", help="with PHOTOS: print JSON lines, with candidates")
            verb.set_defaults(run=_predict)
        if name == "evaluate":
            verb.add_argument("--predictions", action="append", help="score this file (JSON lines or CSV) instead")
            verb.add_argument("--truth", help="with --predictions: file of id, latitude, longitude")
            verb.add_argument(
                "--method", action="append", default=[],
                help="let this baseline answer too (may be repeated): knn, geoclip, classifier",
            )  # fmt: skip
            verb.add_argument(
                "--compare", action="append", nargs=2, default=[], metavar=("A", "B"),
                help="with --predictions: also compare these two files (may be repeated)",
            )  # fmt: skip
            verb.add_argument("--ellipsoid", action="store_true", help="with --predictions: distances on WGS84")
            verb.add_argument("--strict", action="store_true", help="with --predictions: < instead of <=")
            verb.set_defaults(run=_evaluate)
        if name == "export":
            verb.add_argument("--from", dest="source", help="make targets of this export, without a work directory")
            verb.add_argument(
                "--target", action="append", default=[], choices=tuple(targets.TARGETS),
                help="also what this runtime answers with (may be repeated)",
            )  # fmt: skip
            verb.add_argument("--push", metavar="ORG/NAME", help="then bring the folder to the Hugging Face hub")
            verb.set_defaults(run=_export_further)
        if name == "audit":
            verb.add_argument("audit", choices=_AUDITS, help="what to look into")
            verb.set_defaults(run=_audit)
    verb = verbs.add_parser("experiment", help=_EXPERIMENT, description=_EXPERIMENT, epilog=_EPILOG)
    verb.add_argument("experiment", nargs="?", metavar="NAME", help="one of config.experiments")
    verb.add_argument("--config", help="configuration file (default: configs/experiments.py)")
    verb.add_argument("--workdir", help="work directory to start from, such as runs/demo")
    verb.add_argument("--document", action="store_true", help="print docs/experiments.md instead, from what is there")
    verb.set_defaults(run=_experiment)
    verb = verbs.add_parser("scaling", help=_SCALING, description=_SCALING, epilog=_EPILOG)
    verb.add_argument("part", choices=("run", "fit", "plot"), help="train the runs, fit the law, or draw the page")
    verb.add_argument("--config", help="configuration file, such as configs/scaling.py")
    verb.add_argument("--workdir", help="work directory to start from, such as runs/demo")
    verb.add_argument("--index", type=int, help="run: only this one (default: $SLURM_ARRAY_TASK_ID, or all of them)")
    verb.add_argument("--document", action="store_true", help="plot: print docs/scaling.md instead")
    verb.set_defaults(run=_scaling)
    verb = verbs.add_parser("serve", help=_SERVE, description=_SERVE)
    _model(verb, "model", "")
    for field in dataclasses.fields(limits.ServeSettings):
        told = f"{field.metadata['help']} (default: {field.default or 'none'})"
        verb.add_argument(limits.flag(field.name), type=field.type, default=field.default, help=told)
    verb.set_defaults(run=_serve, config=None)
    verb = verbs.add_parser("plan", help=_PLAN, description=_PLAN, epilog=_EPILOG)
    verb.add_argument("--config", help="configuration file, such as configs/common.py")
    verb.add_argument("--topology", help="chips and their shape, such as v5e:16x16, v5p:4x4x4 or h100:8")
    verb.add_argument("--gallery", type=int, help="photos in the gallery (default: the paper's 4,120,000)")
    verb.add_argument("--output", help="write the plan here too, as JSON")
    verb.add_argument("--quick", action="store_true", help="compile in a sixth of the time, into a slower program")
    verb.add_argument("--document", action="store_true", help="print docs/scale.md instead, for all its topologies")
    verb.set_defaults(run=_plan)
    return parser


def _model(verb: argparse.ArgumentParser, name: str, before: str) -> None:
    what = "a folder that `geotoken export` made, or ORG/NAME on the Hugging Face hub"
    verb.add_argument(name, metavar="MODEL", help=before + what)
    verb.add_argument("--revision", help="with ORG/NAME: branch, tag or commit there")
    verb.add_argument("--backbone", help="folder of the checkpoint that MODEL refers to and does not hold")


_EPILOG = "Any key of the configuration is changed by --config.KEY=VALUE, for example --config.train.examples=50000."


def _refusals() -> tuple[type[Exception], ...]:
    """Returns the errors whose message is all that a user needs."""
    return (
        settings.SettingsError,
        workdir.StageError,
        FileNotFoundError,
        *_errors(
            ("geotoken_jax.backbone.preprocess", "ImageError"),
            ("geotoken_jax.predict.exported", "ExportError"),
            ("geotoken_jax.gallery.index", "IndexQualityError"),
            ("geotoken_jax.checkpoint", "CheckpointError"),
            ("geotoken_jax.train.loop", "Diverged"),
            ("geotoken_jax.analysis.evaluate", "PointsError"),
        ),
    )


def _errors(*names: tuple[str, str]) -> tuple[type[Exception], ...]:
    """Returns errors by module and name: a module that was never imported has raised nothing."""
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _config(options: argparse.Namespace, rest: list[str]) -> Any:
    """Returns the configuration with the command line's changes, or None where no --config is given."""
    if options.config is None:
        if rest:
            raise settings.SettingsError(f"{rest[0]} is not understood: see `geotoken {options.verb} --help`")
        return None
    from absl import flags
    from ml_collections import config_flags

    file = Path(options.config.partition(":")[0])  # what follows is get_config's argument
    if not file.exists():
        raise settings.SettingsError(f"--config={file} is not there: the configurations are in configs/")
    # A configuration imports its siblings as `configs.NAME`, wherever the folder is.
    sys.path.insert(0, str(file.resolve().parent.parent))
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    arguments = ["geotoken", f"--config={options.config}", *rest]
    sys_argv, sys.argv = sys.argv, arguments  # config_flags looks for the changes there
    try:
        unread = values(arguments)[1:]
    except (AttributeError, KeyError):
        wrong = next(a for a in rest if not _has(values["config"].value, a.split("=")[0].split(".")[1:]))
        raise settings.SettingsError(f"{wrong} changes a key that {file} does not have") from None
    except flags.Error as error:
        raise settings.SettingsError(" ".join(str(error).split("\n\nTraceback")[0].split())) from None
    finally:
        sys.argv = sys_argv
    if unread:
        raise settings.SettingsError(f"{unread[0]} is not understood: see `geotoken {options.verb} --help`")
    flags.FLAGS.mark_as_parsed()
    config: Any = values["config"].value
    known = {"name", "variants", "experiments", "scaling", *_SECTIONS}
    for key in config:
        if key not in known:
            raise settings.SettingsError(f"config.{key} is not read by anything: use one of {', '.join(sorted(known))}")
    return config


def _has(config: Any, keys: list[str]) -> bool:
    for key in keys:
        if not hasattr(config, "keys") or key not in config:
            return False
        config = config[key]
    return True


_SECTIONS = (
    "photos", "embed", "align", "index", "gallery", "data", "model", "loss", "train", "mesh", "watch", "pools",
    "reward", "verifier", "predict", "judge", "baselines", "evaluate", "audit", "export",
)  # fmt: skip


def _stages(stages: Sequence[Callable]) -> Callable[[argparse.Namespace, Any], int]:
    def run(options: argparse.Namespace, config: Any) -> int:
        if config is None or options.workdir is None:
            raise settings.SettingsError(
                f"give --config=FILE and --workdir=DIR, as in `{_EXAMPLE.format(options.verb)}`"
            )
        _quiet()
        if processes.count() > 1 and options.verb not in _TOGETHER + _APART:
            raise settings.SettingsError(f"`geotoken {options.verb}` is the work of one process: start it alone")
        with contextlib.ExitStack() as stack:
            if options.verb in _TOGETHER:
                stack.enter_context(processes.watched(settings.read(processes.WatchSettings, config.watch, "watch")))
                processes.start()
            for stage in stages:
                stage(config, options.workdir, getattr(options, "variant", None) or list(config.variants))
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


def _report(folder: str, before: Manifest | None, manifest: Manifest) -> None:
    counts = ", ".join(f"{name} {n:,}" if isinstance(n, int) else f"{name} {n}" for name, n in manifest.counts.items())
    dropped = "".join(f"; dropped {n:,}: {reason}" for reason, n in manifest.dropped.items())
    print(f"{'kept' if before == manifest else 'made'} {folder + '/':32} {counts}{dropped}", flush=True)


def _finished(path: str, folder: str) -> Manifest | None:
    try:
        return workdir.read_manifest(path, folder)
    except workdir.StageError:
        return None


def _preparation(module: str, *folders: str) -> Callable:
    """Returns a stage that lives in data_prep: it is found by name, because only a clone has it."""

    def run(config: Any, path: str, variants: Sequence[str]) -> None:
        del variants
        before = {folder: _finished(path, folder) for folder in folders}
        try:
            stage = importlib.import_module(f"data_prep.{module}")
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] == "data_prep":
                raise workdir.StageError(
                    "preparing data needs a clone of the repository: the package has no data_prep"
                ) from None
            raise
        stage.run(config, path)
        for folder in folders:
            if made := _finished(path, folder):
                _report(folder, before[folder], made)
            else:
                print(f"made {folder + '/':32} this process's shards; whoever makes the last completes it", flush=True)

    return run


def _align(config: Any, path: str, variants: Sequence[str]) -> None:
    del variants
    before = _finished(path, "align")
    sections, inputs = ["model", "loss", "init", "train"], ["features"]
    if from_pixels := config.align.pixels.tower != "cached":
        sections, inputs = [*sections, "pixels"], [*inputs, "photos"]
    made_with = {"align": {name: settings.outcome(config.align[name]) for name in sections}}
    if from_pixels:
        made_with["embed"] = {"views": config.embed.views}
    mesh = None if before else make_mesh(config)
    # What cannot be is said before the folder is begun, which would then ask for the same again.
    parts = None if before else aligner(config, path, mesh)
    stage = _begin(path, "align", made_with, inputs)
    if parts:
        task, splits, resident = parts
        after = task.write_tower if from_pixels else None
        _run_loop(stage, task, config.align.train, "align.train", mesh, splits, "align", resident, after)
    _report("align", before, workdir.read_manifest(path, "align"))


def aligner(config: Any, path: str, mesh: Any) -> tuple[Any, list, dict[str, Any]]:
    """Returns alignment's task, its training and validation photos, and the arrays that stay on the mesh."""
    from geotoken_jax import records
    from geotoken_jax.align.heads import AlignSettings
    from geotoken_jax.align.loss import LossSettings
    from geotoken_jax.align.pixels import PixelsSettings
    from geotoken_jax.align.task import AlignTask
    from geotoken_jax.backbone import views
    from geotoken_jax.data.join import Features, Together
    from geotoken_jax.interop import geoclip

    features = workdir.read_manifest(path, "features")
    width = features.facts["width"]
    layout = records.feature_layout(width)
    model = settings.read(AlignSettings, config.align.model, "align.model")
    loss = settings.read(LossSettings, config.align.loss, "align.loss")
    start = geoclip.start(settings.read(geoclip.InitSettings, config.align.init, "align.init"))
    pixels = settings.read(PixelsSettings, config.align.pixels, "align.pixels")

    def read(split: str) -> Features:
        return Features(records.Records(f"{path}/features", split, layout))

    if model.whiten:
        start = _whitened(start, read(views.OF), model.whiten)

    if pixels.tower != "cached":
        return _aligner_from_pixels(config, path, mesh, (model, loss, start, pixels), read)
    splits = [Together([read(split) for split in _trained_on(features)]), read("validation")]
    return AlignTask(model, width, loss, start), splits, {}


def _whitened(start: Callable | None, photos: Any, added: float) -> Callable:
    """Returns what does as `start` does and then fits a new alignment model's whitening to a sample of photos."""
    import numpy as np

    image = photos(np.unique(np.linspace(0, len(photos) - 1, 100_000).astype(int)))["image"]

    def put(model: Any) -> None:
        if start:
            start(model)
        model.whitening.fit(image, added)

    return put


def _aligner_from_pixels(
    config: Any, path: str, mesh: Any, options: tuple[Any, Any, Any, Any], features: Callable
) -> tuple[Any, list, dict[str, Any]]:
    """Returns what `aligner` does, photos in the place of their features. options: PixelsTask's first."""
    from geotoken_jax import backbone, records
    from geotoken_jax.align.pixels import PixelsTask
    from geotoken_jax.backbone import views
    from geotoken_jax.data.pixels import Pixels

    section = {name: config.embed[name] for name in settings.names(backbone.BackboneSettings)}
    chosen = settings.read(backbone.BackboneSettings, section, "embed")
    photos, made = (workdir.read_manifest(path, folder) for folder in ("photos", "features"))
    if {**made.settings["embed"], **settings.plain(backbone.made_with(chosen))} != made.settings["embed"]:
        raise workdir.StageError(
            f"{path}/features was made with another backbone than config.embed has: embed again in another --workdir"
        )
    for split in (views.OF, "validation"):
        if made.counts[split] != photos.counts[split]:
            raise workdir.StageError(
                f"{path}/features has {made.counts[split]:,} of the {photos.counts[split]:,} photos of {split}, and "
                "from pixels every one is read: prepare them again without those that `embed` could not read"
            )
    task = PixelsTask(*options, chosen, mesh)
    others = settings.read(views.ViewsSettings, config.embed.views, "embed.views")
    seed, threads = config.align.train.seed, config.embed.threads

    def read(split: str, others: Any) -> Pixels:
        source = records.Photos(f"{path}/photos", split)
        return Pixels(features(split), source, task.tower, threads, others, seed)

    splits = [read(views.OF, others if config.align.pixels.augment else None), read("validation", None)]
    return task, splits, {"tower": task.tower.parameters}


def _train(config: Any, path: str, variants: Sequence[str]) -> None:
    from geotoken_jax.data.join import check_context

    for variant in variants:
        folder = f"geotoken/{variant}"
        changed = settings.variant(config, variant)
        before = _finished(path, folder)
        features = _finished(path, "features")
        if features and features.facts["width"] != changed.model.backbone_width:
            raise settings.SettingsError(
                f"config.model.backbone_width = {changed.model.backbone_width} is not the width of these features: set "
                f"it to {features.facts['width']}"
            )
        check_context(changed, path)
        made_with = {
            "model": settings.outcome(changed.model),
            "loss": changed.loss,
            "train": settings.outcome(changed.train),
        }
        if changed.data.photos:
            made_with["data"] = changed.data
        stage = _begin(path, folder, made_with, ["tokens", "gallery", "queries"])
        if not stage.manifest:
            mesh = make_mesh(changed)
            task, splits, resident = decoder(changed, path, mesh)
            _run_loop(stage, task, changed.train, "train", mesh, splits, f"train {variant}", resident)
        _report(folder, before, workdir.read_manifest(path, folder))


def decoder(config: Any, path: str, mesh: Any) -> tuple[Any, list, dict[str, Any]]:
    """Returns the decoder's task, its training and validation photos, and the gallery's arrays on the mesh."""
    from geotoken_jax import records
    from geotoken_jax.data.join import DataSettings, Part, Together, Tokens, chosen
    from geotoken_jax.gallery import placement
    from geotoken_jax.gallery.table import Table
    from geotoken_jax.model.geotoken import ModelSettings
    from geotoken_jax.model.task import GeoTokenTask, LossSettings
    from geotoken_jax.predict import sample

    model = settings.read(ModelSettings, config.model, "model")
    where = settings.read(placement.GallerySettings, config.gallery, "gallery")
    tokens = workdir.read_manifest(path, "tokens")
    if tokens.facts["neighbors"] < model.neighbors:
        raise settings.SettingsError(
            f"config.model.neighbors = {model.neighbors} is more than the {tokens.facts['neighbors']} there "
            "are: set config.index.neighbors.count and index again in another --workdir"
        )
    if model.level > records.LEVEL:
        raise settings.SettingsError(
            f"config.model.level = {model.level} is finer than the gallery's cells: use a level up to {records.LEVEL}"
        )
    layout = records.token_layout(tokens.facts["neighbors"])
    gallery = Table(f"{path}/gallery")
    host = None if where.on_device else gallery

    def read(split: str) -> Tokens:
        own = gallery if split == "train" else Table(f"{path}/queries/{split}")
        stored = records.Records(f"{path}/tokens", split, layout)
        return Tokens(stored, own, host, model.cells, model.neighbors, model.times)

    names = _trained_on(tokens)
    train = Together([read(split) for split in names])
    data = settings.read(DataSettings, config.data, "data")
    if data.photos:
        own = [gallery if split == "train" else Table(f"{path}/queries/{split}") for split in names]
        train = Part(train, chosen([table.ids() for table in own], data))
    splits = [train, read("validation")]
    loss = settings.read(LossSettings, config.loss, "loss")
    task = GeoTokenTask(model, loss, placement.lookup(where, mesh), sample.greedy)
    return task, splits, placement.resident(gallery, model.cells, where, mesh)


def _trained_on(manifest: Manifest) -> list[str]:
    """Returns the splits that training reads as one: the photos, and their views where there are any."""
    from geotoken_jax.backbone import views

    return [split for split in (views.OF, views.SPLIT) if split in manifest.counts]


def _begin(path: str, folder: str, made_with: dict, inputs: Sequence[str]) -> workdir.Stage:
    """Opens a folder that several processes fill together: the first one writes what says so."""
    if processes.index():
        processes.wait(f"{folder} has begun")
    stage = workdir.begin(path, folder, made_with, inputs)
    if not processes.index():
        processes.wait(f"{folder} has begun")
    return stage


def make_mesh(config: Any) -> Any:
    """Returns the mesh of config.mesh."""
    from geotoken_jax import sharding

    return sharding.make_mesh(settings.read(sharding.MeshSettings, config.mesh, "mesh"))


def _run_loop(
    stage: workdir.Stage, task: Any, section: Any, where: str, mesh: Any, splits: list, what: str,
    resident: dict[str, Any] | None = None, after: Callable[[Any], None] | None = None,
) -> None:  # fmt: skip
    """Fills a stage's folder by training; the first process does what is left to do in it, and says it is complete."""
    options, result = fit(task, section, where, mesh, splits, stage.path, what, resident)
    if not processes.index():
        if after:
            after(stage.path)
        stage.finish(
            {"steps": options.steps, "examples": options.steps * options.batch_size},
            best_step=result.best_step,
            best_loss=result.best_loss,
            parameters=result.parameters,
        )
    processes.wait(f"{what} has ended")


def fit(
    task: Any, section: Any, where: str, mesh: Any, splits: list, folder: Any, what: str,
    resident: dict[str, Any] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Brings a task, its input and the loop together in a folder; returns the TrainSettings and the loop's Result.

    section: of the settings, `where` in the configuration. splits: training and validation photos.
    """
    from geotoken_jax.data import pipeline
    from geotoken_jax.train import loop

    options = settings.read(loop.TrainSettings, section, where)
    process = (processes.index(), processes.count())
    train, validation = splits
    return options, loop.run(
        task,
        options,
        mesh,
        folder,
        loop.Data(
            pipeline.training(len(train), train, options.batch_size, options.seed, *process),
            lambda: pipeline.evaluation(len(validation), validation, options.batch_size, *process),
            len(train),
            resident or {},
        ),
        what,
    )


def _learn(config: Any, path: str, variants: Sequence[str]) -> None:
    """Trains what chooses among candidates, of each variant whose selectors need it."""
    from geotoken_jax.predict import learn

    for variant in variants:
        changed = settings.variant(config, variant)
        before = {name: _finished(path, f"{name}/{variant}") for name in ("pools", *learn.LEARNED)}

        def train(task: Any, splits: list, where: str, folder: Any, config: Any = changed) -> None:
            section, part = where.split(".")
            fit(task, config[section][part], where, make_mesh(config), splits, folder, where)

        for made in learn.run(config, path, variant, train):
            _report(made.folder, before[made.folder.split("/")[0]], made)


def _predict_all(config: Any, path: str, variants: Sequence[str]) -> None:
    from geotoken_jax.predict import baselines

    _baseline(config, path, baselines.TOP1)
    _predict_variants(config, path, variants)


def _predict_variants(config: Any, path: str, variants: Sequence[str]) -> None:
    from geotoken_jax.predict import stage

    for name in variants:
        before = _finished(path, f"predictions/{name}")
        _report(f"predictions/{name}", before, stage.run(config, path, name))


def _baseline(config: Any, path: str, name: str) -> None:
    """Makes the predictions of one baseline; one that learns is handed the loop."""
    from geotoken_jax.predict import baselines

    def train(task: Any, splits: list, folder: Any) -> None:
        fit(task, config.baselines.train, "baselines.train", make_mesh(config), splits, folder, f"train {name}")

    before = _finished(path, f"predictions/{name}")
    _report(f"predictions/{name}", before, baselines.run(config, path, name, train))


def _evaluate_all(config: Any, path: str, variants: Sequence[str]) -> None:
    del variants
    from geotoken_jax.analysis import evaluate

    before = _finished(path, "report")
    _report("report", before, evaluate.run(config, path))
    print(evaluate.table(json.loads((Path(path) / "report" / "metrics.json").read_text())))
    print(f"open {Path(path) / 'report' / 'index.html'}")


def _export(config: Any, path: str, variants: Sequence[str]) -> None:
    del variants
    from geotoken_jax import export

    before = _finished(path, "export")
    _report("export", before, export.run(config, path, config.evaluate.reference))


def _export_further(options: argparse.Namespace, config: Any) -> int:
    """Makes export/, then each --target in it, and brings it to the hub with --push; a complete one needs no --config,
    and with --from no work directory."""
    further = options.target or options.push
    if options.source is None and (config is not None or not further):
        _stages([_export])(options, config)
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
        return _stages([_predict_all])(options, config)
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
            print(json.dumps({"id": photo, **dataclasses.asdict(answer)}), flush=True)
        else:
            print(
                f"{photo}  {answer.latitude:.5f}, {answer.longitude:.5f}  within {answer.radius_km:,.0f} km", flush=True
            )
    return REFUSED if failed else 0


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
    """Scores files with --predictions, or a work directory without, where each --method answers first."""

    def answer(config: Any, path: str, variants: Sequence[str]) -> None:
        del variants
        for name in options.method:
            _baseline(config, path, name)

    if not options.predictions:
        if options.compare or options.ellipsoid or options.strict:
            raise settings.SettingsError(
                "--compare, --ellipsoid and --strict go with --predictions: for a work directory set "
                "config.evaluate.compare, earth and strict"
            )
        return _stages([answer, _evaluate_all])(options, config)
    if not options.truth:
        raise settings.SettingsError("--predictions needs --truth=FILE, of id, latitude, longitude")
    from geotoken_jax.analysis import evaluate

    chosen = evaluate.EvaluateSettings(
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


#: What is audited -> the module of geotoken_jax.analysis that does it.
_AUDITS = {"coverage": "coverage", "leakage": "leakage", "neighbors": "neighbor_gap", "levels": "per_level"}


def _audit(options: argparse.Namespace, config: Any) -> int:
    """Makes one audit of a work directory, and prints what matters most of it."""

    def run(config: Any, path: str, variants: Sequence[str]) -> None:
        del variants
        audit = importlib.import_module(f"geotoken_jax.analysis.{_AUDITS[options.audit]}")
        folder = f"audit/{options.audit}"
        before = _finished(path, folder)
        _report(folder, before, audit.run(config, path))
        print(audit.table(json.loads((Path(path) / folder / "figures.json").read_text())))
        print(f"open {Path(path) / folder / 'index.html'}")

    options.verb += f" {options.audit}"
    return _stages([run])(options, config)


_EXPERIMENT = "runs that differ in a few settings, compared in one table"


def _experiment(options: argparse.Namespace, config: Any) -> int:
    """Makes one experiment's runs and prints its tables, or prints the page of all that are there."""
    if config is None or options.workdir is None or not (options.experiment or options.document):
        raise settings.SettingsError(
            "give a NAME, --config=FILE and --workdir=DIR, as in "
            "`geotoken experiment beam --config=configs/experiments.py --workdir=runs/demo`"
        )
    _quiet()
    from geotoken_jax.analysis import evaluate, experiment

    if options.document:
        print(experiment.document(config, options.workdir), end="")
        return 0
    stages = {"index": _index, "train": _train, "learn": _learn, "predict": _predict_variants}
    print(evaluate.table(experiment.run(config, options.workdir, options.experiment, stages)))
    return 0


_SCALING = "how loss and accuracy change with size, data, neighbors, gallery and candidates"


def _scaling(options: argparse.Namespace, config: Any) -> int:
    """Trains the runs of config.scaling, one or all; fits the law to those that are there; or draws the page."""
    if config is None or options.workdir is None or "scaling" not in config:
        raise settings.SettingsError(
            "give --config=FILE with a section `scaling` and --workdir=DIR, as in "
            "`geotoken scaling run --config=configs/scaling.py --workdir=runs/demo`"
        )
    _quiet()
    from geotoken_jax.analysis import scaling, scaling_page

    if options.part == "run":
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        index = int(task) if options.index is None and task else options.index
        scaling.run(config, options.workdir, {"train": _train, "predict": _predict_variants}, index)
    elif options.part == "fit":
        print(scaling_page.summary(scaling.fit(config, options.workdir)))
    elif options.document:
        print(scaling_page.document(config, options.workdir), end="")
    else:
        print(f"open {scaling_page.plot(config, options.workdir)}")
    return 0


_SERVE = "answer photos over HTTP with an exported model"


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


_PLAN = "memory, products, collectives and time of a train step on a pod that is not here"


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


_prepare = _preparation("photos", "photos")
_embed = _preparation("embed", "features")
_index = _preparation("index", "queries", "gallery", "neighbors", "tokens")

#: Verb -> the stages it runs, and what it does.
STAGES: dict[str, tuple[list[Callable], str]] = {
    "prepare": ([_prepare], "photos of a source, checked, with their S2 tokens"),
    "embed": ([_embed], "frozen features of every photo and of its place's name"),
    "align": ([_align], "train the heads that bring images, texts and places together"),
    "index": ([_index], "the gallery, its index, every photo's neighbors, and token records"),
    "train": ([_train], "train the decoder, each of config.variants"),
    "learn": ([_learn], "train what chooses among candidates, for the variants whose selectors need it"),
    "predict": ([_predict_all], "candidates and choice for every photo of every split, or for photos of your own"),
    "evaluate": ([_evaluate_all], "score predictions and write report/index.html, or score anybody's files"),
    "audit": ([], "what the gallery covers, what leaks from it, how good train neighbors are, which level goes wrong"),
    "export": ([_export], "a folder that needs nothing else to answer"),
    "all": (
        [_prepare, _embed, _align, _index, _train, _learn, _predict_all, _evaluate_all, _export],
        "every stage in turn; what is complete is kept",
    ),
}


if __name__ == "__main__":
    main()
