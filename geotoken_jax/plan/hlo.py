"""Counts operations, memory traffic, collectives and estimated cycles in the text of a compiled XLA program.

The body of a loop is counted once per iteration. XLA's own cost analysis counts it only once: a train step that scans
over ten layers would seem to cost a tenth of its real cost.
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
#: Type -> bytes per number. Names of other types contain the number of bits, as in f32, u8, f8e4m3fn and c64.
_BYTES_PER_NUMBER = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
#: Element-wise instructions, which a chip's vector unit runs. A reduction counts as one operation per input element.
_ELEMENTWISE = {
    "abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "clz", "compare", "convert", "cosine", "divide", "erf",
    "exponential", "exponential-minus-one", "floor", "is-finite", "log", "log-plus-one", "logistic", "maximum",
    "minimum", "multiply", "negate", "not", "or", "popcnt", "power", "reduce", "remainder", "round-nearest-afz",
    "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign",
    "sine", "sqrt", "subtract", "tan", "tanh", "xor",
}  # fmt: skip
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
#: Instructions without memory traffic of their own. The traffic of a loop or a call is counted in the computation that
#: it runs.
_WITHOUT_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "call", "conditional", "opt-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation, e.g. `%sum.2 = f32[8]{0} add(%x, %y), metadata={...}`.

    name: name of the result. type: type of the result, an array or a tuple of arrays. operands: names of the operands.
    inside: text between the parentheses after the opcode: the operands, the value of a constant, or the index of a
    parameter. rest: text after the closing parenthesis. root: whether the computation returns this result.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that this instruction runs.

        Left out are the small computations that reductions, sorts and collectives apply to pairs of numbers.
        """
        if self.opcode.endswith(("-done", "-update")) or self.opcode in COLLECTIVES:
            return []
        runs = ("fusion", "call", "while", "conditional", "async-start")
        return [n for match in _CALLED.findall(self.rest) for n in _NAME.findall(match)] if self.opcode in runs else []


@dataclasses.dataclass
class Costs:
    """Costs of a program on one device.

    flops: floating-point operations of dots, convolutions and kernels. vector: element-wise operations outside of
    kernels. traffic: bytes read from and written to main memory. cycles: clock cycles that the TPU compiler estimates,
    summed over instructions; it estimates none for kernels, collectives and asynchronous copies.

    kernels: a tuple per Pallas kernel: number of runs, floating-point operations per run, bytes per run. The operations
    and bytes come from the kernel's own cost estimate. Without an estimate, a kernel has no operations, and the bytes
    of its operands and results.

    payload: kind of collective -> bytes of its operands per device; for an all-gather, bytes of its result. sent: kind
    of collective -> bytes that a device sends if the devices pass data around a ring. runs: kind of collective ->
    number of runs. between_slices: bytes that a device sends to other slices, over the network of the data center.

    unknown_loops: number of loops with an unknown number of iterations; one iteration of each is counted.
    """

    flops: float = 0.0
    vector: float = 0.0
    traffic: float = 0.0
    cycles: float = 0.0
    kernels: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)
    payload: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    sent: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    runs: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    between_slices: float = 0.0
    unknown_loops: int = 0


