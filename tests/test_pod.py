"""Training on other devices and in several processes is the same training."""

from pathlib import Path

import numpy as np
import pytest

from geotoken_jax import randomness
from tests import pod

STEPS = 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    pod.run(folder, (1, 1, 1), "host", STEPS)
    assert pod.sequence(folder, "train/loss")[-5:].mean() < pod.sequence(folder, "train/loss")[:5].mean() - 0.2
    return folder


def assert_same(folder: Path, expected: Path) -> None:
    for names in (pod.LOSSES, ("validation/loss", "validation/loss_level_0")):
        np.testing.assert_allclose(pod.sequence(folder, *names), pod.sequence(expected, *names), rtol=2e-4, atol=2e-5)


# tests/test_placement.py has the other six of nine.
@pytest.mark.parametrize(
    "mesh, where", [((2, 2, 2), "replicated"), ((8, 1, 1), "host"), ((1, 4, 2), "sharded")], ids=str
)
def test_eight_devices_train_as_one_wherever_the_gallery_lies(tmp_path, one_device, mesh, where):
    pod.run(tmp_path, mesh, where, STEPS)
    assert_same(tmp_path, one_device)


def test_a_batch_in_parts_trains_as_the_whole(tmp_path):
    """Without dropout, because each part has a random key of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "words", lambda key, *shape: None)
        for name, accumulate, mesh in (("whole", 1, (1, 1, 1)), ("parts", 4, (2, 1, 1))):
            pod.run(tmp_path / name, mesh, "sharded", 6, accumulate=accumulate)
    found, expected = (
        pod.sequence(tmp_path / name, "train/loss", "train/gradient_norm") for name in ("parts", "whole")
    )
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


#: An order of eight devices in which the pairs of axis tensor are (0, 4), (1, 2), (3, 5) and (6, 7). Of two processes
#: with four devices each, the first holds shards 0, 1 and 2 of a batch, and the second holds shards 0, 2 and 3.
OVERLAPPING = (0, 4, 1, 2, 3, 5, 6, 7)


def test_two_processes_train_as_one_and_one_goes_on_alone(tmp_path, one_device):
    """The two share rows of a batch. One goes on with another mesh and another placement of the gallery."""
    pod.finish(2, folder=tmp_path, mesh=(2, 2, 2), where="sharded", steps=10, order=OVERLAPPING)
    pod.run(tmp_path, (8, 1, 1), "host", STEPS)  # already compiled by another test in this file
    assert_same(tmp_path, one_device)


@pytest.mark.parametrize("where", ["host", "sharded"])
@pytest.mark.parametrize(
    "processes, devices, mesh, order",
    [
        (2, 2, (1, 1, 2), None),
        (4, 4, (2, 1, 2), (0, 2, 1, 3)),
    ],
    ids=str,
)
def test_processes_that_share_matrix_products_train_as_one(
    tmp_path, one_device, processes, devices, mesh, order, where
):
    """One device per process. Of four processes, 0 and 2 share products, and 1 and 3."""
    pod.finish(processes, devices, folder=tmp_path, mesh=mesh, where=where, steps=STEPS, order=order)
    assert_same(tmp_path, one_device)
