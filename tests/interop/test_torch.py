"""Our model beside a PyTorch model of the published form, and the files that torch writes.

Run by `make test-interop`, where torch is; without it these are skipped.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

from benchmarks import torch_reference  # noqa: E402
from benchmarks.torch_reference import Shape  # noqa: E402
from geotoken_jax import sharding  # noqa: E402
from geotoken_jax.export import targets  # noqa: E402
from geotoken_jax.gallery import placement  # noqa: E402
from geotoken_jax.gallery.table import Table  # noqa: E402
from geotoken_jax.geo.cells import CellScheme  # noqa: E402
from geotoken_jax.interop import official  # noqa: E402
from geotoken_jax.model.task import GeoTokenTask, LossSettings  # noqa: E402
from geotoken_jax.train.optimizer import OptimizerSettings, make_optimizer  # noqa: E402
from geotoken_jax.train.step import Trainer  # noqa: E402
from tests import exports  # noqa: E402

SMALL = Shape(width=24, layers=1, heads=3, feed_forward=40, group=4, neighbors=2, backbone_width=20)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(width=32, layers=1, heads=4, feed_forward=64, group=1, neighbors=3),
        Shape(width=30, layers=2, heads=5, feed_forward=72, group=2, neighbors=15),
        Shape(width=24, layers=1, heads=3, feed_forward=40, group=4, neighbors=1),
        Shape(width=18, layers=3, heads=1, feed_forward=17, group=5, neighbors=3, backbone_width=50),
    ],
    ids=lambda shape: f"group{shape.group}",
)
def test_our_model_has_the_numbers_of_an_independent_one(tmp_path, shape):
    np.savez(tmp_path / "stored.npz", **torch_reference.stored_values(shape, seed=shape.group))
    found = official.check(str(tmp_path / "stored.npz"))
    tokens = [found.pop(name) for name in ("greedy tokens", "beam tokens")]
    assert tokens == [1.0, 1.0]
    assert max(found.values()) < 1e-4, found


def test_both_learn_alike():
    """The published training, five steps without dropout: every loss the same."""
    shape = Shape(**{**vars(SMALL), "dropout": 0.0})
    torch.manual_seed(0)
    reference = torch_reference.Reference(shape)
    read = torch_reference.batches(shape, batch=8, photos=40, device="cpu")
    batches = [next(read) for _ in range(5)]

    sizes = {name: value for name, value in vars(shape).items() if name not in ("dropout", "level")}
    settings = official.settings(**sizes, level=shape.level, dropout=0.0)
    model = official.from_state_dict(settings, {n: v.detach().numpy() for n, v in reference.state_dict().items()})
    ours = _our_losses(settings, model, batches)

    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-6)
    theirs = []
    for *inputs, tokens in batches:
        loss = torch_reference.weighted_loss(reference(*inputs, tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    assert theirs[0] - theirs[-1] > 0.01  # they do learn
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)


def _our_losses(settings, model, batches) -> list[float]:
    mesh = sharding.make_mesh(sharding.MeshSettings(1, 1, 1), jax.devices()[:1])
    lookup = placement.lookup(placement.GallerySettings("host", -1), mesh)
    options = OptimizerSettings(1e-2, "exponential", 0.9, warmup=0.0, weight_decay=1e-6, b2=0.999, clip=0.0)
    trainer = Trainer(GeoTokenTask(settings, LossSettings(2.0, 1.0), lookup), make_optimizer(options), mesh)
    key = jax.random.key(0)
    state = {**trainer.init(key), "params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    losses = []
    for batch in batches:
        names = ("query", "neighbors", "neighbor_tokens", "tokens")
        arrays = {name: value.numpy() for name, value in zip(names, batch, strict=True)}
        arrays["neighbor_count"] = np.full(len(arrays["tokens"]), settings.neighbors, np.int32)
        state, values = trainer.step(state, arrays, key, options.learning_rate, {})
        losses.append(float(values["loss"]))
    return losses


@pytest.fixture
def reference():
    torch.manual_seed(1)
    return torch_reference.Reference(SMALL)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["official", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        official.main()
    return end.value.code


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"epoch": 3, "model_state_dict": w, "optimizer": {"lr": 1.0}},
                                  lambda w: {"state_dict": {f"module._orig_mod.{n}": v for n, v in w.items()}}],
                         ids=["plain", "checkpoint", "wrapped"])  # fmt: skip
def test_torch_files_come_in_and_go_out_bit_for_bit(monkeypatch, tmp_path, reference, wrap):
    weights = reference.state_dict()
    theirs, ours, back = (tmp_path / name for name in ("w.pth", "parameters.safetensors", "back.pth"))
    torch.save(wrap(weights), theirs)
    assert run(monkeypatch, "import", theirs, ours, "--heads=3") == 0
    assert run(monkeypatch, "export", ours, back) == 0
    found = torch.load(back, weights_only=True)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    reference.load_state_dict(found)  # strict


def test_16_bit_torch_files_are_widened(tmp_path, reference):
    weights = {name: value.to(torch.bfloat16) for name, value in reference.state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    for name, value in official.read_weights(tmp_path / "w.pth").items():
        np.testing.assert_array_equal(value, weights[name].float().numpy(), strict=True)


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda path, w: {**w, "trap": Trap(path)}, "other than tensors"),
        (lambda path, w: {**w, "epoch": 3}, "entry epoch is not a tensor"),
        (lambda path, w: [1, 2], "no state dict"),
    ],
)
def test_a_torch_file_of_anything_else_is_refused_and_runs_nothing(
    monkeypatch, capsys, tmp_path, reference, content, said
):
    torch.save(content(tmp_path / "trapped", reference.state_dict()), tmp_path / "w.pth")
    assert run(monkeypatch, "import", tmp_path / "w.pth", tmp_path / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "trapped").exists()


def test_the_benchmark_compares_both():
    small = ["--set=model.width=16", "--set=model.heads=2", "--set=model.neighbors=2", "--set=train.batch_size=4"]
    command = [sys.executable, "-m", "benchmarks.train_step", "--rounds=1", "--steps=2", "--photos=32", *small]
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = json.loads(subprocess.run(command, env=one_device, stdout=subprocess.PIPE, check=True).stdout)
    assert found["ratio"] == pytest.approx(
        found["ours"]["examples_per_second"] / found["reference"]["examples_per_second"]
    )
    # The published face has a head of 6 columns, ours of 16.
    assert found["ours"]["parameters"] - found["reference"]["parameters"] == 10 * 17
    assert found["ours"]["dtype"] == found["reference"]["dtype"] == "float32"


def test_the_published_code_reads_what_export_writes_and_answers_alike(tmp_path):
    """`geotoken export --target=pytorch`: the same greedy tokens, log-probabilities within 1e-3."""
    exports.write(tmp_path / "export", exports.published)
    weights = torch.load(targets.make(tmp_path / "export", "pytorch") / "geotoken.pth", weights_only=True)
    model = torch_reference.Reference(
        Shape(width=16, layers=1, heads=2, feed_forward=16, group=4, neighbors=4, backbone_width=48)
    ).eval()
    model.load_state_dict(weights)
    ours = exports.candidates(tmp_path / "export", exports.photos())
    gallery = Table(tmp_path / "export" / "gallery")
    near = torch.tensor(gallery.embeddings(ours["rows"]).astype(np.float32))
    tokens = torch.tensor(CellScheme(20, 4).from_stored(gallery.tokens(ours["rows"]), None))
    with torch.no_grad():
        memory = model.encode(torch.tensor(ours["query"].astype(np.float32)), near, tokens)
        found, log_p = torch_reference.search(model, memory, 1)
    np.testing.assert_array_equal(found[:, 0], ours["tokens"][:, 0])
    np.testing.assert_allclose(log_p[:, 0], ours["log_probability"][:, 0], atol=1e-3)
