"""Peak rates and memory of accelerators, as published by their makers. Rooflines and utilization use this table."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of a chip.

    kinds: prefixes of JAX's `device_kind`. flops: floating-point operations per second, bf16 products with f32 sums.
    memory: bytes. bandwidth: bytes of memory traffic per second. links: bytes per second from and to other chips, the
    sum of both directions.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    links: float


#: Name -> chip. TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e). GPUs: NVIDIA's data sheets, without sparsity.
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1228e9, 600e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 400e9),
    "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95 * 2**30, 2765e9, 1200e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1640e9, 800e9),
    "a100": Chip(("NVIDIA A100",), 312e12, 80 * 2**30, 2039e9, 600e9),
    "h100": Chip(("NVIDIA H100",), 989e12, 80 * 2**30, 3350e9, 900e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141 * 2**30, 4800e9, 900e9),
}


def find(device_kind: str) -> Chip | None:
    """Returns the chip of a JAX `device_kind`, or None if it is not in CHIPS."""
    for chip in CHIPS.values():  # v5e must come before v5p, because "TPU v5" is a prefix of "TPU v5 lite"
        if device_kind.startswith(chip.kinds):
            return chip
    return None
