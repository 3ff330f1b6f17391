"""The coordinate check: with "mup", activations change by as much at all widths; with "standard" not."""

import json
import math
from pathlib import Path

import pytest

from configs import scaling as study
from geotoken_jax import cli
from geotoken_jax.analysis import activations
from geotoken_jax.pages import coordinate_check
from geotoken_jax.train.optimizer import OptimizerSettings
from tests import fixtures

pytestmark = pytest.mark.slow  # a minute of a CPU for compiling four models
OPTIMIZER = OptimizerSettings(
    learning_rate=0.003, schedule="cosine", decay=0.9, warmup=0.0, weight_decay=0.0, b2=0.999, clip=0.0
)


@pytest.fixture(scope="module")
def result():
    model = fixtures.settings("compact", level=4, decoder_layers=1)
    return activations.check(model, OPTIMIZER, (16, 128), steps=2, seeds=2, photos=16)


def test_changes_grow_with_the_width_with_standard_and_not_with_mup(result):
    for name, mup in result["slopes"]["mup"].items():
        standard = result["slopes"]["standard"][name]
        if name != "decoder input":  # a table of tokens, which both parametrizations treat alike
            assert standard["change"] > mup["change"] + 0.2, (name, standard, mup)
            assert standard["change"] > 0.2, (name, standard)
        if "logits" in name:  # at first, logits shrink with the width
            assert -0.6 < mup["change"] < 0.1, (name, mup)
        else:
            assert abs(mup["change"]) < 0.15 and abs(mup["rms"]) < 0.15, (name, mup)


def test_rows_have_every_case_and_begin_without_a_change(result):
    names = result["slopes"]["mup"].keys()
    assert names == result["slopes"]["standard"].keys() and len(result["rows"]) == 2 * 2 * 2 * 3 * len(names)
    assert names >= {"encoder input", "encoder layer 1", "decoder layer 1", "copy logits", "head logits"}
    for row in result["rows"]:
        assert math.isfinite(row["rms"]) and (row["change"] == 0) == (row["step"] == 0)
    base = [
        [row["rms"] for row in result["rows"] if (row["parametrization"], row["width"]) == (name, 16)]
        for name in ("standard", "mup")
    ]
    assert base[0] == base[1]


def test_the_check_is_shown_as_a_table_and_as_charts(result):
    lines = coordinate_check.table(result).splitlines()
    assert len(lines) == 1 + len(result["slopes"]["mup"]) and lines[0].endswith("mup change")
    found = coordinate_check.charts(result)
    assert [chart.caption.split(":")[0] for chart in found] == ["standard", "mup"] * 2
    for chart in found:
        assert chart.svg().count("<polyline") == len(result["slopes"]["mup"])


def test_the_command_writes_the_check_and_prints_its_table(result, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(activations, "check", lambda *arguments: asked.append(arguments) or result)
    with pytest.raises(SystemExit) as ended:
        cli.main(["scaling", "check", f"--config={Path(study.__file__)}", f"--workdir={tmp_path}"])
    assert not ended.value.code and capsys.readouterr().out == coordinate_check.table(result) + "\n"
    assert json.loads((tmp_path / "scaling/check.json").read_text()) == result
    model, optimizer, widths, *_ = asked[0]
    assert model.width == 96 and optimizer.learning_rate == 1e-3 and widths[-1] == 8 * widths[0]
    assert all(width % model.heads == 0 for width in widths)
