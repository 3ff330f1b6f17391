"""Kernels of attention: their choice, the Pallas kernel in interpret mode against XLA, and dropped weights."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from geotoken_jax import attention, attention_tpu, randomness, settings, sharding, stack
from geotoken_jax.plan import topology
from tests import fixtures, pod

on_a_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
#: Tolerances for numbers of about 1. A bfloat16 has 8 bits: its numbers next to 1 are 2^-7 above and 2^-8 below it. The
#: gradients round weights and scores before each product, in another order than XLA.
CLOSE = {"float32": dict(rtol=1e-5, atol=1e-5), "bfloat16": dict(rtol=2**-5, atol=2**-5)}


@pytest.fixture
def interpreted(monkeypatch):
    """Every attention without a causal mask runs the Pallas kernel, on the CPU."""
    monkeypatch.setattr(attention_tpu, "INTERPRET", True)
    monkeypatch.setattr(attention, "choose", lambda kernel, q, k, causal=False: "xla" if causal else "pallas")


def mesh_of(*sizes: int):
    return sharding.make_mesh(sharding.MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])


def inputs(b: int, queries: int, keys: int, heads: int, d: int, dtype: str):
    rng = np.random.default_rng(0)
    shapes = ((b, queries, heads, d), (b, keys, heads, d), (b, keys, heads, d), (b, queries, heads, d))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def result_and_gradients(q, k, v, weight, lengths, mesh, kernel="auto"):
    def total(q, k, v, weight, lengths):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = attention.attention(q, k, v, kernel=kernel, lengths=lengths)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v, weight, lengths)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "queries, keys, heads, d, lengths",
    [
        (214, 214, 2, 64, (214, 1, 2, 100, 128, 129, 213, 18)),
        (11, 214, 2, 64, range(1, 215)),
        (364, 364, 2, 64, (364, 1)),
        (257, 257, 2, 64, None),
        (20, 70, 3, 72, (70, 1, 2, 65)),  # heads that do not fill registers
        (9, 80, 2, 128, (80, 1)),
    ],
    ids=["encoder", "decoder", "group 1", "CLIP", "SigLIP", "wide"],
)
def test_the_kernel_computes_what_xla_does(monkeypatch, queries, keys, heads, d, lengths, dtype):
    monkeypatch.setattr(attention_tpu, "INTERPRET", True)
    n = None if lengths is None else jnp.array(lengths, jnp.int32)
    q, k, v, weight = inputs(2 if n is None else len(n), queries, keys, heads, d, dtype)
    expected = result_and_gradients(q, k, v, weight, n, mesh_of(1, 1, 1), "xla")
    monkeypatch.setattr(attention, "choose", lambda *_, **__: "pallas")
    found = result_and_gradients(q, k, v, weight, n, mesh_of(1, 1, 1))
    for name, ours, theirs in zip(("result", "dq", "dk", "dv"), found, expected, strict=True):
        # The gradient of the one key that all queries attend to is a sum over all of them.
        scale = max(1.0, float(np.abs(theirs).max()) / 8)
        np.testing.assert_allclose(ours / scale, theirs / scale, err_msg=name, **CLOSE[dtype])


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_the_kernel_on_a_mesh_is_what_xla_is_on_one_device(interpreted, sizes):
    mesh, lengths = mesh_of(*sizes), jnp.arange(1, 81, 10, dtype=jnp.int32)
    q, k, v, weight = inputs(8, 11, 80, 4, 64, "float32")
    split = NamedSharding(mesh, sharding.spec("batch", None, "heads"))
    found = result_and_gradients(*jax.device_put((q, k, v, weight), split), lengths, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose", lambda *_, **__: "xla")
        expected = result_and_gradients(q, k, v, weight, lengths, mesh_of(1, 1, 1))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE["float32"])


@pytest.mark.slow
def test_training_with_the_kernel_has_the_losses_of_training_without(tmp_path, monkeypatch):
    pod.run(tmp_path / "xla", (1, 1, 1), "replicated", 20)
    expected = pod.sequence(tmp_path / "xla", *pod.LOSSES)
    monkeypatch.setattr(attention_tpu, "INTERPRET", True)
    monkeypatch.setattr(attention, "choose", lambda kernel, q, k, causal=False: "xla" if causal else "pallas")
    for mesh in ((1, 1, 1), (2, 2, 2)):
        folder = tmp_path / str(mesh)
        pod.run(folder, mesh, "replicated", 20)
        np.testing.assert_allclose(pod.sequence(folder, *pod.LOSSES), expected, rtol=2e-4, atol=2e-5)


def abstract_mesh(platform: str, *sizes: int) -> AbstractMesh:
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    return AbstractMesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, abstract_device=device)


def chosen(platform, *, requested="auto", sizes=(2, 1, 1), dtype="bfloat16", causal=False, shape=(8, 214, 214, 8, 64)):
    b, queries, keys, heads, d = shape
    q, k = (jax.ShapeDtypeStruct((b, n, heads, d), dtype) for n in (queries, keys))
    with jax.sharding.use_abstract_mesh(abstract_mesh(platform, *sizes)):
        return attention.choose(requested, q, k, causal=causal)


def test_auto_on_a_tpu_takes_the_kernel_if_photos_heads_and_memory_allow_it():
    assert chosen("tpu") == chosen("tpu", sizes=(2, 2, 2)) == chosen("tpu", shape=(8, 11, 214, 8, 64)) == "pallas"
    assert chosen("tpu", shape=(8, 364, 364, 8, 64)) == "pallas"
    towers = [(257, 16, 64), (197, 12, 64), (256, 12, 64), (256, 16, 72)]
    assert [chosen("tpu", shape=(8, n, n, heads, d)) for n, heads, d in towers] == ["pallas"] * 4
    assert chosen("tpu", shape=(8, 729, 729, 16, 72)) == "xla"  # its rows do not fit
    assert chosen("tpu", shape=(8, 11, 11, 8, 64), causal=True) == chosen("tpu", causal=True) == "xla"
    assert chosen("tpu", requested="xla") == chosen("tpu", dtype="float32") == "xla"
    assert chosen("tpu", sizes=(16, 1, 1)) == chosen("tpu", sizes=(1, 1, 16)) == "xla"  # 8 photos, 8 heads
    assert chosen("cpu") == "xla"


def test_on_a_tpu_sequences_fill_whole_tiles():
    assert attention.positions(214) == 214
    with jax.sharding.use_abstract_mesh(abstract_mesh("cpu", 1, 1, 1)):
        assert attention.positions(214) == 214
    with jax.sharding.use_abstract_mesh(abstract_mesh("tpu", 2, 1, 1)):
        assert [attention.positions(n) for n in (214, 216, 364, 19)] == [216, 216, 368, 24]


@pytest.mark.parametrize("remat, kernels", [("none", 2), ("dots", 2), ("full", 3)])
def test_the_backward_pass_runs_the_kernel_again_only_if_nothing_is_kept(interpreted, remat, kernels):
    mesh, arrays = mesh_of(1, 1, 1), inputs(8, 16, 64, 2, 64, "bfloat16")

    def body(layer, x, _):
        return layer.scale[...] * attention.attention(x, *arrays[1:3], kernel="auto").astype(x.dtype), None

    layers = stack.make(lambda rngs: nnx.RMSNorm(64, param_dtype=jnp.bfloat16, rngs=rngs), 3, nnx.Rngs(0))
    graph, state = nnx.split(layers)

    def total(state, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(stack.scan(nnx.merge(graph, state), body, x, None, remat)[0].astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(total))(state, arrays[0]))
    assert text.count("name=forward_attention") + text.count("name=backward_attention") == kernels
    assert "reduce_precision" not in text


def test_auto_without_a_mesh_or_within_a_shard_map_is_xla():
    q = jax.ShapeDtypeStruct((8, 214, 8, 64), jnp.bfloat16)
    assert attention.choose("auto", q, q) == "xla"
    found = []
    with jax.sharding.use_abstract_mesh(abstract_mesh("tpu", 2, 1, 1)):
        spec = sharding.spec("batch")
        inner = jax.shard_map(
            lambda x: (found.append(attention.choose("auto", x, x)), x)[1], in_specs=spec, out_specs=spec
        )
        jax.eval_shape(inner, q)
    assert found == ["xla"]


@pytest.mark.parametrize("capability, kernel", [("9.0", "cudnn"), ("7.5", "xla"), ("gfx942", "xla")])
def test_auto_on_a_gpu_takes_cudnn_if_it_can(monkeypatch, capability, kernel):
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert chosen("gpu") == chosen("gpu", shape=(8, 257, 257, 16, 64)) == kernel
    assert chosen("gpu", dtype="float32") == chosen("gpu", shape=(8, 214, 214, 8, 36)) == "xla"
    assert chosen("gpu", shape=(8, 11, 11, 8, 64)) == chosen("gpu", shape=(8, 1, 214, 8, 64)) == "xla"


def test_cudnn_without_a_gpu_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(
        settings.SettingsError, match=r"'cudnn', which needs a GPU, but JAX uses a tpu: set it to 'auto'"
    ):
        chosen("tpu", requested="cudnn")
    model = fixtures.model("ours", attention="cudnn", dtype="bfloat16")
    with pytest.raises(settings.SettingsError, match=r"config\.model\.attention"):
        fixtures.forward(model, fixtures.batch())


def test_cudnn_leaves_short_sequences_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = {keys: chosen("gpu", requested="cudnn", shape=(8, keys, keys, 8, 64)) for keys in (11, 19, 21, 214, 364)}
    assert found == {11: "xla", 19: "xla", 21: "xla", 214: "cudnn", 364: "cudnn"}


@on_a_gpu
@pytest.mark.parametrize("queries", [11, 214])
def test_cudnn_computes_what_xla_does(queries):
    q, k, v, weight = inputs(4, queries, 214, 8, 64, "bfloat16")
    lengths = jnp.array([214, 100, 17, 4], jnp.int32)
    found, expected = (
        result_and_gradients(q, k, v, weight, lengths, mesh_of(1, 1, 1), kernel) for kernel in ("auto", "xla")
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_dropped_weights_leave_the_mean_and_hide_what_is_hidden(causal):
    q, k, v, _ = inputs(2, 5, 5, 2, 8, "float32")
    lengths = jnp.array([5, 3], jnp.int32)

    def mixed(key):
        words = randomness.words(key, 2, 1, 5)
        drop = None if words is None else lambda weights: randomness.dropout(weights, 0.5, words)
        return attention.attention(q, k, v, kernel="auto", causal=causal, lengths=lengths, drop=drop)

    found = jax.jit(jax.vmap(mixed))(jax.random.split(jax.random.key(0), 4000))
    assert float(found.std(0).max()) > 0.5
    np.testing.assert_allclose(found.mean(0), mixed(None), atol=0.1)


@pytest.mark.slow
def test_attention_dropout_acts_in_training_alone():
    quiet, dropping = (fixtures.model("ours", attention_dropout=rate) for rate in (0.0, 0.5))
    batch, key = fixtures.batch(), jax.random.key(0)
    found, without = (np.exp(fixtures.forward(dropping, batch, k)) for k in (key, None))
    assert np.abs(found - without).max() > 0.01
    np.testing.assert_array_equal(without, np.exp(fixtures.forward(quiet, batch)))


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # it was written without the chips
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernel_compiles_for_absent_tpus_and_keeps_scores_on_chip(name):
    devices = topology.devices(topology.read(name))[:4]
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    split = NamedSharding(mesh, sharding.spec("batch", None, "heads"))

    def total(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(attention.attention(q, k, v, kernel="auto").astype(jnp.float32))

    for queries, keys, heads, d in ((214, 214, 8, 64), (11, 214, 8, 64), (257, 257, 4, 64), (256, 256, 4, 72)):
        q, k = (jax.ShapeDtypeStruct((16, n, heads, d), jnp.bfloat16, sharding=split) for n in (queries, keys))
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k).compile().as_text()
        assert "backward_attention" in text and f"{queries},{keys}]" not in text