class Program:
    """The computations of a compiled module, read from `Compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.devices = math.prod(
            int(n) for name in ("num_partitions", "replica_count") for n in re.findall(rf"{name}=(\d+)", text[:100_000])
        )
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and "->" in line and "=" not in line.split("->")[0].split("(")[0]:
                name = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif instruction := _instruction(line):
                current[instruction.name] = instruction

    def costs(self, turns: bool = True) -> Costs:
        """Returns the costs of the program. turns: whether to count a loop's body per iteration; if False, once."""
        total = Costs()
        self._add(total, self.entry, 1.0, turns, top=True)
        return total

    def _add(self, total: Costs, computation: str, times: float, turns: bool, top: bool) -> None:
        """Adds the costs of a computation to `total`.

        computation: name of the computation. times: number of its runs. top: whether its arrays are stored in memory;
        inside a fusion they are not.
        """
        instructions = self.computations[computation]
        for instruction in instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                total.flops += times * _product_flops(instruction, instructions)
            elif instruction.opcode in _ELEMENTWISE:
                reads = instructions[instruction.operands[0]] if instruction.opcode == "reduce" else instruction
                total.vector += times * _elements(reads.type)
            elif 'custom_call_target="tpu_custom_call"' in instruction.rest:
                total.kernels.append((times, *_kernel_cost(instruction, instructions)))
                total.flops += times * total.kernels[-1][1]
            elif instruction.opcode == "send" and "xla_megascale" in instruction.rest:
                total.between_slices += times * _to_other_slices(instruction, instructions)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self._add_collective(total, kind, instruction, instructions, times)
            if top and instruction.opcode not in _WITHOUT_TRAFFIC:
                total.traffic += times * self._traffic(instruction, instructions)
            if top and (cycles := _CYCLES.search(instruction.rest)):
                total.cycles += times * int(cycles[1])
            runs = times
            if instruction.opcode == "while":
                n = self._iterations(instruction)
                total.unknown_loops += n is None
                runs = times * (n or 1) if turns else times
            for name in instruction.called:
                self._add(total, name, runs, turns, top and instruction.opcode != "fusion")

    def _iterations(self, loop: Instruction) -> int | None:
        """Returns a loop's number of iterations, or None if it is unknown.

        The number is the trip count in the program's text, if there is one. If not, the loop's condition must compare a
        counter, which starts at 0, with a constant; the constant decides.
        """
        if known := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]  # pyright: ignore
        test = next((i for i in condition.values() if i.root), None)
        if test is None or test.opcode != "compare":
            return None
        bounds = [int(condition[o].inside) for o in test.operands if condition[o].opcode == "constant"]
        more = {"direction=LT": 0, "direction=LE": 1, "direction=NE": 0}
        extra = next((n for text, n in more.items() if text in test.rest), None)
        return bounds[0] + extra if len(bounds) == 1 and extra is not None else None

    def _add_collective(
        self, total: Costs, kind: str, instruction: Instruction, instructions: dict[str, Instruction], times: float
    ) -> None:
        n = _group_size(instruction.rest, self.devices)
        payload = times * sum(_bytes(instructions[o].type) for o in instruction.operands)
        if kind == "all-gather":
            payload *= n
        # The TPU compiler writes a reduce-scatter as an all-reduce that is followed by dynamic slices of its result.
        users = [i for i in instructions.values() if instruction.name in i.operands]
        if kind == "all-reduce" and users and all(i.opcode == "dynamic-slice" for i in users):
            kind = "reduce-scatter"
        rings = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        total.payload[kind] += payload
        total.runs[kind] += times
        total.sent[kind] += payload * rings.get(kind, (n - 1) / n)

    def _traffic(self, instruction: Instruction, instructions: dict[str, Instruction]) -> float:
        if instruction.opcode.endswith("-start"):
            return 0.0  # counted at the matching -done
        if instruction.opcode.endswith("-done"):
            source = instructions[instructions[instruction.operands[0]].operands[0]]
            moved = _bytes(instruction.type)
            return moved * (_is_in_memory(instruction.type) + _is_in_memory(source.type))
        operands = [instructions[o] for o in instruction.operands if o in instructions]
        if instruction.opcode == "fusion":
            return self._fusion_traffic(instruction, [o.type for o in operands])
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * _memory_bytes(instruction.type)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _memory_bytes(operands[1].type)
        return _memory_bytes(instruction.type) + sum(_memory_bytes(o.type) for o in operands)

    def _fusion_traffic(self, fusion: Instruction, types: list[str]) -> float:
        """Returns a fusion's memory traffic in bytes. types: types of the operands.

        If the fusion slices an operand, or updates a slice of it in place, only the slice is counted.
        """
        moved, in_place = 0.0, 0.0
        for at, kind in enumerate(types):
            if _is_in_memory(kind):
                read, updated = self._reads(fusion.called[0], at)
                moved += min(read, _memory_bytes(kind))
                in_place += updated
        return moved + max(0.0, _memory_bytes(fusion.type) - in_place)

    def _reads(self, computation: str, at: int) -> tuple[float, float]:
        """Returns two numbers of bytes for one operand of a fusion.

        The first number is the bytes that the fusion reads from the operand; it is infinite if the fusion reads all of
        it. The second number is the bytes that the fusion does not write: if it updates a slice of the operand in
        place, the other bytes of the operand stay in the result unchanged.

        computation: name of the fusion's computation; fusions in it are followed. at: index of the operand.
        """
        body = self.computations[computation]
        names = [i.name for i in body.values() if i.opcode == "parameter" and int(i.inside) == at]
        read, in_place = 0.0, 0.0
        while names:
            name = names.pop()
            for user in body.values():
                for position in (n for n, operand in enumerate(user.operands) if operand == name):
                    if user.opcode == "bitcast":
                        names.append(user.name)
                    elif user.opcode in ("dynamic-slice", "gather", "slice") and position == 0:
                        read += _bytes(user.type)
                    elif user.opcode == "dynamic-update-slice" and position == 0:
                        in_place += _bytes(user.type) - _bytes(body[user.operands[1]].type)
                    elif user.opcode == "fusion":
                        inner = self._reads(user.called[0], position)
                        read, in_place = read + inner[0], in_place + inner[1]
                    else:
                        read = math.inf
        return read, in_place


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opcode = re.match(r"\s*([\w\-]+)\(", line[end:])
    if not opcode:
        return None
    opened = end + opcode.end() - 1
    closed = _closing(line, opened)
    inside = line[opened + 1 : closed - 1]
    return Instruction(
        head[2], line[at:end], opcode[1], tuple(_NAME.findall(inside)), inside, line[closed:], bool(head[1])
    )


