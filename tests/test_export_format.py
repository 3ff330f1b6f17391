"""Exports of earlier and later formats, and their upgrade."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geotoken_jax import GeoToken, cli
from geotoken_jax.export import upgrade
from geotoken_jax.predict import bundle, export_format
from geotoken_jax.predict.bundle import ExportError
from geotoken_jax.settings import SettingsError
from tests import exports
from tests.make_export_golden import GOLDEN, answers, photos


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An export of format 1."""
    return Path(shutil.copytree(GOLDEN / "export_1", tmp_path / "old"))


def edit(folder: Path, change: Any) -> dict[str, Any]:
    """Changes config.json, and the sums with it."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    exports.write_sums(folder)
    return config


@pytest.mark.slow
def test_an_export_of_format_1_answers_as_it_did_before_and_after_its_upgrade(old: Path):
    def with_more_selectors(config: dict[str, Any]) -> None:
        config["predict"]["selectors"] += ["a selector of old"]
        config["learned"]["gone"] = {"hidden": 8}

    (old / "gone").mkdir()
    (old / "gone/parameters.safetensors").write_bytes(b"x")
    before = edit(old, with_more_selectors)
    assert "format" not in before
    expected = json.loads((GOLDEN / "export_1.json").read_text())
    first = answers(GeoToken.load(old).predict(photos()))
    for one, other in zip(first, expected, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", f"--from={old}", "--upgrade"])
    assert not ended.value.code
    new = old.with_name("old-upgraded")
    bundle.check(new, everything=True)
    assert export_format.read_format(new) == export_format.FORMAT > export_format.read_format(old) == 1
    assert not (new / "gone").exists() and (new / "standalone.py").exists()
    assert answers(GeoToken.load(new, verify=True).predict(photos())) == first
    with pytest.raises(SettingsError, match=f"has the present format, {export_format.FORMAT}: use it as it is"):
        upgrade.run(new, new.with_name("newer"))
    with pytest.raises(SettingsError, match=r"old-upgraded exists: remove it, or write another folder"):
        upgrade.run(old, new)


def test_an_export_of_a_later_format_names_what_to_install(old: Path, capsys: pytest.CaptureFixture[str]):
    later = export_format.FORMAT + 1
    edit(old, lambda config: config.update(format=later))
    sentence = f"{old} has format {later}, and this release .* reads up to format {later - 1}: install a newer geotoken"
    for use in (GeoToken.load, lambda folder: upgrade.run(folder, folder / "new")):
        with pytest.raises(ExportError, match=sentence):
            use(old)
    for verb in (["export", f"--from={old}", "--target=pytorch"], ["predict", f"--model={old}", "photo.jpg"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(verb)
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "install a newer geotoken" in printed
    edit(old, lambda config: config.update(format="new"))
    with pytest.raises(ExportError, match="has format new"):
        GeoToken.load(old)


def test_an_export_that_chooses_by_an_unknown_selector_says_to_export_again(old: Path):
    edit(old, lambda config: config["predict"].update(selectors=["greedy", "divination"], choice="divination"))
    for use in (GeoToken.load, lambda folder: upgrade.run(folder, folder / "new")):
        with pytest.raises(ExportError, match=r"by 'divination', a selector .* export again from the work directory"):
            use(old)


def test_a_damaged_export_is_not_upgraded(old: Path):
    (old / "gallery" / next(file.name for file in (old / "gallery").glob("*.npy"))).write_bytes(b"x")
    with pytest.raises(ExportError, match="does not match its sum"):
        upgrade.run(old, old.with_name("new"))
    assert sorted(path.name for path in old.parent.iterdir()) == ["old"]


def test_upgrade_needs_an_export(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["export", "--workdir=.", "--upgrade"])
    assert "--upgrade has no export: add --from=EXPORT" in capsys.readouterr().err
