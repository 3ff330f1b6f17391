"""Peak rates and memory of accelerators, as published by their makers, for rooflines and utilization."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of a chip.

    kinds: prefixes of JAX's `device_kind`. flops: floating-point operations per second, bf16 products with f32 sums.
    memory: bytes. bandwidth: bytes of memory traffic per second. links: bytes per second that a chip can send to and
    receive from the chips of its slice, the sum of both directions. vector: element-wise operations on 32-bit numbers
    per second. clock: cycles per second; 0 for GPUs. network: bytes per second that a chip can send to other slices,
    which is its share of the host's network; 0 for GPUs.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    links: float
    vector: float
    clock: float = 0.0
    network: float = 0.0


#: Element-wise operations per cycle of a TPU core: 8 x 128 lanes, each with 4 units. For a long chain of
#: multiplications, the TPU compiler estimates 93 % of this rate on v5e and v6e.
_VECTOR = 8 * 128 * 4
# Source of the TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e). Their clock is computed from their peak, which is
# cores x 4 matrix units x 128 x 128 x 2 x clock. v6e instead has 2 matrix units of 256 x 256 numbers, which take two
# rows per cycle. The network of a pod of 256 chips has 6.4 Tb/s (v5e) or 25.6 Tb/s (v6e). The network of a host with
# four v4 or v5p chips has 200 Gb/s.
# Source of the GPUs: NVIDIA's data sheets, without sparsity. `vector` is half of the float32 peak, because the peak
# counts a multiply-add as two operations.
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
