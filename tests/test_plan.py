"""Planning: costs read from compiled programs, and counts against measured sizes."""

import dataclasses
import functools
import importlib.util

import jax
import numpy as np
import pytest

from configs import common
from geotoken_jax import chips, cli, configuration, hlo, plan
from geotoken_jax.model import flops
from geotoken_jax.settings import SettingsError

PROGRAM = """
HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (p: f32[16,64]) -> f32[1,64] {
  %p = f32[16,64]{1,0} parameter(0)
  %whole = f32[16,64]{1,0} all-reduce(%p), replica_groups=[1,16]<=[16], to_apply=%add
  %me = s32[] constant(0)
  ROOT %part = f32[1,64]{1,0} dynamic-slice(%whole, %me, %me), dynamic_slice_sizes={1,64}
}

%one_layer (stack: bf16[10,8,8], at: s32[]) -> bf16[8,8] {
  %stack = bf16[10,8,8]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %slice = bf16[1,8,8]{2,1,0} dynamic-slice(%stack, %at, %at, %at), dynamic_slice_sizes={1,8,8}
  ROOT %layer = bf16[8,8]{1,0} bitcast(%slice)
}

%inner.condition (state: (s32[], bf16[4,8])) -> pred[] {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(10)
  %turn = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%inner.body (state.1: (s32[], bf16[4,8], /*index=2*/bf16[10,8,8])) -> (s32[], bf16[4,8], bf16[10,8,8]) {
  %state.1 = (s32[], bf16[4,8]{1,0}, /*index=2*/bf16[10,8,8]{2,1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%state.1), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %stack.1 = bf16[10,8,8]{2,1,0} get-tuple-element(%state.1), index=2
  %w = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} fusion(%stack.1, %turn.1), kind=kLoop, calls=%one_layer
  %y = bf16[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = bf16[4,8]{1,0} all-reduce(%y), channel_id=2, replica_groups=mesh['a'=4,'b'=4] {'b'}, to_apply=%add
  ROOT %next = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) tuple(%turn.1, %z, %stack.1)
}

%outer.condition (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  ROOT %unknown = pred[] custom-call(%s), custom_call_target="Told"
}

%outer.body (s.1: (s32[], bf16[4,8], bf16[10,8,8])) -> (s32[], bf16[4,8], bf16[10,8,8]) {
  %s.1 = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) while(%s.1), condition=%inner.condition, body=%inner.body
}

ENTRY %main (g: f32[16,64], s.2: (s32[], bf16[4,8], bf16[10,8,8])) -> f32[1,64] {
  %g = f32[16,64]{1,0} parameter(0)
  %s.2 = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) parameter(1)
  %loops = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) while(%s.2), condition=%outer.condition, body=%outer.body, KNOWN
  %gathering = (f32[16,64]{1,0}, f32[64,64]{1,0}) all-gather-start(%g), replica_groups={{0,1,2,3},{4,5,6,7}}
  %gathered = f32[64,64]{1,0} all-gather-done(%gathering)
  ROOT %mine = f32[1,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"3"},"other":[]}'


def costs(text, turns=True):
    return hlo.Program(text).costs(turns)


def test_loops_within_loops_are_multiplied_out():
    found = costs(PROGRAM.replace("KNOWN", KNOWN))
    assert found.flops == 3 * 10 * 2 * 4 * 8 * 8 and found.unknown_loops == 0
    assert found.payload["all-reduce"] == 3 * 10 * (4 * 8 * 2)
    assert found.sent["all-reduce"] == 3 * 10 * (4 * 8 * 2) * 2 * 3 / 4
    once = costs(PROGRAM.replace("KNOWN", KNOWN), turns=False)
    assert once.flops == found.flops / 30 and once.payload["all-gather"] == found.payload["all-gather"]


def test_a_loop_of_unknown_turns_is_counted_once_and_told():
    found = costs(PROGRAM.replace(", KNOWN", ""))
    assert found.flops == 10 * 2 * 4 * 8 * 8 and found.unknown_loops == 1


def test_gathers_and_scatters_are_told_from_reductions():
    found = costs(PROGRAM)
    assert found.payload["all-gather"] == 4 * 16 * 64 * 4 and found.sent["all-gather"] == 3 * 16 * 64 * 4
    assert found.payload["reduce-scatter"] == 16 * 64 * 4 and found.sent["reduce-scatter"] == 15 * 64 * 4


def test_a_fusion_that_slices_reads_the_slice():
    program = hlo.Program(PROGRAM)
    body = program.computations["inner.body"]
    # Reads the layer's 8 x 8 slice of ten. The output, in S(1), and the loop counter's space are on the chip.
    assert program._traffic(body["w"], body) == 2 * 8 * 8 + 4
    assert program._traffic(body["y"], body) == 2 * (4 * 8 + 4 * 8)


def test_products_written_as_convolutions():
    # A product of 6 matrices [5, 7] x [7, 3] in a program for a TPU is a convolution with the batch as dilated window,
    # in which all but one position is padding.
    line = (
        "  %c = f32[6,5,3]{2,1,0} convolution(%l, %r), window={size=6 stride=5 pad=0_0 lhs_dilate=6}, "
        "dim_labels=0bf_0io->0bf"
    )
    product = hlo._instruction(line)
    assert product.operands == ("l", "r")
    known = {"l": dataclasses.replace(product, type="f32[6,5,7]"), "r": dataclasses.replace(product, type="f32[6,7,3]")}
    assert hlo._product(product, known) == 2 * 6 * 5 * 7 * 3


@pytest.mark.parametrize(
    "text, size",
    [
        ("replica_groups={{0,1},{2,3}}, x", 2),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,4]<=[4,2,2]T(0,2,1)", 4),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}, y", 4),
        ("replica_groups={}", 16),
    ],
)
def test_groups(text, size):
    assert hlo._group(text, 16) == size


def test_the_program_of_a_real_scan():
    """Compares the parser with this machine's compiler, which has known trip counts and may unroll all loops."""

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, w)[0]

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((16, 32), (5, 32, 32))]
    text = jax.jit(layers).lower(*shapes).compile().as_text()
    found = costs(text)
    assert found.unknown_loops == 0
    assert found.flops in (0, 5 * 2 * 16 * 32 * 32)  # 0 for a library call, whose operations are not in the text


