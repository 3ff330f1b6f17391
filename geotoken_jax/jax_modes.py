"""Protects computations from the global modes of JAX that a host program has set."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard() -> Iterator[None]:
    """Sets JAX's default modes inside the context or the decorated function, in the calling thread.

    In these modes numbers have 32 bits, types and ranks are promoted as usual, and arrays may be copied between host
    and devices.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield
