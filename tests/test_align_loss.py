"""InfoNCE: against the formula written out, and who is whose negative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geotoken_jax.align.loss import info_nce, same_rows

A, B = jax.random.normal(jax.random.key(0), (2, 8, 6))
ALL, NONE = jnp.ones(8, bool), jnp.zeros((8, 8), bool)
SCALE = jnp.float32(2.0)


def written_out(a, b, rows, scale=2.0):
    a, b = (np.asarray(x, float)[rows] for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    weights = np.exp(np.exp(scale) * a @ b.T)
    own = np.diagonal(weights)
    return -(np.log(own / weights.sum(1)) + np.log(own / weights.sum(0))).mean() / 2


def test_equals_the_formula():
    loss, _ = info_nce(A, B, SCALE, ALL, NONE)
    assert float(loss) == pytest.approx(written_out(A, B, range(8)), rel=1e-5)
    np.testing.assert_allclose(info_nce(3 * A, B, SCALE, ALL, NONE)[0], loss, rtol=1e-5)  # cosines, not products
    assert float(info_nce(B, A, SCALE, ALL, NONE)[0]) == pytest.approx(float(loss), rel=1e-5)


def test_accuracy_counts_nearest_pairs():
    swapped = A.at[jnp.array([0, 1])].set(A[jnp.array([1, 0])])
    assert float(info_nce(A, A, SCALE, ALL, NONE)[1]) == 1
    assert float(info_nce(swapped, A, SCALE, ALL, NONE)[1]) == 6 / 8


def test_absent_pairs_take_no_part():
    present = ALL.at[jnp.array([2, 5])].set(False)
    b = B.at[2].set(0).at[5].set(1e3)
    loss, accuracy = info_nce(A, b, SCALE, present, NONE)
    assert float(loss) == pytest.approx(written_out(A, B, [0, 1, 3, 4, 6, 7]), rel=1e-5)
    assert float(accuracy) * 6 == pytest.approx(round(float(accuracy) * 6))
    gradient = jax.grad(lambda a, b: info_nce(a, b, SCALE, present, NONE)[0], argnums=(0, 1))(A, b)
    assert all(not g[jnp.array([2, 5])].any() and jnp.isfinite(g).all() for g in gradient)


def test_nobody_present_is_zero():
    loss, accuracy = info_nce(A, B, SCALE, ~ALL, NONE)
    assert float(loss) == float(accuracy) == 0


def test_photos_of_one_target_are_no_negatives_of_each_other():
    target = jnp.array([[1.0, 2], [3, 4], [1, 2], *[[9.0, i] for i in range(5)]])
    same = same_rows(target)
    assert same.sum() == 8 + 2 and same[0, 2] and same[2, 0]
    b = B.at[2].set(B[0])
    a = A.at[2].set(A[0])
    loss, _ = info_nce(a, b, SCALE, ALL, same)
    # Rows 0 and 2 see each seven others less their twin; any other row sees both.
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    logits = np.asarray(jnp.exp(SCALE) * unit(a) @ unit(b).T, float)
    logits[0, 2] = logits[2, 0] = -np.inf
    log_own = [np.diagonal(logits) - np.log(np.exp(logits).sum(axis)) for axis in (0, 1)]
    assert float(loss) == pytest.approx(-np.mean(log_own), rel=1e-5)
    assert float(loss) < float(info_nce(a, b, SCALE, ALL, NONE)[0])
