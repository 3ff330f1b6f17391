"""Peak rates and memory of accelerators, as published by their makers. Rooflines and utilization use this table."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of a chip.

    kinds: prefixes of JAX's `device_kind`. flops: floating-point operations per second, bf16 products with f32 sums.
    memory: bytes. bandwidth: bytes of memory traffic per second. links: bytes per second from and to other chips, the
    sum of both directions. vector: element-wise operations per second, 32 bits each. clock: cycles per second; 0 for
    GPUs. network: bytes per second that a chip sends to other slices, a share of its host's network; 0 for GPUs.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    links: float
    vector: float
    clock: float = 0.0
    network: float = 0.0


#: Element-wise operations per cycle of a TPU core: 8 x 128 lanes, each with 4 units. The TPU compiler counts 93 % of
#: them for a long chain of multiplications on v5e and v6e.
_VECTOR = 8 * 128 * 4
# TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e). Clocks follow from the peak, which is cores x 4 product units
# x 128 x 128 x 2 x clock; v6e has 2 units of 256 x 256, with two rows per cycle. The network of a pod of 256 chips has
# 6.4 Tb/s (v5e) or 25.6 Tb/s (v6e), and the network of a host of four v4 or v5p chips 200 Gb/s.
# GPUs: NVIDIA's data sheets, without sparsity. `vector` is half of the peak in float32, which counts a multiply-add as
# two operations.
#: Name -> chip.
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1228e9, 600e9, 2 * _VECTOR * 1.05e9, 1.05e9, 6.25e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 400e9, _VECTOR * 1.5e9, 1.5e9, 3.125e9),
    "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95 * 2**30, 2765e9, 1200e9, 2 * _VECTOR * 1.75e9, 1.75e9, 6.25e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1640e9, 800e9, _VECTOR * 1.75e9, 1.75e9, 12.5e9),
    "a100": Chip(("NVIDIA A100",), 312e12, 80 * 2**30, 2039e9, 600e9, 9.75e12),
    "h100": Chip(("NVIDIA H100",), 989e12, 80 * 2**30, 3350e9, 900e9, 33.5e12),
    "h200": Chip(("NVIDIA H200",), 989e12, 141 * 2**30, 4800e9, 900e9, 33.5e12),
}


def find(device_kind: str) -> Chip | None:
    """Returns the chip of a JAX `device_kind`, or None if it is not in CHIPS."""
    for chip in CHIPS.values():  # v5e must come before v5p, because "TPU v5" is a prefix of "TPU v5 lite"
        if device_kind.startswith(chip.kinds):
            return chip
    return None
