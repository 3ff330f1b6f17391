"""`geotoken`: one verb a stage of the path, and the same verbs for a user's own photos and predictions."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geotoken_jax import commands, processes, settings, workdir
from geotoken_jax.interop import targets
from geotoken_jax.serve import limits

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
        sys.exit(commands.run(options, config))
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
    for name, what in STAGES.items():
        verb = verbs.add_parser(name, help=what, description=what, epilog=_EPILOG)
        verb.add_argument("--config", help="configuration file, such as configs/demo.py")
        verb.add_argument("--workdir", help="folder that holds, or will hold, every stage's result")
        if name in ("train", "learn", "predict", "all"):
            verb.add_argument("--variant", action="append", help="only this one of config.variants (may be repeated)")
        if name in _OPTIONS:
            _OPTIONS[name](verb)
    _add_studies(verbs)
    verb = verbs.add_parser("serve", help=_SERVE, description=_SERVE)
    _model(verb, "model", "")
    for field in dataclasses.fields(limits.ServeSettings):
        told = f"{field.metadata['help']} (default: {field.default or 'none'})"
        verb.add_argument(limits.flag(field.name), type=field.type, default=field.default, help=told)
    verb.set_defaults(config=None)
    verb = verbs.add_parser("plan", help=_PLAN, description=_PLAN, epilog=_EPILOG)
    verb.add_argument("--config", help="configuration file, such as configs/common.py")
    verb.add_argument("--topology", help="chips and their shape, such as v5e:16x16, v5p:4x4x4 or h100:8")
    verb.add_argument("--gallery", type=int, help="photos in the gallery (default: the paper's 4,120,000)")
    verb.add_argument("--output", help="write the plan here too, as JSON")
    verb.add_argument("--quick", action="store_true", help="compile in a sixth of the time, into a slower program")
    verb.add_argument("--document", action="store_true", help="print docs/scale.md instead, for all its topologies")
    return parser


def _add_studies(verbs: Any) -> None:
    verb = verbs.add_parser("experiment", help=_EXPERIMENT, description=_EXPERIMENT, epilog=_EPILOG)
    verb.add_argument("experiment", nargs="?", metavar="NAME", help="one of config.experiments")
    verb.add_argument("--config", help="configuration file (default: configs/experiments.py)")
    verb.add_argument("--workdir", help="work directory to start from, such as runs/demo")
    verb.add_argument("--document", action="store_true", help="print docs/experiments.md instead, from what is there")
    verb = verbs.add_parser("scaling", help=_SCALING, description=_SCALING, epilog=_EPILOG)
    verb.add_argument("part", choices=("run", "fit", "plot"), help="train the runs, fit the law, or draw the page")
    verb.add_argument("--config", help="configuration file, such as configs/scaling.py")
    verb.add_argument("--workdir", help="work directory to start from, such as runs/demo")
    verb.add_argument("--index", type=int, help="run: only this one (default: $SLURM_ARRAY_TASK_ID, or all of them)")
    verb.add_argument("--document", action="store_true", help="plot: print docs/scaling.md instead")


def _predict_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("photos", nargs="*", help="with --model or --method: photos, or folders of photos")
    _model(verb, "--model", "answer for PHOTOS instead with ")
    verb.add_argument("--method", choices=("geoclip",), help="answer for PHOTOS with GeoCLIP as published")
    verb.add_argument("--clip", help="with --method=geoclip: folder of a checkpoint of CLIP ViT-L/14")
    verb.add_argument("--geoclip", help="with --method=geoclip: its wheel (pip download --no-deps geoclip)")
    verb.add_argument("--json", action="store_true", help="with PHOTOS: print JSON lines, with candidates")


def _evaluate_options(verb: argparse.ArgumentParser) -> None:
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


def _export_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--from", dest="source", help="make targets of this export, without a work directory")
    verb.add_argument(
        "--target", action="append", default=[], choices=tuple(targets.TARGETS),
        help="also what this runtime answers with (may be repeated)",
    )  # fmt: skip
    verb.add_argument("--push", metavar="ORG/NAME", help="then bring the folder to the Hugging Face hub")


def _audit_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("audit", choices=("coverage", "leakage", "neighbors", "levels"), help="what to look into")


#: Verb of a stage -> what adds its own options.
_OPTIONS = {
    "predict": _predict_options,
    "evaluate": _evaluate_options,
    "export": _export_options,
    "audit": _audit_options,
}


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
            ("geotoken_jax.predict.bundle", "ExportError"),
            ("geotoken_jax.gallery.index", "IndexQualityError"),
            ("geotoken_jax.checkpoint", "CheckpointError"),
            ("geotoken_jax.train.loop", "Diverged"),
            ("geotoken_jax.analysis.coordinates", "TableError"),
        ),
    )


def _errors(*names: tuple[str, str]) -> tuple[type[Exception], ...]:
    """Returns errors by module and name: a module that was never imported has raised nothing."""
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _config(options: argparse.Namespace, rest: list[str]) -> Any:
    """Returns the Config with the command line's changes, or None where no --config is given."""
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
    from geotoken_jax import configuration

    return configuration.read(values["config"].value)  # pyright: ignore[reportArgumentType]


def _has(config: Any, keys: list[str]) -> bool:
    for key in keys:
        if not hasattr(config, "keys") or key not in config:
            return False
        config = config[key]
    return True


_EXPERIMENT = "runs that differ in a few settings, compared in one table"
_SCALING = "how loss and accuracy change with size, data, neighbors, gallery and candidates"
_SERVE = "answer photos over HTTP with an exported model"
_PLAN = "memory, products, collectives and time of a train step on a pod that is not here"
#: Verb of a stage -> what it does.
STAGES = {
    "prepare": "photos of a source, checked, with their S2 tokens",
    "embed": "frozen features of every photo and of its place's name",
    "align": "train the heads that bring images, texts and places together",
    "index": "the gallery, its index, every photo's neighbors, and token records",
    "train": "train the decoder, each of config.variants",
    "learn": "train what chooses among candidates, for the variants whose selectors need it",
    "predict": "candidates and choice for every photo of every split, or for photos of your own",
    "evaluate": "score predictions and write report/index.html, or score anybody's files",
    "audit": "what the gallery covers, what leaks from it, how good train neighbors are, which level goes wrong",
    "export": "a folder that needs nothing else to answer",
    "all": "every stage in turn; what is complete is kept",
}


if __name__ == "__main__":
    main()
