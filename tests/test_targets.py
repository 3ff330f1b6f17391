"""Targets of an export that need no converter, and the message if a converter is needed."""

import re
from pathlib import Path

import numpy as np
import pytest

from geotoken_jax import cli
from geotoken_jax.export import standalone
from geotoken_jax.interop import official
from geotoken_jax.predict import programs
from geotoken_jax.settings import SettingsError
from tests import tiny_export


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("export")
    return folder, tiny_export.write(folder, tiny_export.OURS)


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *arguments])
    assert ended.value.code == cli.REFUSED
    return capsys.readouterr().err


@pytest.mark.parametrize(("target", "package"), [("onnx", "jax2onnx"), ("savedmodel", "tensorflow")])
def test_a_missing_converter_is_named_with_what_to_install(made, capsys, target: str, package: str):
    said = refused(capsys, f"--from={made[0]}", f"--target={target}")
    assert re.search(f"needs {package}: in a separate environment, run `pip install .*{package}", said)
    assert said.count("\n") == 1 and not (made[0] / "targets").exists()


def test_a_target_needs_an_export_and_an_export_a_target(made, tmp_path: Path, capsys):
    assert "has no config.json" in refused(capsys, f"--from={tmp_path}", "--target=pytorch")
    assert "--from needs --upgrade, --push=ORG/NAME or --target=onnx|savedmodel|pytorch: add one" in refused(
        capsys, f"--from={made[0]}"
    )


def test_pytorch_refuses_what_the_published_code_does_not_have(made, capsys):
    said = refused(capsys, f"--from={made[0]}", "--target=pytorch")
    assert "config.model.norm is 'pre'" in said and "not 'post'" in said


def test_noise_takes_no_beam(tmp_path: Path):
    tiny_export.write(tmp_path, predict=dict(beam=3))
    with pytest.raises(SettingsError, match=r"config\.predict\.beam is 3"):
        programs.with_noise(tmp_path)


def test_pytorch_writes_the_published_names(tmp_path: Path):
    tiny_export.write(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", f"--from={tmp_path}", "--target=pytorch"])
    assert not ended.value.code
    weights = official.read_weights(tmp_path / "targets" / "pytorch" / "geotoken.safetensors")
    stored = standalone.read_safetensors(tmp_path / "geotoken.safetensors")
    np.testing.assert_array_equal(weights["embedding.weight"], stored["token_table"])
    assert weights["output_layers.0.weight"].shape == (6, 16) and "retrieval_embedding.weight" in weights


def test_standalone_answers_as_the_package(made):
    """Batches of any size, with missing neighbors: the same tokens, and log-probabilities within 1e-4."""
    folder, features = made
    model = standalone.Model(folder)
    wanted = tiny_export.answers(folder, features[:11])
    vectors = model.vectors(features[:11])
    np.testing.assert_array_equal(vectors, wanted["query"].astype(np.float32))
    rows, _ = model.neighbors(vectors)
    np.testing.assert_array_equal(rows, wanted["rows"])
    answers = model.answers(features[:11])
    tiny_export.compare(answers, wanted)
    assert len({(answer["latitude"], answer["longitude"]) for answer in answers}) > 1


def test_rounding_is_that_of_bfloat16():
    import ml_dtypes

    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values[:3] = 1 + 2**-8, 1 + 3 * 2**-8, -0.0  # halfway between two values of bfloat16
    np.testing.assert_array_equal(
        standalone._rounded(values).view(np.uint32),
        values.astype(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32),
    )


def test_a_folder_that_is_no_target_is_named(made, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="has no programs"):
        standalone.Model(made[0], tmp_path)
