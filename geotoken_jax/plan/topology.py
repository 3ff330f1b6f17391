"""The chips of a pod: reads names of topologies, and describes absent chips for the compiler."""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from geotoken_jax import chips
from geotoken_jax.settings import SettingsError

#: Compiler flags that launch/env.sh sets for training on TPUs. A plan needs them too, because it must compile the
#: program that will run. A flag that libtpu does not have ends the process with "Unknown command line flag".
FLAGS = "--xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_data_parallel_all_reduce_opt=true"
#: Chip -> value of the environment variable TPU_ACCELERATOR_TYPE, which libtpu needs to compile for an absent machine.
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-16", "v5p": "v5p-8", "v6e": "v6e-8"}
#: With these environment variables, libtpu queries no metadata server, and several processes can compile at once.
_ABSENT = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The chips of a pod: one or more slices of the same shape.

    name: CHIP:SHAPE, such as v5e:16x16, or SLICESxCHIP:SHAPE, such as 2xv5e:16x16. chip: key of chips.CHIPS. shape:
    number of chips along each axis of a slice's network. slices: number of slices.
    """

    name: str
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """Number of chips in all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def compiled(self) -> bool:
        """Whether programs can be compiled for the chip."""
        return self.chip in _ACCELERATORS


def read(name: str) -> Topology:
    """Returns the topology named CHIP:SHAPE or SLICESxCHIP:SHAPE, as in "v5e:16x16", "2xv5e:16x16" or "h100:8".

    Raises SettingsError if the chip is not in chips.CHIPS or the name has another form.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not match or match[2] not in chips.CHIPS:
        known = ", ".join(chips.CHIPS)
        raise SettingsError(
            f"--topology={name} is unknown: use CHIP:SHAPE, as in v5e:16x16 or h100:8, with the number of slices in "
            f"front, as in 2xv5e:16x16; chips: {known}"
        )
    return Topology(name, match[2], tuple(map(int, match[3].split("x"))), int(match[1] or 1))


def devices(pod: Topology) -> Sequence[Any]:
    """Returns one device per chip of the pod.

    For TPUs, these are libtpu's descriptions of absent devices. For GPUs, they are CPU devices instead.

    Raises SettingsError if the TPU compiler is missing or does not fit jax, or if a TPU cannot have this shape.
    """
    jax.config.update("jax_platforms", "cpu")
    if not pod.compiled:
        return stand_ins(pod)
    _check_compiler(pod)
    from jax.experimental import topologies

    if FLAGS not in os.environ.get("LIBTPU_INIT_ARGS", ""):
        os.environ["LIBTPU_INIT_ARGS"] = f"{FLAGS} {os.environ.get('LIBTPU_INIT_ARGS', '')}"
    os.environ.update(_ABSENT, TPU_ACCELERATOR_TYPE=_ACCELERATORS[pod.chip])
    # With megacore, a v4 chip is one device. Otherwise each of its two cores would be a device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if pod.chip == "v4" else {}
    if pod.slices > 1:
        options["num_slices"] = pod.slices
    shape = f"{pod.chip}:{'x'.join(map(str, pod.shape))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=shape, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise SettingsError(f"--topology={pod.name} is not a shape of {pod.chip}, choose another: {error}") from None


def _check_compiler(pod: Topology) -> None:
    """Raises SettingsError if libtpu is missing or is not a version that the installed jax requires for TPUs.

    With another version, an error may come late. For example, libtpu 0.0.52 with jax 0.10.2 compiles for minutes, and a
    program with fsdp then fails with "INTERNAL".
    """
    try:
        installed = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    required = re.search(r"\blibtpu\s*==\s*([\w.*]+)", "\n".join(importlib.metadata.requires("jax") or ()))
    wanted = required[1] if required else ""
    if installed and f"{installed}.".startswith(wanted.removesuffix("*").rstrip(".") + "." if wanted else ""):
        return
    package = f"libtpu=={wanted}" if wanted else "libtpu"
    found = f"libtpu {installed} is" if installed else "no libtpu is"
    # The message recommends a separate folder, because a JAX program that finds libtpu on a machine without TPUs prints
    # errors.
    raise SettingsError(
        f"--topology={pod.name} needs {package}, the TPU compiler that jax {jax.__version__} requires, but {found} "
        f"installed: run pip install --target=.tpu --no-deps '{package}', then repeat the command with PYTHONPATH=.tpu"
    )


def stand_ins(pod: Topology) -> Sequence[Any]:
    """Returns one CPU device per chip of the pod. They have shardings, but a program that is compiled for them is not
    the program of the pod.

    Raises SettingsError if JAX is in use with fewer devices.
    """
    n = pod.size
    with contextlib.suppress(RuntimeError):  # if JAX is initialized, its number of devices cannot change
        jax.config.update("jax_num_cpu_devices", n)
    if len(jax.devices("cpu")) < n:
        raise SettingsError(f"JAX is in use already: plan for {n} chips in a new process, with `geotoken plan`")
    return jax.devices("cpu")[:n]
