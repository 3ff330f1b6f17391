"""Planning: memory against measured sizes, times that follow from costs, and topologies."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

from configs import common
from geotoken_jax import chips, cli, configuration
from geotoken_jax.model import flops
from geotoken_jax.plan import hlo, planning, text, topology, workloads
from geotoken_jax.settings import SettingsError

ROOT = pathlib.Path(__file__).parents[1]


def tiny(**changes):
    """The paper's configuration in a tiny size. changes: section -> keys."""
    config = common.get_config()
    config.model.update(
        level=6, width=16, heads=2, feed_forward=32, encoder_layers=2, decoder_layers=2, neighbors=3, backbone_width=8
    )
    config.train.batch_size = 32
    config.embed.backbone = "huggingface"
    config.predict.update(batch_size=16, samples=3)
    for section, keys in changes.items():
        config.update_from_flattened_dict({f"{section}.{key}": value for key, value in keys.items()})
    jax.devices()  # first starts JAX with all devices of the tests
    return configuration.read(config)


def run(config, name, rows=1000, **options):
    return planning.run(config, topology.read(name), rows=rows, **options)


def test_chips_are_what_they_are_sold_as():
    for chip in chips.CHIPS.values():
        assert 1e14 < chip.flops < 3e15 and 16 * 2**30 <= chip.memory <= 288 * 2**30
        # Between 100 and 600 operations per byte, and memory faster than links.
        assert 100 < chip.flops / chip.bandwidth < 600 and chip.bandwidth > chip.links
        assert 16 < chip.flops / chip.vector < 150
        if chip.clock:  # a TPU computes a whole number of products of 128 x 128 per cycle
            products = chip.flops / chip.clock / (2 * 128 * 128)
            assert products == pytest.approx(round(products), rel=0.01) and chip.network < chip.links / 30


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_resident_bytes_are_those_of_the_real_arrays(sizes):
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    config = tiny(mesh=mesh, gallery={"placement": "sharded"}, train={"ema": 0.9})
    program = workloads.train(config, 1000, jax.devices())
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), program.arguments[0])

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    found = program.resident_bytes()
    assert found["parameters"] == held([state[name] for name in ("params", "constants", "ema")])
    assert found["optimizer"] == held(state["optimizer"])
    assert found["gallery"] == 1000 / 8 * (3 * 8 * 2 + config.model.cells.length)
    assert program.parameters == sum(leaf.size for leaf in jax.tree.leaves(state["params"]))


@functools.cache
def compiled(remat, accumulate=1):
    """Returns the costs of the step as compiled for this machine's eight devices."""
    config = tiny(model={"remat": remat}, train={"accumulate": accumulate})
    return planning._compiled(workloads.train(config, 1000, jax.devices()), quick=False)


@pytest.mark.slow
def test_activations_shrink_with_what_is_kept_and_with_parts():
    none, full, parts = (
        compiled(*case)["memory"]["activations and temporaries"] for case in (("none",), ("full",), ("full", 4))
    )
    assert none > full > parts


@pytest.mark.slow
def test_gradients_are_reduced_and_products_made_again():
    parameters = workloads.train(tiny(), 1000, jax.devices()).parameters
    # Gradients are in float32 here; in a program for a TPU, gradients of products are in bfloat16.
    assert 2 <= compiled("none")["program"].payload["all-reduce"] / parameters < 6
    assert compiled("full")["program"].flops >= compiled("none")["program"].flops


def test_a_plan_that_fits_and_its_table():
    found = run(tiny(), "h100:8")
    assert found["fits"] and found["method"].startswith("not compiled, which needs a GPU") and "advice" not in found
    assert found["bytes"]["total"] == sum(
        found["bytes"][name] for name in ("parameters", "optimizer", "gallery", "batch")
    )
    assert found["flops"]["model"] == flops.per_example(tiny().model) * 32 / 8
    assert found["seconds"]["bound"] == "compute" and "traffic" not in found and "estimate" not in found
    assert found["seconds"]["compute"] == pytest.approx(32 / found["photos_per_second"])
    printed = text.table(found)
    assert "it fits" in printed and "activations, memory traffic and collectives are left" in printed


