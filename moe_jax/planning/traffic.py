"""The traffic of a compiled program: between devices, and between a device and its memory."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.planning.hlo import Instruction, Program, tuple_parts, type_bytes

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip
# Instructions that move no data themselves.
_FREE = {
    "", "after-all", "async", "bitcast", "call", "conditional", "constant", "get-tuple-element",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
# Custom calls that are only marks of the TPU compiler; they move no data.
_MARKS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart",
    "ConcatBitcast", "GatherScatterIndicesBitpacked", "X64Combine", "X64SplitHigh", "X64SplitLow",
}  # fmt: skip


@dataclasses.dataclass
class Collectives:
    """All collectives of one kind in one run of the program on one device.

    Attributes:
        count: number of collectives.
        bytes: size of the arrays that are gathered, reduced, scattered or exchanged.
        largest_bytes: the largest of these sizes.
        wire_bytes: the least number of bytes that the device must send.
    """

    count: int = 0
    bytes: int = 0
    largest_bytes: int = 0
    wire_bytes: float = 0.0


def collectives(program: Program, devices: int) -> dict[str, Collectives]:
    """Kind -> its collectives.

    Args:
        devices: number of devices of the program.
    """
    result: dict[str, Collectives] = {}
    chains = set()
    for _, instruction, times in program.instructions():
        kind = instruction.kind
        if kind not in COLLECTIVES:
            continue
        # The TPU compiler spreads one collective over several fusions. Each holds a copy of it.
        chain = instruction.attribute(r'chain_id="(\d+)"')
        if chain is not None and (kind, chain) in chains:
            continue
        chains.add((kind, chain))
        group = _group_size(instruction, devices)
        size = type_bytes(_result(instruction)) * (group if kind == "reduce-scatter" else 1)
        wire = size if kind.startswith("collective-") else size * (group - 1) / group
        total = result.setdefault(kind, Collectives())
        total.count += times
        total.bytes += times * size
        total.largest_bytes = max(total.largest_bytes, size)
        # A sum is sent in parts, and the results are sent back.
        total.wire_bytes += times * wire * (2 if kind == "all-reduce" else 1)
    return dict(sorted(result.items()))


def _result(instruction: Instruction) -> str:
    """The type of an instruction's result, also for the start of an asynchronous one."""
    if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
        return instruction.type
    parts = tuple_parts(instruction.type)
    # (result, operand, context) of a copy; (operands, results, context) of everything else.
    return parts[0] if instruction.opcode == "copy-start" or len(parts) < 2 else parts[1]


def _group_size(collective: Instruction, devices: int) -> int:
    """Number of devices in a group.

    `replica_groups` is a list, `[groups,size]<=...`, some axes of a mesh, or {}.
    """
    if short := collective.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(short)
    if listed := collective.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return len(listed.split(","))
    if mesh := collective.attribute(r"replica_groups=mesh\[([^\]]*)\]"):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
        axes = collective.attribute(r"replica_groups=mesh[^{]*\{([^}]*)\}") or ""
        # 'x':(2)4 are four parts of the axis x, which lie two apart.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices


class Accesses(NamedTuple):
    """What one run of a program does with a device's memory.

    Attributes:
        bytes: read and written.
        operations: number of instructions that do so, one after the other.
    """

    bytes: int
    operations: int


def accesses(program: Program) -> Accesses:
    """What instructions read from a device's memory and write to it.

    A loop's body counts once per iteration. If a slice is read from or written into a large array,
    only the slice counts. Arrays that the compiler keeps on the chip (memory spaces other than 0)
    do not count. Hits in hardware caches are not known here and count as memory accesses; so do all
    of a kernel's arrays, though it may use parts.
    """
    total = count = 0
    types = {
        name: {i.name: i.type for i in instructions}
        for name, instructions in program.computations.items()
    }
    for name, instruction, times in program.instructions():
        if name not in program.fused:
            operands = [types[name].get(operand, "") for operand in instruction.operands]
            moved = _moved(program, instruction, operands)
            total += times * moved
            count += times * (moved > 0)
    return Accesses(total, count)


def _moved(program: Program, instruction: Instruction, operands: list[str]) -> int:
    """Bytes that one instruction reads and writes.

    Args:
        operands: types of the operands.
    """
    kind, result = instruction.kind, _result(instruction)
    if kind in _FREE or kind.endswith(("-done", "-update")):
        return 0
    written = type_bytes(result, main_memory=True)
    read = sum(type_bytes(operand, main_memory=True) for operand in operands)
    match kind:
        case "fusion":
            return _moved_by_fusion(program, instruction, operands)
        case "custom-call":
            target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
            if target in _MARKS:
                return 0
            return _read_by_call(instruction, operands) + written - _scratch_bytes(target, result)
        case "dynamic-slice" | "slice" | "gather":
            return written + _at_most(operands[0], type_bytes(result))
        case "dynamic-update-slice":
            return 2 * _at_most(operands[0], type_bytes(operands[1]))
        case "scatter":  # reads the updates, reads what they change, and writes it
            return 3 * _at_most(operands[0], type_bytes(operands[2]))
    return read + written


