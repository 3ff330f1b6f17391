"""Targets of an export that need no converter, and the message if a converter is needed."""

import re
from pathlib import Path

import numpy as np
import pytest

from geotoken_jax import cli
from geotoken_jax.export import program, standalone
from geotoken_jax.interop import official
from geotoken_jax.settings import SettingsError
from tests import exports


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "export"
    exports.write(folder)
    (folder / "standalone.py").touch()  # as if it had its program, which these tests do not run
    return folder


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *arguments])
    assert ended.value.code == cli.REFUSED
    return capsys.readouterr().err


@pytest.mark.parametrize(("target", "package"), [("onnx", "jax2onnx"), ("savedmodel", "tensorflow")])
def test_a_missing_converter_is_named_with_what_to_install(made, capsys, target: str, package: str):
    said = refused(capsys, f"--from={made}", f"--target={target}")
    assert re.search(f"needs {package}: in a separate environment, run `pip install .*{package}", said)
    assert said.count("\n") == 1 and not (made / "targets").exists()


def test_a_target_needs_an_export_and_an_export_a_target(made, tmp_path: Path, capsys):
    assert "has no config.json" in refused(capsys, f"--from={tmp_path}", "--target=pytorch")
    assert "--from needs --upgrade, --push=ORG/NAME or --target=onnx|savedmodel|pytorch: add one" in refused(
        capsys, f"--from={made}"
    )


def test_pytorch_refuses_what_the_published_code_does_not_have(made, capsys):
    said = refused(capsys, f"--from={made}", "--target=pytorch")
    assert "config.model.norm is 'pre'" in said and "not 'post'" in said


def test_noise_takes_no_beam(tmp_path: Path):
    exports.write(tmp_path / "export", lambda config: config.predict.update(beam=3))
    with pytest.raises(SettingsError, match=r"config\.predict\.beam is 3"):
        program.load(tmp_path / "export", plain=True)


def test_pytorch_writes_the_published_names(tmp_path: Path):
    exports.write(tmp_path / "export", exports.published)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", f"--from={tmp_path / 'export'}", "--target=pytorch"])
    assert not ended.value.code
    weights = official.read_weights(tmp_path / "export" / "targets" / "pytorch" / "geotoken.safetensors")
    stored = standalone.read_safetensors(tmp_path / "export" / "geotoken.safetensors")
    np.testing.assert_array_equal(weights["embedding.weight"], stored["token_table"])
    assert weights["output_layers.0.weight"].shape == (6, 16) and "retrieval_embedding.weight" in weights
