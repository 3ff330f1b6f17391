"""The stage `audit`: one look at a work directory, as figures.json and a page in audit/NAME/."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from geotoken_jax.analysis import audit, coverage, leakage, neighbor_gap, per_level
from geotoken_jax.artifacts import Workdir
from geotoken_jax.configuration import Config
from geotoken_jax.stages.evaluate import predicted
from geotoken_jax.workdir import Manifest


class Audit(NamedTuple):
    """One audit.

    section: its own dotted place in the configuration, "" for none. inputs: folders that it reads, where GEOTOKEN
    stands for the reference's decoder and PREDICTIONS for all predictions. make: returns what its folder holds. table:
    its figures that matter most, as text. check: raises for what cannot be, before the folder is begun.
    """

    section: str
    inputs: tuple[str, ...]
    make: Callable[[Config, Workdir, epath.Path], audit.Made]
    table: Callable[[Mapping[str, Any]], str]
    check: Callable[[Config, Workdir], None] = lambda config, workdir: None


AUDITS = {
    "coverage": Audit(
        "audit.coverage",
        ("photos", "gallery", "queries", "neighbors", "GEOTOKEN", "PREDICTIONS"),
        coverage.make,
        coverage.table,
        coverage.check,
    ),
    "leakage": Audit("audit.leakage", ("photos", "gallery", "queries", "PREDICTIONS"), leakage.make, leakage.table),
    "neighbors": Audit("", ("gallery", "queries", "neighbors"), neighbor_gap.make, neighbor_gap.table),
    "levels": Audit("", ("queries", "gallery", "tokens", "GEOTOKEN"), per_level.make, per_level.table),
}


def run(config: Config, workdir: Workdir, name: str) -> list[Manifest]:
    """Makes audit/NAME/. name: one of AUDITS."""
    chosen = AUDITS[name]
    inputs = []
    for folder in chosen.inputs:
        stands_for = {"GEOTOKEN": [f"geotoken/{config.evaluate.reference}"]}
        inputs += predicted(config, workdir) if folder == "PREDICTIONS" else stands_for.get(folder, [folder])
    chosen.check(config, workdir)
    keys = ["name", "evaluate", *([chosen.section] if chosen.section else [])]
    stage = workdir.begin(config, f"audit/{name}", keys, inputs)
    if stage.manifest:
        return [stage.manifest]
    return [audit.write(stage, chosen.make(config, workdir, stage.path), config.evaluate.resamples)]
