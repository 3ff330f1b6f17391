"""Parses and runs the command line `geotoken VERB`. Each stage has a verb. Verbs such as `serve` are no stages.

`predict` and `evaluate` also accept a user's own photos and predictions.
"""

import argparse
import dataclasses
import difflib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geotoken_jax import commands, disk, errors, manifests, processes, settings
from geotoken_jax.export import targets
from geotoken_jax.serve import limits

#: Exit status after an error that a user can fix, which is reported in one line.
REFUSED = 2
#: Exit status of a training that saved a checkpoint and ended after SIGTERM. The same command continues the training.
PREEMPTED = processes.RESTART


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb and exits.

    Exit status: 0 after success, 2 after an error that the user can fix, 75 after an interruption from which the same
    command continues, 130 after Ctrl-C, 1 after any other error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be in any encoding
    disk.raise_open_files_limit()
    parser = _parser()
    options, rest = parser.parse_known_args([_expand_home(a) for a in (sys.argv[1:] if argv is None else argv)])
    try:
        config = _config(options, rest)
        if getattr(options, "workdir", None) is not None:
            manifests.local(options.workdir)
        sys.exit(commands.run(options, config))
    except _preempted_error() as error:
        print(f"geotoken {options.verb}: {error}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except errors.UserError as error:
        print(f"geotoken {options.verb}: {error}", file=sys.stderr)
        processes.leave(REFUSED)
    except BrokenPipeError:
        # The program that reads standard output has ended, e.g. `head`. With this closed pipe, Python would fail again
        # when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MemoryError, UnicodeError) as error:
        # `python -X dev` shows the traceback. If the cause is that another process was lost, the hook that
        # `processes.start` sets for uncaught errors ends this process with the exit status RESTART.
        if sys.flags.dev_mode or processes.is_process_loss(error):
            raise
        print(f"geotoken {options.verb}: {errors.explain(error, _place(options))}", file=sys.stderr)
        processes.leave(REFUSED)
    except KeyboardInterrupt:
        print(f"\ngeotoken {options.verb}: interrupted; run the same command again to continue", file=sys.stderr)
        processes.leave(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="geotoken", description="Predicts where on Earth a photo was taken.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in STAGES.items():
        verb = verbs.add_parser(name, help=summary, description=summary, epilog=_EPILOG)
        verb.add_argument("--config", help="configuration file, such as configs/demo.py")
        verb.add_argument("--workdir", help="folder for the results of all stages")
        if name in ("train", "learn", "predict", "all"):
            verb.add_argument("--variant", action="append", help="only this variant of config.variants (repeatable)")
        if name in (*manifests.UPDATED, "all"):
            verb.add_argument("--update", action="store_true", help=_UPDATE)
        if name == "all":
            stages = tuple(dict.fromkeys(verb for verb in manifests.PATH.values() if verb != "audit"))
            verb.add_argument("--remake", choices=stages, metavar="STAGE", help=f"{_REMAKE} ({', '.join(stages)})")
        if name in _OPTIONS:
            _OPTIONS[name](verb)
    _add_verify(verbs)
    _add_studies(verbs)
    verb = verbs.add_parser("serve", help=_SERVE, description=_SERVE)
    _add_model_options(verb, "model", "")
    for field in dataclasses.fields(limits.ServeSettings):
        summary = f"{field.metadata['help']} (default: {field.default or 'none'})"
        verb.add_argument(limits.flag(field.name), type=field.type, default=field.default, help=summary)
    verb.set_defaults(config=None)
    verb = verbs.add_parser("plan", help=_PLAN, description=_PLAN, epilog=_EPILOG)
    verb.add_argument("--config", help="configuration file, such as configs/common.py")
    verb.add_argument("--topology", help="chips and their shape, such as v5e:16x16, 2xv5e:16x16 or h100:8")
    verb.add_argument(
        "--workload", choices=("train", "align", "embed", "predict"), default="train",
        help="program to plan: train step of the decoder (train) or of the alignment model (align), the backbone's "
        "image tower (embed), or decoding of candidates (predict); default: train",
    )  # fmt: skip
    verb.add_argument("--gallery", type=int, help="number of gallery photos (default: 4,120,000, as in the paper)")
    verb.add_argument("--output", help="JSON file to which the plan is written too")
    verb.add_argument("--quick", action="store_true", help="compile in a third of the time, into a slower program")
    verb.add_argument("--document", action="store_true", help="print docs/scale.md instead, for all its topologies")
    return parser


def _add_studies(verbs: Any) -> None:
    verb = verbs.add_parser("experiment", help=_EXPERIMENT, description=_EXPERIMENT, epilog=_EPILOG)
    verb.add_argument("experiment", nargs="?", metavar="NAME", help="one of config.experiments")
    verb.add_argument("--config", help="configuration file, such as configs/experiments.py")
    verb.add_argument("--workdir", help="work directory to start from, such as runs/demo")
    verb.add_argument("--document", action="store_true", help="print docs/experiments.md instead, from finished runs")
    verb = verbs.add_parser("scaling", help=_SCALING, description=_SCALING, epilog=_EPILOG)
    verb.add_argument("part", choices=("plan", "check", "run", "fit", "plot"), help=_SCALING_PARTS)
    verb.add_argument("--config", help="configuration file, such as configs/scaling.py")
    verb.add_argument("--workdir", help="work directory to start from, such as runs/demo")
    verb.add_argument(
        "--index", type=int, help="with run: only this run, from 0 (default: $SLURM_ARRAY_TASK_ID or all)"
    )
    verb.add_argument(
        "--document",
        action="store_true",
        help="with plot: print docs/scaling.md instead; with plan: docs/scaling_pod.md",
    )
    verb.add_argument(
        "--topology", action="append", default=[],
        help="with plan: chips and their shape, such as v5e:16x16, to print chip-hours too (repeatable)",
    )  # fmt: skip
    verb.add_argument("--mfu", type=float, help="with plan: share of the chips' peak rate, 0 to 1 (default: 0.15)")
    verb.add_argument("--compile", action="store_true", help="with plan: compile each step for a TPU instead of --mfu")


def _add_verify(verbs: Any) -> None:
    verb = verbs.add_parser("verify", help=_VERIFY, description=_VERIFY, epilog=_EPILOG)
    verb.add_argument("workdir", metavar="WORKDIR", help="folder with the results of all stages")
    verb.add_argument(
        "--mend", action="store_true", help="make the bad files of prepare, embed and index again, and no others"
    )
    verb.add_argument("--config", help="with --mend: configuration file that the work directory was made with")


def _predict_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "photos",
        nargs="*",
        help="with --model or --method: photos or folders of photos to predict; - reads a photo from standard input",
    )
    _add_model_options(verb, "--model", "predict PHOTOS with ")
    verb.add_argument("--method", choices=("geoclip",), help="predict PHOTOS with GeoCLIP as published")
    verb.add_argument("--clip", help="with --method=geoclip: CLIP ViT-L/14, a folder or ORG/NAME on the hub")
    verb.add_argument("--geoclip", help="with --method=geoclip: GeoCLIP's wheel, or its folder or ORG/NAME on the hub")
    verb.add_argument("--json", action="store_true", help="with PHOTOS: print JSON lines with all candidates")
    verb.add_argument(
        "--output",
        help="with PHOTOS: write the answers to a file that ends in .csv, .jsonl, .geojson, .kml or .html",
    )
    verb.add_argument(
        "--min-within", metavar="KM:P", help="with PHOTOS: answer \"unknown\" if the probability to be within KM is "
        "less than P, as in 25:0.5",
    )  # fmt: skip
    verb.add_argument(
        "--xmp", action="store_true", help="with PHOTOS: write a sidecar, PHOTO.xmp, for each photo without a position"
    )
    verb.add_argument(
        "--exclude-author", metavar="TABLE", help="with --model: table of PHOTOS with the columns id and author; each "
        "photo is predicted without the gallery photos of its author",
    )  # fmt: skip
    verb.add_argument(
        "--exclude-ids", metavar="TABLE", help="with --model: table with the columns id and excluded_id; the photo id "
        "is predicted without the gallery photo excluded_id",
    )  # fmt: skip
    verb.add_argument("--dry-run", action="store_true", help="with --xmp: print the sidecars instead of writing them")


def _evaluate_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--predictions", action="append", help="file to score, JSON lines or CSV (repeatable)")
    verb.add_argument("--truth", help="with --predictions: file with id, latitude and longitude")
    verb.add_argument(
        "--method", action="append", default=[],
        help="with --workdir: baseline to predict with and to score (repeatable): knn, geoclip or classifier",
    )  # fmt: skip
    verb.add_argument(
        "--compare", action="append", nargs=2, default=[], metavar=("A", "B"),
        help="with --predictions: two files to compare with each other too (repeatable)",
    )  # fmt: skip
    verb.add_argument(
        "--output", help="with --predictions: write the metrics to a file that ends in .json, or the table to .csv"
    )
    verb.add_argument("--ellipsoid", action="store_true", help="with --predictions: use distances on WGS84")
    verb.add_argument(
        "--strict", action="store_true", help="with --predictions: count distances below a threshold (<) instead of <="
    )


def _export_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--from", dest="source", help="folder of an export to use, instead of a work directory")
    verb.add_argument(
        "--target", action="append", default=[], choices=tuple(targets.TARGETS),
        help="runtime for which the model is converted too (repeatable)",
    )  # fmt: skip
    verb.add_argument(
        "--upgrade", nargs="?", const="", metavar="DIR",
        help="with --from=EXPORT: convert an export of an earlier release to the format of this release, in the new "
        "folder DIR (default: EXPORT-upgraded)",
    )  # fmt: skip
    verb.add_argument("--push", metavar="ORG/NAME", help="Hugging Face repository to which the export is uploaded")


def _audit_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("audit", choices=("coverage", "leakage", "neighbors", "levels"), help="audit to make")


#: Verb of a stage -> function that adds the verb's own options.
_OPTIONS = {
    "predict": _predict_options,
    "evaluate": _evaluate_options,
    "export": _export_options,
    "audit": _audit_options,
}


def _add_model_options(verb: argparse.ArgumentParser, name: str, prefix: str) -> None:
    summary = "a folder that `geotoken export` made, or ORG/NAME or ORG/NAME@REVISION on the Hugging Face hub"
    verb.add_argument(name, metavar="MODEL", help=prefix + summary)
    verb.add_argument("--revision", help="with ORG/NAME: branch, tag or commit")
    verb.add_argument(
        "--backbone", help="the backbone's checkpoint, a folder or ORG/NAME on the hub, if MODEL does not contain it"
    )


_EPILOG = "--config.KEY=VALUE changes a key of the configuration, for example --config.train.examples=50000."


def _expand_home(argument: str) -> str:
    """Returns an argument of the command line, with ~ replaced by the home folder.

    Shells replace ~ in `~/x`, but not in `--option=~/x`.
    """
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def _place(options: argparse.Namespace) -> str:
    """Returns the folder or file that a verb works on, or "" if there is none.

    Messages about errors of the operating system contain it if the error itself names no file.
    """
    names = ("workdir", "output", "model", "source", "predictions", "config")
    place = next((value for name in names if (value := getattr(options, name, None))), "")
    return place[0] if isinstance(place, list) else place


def _preempted_error() -> tuple[type[Exception], ...]:
    """Returns the class of the error that an interrupted training raises, or () if the training loop is not imported.

    This function does not import the training loop, because that takes seconds. A module that is not imported cannot
    have raised an error.
    """
    loop = sys.modules.get("geotoken_jax.train.loop")
    return (loop.Preempted,) if loop else ()


def _config(options: argparse.Namespace, rest: list[str]) -> Any:
    """Returns the Config with the command line's changes, or None without --config."""
    if options.config is None:
        if rest:
            if rest[0].startswith("--config."):
                raise settings.SettingsError(
                    f"{rest[0]} changes a configuration, but --config=FILE is missing: add it, as in "
                    "--config=configs/demo.py"
                )
            raise settings.SettingsError(f"{rest[0]} is not an option: see `geotoken {options.verb} --help`")
        return None
    from absl import flags

    file = Path(options.config.partition(":")[0])  # the part after ":" is get_config's argument
    if not file.exists():
        raise settings.SettingsError(
            f"--config={file} does not exist: run the command in a clone of geotoken-jax, which has configs/demo.py "
            "and others, or correct the path"
        )
    # Configurations import each other as `configs.NAME`, so sys.path must contain the folder above configs/.
    sys.path.insert(0, str(file.resolve().parent.parent))
    try:
        values, unread = _parsed(options.config, rest)
    except flags.Error as error:
        reason = " ".join(str(error).split("\n\nTraceback")[0].split())
        where = "" if rest else f"--config={file} cannot be read: "
        raise settings.SettingsError(f"{where}{reason}: mend the file or the value; see configs/common.py") from None
    except OSError as error:
        raise settings.SettingsError(f"--config={file} cannot be read ({error}): check it and its imports") from None
    except (AttributeError, IndexError, KeyError, SyntaxError, TypeError, ValueError) as error:
        if not rest:
            raise
        _refuse_unknown_key(file, _parsed(options.config, [])[0], rest)
        raise settings.SettingsError(
            f"{' '.join(rest)} cannot be applied to {file} ({error}): see configs/common.py for all keys and values"
        ) from None
    if unread:
        raise settings.SettingsError(f"{unread[0]} is not an option: see `geotoken {options.verb} --help`")
    flags.FLAGS.mark_as_parsed()
    from geotoken_jax import configuration

    return configuration.read(values)


def _parsed(config: str, changes: list[str]) -> tuple[Any, list[str]]:
    """Returns a file's ConfigDict with the command line's changes applied, and the arguments that are not changes.

    config: value of --config. changes: arguments such as --config.model.width=256.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    arguments = ["geotoken", f"--config={config}", *changes]
    sys_argv, sys.argv = sys.argv, arguments  # config_flags reads the changes from sys.argv
    try:
        unread = values(arguments)[1:]
        loaded: Any = values["config"].value
        loaded.keys()  # if the file could not be loaded, config_flags raises the error here
    finally:
        sys.argv = sys_argv
    return loaded, unread


def _refuse_unknown_key(file: Path, config: Any, changes: list[str]) -> None:
    """Raises SettingsError for the first change whose key the configuration lacks, and suggests the most similar key.

    file: file of the configuration. changes: arguments such as --config.model.width=256.
    """
    for change in changes:
        name = change.split("=")[0].lstrip("-")
        key = name.removeprefix("config.")
        if key != name and not _has(config, key.split(".")):
            near = difflib.get_close_matches(key, _keys(config, ""), 1)
            hint = f"use config.{near[0]}, or " if near else ""
            raise settings.SettingsError(f"{name} is not a key of {file}: {hint}see configs/common.py for all keys")


def _keys(config: Any, prefix: str) -> list[str]:
    """Returns the dotted keys of a configuration's sections and values, such as `model` and `model.width`."""
    keys = []
    for key in config.keys() if hasattr(config, "keys") else ():
        keys += [prefix + key, *_keys(config[key], f"{prefix}{key}.")]
    return keys


def _has(config: Any, keys: list[str]) -> bool:
    """Returns whether a configuration has a key. keys: parts of the dotted key, such as ["model", "width"]."""
    for key in keys:
        if not hasattr(config, "keys") or key not in config:
            return False
        config = config[key]
    return True


_UPDATE = "add photos that were added to the source, without processing the others again (docs/data.md)"
_REMAKE = "first remove the folders of this stage, and all folders that were made from them"
_EXPERIMENT = "make runs that differ in a few settings, and compare them in one table"
_VERIFY = "compare the files of a work directory with the sums that were recorded when they were written"
_SCALING_PARTS = (
    "print all runs and their cost (plan), check how activations depend on the width (check, prints exponents), train "
    "the runs, fit the laws, or plot the results"
)
_SCALING = "measure how loss and accuracy change with size, data, neighbors, gallery and candidates"
_SERVE = "predict photos over HTTP with an exported model"
_PLAN = "estimate memory, compute, collectives and time of training and other work on a pod, without the pod"
#: Verb of a stage -> summary for --help.
STAGES = {
    "prepare": "read and check the photos of a source, and add their S2 tokens",
    "check": "compare the settings of all stages with the prepared photos, before the stages that take long",
    "embed": "compute the frozen backbone's features of photos and place names",
    "align": "train the alignment model: heads that map images, texts and coordinates to similar vectors",
    "index": "make the gallery, its index, the neighbors of all photos, and token records",
    "train": "train the decoder of each variant in config.variants",
    "learn": "train the selectors that choose among candidates, for the variants that use trained selectors",
    "predict": "predict all photos of all splits, or photos of your own",
    "evaluate": "score predictions and write report/index.html, or score files of your own",
    "audit": "check one of: gallery coverage, leakage, neighbors of train photos, level at which predictions go wrong",
    "export": "write a folder that contains all that prediction needs",
    "all": "run all stages in order; complete folders are kept",
}