def _closing(line: str, start: int) -> int:
    """Returns the index after the bracket that closes the bracket at `start`."""
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if depth == 0:
            return at + 1
    raise ValueError(
        f"the compiled program has a bracket that is never closed, in {line[:80]!r}: this release cannot read programs "
        "of this version of XLA, so install the version of jax in requirements-lock.txt"
    )


def _arrays(kind: str) -> Iterator[tuple[float, str]]:
    """Yields bytes and layout of each array in a type."""
    for name, sizes, layout in _ARRAY.findall(kind):
        width = _BYTES_PER_NUMBER.get(name) or int(re.search(r"\d+", name)[0]) / 8  # pyright: ignore
        yield width * math.prod(_sizes(sizes)), layout


def _sizes(text: str) -> list[int]:
    return [int(n.removeprefix("<=")) for n in text.split(",") if n]


def _shape(kind: str) -> list[int]:
    return _sizes(_ARRAY.search(kind)[2])  # pyright: ignore[reportOptionalSubscript]


def _bytes(kind: str) -> float:
    return sum(size for size, _ in _arrays(kind))


def _elements(kind: str) -> float:
    return sum(math.prod(_sizes(sizes)) for _, sizes, _ in _ARRAY.findall(kind))


def _memory_bytes(kind: str) -> float:
    """Returns the bytes that a type takes in main memory (HBM). Arrays in on-chip memory take none; TPU layouts mark
    them, for example with S(1)."""
    return sum(size for size, layout in _arrays(kind) if not re.search(r"S\([1-9]", layout))


def _is_in_memory(kind: str) -> bool:
    return _memory_bytes(kind) > 0


def _kernel_cost(kernel: Instruction, instructions: dict[str, Instruction]) -> tuple[float, float]:
    """Returns the floating-point operations and the bytes of a Pallas kernel, by its cost estimate if it has one."""
    if estimate := _KERNEL_COST.search(kernel.rest):
        return float(estimate[1]), float(estimate[2])
    return 0.0, _bytes(kernel.type) + sum(_bytes(instructions[o].type) for o in kernel.operands)


def _to_other_slices(send: Instruction, instructions: dict[str, Instruction]) -> float:
    """Returns the bytes that a device sends to other slices in one transfer.

    The instruction names a target, e.g. `{1,2}x{0:15}`; the numbers in the first braces are slices. An all-reduce
    passes its data around a ring of these slices.
    """
    payload = _bytes(instructions[send.operands[0]].type)
    target = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', send.rest)
    if '"ALL_REDUCE"' not in send.rest or not target:
        return payload
    spans = [[int(n) for n in span.split(":")] for span in target[1].split(",")]
    slices = sum(span[-1] - span[0] + 1 for span in spans)
    return payload * 2 * (slices - 1) / slices


def _product_flops(i: Instruction, instructions: dict[str, Instruction]) -> float:
    """Returns the floating-point operations of a dot or a convolution: two per multiplication."""
    out, (left, right) = _shape(i.type), (_shape(instructions[o].type) for o in i.operands)
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        return 2.0 * math.prod(out) * math.prod(left[d] for d in _sizes(contracted[1] if contracted else ""))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    _, kernel, result = labels.groups()  # pyright: ignore[reportOptionalMemberAccess]
    fixed = out[result.index("b")] * out[result.index("f")] * right[kernel.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or ["", ""])[1]))
    spatial = sum(c.isdigit() for c in kernel)
    taps = 1
    for d in range(spatial):
        size, stride, dilate_left, dilate_right = (
            int(window[key].split("x")[d]) if key in window else 1
            for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
        base = left[labels[1].index(str(d))]  # pyright: ignore[reportOptionalSubscript]
        taps *= _taps(out[result.index(str(d))], size, stride, low, dilate_left, dilate_right, base)
    return 2.0 * fixed * taps


def _taps(out: int, size: int, stride: int, low: int, dilate_left: int, dilate_right: int, base: int) -> int:
    """Returns the number of multiplications of a one-dimensional convolution.

    Multiplications by zeros that padding and dilation insert are not counted. The TPU compiler writes batched matrix
    products as dilated convolutions, in which most multiplications are by such zeros.

    out: size of the result. size: size of the window. low: padding before the first number. dilate_left: dilation of
    the input. dilate_right: dilation of the window. base: size of the input.
    """
    at = (o * stride + k * dilate_right - low for o, k in itertools.product(range(out), range(size)))
    return sum(a % dilate_left == 0 and 0 <= a < base * dilate_left for a in at)


def _group_size(rest: str, devices: int) -> int:
    """Returns the number of devices per replica group, which XLA writes in several forms. rest: see Instruction."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    return devices
