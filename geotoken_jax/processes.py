"""Several processes that train as one: who they are, and how they wait for each other.

A launcher gives every process JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
Without them a process is alone, and JAX is not even imported.
"""

import os

from geotoken_jax.settings import SettingsError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def count() -> int:
    """Returns how many processes there are. Raises SettingsError if the environment names them in part, or wrongly."""
    if _ADDRESS not in os.environ:
        return 1
    values = {name: os.environ.get(name, "") for name in (_COUNT, _INDEX)}
    wrong = next((name for name, value in values.items() if not value.isdigit()), None)
    if wrong is None and int(values[_INDEX]) >= int(values[_COUNT]):
        wrong = _INDEX
    if wrong:
        raise SettingsError(
            f"{_ADDRESS} is set and {wrong} is {values[wrong]!r}: set {_COUNT} to the number of processes and {_INDEX} "
            "to 0, 1, ... in each of them, or unset them all"
        )
    return int(values[_COUNT])


def index() -> int:
    """Returns this process's number; the first one writes what only one may write."""
    return int(os.environ[_INDEX]) if count() > 1 else 0


def start() -> None:
    """Connects the processes; must come before JAX looks for devices."""
    if count() > 1:
        import jax

        if not jax.distributed.is_initialized():
            jax.distributed.initialize(os.environ[_ADDRESS], count(), index())


def wait(where: str) -> None:
    """Returns when all processes have come to the same place."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)
