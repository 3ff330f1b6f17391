"""Compiled programs in the user's cache."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from geotoken_jax import compiled


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Undoes what `keep` changes, and begins without a cache, as a process of a user does."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(compiled, "_folder", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def answers(key: Any, traced: list[int]) -> list[list[float]]:
    """Returns the results of a program as a new process computes them, and counts in `traced` how often it traces."""

    def add(state: Any, x: jax.Array) -> dict[str, Any]:
        traced.append(x.size)
        return {"sum": state["a"] + x, "none": None}

    run = compiled.jit(add, key)
    return [run({"a": np.float32(1)}, np.zeros(n, np.float32))["sum"].tolist() for n in (1, 1, 2)]


def programs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.program"))


def test_a_kept_program_is_neither_traced_nor_compiled_again(tmp_path: Path):
    compiled.keep()
    for key, expected in (({"a": 1}, [1, 2]), ({"a": 1}, []), ({"a": 2}, [1, 2])):
        traced: list[int] = []
        assert answers(key, traced) == [[1], [1], [1, 1]] and traced == expected
    files = programs(tmp_path)
    assert len(files) == 4 and {file.parent.stat().st_mode & 0o777 for file in files} == {0o700}
    for file in files:
        file.write_bytes(b"damaged")
    assert answers({"a": 1}, traced) == [[1], [1], [1, 1]] and traced == [1, 2, 1, 2]
    assert sum(file.stat().st_size > 100 for file in files) == 2


_LOOP = """
import sys
import jax, jax.numpy as jnp
from geotoken_jax import compiled

def body(x, k):
    return jnp.tanh(x @ x.T), jax.random.normal(jax.random.key(k), x.shape).sum() + x.sum()

compiled.keep()
loop = compiled.jit(lambda x: jax.lax.scan(body, x, jnp.arange(5))[1], sys.argv[1])
print(loop(jnp.arange(64.0).reshape(8, 8)).tolist())
"""


@pytest.mark.slow
def test_a_program_with_another_key_is_stored_whole_too():
    """An update of this package changes the key but not always the program, which is then in JAX's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    starts = [
        subprocess.run([sys.executable, "-c", _LOOP, key], env=environment, capture_output=True, text=True)
        for key in ("before the update", "after the update", "after the update")
    ]
    assert [start.returncode for start in starts] == [0, 0, 0], starts[-1].stderr
    assert len({start.stdout for start in starts}) == 1


def test_a_users_own_choice_of_a_cache_stays(tmp_path: Path):
    jax.config.update("jax_compilation_cache_dir", "own")
    compiled.keep()
    assert jax.config.jax_compilation_cache_dir == "own" and compiled._folder is None
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        compiled.keep()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    traced: list[int] = []
    assert answers({}, traced) == [[1], [1], [1, 1]] and traced == [1, 2] and not programs(tmp_path)


@pytest.mark.parametrize("reason", ["a file is in its place", "it is another user's"])
def test_without_a_folder_of_the_users_own_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
):
    if "file" in reason:
        (tmp_path / "cache").write_bytes(b"")
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    compiled.keep()
    assert jax.config.jax_compilation_cache_dir is None and compiled._folder is None
