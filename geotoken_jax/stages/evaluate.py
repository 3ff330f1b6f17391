"""The stage `evaluate`: scores every variant on every split, and writes report/metrics.json and report/index.html."""

import json

from geotoken_jax.analysis import evaluate, overlap, report
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.workdir import Manifest, StageError, write_bytes, write_json


def run(config: Config, workdir: Workdir) -> list[Manifest]:
    """Makes report/, again and whole where there are predictions that an earlier report did not know."""
    folders = predicted(config, workdir)
    for name in ("manifest.json", "begun.json"):
        earlier = workdir.path / "report" / name
        if earlier.exists() and not set(folders) <= json.loads(earlier.read_text())["inputs"].keys():
            earlier.unlink()
    keys, inputs = ["name", "evaluate", "audit.leakage"], ["photos", "gallery", "queries", *folders]
    stage = workdir.begin(config, "report", keys, inputs)
    if stage.manifest:
        return [stage.manifest]
    truths, methods = evaluate.read_predictions(workdir, config.evaluate)
    known = overlap.find(workdir, truths, config.audit.leakage.cosine_above)
    metrics = evaluate.figures(truths, methods, known, config)
    write_json(stage.path / "metrics.json", metrics)
    page = report.page(workdir.path, config.name, metrics, truths, methods, config.evaluate)
    write_bytes(stage.path / "index.html", page.encode())
    return [stage.finish({"variants": len(folders), **{split: len(truth.ids) for split, truth in truths.items()}})]


def predicted(config: Config, workdir: Workdir) -> list[str]:
    """Returns the folders of predictions. Raises StageError if the reference is not among them."""
    variants = workdir.answered()
    if config.evaluate.reference not in variants:
        raise StageError(
            f"config.evaluate.reference is {config.evaluate.reference!r}, and {workdir.path / 'predictions'} holds "
            f"{', '.join(variants) or 'nothing'}: run `geotoken predict` for it first, or name one that is there"
        )
    return [f"predictions/{variant}" for variant in variants]
