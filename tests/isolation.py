"""Isolates a test session from the machine's environment and home folder, and finds files that it leaves behind.

conftest.py uses it; it imports nothing that reads the environment.
"""

import importlib.metadata
import os
from pathlib import Path

#: Prefixes of variables from which programs read settings, credentials or folders.
PREFIXES = (
    "AWS_", "CLOUDSDK_", "FSSPEC_", "GCSFS_", "GEOTOKEN_", "GOOGLE_", "HF_", "HUGGINGFACE_", "HYPOTHESIS_", "JAX_",
    "LIBTPU_", "SLURM_", "TF_", "TFDS_", "TPU_", "TRANSFORMERS_", "WANDB_", "XDG_", "XLA_",
)  # fmt: skip
#: Folders of the repository that tools write to during a session; tests must not use them.
TOOLS = {
    ".git", ".venv", ".torch", ".beam", ".tools", ".onnx", ".tensorflow", ".tpu", ".pytest_cache", ".ruff_cache",
    "__pycache__", "site", "build", "dist",
}  # fmt: skip


def xla_flags(devices: int) -> str:
    """Returns XLA_FLAGS for a number of CPU devices, with fast compilation and long timeouts."""
    # Tests compile far longer than they run. Without LLVM's optimizations a gradient takes 2.9 s instead of 6.4 s, and
    # without the emitters of fusions in MLIR a run of tests/pod.py takes 37 s of CPU instead of 52 s.
    # Eight devices that meet on two busy cores may be minutes apart, and XLA ends the process after 40 s of waiting.
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
    # XLA ends the process for a flag that it does not know, and later versions have only the emitters.
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def environment(root: Path, session: Path, platform: str) -> dict[str, str]:
    """Returns the environment of a test session: the caller's without PREFIXES, and with folders under `session`.

    root: the repository, importable from any working directory. platform: value of JAX_PLATFORMS.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    paths = [str(root), *(os.path.abspath(path) for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "HOME": str(session / "home"),
        "XDG_CACHE_HOME": str(session / "home" / ".cache"),
        "HF_HOME": str(session / "home" / "huggingface"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(session / "hypothesis"),
        "JAX_PLATFORMS": platform,
        "XLA_FLAGS": xla_flags(devices=8),
        # One cache for all workers and for the processes that tests start.
        "JAX_COMPILATION_CACHE_DIR": str(session / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def listing(root: Path) -> dict[str, int]:
    """Returns path -> time of the last change in ns, of the files at the root of the repository and under runs/.

    Folders at the root count by their name alone: somebody may edit the sources while tests run.
    """
    found = {str(path.relative_to(root)): 0 for path in root.iterdir() if path.name not in TOOLS}
    for path in (root / "runs").rglob("*"):
        found[str(path.relative_to(root))] = 0 if path.is_dir() else path.lstat().st_mtime_ns
    return found


def changes(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Returns the sorted paths that are in only one listing, or have another time."""
    return sorted({name for name, _ in before.items() ^ after.items()})
