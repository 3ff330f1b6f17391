"""Experiments: one question, several runs that differ in a few settings, one table against the first of them.

Each run is a work directory of its own under experiments/NAME/, in which the folders that its settings leave as they
are link into the one it starts from: only what differs is made again, and what was interrupted goes on.
"""

import dataclasses
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from etils import epath

from geotoken_jax import settings, workdir
from geotoken_jax.analysis import evaluate
from geotoken_jax.analysis.points import methods_of, read_points, read_truth
from geotoken_jax.data.join import check_context
from geotoken_jax.geo.distance import THRESHOLDS_KM

#: Makes the folders of a stage in a work directory, for one variant.
Stage = Callable[[Any, str, Sequence[str]], None]

#: Folders that a run may share with the work directory it starts from; of the last, each variant's own.
_SHARED = ("photos", "features", "align", "gallery", "queries", "neighbors", "tokens")
_TRAINED = ("geotoken", "pools", "reward", "verifier")


_HEAD = """# Experiments

Each table is the result of one command, `geotoken experiment NAME --config=configs/experiments.py --workdir=runs/demo`,
and this page of `geotoken experiment --document` with the same options ({date}, {cores} {machine} cores). The first
row of a table is what the others are compared with: points above it, with the 95 % interval of the paired bootstrap
over authors. The validation loss is in nats a token, weighted as the run trains, so that runs of other tokens or
weights have losses that do not compare. When a photo was taken can be read (`config.model.context`), and `geotoken
experiment context` compares that where photos say it. EarthView's do not, so there is no table of it here.
"""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """question: that it answers. note: what its table says, written by who has read it. runs: the name of each, the
    sections and keys that it changes and, where it trains nothing, the name of the run before it whose trained parts
    it takes; the first is what the others are compared with. choices: of each run that the table
    shows: names of selectors, "" for the run's own, "ideal" for the bound. splits: that are scored."""

    question: str
    note: str
    runs: tuple
    choices: tuple
    splits: tuple


def run(config: Any, path: str, name: str, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Makes every run of an experiment, and experiments/NAME/results.json, which is returned.

    stages: verb -> what makes a part of a run, in the order of the path. Raises SettingsError if there is no experiment
    of that name.
    """
    experiment, options = _read(config, name), settings.read(evaluate.EvaluateSettings, config.evaluate, "evaluate")
    variant, folder = options.reference, Path(path) / "experiments" / name
    trained = [f"{part}/{variant}" for part in _TRAINED]
    made: dict[str, Path] = {}
    configs = [settings.changed(config, changes, f"experiments.{name}") for _, changes, *_ in experiment.runs]
    for changed in configs:  # before the first of them is trained
        check_context(changed, path)
    for (label, _, *trained_by), changed in zip(experiment.runs, configs, strict=True):
        print(f"{name}: {label}", flush=True)
        place = made[label] = folder / re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
        source = made[trained_by[0]] if trained_by else Path(path)
        _link(source.resolve(), place, trained)
        _link(Path(path).resolve(), place, [*_SHARED, f"predictions/{variant}"])
        for verb, stage in stages.items():
            if not (trained_by and verb in ("train", "learn")):
                _make(stage, changed, place, variant)
    results = {
        "question": experiment.question,
        "base": config.name,
        "earth": options.earth,
        "strict": options.strict,
        "runs": [{"name": label, **_facts(place, variant)} for label, place in made.items()],
        "splits": {split: _score(experiment, made, split, options) for split in experiment.splits},
    }
    workdir.write_json(folder / "results.json", results)  # pyright: ignore[reportArgumentType]
    return results


def document(config: Any, path: str) -> str:
    """Returns docs/experiments.md: every experiment of the configuration whose results are there, by name."""
    parts = [_HEAD.format(cores=os.cpu_count(), machine=platform.machine(), date=date.today())]
    for name in config.experiments:
        file, experiment = Path(path) / "experiments" / name / "results.json", _read(config, name)
        if not file.exists():
            continue
        results = json.loads(file.read_text())
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{experiment.question}\n")
        if experiment.note:
            parts.append(f"{experiment.note}\n")
        for split, scores in results["splits"].items():
            parts.append(_table(split, scores, {run["name"]: run for run in results["runs"]}))
    return "\n".join(parts)


def _read(config: Any, name: str) -> Experiment:
    if name not in config.experiments:
        raise settings.SettingsError(f"there is no experiment {name!r}: choose one of {', '.join(config.experiments)}")
    return settings.read(Experiment, config.experiments[name], f"experiments.{name}")


def _link(base: Path, place: Path, folders: Sequence[str]) -> None:
    """Links into a run's work directory whatever is complete in another one, and not there yet."""
    for folder in folders:
        link = place / folder
        if (base / folder / "manifest.json").exists() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(base / folder)


def _make(stage: Stage, config: Any, place: Path, variant: str) -> None:
    """Runs a stage; for a linked folder that the run's settings do not leave as it is, another run's is taken that they
    do, and where there is none it is made anew."""
    others: dict[Path, list[Path]] = {}
    while True:
        try:
            return stage(config, str(place), [variant])
        except workdir.MadeOtherwise as error:
            linked = Path(error.path)
            if not linked.is_symlink():
                raise
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


def _facts(place: Path, variant: str) -> dict[str, Any]:
    trained = workdir.read_manifest(str(place), f"geotoken/{variant}")
    return {
        "examples": trained.counts["examples"],
        "parameters": trained.facts["parameters"],
        "validation_loss": trained.facts["best_loss"],
    }


def _score(
    experiment: Experiment, made: Mapping[str, Path], split: str, options: evaluate.EvaluateSettings
) -> dict[str, Any]:
    first, *_ = made
    truth = read_truth(epath.Path(made[first]), split)
    methods = []
    for label, place in made.items():
        points = read_points(place / "predictions" / options.reference / f"{split}.jsonl")
        for method in methods_of(points, truth, label, label, options.earth):
            if method.choice in experiment.choices or (method.main and "" in experiment.choices):
                methods.append(method)
    found = evaluate.score(methods, truth, first, options.resamples, options.seed, options.strict)
    return {**found, "uncertainty": None}  # not looked at here


def _table(split: str, scores: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns one split's rows as Markdown: accuracies, and how far from the first run's, with intervals."""
    differences = {(row["variant"], row["choice"]): row["accuracy"] for row in scores["differences"]}
    heads = [f"{km:,} km" for km in THRESHOLDS_KM]
    compared = [f"{km:,} km, difference" for km in (25, 200)]
    lines = [
        f"`{split}`, {scores['photos']:,} photos, percent within:\n",
        f"| | {' | '.join(heads)} | GeoScore | {' | '.join(compared)} | validation loss |",
        "|---|" + "---:|" * (len(heads) + len(compared) + 2),
    ]
    for row in scores["methods"]:
        values = [f"{100 * a['value']:.1f}" for a in row["accuracy"]]
        against = {a["km"]: a for a in differences.get((row["variant"], row["choice"]), ())}
        cells = [
            f"{100 * a['value']:+.1f} ({100 * a['low']:.1f}..{100 * a['high']:.1f})" if (a := against.get(km)) else ""
            for km in (25, 200)
        ]
        loss = f"{runs[row['variant']]['validation_loss']:.3f}"
        score = f"{row['geoscore']['value']:,.0f}"
        lines.append(f"| {row['name']} | {' | '.join(values)} | {score} | {' | '.join(cells)} | {loss} |")
    return "\n".join(lines) + "\n"