@pytest.fixture
def here(monkeypatch):
    """Uses this machine's compiler instead of a TPU's compiler."""
    monkeypatch.setattr(topology, "devices", lambda pod: jax.devices()[: pod.size])
    monkeypatch.setattr(planning, "_QUICK", None)


@pytest.mark.slow
@pytest.mark.parametrize("workload", workloads.WORKLOADS)
def test_every_workload_is_compiled_and_printed(here, workload, monkeypatch):
    shape = {"model_type": "clip", "projection_dim": 8}
    for section in ("text_config", "vision_config"):
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape[section] = {**size, "patch_size": 112} if section == "vision_config" else size
    monkeypatch.setattr(workloads, "_L14", shape)
    changes = {"train.batch_size": 16, "model.hidden": 16, "model.location.hidden": 16, "model.location.out": 16}
    found = run(tiny(align=changes), "v5e:2x4", workload=workload)
    times = {name: found["seconds"][name] for name in ("compute", "memory", "vector", "links")}
    photos = {"train": 32, "align": 16, "embed": 256, "predict": 16}[workload]
    assert times[found["seconds"]["bound"]] == max(times.values())
    assert found["photos_per_second_at_bound"] == pytest.approx(photos / max(times.values()))
    assert found["bytes"]["total"] > found["bytes"]["parameters"] + found["bytes"]["activations and temporaries"] > 0
    assert found["flops"]["executed"] > 0 and found["vector"] > 0 and json.dumps(found)
    assert bool(found["collectives"]) == (workload in ("train", "align"))
    printed = text.table(found)
    assert f"v5e:2x4, {workload}: 8 chips" in printed and "compiled with full effort" in printed
    assert "vector unit" in printed and ("all-reduce" in printed) == (workload in ("train", "align"))


def test_times_follow_from_costs():
    program = dataclasses.replace(workloads.train(tiny(), 1000, jax.devices()), copies=2)
    chip = chips.CHIPS["v5e"]
    costs = hlo.Costs(
        flops=1e9, vector=2e9, traffic=3e9, cycles=6e6, kernels=[(10, 197e6, 1), (2, 0, 819e6)], between_slices=3.125e6
    )
    costs.payload["all-reduce"], costs.sent["all-reduce"], costs.runs["all-reduce"] = 1e8, 2e8, 3
    found = planning._times(program, {"program": costs}, chip, model=197e9 / 2)
    assert found["seconds"] == pytest.approx(
        {"compute": 1e9 / 197e12, "memory": 3 / 819, "vector": 2e9 / (4096 * 1.5e9), "links": 1e-3, "slices": 1e-3}
        | {"bound": "memory"}
    )
    # 6 M cycles at 1.5 GHz; ten kernels of 1 us of products and two of 1 ms of traffic, at half of the peak; links and
    # the network between slices.
    assert {name: found["estimate"][name] for name in ("instructions", "kernels", "collectives", "step")} == (
        pytest.approx({"instructions": 4e-3, "kernels": 4.02e-3, "collectives": 2e-3, "step": 10.02e-3})
    )
    assert found["estimate"]["mfu"] == pytest.approx(0.5e-3 / 10.02e-3)
    assert found["photos_per_second"] == pytest.approx(2 * 32 / 10.02e-3)
    assert found["days"] == pytest.approx(206_000_000 / found["photos_per_second"] / 86_400)


@pytest.mark.slow
def test_the_document_has_all_workloads(monkeypatch):
    program = dataclasses.replace(workloads.train(tiny(), 1000, jax.devices()), examples=1000)

    def run(config, pod, workload, rows, quick):
        costs = {"program": hlo.Costs(flops=1e9, traffic=3e9, cycles=6e6 / pod.size)}
        plan = {"topology": pod.name, "workload": workload, "chips": pod.size, "copies": 1, "batch_size": 32}
        plan |= {"method": "compiled", "bytes": {"total": 1}, "fits": True}
        return plan | planning._times(program, costs, chips.CHIPS[pod.chip], 1e9)

    def check(config, pod, workload, rows):
        return workloads.WORKLOADS[workload](config, rows, jax.devices())

    monkeypatch.setattr(planning, "check", check)
    with pytest.raises(SettingsError, match=r"config\.embed\.backbone is 'thumbnail'"):  # before anything is compiled
        text.document(tiny(embed={"backbone": "thumbnail"}), "geotoken plan --document", 1000)
    monkeypatch.setattr(planning, "run", run)
    page = text.document(tiny(), "geotoken plan --document", 1000)
    assert "| 2xv5e:16x16 |" in page and "| estimated photos/s |" in page and "GPUs are not in the tables" in page
    assert all(title in page for title in ("## Training, group 1", "## Alignment", "## Embedding", "## Decoding"))
    # Steps are shorter on more chips here, so the largest pod of a kind has the best speed per chip.
    assert re.search(r"\| 2xv5e:16x16 \| 0.0625 \| [\d,]+ \| [\d,]+ \| 100 % \|", page)