def workload(rows=1000, **changes):
    """The paper's configuration in a tiny size. changes: section -> keys."""
    config = common.get_config()
    config.model.update(
        level=6, width=16, heads=2, feed_forward=32, encoder_layers=2, decoder_layers=2, neighbors=3, backbone_width=8
    )
    config.train.batch_size = 32
    for section, keys in changes.items():
        config[section].update(keys)
    jax.devices()  # first starts JAX with all devices of the tests
    return plan.read(configuration.read(config), rows)


def test_chips_are_what_they_are_sold_as():
    for chip in chips.CHIPS.values():
        assert 1e14 < chip.flops < 3e15 and 16 * 2**30 <= chip.memory <= 288 * 2**30
        # Between 100 and 600 operations per byte, and memory faster than links.
        assert 100 < chip.flops / chip.bandwidth < 600 and chip.bandwidth > chip.links


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_resident_bytes_are_those_of_the_real_arrays(sizes):
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    step = plan._Step(workload(mesh=mesh, gallery={"placement": "sharded"}, train={"ema": 0.9}), jax.devices())
    state = step.trainer.init(jax.random.key(0))

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    found = step.resident_bytes()
    assert found["parameters"] == held([state[name] for name in ("params", "constants", "ema")])
    assert found["optimizer"] == held(state["optimizer"])
    assert found["gallery"] == 1000 / 8 * (3 * 8 * 2 + step.workload.model.cells.length)
    assert step.parameters == sum(leaf.size for leaf in jax.tree.leaves(state["params"]))


@functools.cache
def compiled(remat, accumulate=1):
    """Returns the costs of the step as compiled for this machine's eight devices."""
    changes = {"model": {"remat": remat}, "train": {"accumulate": accumulate}}
    return plan._compiled(plan._Step(workload(**changes), jax.devices()), quick=False)


def test_activations_shrink_with_what_is_kept_and_with_parts():
    none, full, parts = (
        compiled(*case)["memory"]["activations and temporaries"] for case in (("none",), ("full",), ("full", 4))
    )
    assert none > full > parts


def test_gradients_are_reduced_and_products_made_again():
    step = plan._Step(workload(), jax.devices())
    # Gradients are in float32 here; a program for a TPU has those of products in bfloat16.
    assert 2 <= compiled("none")["payload"]["all-reduce"] / step.parameters < 6
    assert compiled("full")["flops"] >= compiled("none")["flops"]


def test_a_plan_that_fits_and_its_table():
    found = plan.run(workload(), plan.topology("h100:8"))
    assert found["fits"] and found["method"].startswith("not compiled, which needs a GPU") and "advice" not in found
    assert found["bytes"]["total"] == sum(
        found["bytes"][name] for name in ("parameters", "optimizer", "gallery", "batch")
    )
    assert found["flops"] == {"model": flops.per_example(workload().model) * 32 / 8}
    assert found["seconds"]["bound"] == "compute" and "traffic" not in found
    assert found["seconds"]["compute"] == pytest.approx(32 / found["examples_per_second"])
    assert "it fits" in plan.table(found) and "activations, memory traffic and collectives are left" in plan.table(
        found
    )


