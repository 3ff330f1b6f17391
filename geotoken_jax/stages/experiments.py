"""`geotoken experiment`: trains several runs that differ in a few settings and compares them in one table.

Each run has a work directory under experiments/NAME/. Folders that do not depend on the changed settings are links into
the base work directory, so only the other folders are made again. An interrupted experiment continues.
"""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from geotoken_jax.analysis import evaluate, training
from geotoken_jax.analysis.coordinates import methods_of, read_coordinates, read_truth
from geotoken_jax.configuration import Config, EvaluateSettings, Experiment
from geotoken_jax.geo.distance import THRESHOLDS_KM, great_circle_km, within
from geotoken_jax.manifests import write_bytes, write_json
from geotoken_jax.pages.experiment import page
from geotoken_jax.settings import SettingsError
from geotoken_jax.stages import sweep
from geotoken_jax.stages.train import check_context
from geotoken_jax.workdir import VALIDATION, Workdir

#: Folders that a run links to instead of making them again. The folders in _SHARED are linked to the base work
#: directory. Of each folder in _TRAINED, only the variant's subfolder is linked. If the experiment names a run whose
#: models are reused, it is linked to that run, else to the base work directory.
_SHARED = ("photos", "features", "align", "gallery", "queries", "neighbors", "tokens")
_TRAINED = ("geotoken", "pools", "reward", "reranker")


_HEAD = """# Experiments

Each table is the result of one command, `geotoken experiment NAME --config=configs/experiments.py --workdir=runs/demo`,
which also writes a page of its own, `experiments/NAME/index.html`. `geotoken experiment --document` with the same
options writes this page ({date}, {cores} {machine} cores). The first row of a table is the baseline: other rows state
their difference to it in percentage points, with the 95 % interval of the paired bootstrap over authors. The validation
loss is in nats per token, with the run's own loss weights, so it is comparable only between runs with equal tokens and
weights. `geotoken experiment context` compares models that read a photo's capture time (`config.model.context`).
EarthView's photos have no such times, so this page has no table of it.
"""

#: An experiment's figure, which docs/figures.py draws.
_FIGURE = """![Accuracy of each run on validation during training.](figures/{name}_light.webp#gh-light-mode-only)
![Accuracy of each run on validation during training.](figures/{name}_dark.webp#gh-dark-mode-only)
"""


def run(config: Config, workdir: Workdir, name: str) -> dict[str, Any]:
    """Makes all runs of an experiment, writes results.json and index.html to experiments/NAME, and returns the results.

    Raises SettingsError if there is no experiment of that name, or if the settings of a run are invalid.
    """
    experiment, options = _experiment(config, name), config.evaluate
    variant, folder, base = options.reference, Path(workdir.path) / "experiments" / name, Path(workdir.path).resolve()
    runs: dict[str, Workdir] = {}
    configs: dict[str, Config] = {}
    for label, changes, *trained_by in experiment.runs:  # check every run before the first one trains
        source = configs[trained_by[0]] if trained_by else config  # reused models keep their settings
        configs[label] = source.changed(changes, f"experiments.{name}")
        check_context(configs[label], workdir)
    for label, _, *trained_by in experiment.runs:
        print(f"{name}: {label}", flush=True)
        place = folder / _folder(label)
        source = Path(runs[trained_by[0]].path).resolve() if trained_by else base
        sweep.link(source, place, [f"{part}/{variant}" for part in _TRAINED])
        sweep.link(base, place, [*_SHARED, f"predictions/{variant}"])
        runs[label] = Workdir(place)
        verbs = ("index", "predict") if trained_by else ("index", "train", "learn", "predict")
        sweep.make(configs[label], runs[label], variant, verbs)
    results = {
        "question": experiment.question,
        "base": config.name,
        "earth": options.earth,
        "strict": options.strict,
        "runs": [{"name": label, **_facts(place, variant)} for label, place in runs.items()],
        "splits": {split: _score(experiment, runs, split, options) for split in experiment.splits},
        "curve": curve(config, workdir, name) if experiment.curve else None,
    }
    write_json(epath.Path(folder / "results.json"), results)
    text = page(name, experiment, results, options.resamples)
    write_bytes(epath.Path(folder / "index.html"), text.encode())
    return results


