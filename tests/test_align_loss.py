"""The contrastive losses: against the written-out formula, on one device and on several; the choice of negatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import align_loss
from geotoken_jax import sharding
from geotoken_jax.align import loss as contrast
from geotoken_jax.align.loss import LossSettings, Targets
from geotoken_jax.geo.distance import great_circle_km
from geotoken_jax.settings import SettingsError

A, B = jax.random.normal(jax.random.key(0), (2, 8, 6))
ALL, APART = jnp.ones(8, bool), jnp.arange(8.0)[:, None]
SCALE = jnp.float32(2.0)


@jax.jit
def info_nce(targets, photos, present=ALL, key=APART, queue=None):
    return contrast.info_nce(photos, Targets(targets, key, present), SCALE, chunk=3, queue=queue)


def written_out(a, b, rows, scale=2.0):
    a, b = (np.asarray(x, float)[rows] for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    weights = np.exp(np.exp(scale) * a @ b.T)
    own = np.diagonal(weights)
    return -(np.log(own / weights.sum(1)) + np.log(own / weights.sum(0))).mean() / 2


def test_equals_the_formula():
    loss, _ = info_nce(A, B)
    assert float(loss) == pytest.approx(written_out(A, B, range(8)), rel=1e-5)
    np.testing.assert_allclose(info_nce(3 * A, B)[0], loss, rtol=1e-5)  # cosines, not products
    assert float(info_nce(B, A)[0]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_the_sigmoid_loss_equals_the_formula():
    unit = [np.asarray(x / jnp.linalg.norm(x, axis=1, keepdims=True), float) for x in (A, B)]
    logits = np.exp(2) * unit[1] @ unit[0].T - 3
    signs = 2 * np.eye(8) - 1
    loss, _ = contrast.sigmoid(B, Targets(A, APART, ALL), SCALE, jnp.float32(-3), chunk=3)
    assert float(loss) == pytest.approx(np.log1p(np.exp(-signs * logits)).sum() / 8, rel=1e-5)


def test_accuracy_counts_nearest_pairs():
    swapped = A.at[jnp.array([0, 1])].set(A[jnp.array([1, 0])])
    assert float(info_nce(A, A)[1]) == 1
    assert float(info_nce(swapped, A)[1]) == 6 / 8


def test_absent_pairs_take_no_part():
    present = ALL.at[jnp.array([2, 5])].set(False)
    b = B.at[2].set(0).at[5].set(1e3)
    loss, accuracy = info_nce(A, b, present)
    assert float(loss) == pytest.approx(written_out(A, B, [0, 1, 3, 4, 6, 7]), rel=1e-5)
    assert float(accuracy) * 6 == pytest.approx(round(float(accuracy) * 6))
    gradient = jax.jit(jax.grad(lambda a, b: info_nce(a, b, present)[0], argnums=(0, 1)))(A, b)
    assert all(not g[jnp.array([2, 5])].any() and jnp.isfinite(g).all() for g in gradient)


def test_nobody_present_is_zero():
    loss, accuracy = info_nce(A, B, ~ALL)
    assert float(loss) == float(accuracy) == 0


def test_photos_of_one_target_are_no_negatives_of_each_other():
    b = B.at[2].set(B[0])
    a = A.at[2].set(A[0])
    loss, _ = info_nce(a, b, key=APART.at[2].set(APART[0]))
    # Rows 0 and 2 have seven others minus each other as negatives; any other row has both as negatives.
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    logits = np.asarray(jnp.exp(SCALE) * unit(a) @ unit(b).T, float)
    logits[0, 2] = logits[2, 0] = -np.inf
    log_own = [np.diagonal(logits) - np.log(np.exp(logits).sum(axis)) for axis in (0, 1)]
    assert float(loss) == pytest.approx(-np.mean(log_own), rel=1e-5)
    assert float(loss) < float(info_nce(a, b)[0])


def test_fingerprints_are_equal_where_rows_are():
    rows = jax.random.normal(jax.random.key(1), (200, 40)).astype(jnp.bfloat16).astype(jnp.float32)
    rows = rows.at[100:].set(rows[:100]).at[150, 7].multiply(1 + 2**-7).at[151].set(rows[51, ::-1]).at[0, 0].set(0.0)
    rows = rows.at[100, 0].set(-0.0)
    found = np.asarray(jax.jit(contrast.text_keys)(rows))
    same = (found[:, None] == found).all(-1)
    np.testing.assert_array_equal(same, (np.asarray(rows)[:, None] == np.asarray(rows)).all(-1))
    assert same.sum() == 200 + 2 * 98
    assert (found == found.astype(np.uint16)).all()


def test_places_nearer_than_a_distance_are_within_its_reach():
    rng = np.random.default_rng(0)
    places = np.concatenate([rng.uniform([-90, -180], [90, 180], (50, 2)), rng.normal([60, 180], 0.1, (50, 2))])
    places[:, 0] = places[:, 0].clip(-90, 90)
    places = places.astype(np.float32)
    key = np.asarray(contrast.place_keys(jnp.asarray(places)), float)
    apart = np.linalg.norm(key[:, None] - key, axis=-1)
    km = np.asarray(great_circle_km(*places.T[:, :, None], *places.T[:, None]))
    for limit in (0.0, 5.0, 25.0, 2500.0):
        clear = abs(km - limit) > 0.005
        np.testing.assert_array_equal((apart <= contrast.reach(limit))[clear], (km <= limit)[clear])
        assert (apart.diagonal() <= contrast.reach(limit)).all()


N, Q = 32, 16
PHOTOS, VECTORS, PAST = jax.random.normal(jax.random.key(2), (3, N, 12))
KEYS = jax.random.randint(jax.random.key(3), (2, N, 1), 0, 40).astype(jnp.float32)
TARGETS = Targets(VECTORS, KEYS[0], jnp.arange(N) % 5 != 0)
QUEUE = Targets(PAST[:Q], KEYS[1, :Q], jnp.arange(Q) < 11)


def graded(compare, kind, with_queue, mesh):
    """Returns loss, accuracy and every gradient."""

    def scored(photos, vectors, past, scale, bias):
        queue = QUEUE._replace(vectors=past) if with_queue else None
        return compare(kind, photos, TARGETS._replace(vectors=vectors), scale, bias, reach=1.0, queue=queue)

    @jax.jit
    def run(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(scored, argnums=(0, 1, 2, 3, 4), has_aux=True)(*arguments)

    split, whole = sharding.batch_sharding(mesh), jax.sharding.NamedSharding(mesh, sharding.spec())
    arguments = (PHOTOS, VECTORS, QUEUE.vectors, SCALE, jnp.float32(-3.0))
    return jax.device_get(run(*jax.device_put(arguments, (split, split, split, whole, whole))))


def mesh_of(*sizes):
    return sharding.make_mesh(sharding.MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])


@functools.cache
def plainly(kind, with_queue):
    return graded(align_loss.plain, kind, with_queue, mesh_of(1, 1, 1))


@pytest.mark.parametrize("kind", contrast.KINDS)
@pytest.mark.parametrize(
    ("sizes", "chunk", "with_queue", "ring"),
    [
        ((1, 1, 1), 7, True, True),
        ((8, 1, 1), 4, True, True),
        ((8, 1, 1), 4, True, False),
        ((8, 1, 1), 3, False, True),
        ((2, 4, 1), 99, True, False),
        ((2, 2, 2), 5, False, False),
        ((2, 2, 2), 5, False, True),
    ],
)
def test_in_chunks_on_any_mesh_it_is_the_plain_loss(sizes, chunk, with_queue, ring, kind, monkeypatch):
    monkeypatch.setattr(contrast, "_TURN_BYTES", 0 if ring else 1 << 20)
    found = graded(functools.partial(align_loss.ours, chunk=chunk), kind, with_queue, mesh_of(*sizes))
    wanted = plainly(kind, with_queue)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # InfoNCE does not depend on the bias, so its gradient is a sum of terms that cancel up to rounding.
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert np.any(found[1][2]) == with_queue


@pytest.mark.parametrize(("constant", "value"), [("_TURN_BYTES", 1), ("_GATHERED_BYTES", 1), ("", 0)])
def test_large_targets_travel_in_a_ring_and_small_ones_are_gathered(constant, value, monkeypatch):
    if constant:
        monkeypatch.setattr(contrast, constant, value)
    with jax.sharding.use_abstract_mesh(mesh_of(8, 1, 1).abstract_mesh):
        traced = str(jax.make_jaxpr(lambda a, b: contrast.info_nce(a, Targets(b, APART, ALL), SCALE, chunk=3))(A, B))
    assert ("ppermute" in traced) == bool(constant) and ("all_gather" in traced) != bool(constant)


def test_the_queue_makes_it_harder_for_photos_alone():
    past = Targets(B, APART + 100, ALL)
    assert float(info_nce(A, B, queue=past)[0]) > float(info_nce(A, B)[0])
    gone = [past._replace(present=~ALL), past._replace(key=APART[:1].repeat(8, 0))]
    rows = ALL & (jnp.arange(8) == 0)
    assert float(info_nce(A, B, rows, queue=gone[1])[0]) == float(info_nce(A, B, rows)[0]) == 0
    assert float(info_nce(A, B, queue=gone[0])[0]) == pytest.approx(float(info_nce(A, B)[0]), rel=1e-6)


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def steep(targets, photos):
    """The gradients at a scale of 403, whose exponential no float32 holds."""
    queue = Targets(targets, APART + 100, ALL)
    return contrast.info_nce(photos, Targets(targets, APART, ALL), jnp.float32(6), chunk=3, queue=queue)[0]


def test_a_large_scale_overflows_nowhere():
    assert all(jnp.isfinite(gradient).all() for gradient in steep(A, A))


def test_a_queue_that_does_not_divide_is_refused():
    with jax.sharding.use_abstract_mesh(mesh_of(2, 4, 1).abstract_mesh), pytest.raises(
        SettingsError, match=r"config\.align\.loss\.queue is 6, which does not divide over data x fsdp = 8 devices"
    ):  # fmt: skip
        info_nce(A, B, queue=Targets(A[:6], APART[:6], ALL[:6]))


@pytest.mark.parametrize("kind", contrast.KINDS)
def test_memory_is_far_under_the_plain_losss(kind):
    ours, plain = (
        align_loss.memory(lambda *a, f=f: f(kind, *a), 4096, 16, 8)
        for f in (functools.partial(align_loss.ours, chunk=64), align_loss.plain)
    )
    assert ours["temporary"] < plain["temporary"] / 10


@pytest.mark.parametrize(("changes", "said"), [
    ({"kind": "clip"}, r"kind is 'clip': choose one of info_nce, sigmoid"), ({"chunk": 0}, "chunk is 0"),
    ({"queue": -1}, "queue is -1"), ({"same_within_km": 20_020.0}, r"same_within_km is 20020\.0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(changes, said):
    with pytest.raises(ValueError, match=rf"config\.align\.loss\.{said}"):
        LossSettings(**{"kind": "info_nce", "chunk": 1, "queue": 0, "same_within_km": 0.0, **changes})
