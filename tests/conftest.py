"""Gives tests eight CPU devices, an empty home folder per session, and a temporary working directory per test."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags

from tests import isolation

ROOT = Path(__file__).parents[1]
#: Test files that take more than half a minute of a CPU, the longest first.
LONGEST = ("test_end_to_end", "test_pod", "test_killed")
_before = pytest.StashKey[dict[str, int]]()
_session = pytest.StashKey[Path]()

# grain reads absl flags, which nothing parses in tests.
flags.FLAGS.mark_as_parsed()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--platform", default="cpu", help="what JAX runs the tests on: cpu (default), cuda or tpu")


def pytest_configure(config: pytest.Config) -> None:
    """Replaces the environment before a test module imports jax; workers of xdist inherit it."""
    if hasattr(config, "workerinput"):
        return
    config.stash[_before] = isolation.listing(ROOT)
    config.stash[_session] = session = Path(tempfile.mkdtemp(prefix="geotoken-tests-"))
    (session / "home").mkdir()
    values = isolation.environment(ROOT, session, config.getoption("--platform"))
    os.environ.clear()
    os.environ.update(values)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest test files first: as the last one, a slow file would run while the other worker is idle."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session that has left something in the repository."""
    if (before := session.config.stash.get(_before, None)) is None:
        return
    if changed := isolation.changes(before, isolation.listing(ROOT)):
        print(f"\n{ROOT} was changed while the tests ran, and no test may: {', '.join(changed[:20])}")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_session, None):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs fixtures of wider scope than a test in an empty folder."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _own_folder_and_environment(tmp_path: Path) -> Iterator[None]:
    """Runs a test in its temporary folder, and undoes its changes of the environment."""
    folder, environment = os.getcwd(), dict(os.environ)
    os.chdir(tmp_path)
    yield
    os.chdir(folder)
    if environment != dict(os.environ):
        os.environ.clear()
        os.environ.update(environment)