def curve(config: Config, workdir: Workdir, name: str) -> dict[str, Any] | None:
    """Returns the validations of an experiment's runs until now, and the first neighbor's accuracy on the same photos.

    The result is None if no run has a validation yet. Accuracies are fractions within each of THRESHOLDS_KM; a run's
    accuracies are measured with greedy decoding. `processor_s` is the processor time of training until the validation,
    in seconds.
    """
    experiment, variant = _experiment(config, name), config.evaluate.reference
    runs: dict[str, list[dict[str, Any]]] = {}
    for label, *_ in experiment.runs:
        log = Workdir(Path(workdir.path) / "experiments" / name / _folder(label)).training_log(variant)
        for row in training.validations(log.read_text()) if log.exists() else ():
            shares = [row[f"within_{km}_km"] for km in THRESHOLDS_KM]
            found = {key: row[key] for key in ("examples", "processor_s", "loss")}
            runs.setdefault(label, []).append({**found, "within": shares})
    if not runs:
        return None
    true, nearest = workdir.table(VALIDATION).coordinates(), workdir.neighbors(VALIDATION, 1)[0][:, 0]
    km = np.asarray(great_circle_km(*true.T, *workdir.gallery.coordinates(np.maximum(nearest, 0)).T))
    km = np.where(nearest < 0, np.inf, km)  # a photo without a neighbor
    return {"photos": len(true), "first_neighbor": within(km[:, None]).mean(0).tolist(), "runs": runs}


def _folder(label: str) -> str:
    """Returns the name of a run's folder."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def document(config: Config, workdir: Workdir) -> str:
    """Returns the text of docs/experiments.md: all experiments of the configuration that have a results.json.

    A curve is included as soon as one of its runs has a validation.
    """
    parts = [_HEAD.format(cores=os.cpu_count(), machine=platform.machine(), date=date.today())]
    for name in config.experiments:
        file, experiment = Path(workdir.path) / "experiments" / name / "results.json", _experiment(config, name)
        trained = curve(config, workdir, name) if experiment.curve else None
        if not file.exists() and not trained:
            continue
        results = json.loads(file.read_text()) if file.exists() else {"splits": {}}
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{experiment.question}\n")
        if experiment.note:
            parts.append(f"{experiment.note}\n")
        if trained:
            parts.append(_FIGURE.format(name=name))
            parts.append(_curve_table(trained))
        for split, scores in results["splits"].items():
            parts.append(_table(split, scores, {run["name"]: run for run in results["runs"]}))
    return "\n".join(parts)


def _experiment(config: Config, name: str) -> Experiment:
    if name not in config.experiments:
        raise SettingsError(f"there is no experiment {name!r}: choose one of {', '.join(config.experiments)}")
    return config.experiments[name]


def _facts(place: Workdir, variant: str) -> dict[str, Any]:
    trained = place.manifest(f"geotoken/{variant}")
    return {
        "examples": trained.counts["examples"],
        "parameters": trained.facts["parameters"],
        "validation_loss": trained.facts["best_loss"],
    }


def _score(
    experiment: Experiment, runs: Mapping[str, Workdir], split: str, options: EvaluateSettings
) -> dict[str, Any]:
    first, *_ = runs
    truth = read_truth(runs[first], split)
    methods = []
    for label, place in runs.items():
        points = read_coordinates(place.predictions_file(options.reference, split))
        for method in methods_of(points, truth, label, label, options.earth):
            if method.choice in experiment.choices or (method.main and "" in experiment.choices):
                methods.append(method)
    scores = evaluate.score(methods, truth, first, options.resamples, options.seed, options.strict)
    return {**scores, "uncertainty": None}  # the table has no column for it


def _curve_table(trained: Mapping[str, Any]) -> str:
    """Returns a Markdown table of all runs' validations, one row per number of examples. trained: see `curve`."""
    heads = ["minutes", "loss", *(f"{km:,} km" for km in THRESHOLDS_KM[:3])]
    lines = [
        f"`validation`, {trained['photos']:,} photos, percent within, decoded greedily, after each number of examples. "
        "Minutes are processor time of the training alone. The first neighbor has "
        f"{_percent(trained['first_neighbor'])}.\n",
        f"| examples | {' | '.join(f'{run}: {head}' for run in trained['runs'] for head in heads)} |",
        "|---:|" + "---:|" * (len(heads) * len(trained["runs"])),
    ]
    by_examples = [{row["examples"]: row for row in rows} for rows in trained["runs"].values()]
    for examples in sorted(set().union(*by_examples)):
        cells = [f"{examples:,}"]
        for rows in by_examples:
            row = rows.get(examples)
            shown = [f"{100 * share:.1f}" for share in row["within"][:3]] if row else []
            cells += [f"{row['processor_s'] / 60:.1f}", f"{row['loss']:.3f}", *shown] if row else [""] * len(heads)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(shares: Sequence[float]) -> str:
    figures = [f"{100 * share:.1f} within {km:,} km" for share, km in zip(shares[:3], THRESHOLDS_KM, strict=False)]
    return f"{', '.join(figures[:-1])} and {figures[-1]}"


def _table(split: str, scores: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table of one split: accuracies, and differences to the first run with their intervals."""
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
