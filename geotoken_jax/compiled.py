"""Stores compiled programs in a cache of the user. The next process on this machine loads them instead of compiling.

Loading a compiled program can run any code. For this reason exports, which may come from other people, contain no
compiled programs. The cache is used only if no other user can write to it.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import platform
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from geotoken_jax import disk, settings

#: Environment variables that change how a program is compiled.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "CUDA_VISIBLE_DEVICES")
#: Folder of the cache. If None, programs are not stored.
_folder: Path | None = None
_one_at_a_time = threading.Lock()


def keep() -> None:
    """Makes this process store compiled programs in the user's cache, and load the programs that are already there.

    Call it before the first computation. Nothing changes if the user has chosen a folder for JAX's own cache
    (JAX_COMPILATION_CACHE_DIR), has switched JAX's cache off (JAX_ENABLE_COMPILATION_CACHE=0), or cannot write to the
    folder of this cache.
    """
    global _folder
    options: Any = jax.config
    if _folder or options.jax_compilation_cache_dir or not options.jax_enable_compilation_cache:
        return
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError:  # the folder belongs to another user, or the disk cannot be written
        return
    if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
        _folder = folder
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # By default JAX does not store programs that compile in less than a second. A prediction runs dozens of these.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def jit(function: Callable[..., Any], key: Any) -> Callable[..., Any]:
    """Returns the compiled function. If the cache has its program, the function is not traced and not compiled.

    Until `keep` is called, this is the same as jax.jit(function).

    key: values that the function's computation depends on, besides its arguments and the code of this package, such as
    the settings of a model. Functions that compute different results must have different keys.
    """
    traced, programs = jax.jit(function), {}

    def run(*arguments: Any) -> Any:
        if _folder is None:
            return traced(*arguments)
        leaves, tree = jax.tree.flatten_with_path((arguments, {}))
        types = tuple((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves)
        if types not in programs:
            file = _folder / f"{_digest([settings.plain(key), types])}.program"
            programs[types] = _load(file, tree) or _compile(traced, arguments, file)
        return programs[types](*arguments)

    return run


def _compile(traced: Any, arguments: Any, file: Path) -> Callable[..., Any]:
    lowered = traced.lower(*arguments)
    with _without_jax_cache():
        program = lowered.compile()
    try:
        data, _, out = serialize_executable.serialize(program)
        example = jax.tree.unflatten(out, range(out.num_leaves))
        with disk.writing(file) as temporary:
            temporary.write_bytes(pickle.dumps((data, example)))
    except Exception as error:  # the backend cannot serialize programs, or the disk is full: the program runs anyway
        logging.getLogger(__name__).debug("a compiled program is not kept: %s", error)
    return program


@contextlib.contextmanager
def _without_jax_cache() -> Iterator[None]:
    """Switches JAX's own cache off in this process.

    A program that JAX has loaded from its cache cannot be stored a second time: XLA would write a file without the
    program's functions, and the next process would fail with "Function ... not found" (jaxlib 0.10.2).
    """
    with _one_at_a_time:
        try:
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()  # JAX reads the setting once, and again after a reset
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()


def _load(file: Path, tree: Any) -> Callable[..., Any] | None:
    try:
        data, example = pickle.loads(file.read_bytes())
        out, devices = jax.tree.structure(example), jax.local_devices()[:1]
        return serialize_executable.deserialize_and_load(data, tree, out, execution_devices=devices)
    except FileNotFoundError:
        return None
    except Exception as error:  # the file is damaged: the program is compiled and written again
        logging.getLogger(__name__).debug("%s cannot be loaded: %s", file, error)
        return None


def _cache_folder() -> Path:
    """Returns the cache's folder. Each kind of processor has a folder of its own, because programs contain instructions
    that other processors lack."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "geotoken" / "compiled" / hashlib.sha256(_processor().encode()).hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps([_environment(), key], sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _environment() -> list[Any]:
    """Returns further values that a compiled program depends on: code of this package, versions, device and flags."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    device = jax.local_devices()[0]
    options: Any = jax.config
    machine = [device.device_kind, device.client.platform_version, options.jax_default_matmul_precision]
    return [code.hexdigest(), versions, machine, [os.environ.get(name) for name in _VARIABLES]]