@pytest.mark.slow
def test_a_step_that_the_compiler_refuses_has_its_memory_and_advice(here, monkeypatch):
    def compile(program, quick):
        refused = {"method": "refused", "memory": {"activations and temporaries": 2**40}, "refused": True}
        kept = program.flops and program.photos == 8
        return {"method": "compiled", "memory": {"activations and temporaries": 2**20}} if kept else refused

    monkeypatch.setattr(planning, "_compiled", compile)
    config = tiny(gallery={"placement": "host"}, model={"remat": "full"}, train={"accumulate": 16, "batch_size": 128})
    small = tiny(train={"accumulate": 1, "batch_size": 32}, model={"remat": "full"})
    with pytest.raises(SettingsError, match="batch_size is 32"):
        workloads.train(planning.changed(small, [("train", {"accumulate": 16})]), 1000, jax.devices())
    found = run(small, "v5e:2x4")
    assert not found["fits"] and "traffic" not in found and config.train.accumulate == 16
    assert [tried["change"] for tried in found["advice"] if tried["fits"]] == ["--config.train.batch_size=8"]
    assert "it does not fit" in text.table(found) and "changes tried" in text.table(found)
    assert "| refused |" in text._markdown([found])


def test_what_does_not_fit_is_told_what_would():
    # 200 million photos of 52 bytes are 10 GB per device, and the chip has 8 GiB.
    small = dataclasses.replace(chips.CHIPS["a100"], memory=8 * 2**30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chips.CHIPS, "a100", small)
        found = run(tiny(gallery={"placement": "replicated"}), "a100:8", rows=200_000_000)
    assert not found["fits"]
    assert [tried["change"] for tried in found["advice"]] == ["--config.gallery.placement=sharded"]
    assert found["advice"][0]["fits"] and found["advice"][0]["bytes"] < found["bytes"]["gallery"] / 7
    assert "it does not fit" in text.table(found)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("b100:8", {}, "--topology=b100:8 is unknown: use CHIP:SHAPE"),
        ("h100", {}, "--topology=h100 is unknown"),
        ("0xv5e:4x4", {}, "--topology=0xv5e:4x4 is unknown: .*2xv5e:16x16"),
        ("h100:8", {"mesh": {"tensor": 3}}, r"config.mesh \(.*tensor=3\) does not fit 8 devices"),
        ("h100:8", {"train": {"accumulate": 3}}, "batch_size is 32: choose a multiple of 24, .*accumulate = 3"),
        ("h100:8", {"train": {"batch_size": 36}}, "batch_size is 36: choose a multiple of 8, .* = 8 devices"),
        ("h100:8", {"model": {"width": 18}, "mesh": {"data": 1, "fsdp": 4, "tensor": 2}}, "does not divide over fsdp"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(name, changes, message):
    with pytest.raises(SettingsError, match=message):
        run(tiny(**changes), name)


@pytest.mark.parametrize(
    "workload, changes, message",
    [
        ("embed", {"embed": {"backbone": "thumbnail"}}, "config.embed.backbone is 'thumbnail', which uses no"),
        ("embed", {}, "--workload=embed cannot be planned for --topology=h100:8"),
        ("embed", {"embed": {"huggingface.batch_size": 3}}, "batch_size is 3: choose a multiple of 8"),
        ("align", {"align": {"pixels.tower": "frozen"}}, "config.align.pixels.tower is 'frozen': set it to 'cached'"),
        ("align", {"align": {"train.batch_size": 12}}, "config.align.train.batch_size is 12: choose a multiple of 8"),
    ],
)
def test_workloads_that_cannot_be_planned_are_refused(workload, changes, message):
    with pytest.raises(SettingsError, match=message):
        run(tiny(**changes), "h100:8", workload=workload)


def test_a_topology_has_slices():
    assert topology.read("2xv5e:16x16") == topology.Topology("2xv5e:16x16", "v5e", (16, 16), 2)
    assert topology.read("2xv5e:16x16").size == 512 and topology.read("v5p:4x4x4").slices == 1


@pytest.mark.parametrize(
    "installed, message",
    [
        (
            "0.0.52",
            r"--topology=v5e:2x2 needs libtpu==0.0.42.\*, the TPU compiler .* but libtpu 0.0.52 is installed: run",
        ),
        ("0.0.421", "but libtpu 0.0.421 is installed"),
        (None, r"but no libtpu is installed: run pip install --target=.tpu --no-deps 'libtpu==0.0.42.\*'"),
    ],
)
def test_a_compiler_that_does_not_fit_jax_is_refused_before_compiling(monkeypatch, installed, message):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["jaxlib==1", 'libtpu==0.0.42.*; extra == "tpu"', "numpy>=2"]
    )
    with pytest.raises(SettingsError, match=message):
        topology.devices(topology.read("v5e:2x2"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.42.1")
    topology._check_compiler(topology.read("v5e:2x2"))


def test_the_compiler_gets_the_flags_of_the_launcher():
    launcher = re.findall(r'LIBTPU_INIT_ARGS="(--\S+)', (ROOT / "launch/env.sh").read_text())
    assert launcher and sorted(launcher) == sorted(topology.FLAGS.split())


def test_the_verb_prints_and_writes(tmp_path, capsys):
    jax.devices()
    sizes = ["level=6", "width=16", "heads=2", "encoder_layers=1", "decoder_layers=1"]
    arguments = [f"--config={common.__file__}", "--topology=h200:8", f"--output={tmp_path / 'plan.json'}"]
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *arguments, *(f"--config.model.{key}" for key in sizes)])
    assert end.value.code == 0 and "h200:8, train: 8 chips" in capsys.readouterr().out
    assert '"photos_per_second"' in (tmp_path / "plan.json").read_text()


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it was written without the chips
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_with_the_fused_kernel_a_step_stores_no_scores(kernel):
    model = {"level": 20, "width": 128, "neighbors": 15, "encoder_layers": 1, "decoder_layers": 1, "attention": kernel}
    program = workloads.train(tiny(model=model), 1000, topology.devices(topology.read("v5e:2x2")))
    program_text = program.function.lower(*program.arguments).compile(compiler_options=planning._QUICK).as_text()
    # 214 positions, and 216 with the padding to whole tiles. Scores are positions x positions.
    scores = [sizes for sizes in re.findall(r"\[([\d,]+)\]", program_text) if len(re.findall(r"\b21[46]\b", sizes)) > 1]
    assert bool(scores) == (kernel == "xla")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["v5e:2x2", "2xv5e:2x2"])
def test_a_pod_that_is_not_here_is_compiled_for(name):
    # With the paper's 214 positions and a width of 96, whole tiles and sums of rows as products, which
    # the model's operations do not count, are a few percent.
    one = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0, "remat": "none"}
    one |= {"level": 20, "width": 96, "feed_forward": 192, "neighbors": 15}
    found = run(tiny(model=one), name, quick=True)
    assert found["method"].startswith("compiled with minimal effort") and found["fits"]
    assert topology.FLAGS in os.environ["LIBTPU_INIT_ARGS"]
    assert found["flops"]["executed"] == pytest.approx(found["flops"]["model"], rel=0.1)
    assert found["estimate"]["instructions"] > found["seconds"]["compute"]
    assert (found["between_slices"] > 0) == (found["chips"] == 8)
    assert np.isfinite(list(found["bytes"].values())).all()
    if found["chips"] == 4:
        # Gradients of products are summed in bfloat16; gradients of biases, norms and token tables in float32.
        assert 2 < found["collectives"]["all-reduce"]["payload"] / found["parameters"] < 5