def _read_by_call(call: Instruction, operands: list[str]) -> int:
    """Bytes that a custom call reads: of an operand that is given twice once, and of one that
    becomes its result none, except by cuBLAS, which adds to it."""
    changed = re.findall(r"\{[\d, ]*\}: \((\d+), ", call.text)  # output_to_operand_aliasing
    if call.attribute(r'custom_call_target="(__cublas)'):
        changed = []
    read = {
        name: type_bytes(operand, main_memory=True)
        for number, (name, operand) in enumerate(zip(call.operands, operands, strict=True))
        if str(number) not in changed
    }
    return sum(read.values())


def _scratch_bytes(target: str, result: str) -> int:
    """Bytes of the last result of a custom call, where NVIDIA's libraries only want memory."""
    last = tuple_parts(result)[-1]
    is_scratch = target.startswith("__cu") and re.match(r"[su]8\[\d*\]", last)
    return type_bytes(last) if is_scratch else 0


def _at_most(array: str, size: int) -> int:
    """At most `size` bytes of an array; 0 if it is not in main memory."""
    return min(type_bytes(array, main_memory=True), size)


def _moved_by_fusion(program: Program, fusion: Instruction, operands: list[str]) -> int:
    body = _Body(program, fusion.called[0])
    read = sum(
        _at_most(array, body.read(number, type_bytes(array)))
        for number, array in enumerate(operands)
    )
    results = tuple_parts(_result(fusion))
    roots = body.roots()
    if len(roots) != len(results):
        return read + type_bytes(_result(fusion), main_memory=True)
    return read + sum(
        _at_most(array, body.written(root, type_bytes(array)))
        for root, array in zip(roots, results, strict=True)
    )


class _Body:
    """The computation of a fusion: which parts of operands it reads and of results it writes."""

    def __init__(self, program: Program, name: str):
        self._program = program
        self._by_name: Mapping[str, Instruction] = {
            i.name: i for i in program.computations.get(name, ())
        }
        self._users = collections.defaultdict(list)
        self._parameters: dict[int, str] = {}
        for instruction in self._by_name.values():
            number = instruction.attribute(r"parameter\((\d+)\)")
            if instruction.opcode == "parameter" and number:
                self._parameters[int(number)] = instruction.name
            for place, operand in enumerate(instruction.operands):
                self._users[operand].append((place, instruction))

    def roots(self) -> list[str]:
        """Names of the results."""
        root = next(i for i in self._by_name.values() if i.root)
        return list(root.operands) if root.opcode == "tuple" else [root.name]

    def read(self, number: int, size: int) -> int:
        """Bytes read of an operand of `size` bytes."""
        name = self._parameters.get(number)
        return size if name is None else min(size, self._read(name, size))

    def _read(self, name: str, size: int) -> int:
        total = 0
        for place, user in self._users[name]:
            match user.opcode:
                case "bitcast":
                    total += self._read(user.name, size)
                case "dynamic-slice" | "slice" | "gather" if place == 0:
                    total += type_bytes(user.type)
                case "dynamic-update-slice" if place == 0:
                    pass
                case "scatter" if place == 0:
                    total += self._updates(user, size)
                case "tuple":
                    pass
                case "custom-call" if "AsyncCollective" in user.text:
                    pass
                case "fusion":
                    total += _Body(self._program, user.called[0]).read(place, size)
                case opcode if opcode in COLLECTIVES and "chain_id" in user.text:
                    pass  # counted at its last instruction
                case _:
                    return size
        return total

    def written(self, name: str, size: int) -> int:
        """Bytes written of a result of `size` bytes."""
        instruction = self._by_name.get(name)
        if instruction is None:
            return size
        match instruction.opcode:
            case "parameter":
                return 0
            case "bitcast":
                return self.written(instruction.operands[0], size)
            case "dynamic-update-slice" | "scatter" if not self._made_here(name):
                return self._updates(instruction, size)
            case opcode if opcode in COLLECTIVES and "chain_id" in instruction.text:
                return 0
        return size

    def _updates(self, instruction: Instruction, size: int) -> int:
        """Bytes of an array of `size` bytes that an instruction changes in place."""
        place = {"dynamic-update-slice": 1, "scatter": 2}[instruction.opcode]
        update = self._by_name.get(instruction.operands[place])
        return size if update is None else min(size, type_bytes(update.type))

    def _made_here(self, name: str) -> bool:
        """Whether an array is computed, and not an operand, parts of which may be changed."""
        instruction = self._by_name.get(name)
        if instruction is None or instruction.opcode == "parameter":
            return False
        changed = instruction.opcode in ("bitcast", "dynamic-update-slice", "scatter")
        return not changed or self._made_here(instruction.operands[0])