def test_a_compiled_plan_its_table_and_the_document(monkeypatch):
    """Uses this machine's compiler instead of a TPU's compiler."""
    monkeypatch.setattr(plan, "_devices", lambda where: jax.devices()[: where.size])
    monkeypatch.setattr(plan, "_QUICK", None)
    monkeypatch.setattr(plan, "DOCUMENTED", ("v5e:2x4",))
    found = plan.run(workload(), plan.topology("v5e:2x4"))
    times = {name: found["seconds"][name] for name in ("compute", "memory", "links")}
    assert times[found["seconds"]["bound"]] == max(times.values()) == pytest.approx(32 / found["examples_per_second"])
    assert found["bytes"]["total"] > found["bytes"]["parameters"] + found["bytes"]["activations and temporaries"] > 0
    printed = plan.table(found)
    assert "executed compute" in printed and "all-reduce" in printed and "compiled" in printed
    page = plan.document(workload(), "geotoken plan --document")
    assert "| v5e:2x4 |" in page and "| all-reduce, MB |" in page and "GPUs are not in the tables" in page


def test_a_step_that_the_compiler_refuses_has_its_memory_and_advice(monkeypatch):
    monkeypatch.setattr(plan, "_devices", lambda where: jax.devices()[: where.size])

    def compile(step, quick):
        refused = {"method": "refused", "memory": {"activations and temporaries": 2**40}, "refused": True}
        kept = step.workload.train.accumulate > 1
        return {"method": "compiled", "memory": {"activations and temporaries": 2**20}} if kept else refused

    monkeypatch.setattr(plan, "_compiled", compile)
    found = plan.run(workload(gallery={"placement": "host"}, model={"remat": "dots"}), plan.topology("v5e:2x4"))
    assert not found["fits"] and "traffic" not in found
    assert [tried["change"] for tried in found["advice"] if tried["fits"]] == ["--config.train.accumulate=4"]
    assert "it does not fit" in plan.table(found) and "changes tried" in plan.table(found)
    assert "| refused |" in plan._markdown([found])


def test_what_does_not_fit_is_told_what_would():
    # 200 million photos of 52 bytes are 10 GB per device, and the chip has 8 GiB.
    small = dataclasses.replace(chips.CHIPS["a100"], memory=8 * 2**30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chips.CHIPS, "a100", small)
        found = plan.run(workload(200_000_000, gallery={"placement": "replicated"}), plan.topology("a100:8"))
    assert not found["fits"]
    assert [tried["change"] for tried in found["advice"]] == ["--config.gallery.placement=sharded"]
    assert found["advice"][0]["fits"] and found["advice"][0]["bytes"] < found["bytes"]["gallery"] / 7
    assert "it does not fit" in plan.table(found)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("b100:8", {}, "--topology=b100:8 is unknown: use CHIP:SHAPE"),
        ("h100", {}, "--topology=h100 is unknown"),
        ("h100:8", {"mesh": {"tensor": 3}}, r"config.mesh \(.*tensor=3\) does not fit 8 devices"),
        ("h100:8", {"train": {"accumulate": 3}}, "batch_size is 32: choose a multiple of 24, .*accumulate = 3"),
        ("h100:8", {"train": {"batch_size": 36}}, "batch_size is 36: choose a multiple of 8, .* = 8 devices"),
        ("h100:8", {"model": {"width": 18}, "mesh": {"data": 1, "fsdp": 4, "tensor": 2}}, "does not divide over fsdp"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(name, changes, message):
    with pytest.raises(SettingsError, match=message):
        plan.run(workload(**changes), plan.topology(name))


def test_the_verb_prints_and_writes(tmp_path, capsys):
    jax.devices()
    tiny = ["level=6", "width=16", "heads=2", "encoder_layers=1", "decoder_layers=1"]
    arguments = [f"--config={common.__file__}", "--topology=h200:8", f"--output={tmp_path / 'plan.json'}"]
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *arguments, *(f"--config.model.{key}" for key in tiny)])
    assert end.value.code == 0 and "h200:8: 8 chips" in capsys.readouterr().out
    assert '"examples_per_second"' in (tmp_path / "plan.json").read_text()


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it was written without the chips
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_pod_that_is_not_here_is_compiled_for():
    one = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0, "neighbors": 1, "remat": "none"}
    found = plan.run(workload(model=one), plan.topology("v5e:2x2"), quick=True)
    assert found["method"] == "compiled with minimal effort" and found["fits"]
    assert found["flops"]["executed"] == pytest.approx(found["flops"]["model"], rel=0.1)
    # Gradients of products are summed in bfloat16; gradients of norms and token tables in float32.
    assert 2 < found["collectives"]["all-reduce"]["payload"] / found["parameters"] < 4
    assert np.isfinite(list(found["bytes"].values())).all()
