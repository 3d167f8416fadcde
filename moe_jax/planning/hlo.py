"""Reads a compiled program's text: how often each instruction runs, what it moves and sends."""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^{]*\) -> .*)?\{", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLS = re.compile(
    r"\b(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
# Instructions that move nothing by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "custom-call",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(%operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of the result, all parts of a tuple together."""
        return type_bytes(self.type)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        return [
            name.strip().lstrip("%")
            for group in _CALLS.findall(self.text)
            for name in group.strip("{}").split(",")
        ]


@dataclasses.dataclass
class Sent:
    """Collectives of one kind, in one run of the program on one device."""

    count: int = 0
    bytes: int = 0
    largest_bytes: int = 0


def type_bytes(text: str) -> int:
    """Bytes of a type such as `f32[8,4]{1,0}` or of a tuple of them."""
    return sum(_bytes_of(kind, dims) for kind, dims in _SHAPE.findall(text))


def _bytes_of(kind: str, dims: str) -> int:
    bits = _BITS.get(kind)
    if bits is None:
        bits = int(re.search(r"\d+", kind)[0])
    size = math.prod(int(d) for d in dims.split(",") if d)
    return math.ceil(size * bits / 8)


class Program:
    """The computations of a compiled program and how often each one runs.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            head = None if line.startswith(" ") else _COMPUTATION.match(line)
            if head:
                current = self.computations.setdefault(head[2], [])
                if head[1]:
                    self._entry = head[2]
            elif match := _INSTRUCTION.match(line):
                current.append(_parse(*match.groups()))
        self._fused = {
            name
            for instruction in self._all()
            if instruction.opcode == "fusion"
            for name in instruction.called
        }
        self.runs = self._count_runs()

    def _all(self) -> Iterator[Instruction]:
        for instructions in self.computations.values():
            yield from instructions

    def _count_runs(self) -> Mapping[str, int]:
        """Computation -> how often it runs; of branches each counts as taken."""
        runs: collections.Counter[str] = collections.Counter()

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self.computations.get(name, ()):
                for callee in instruction.called:
                    visit(callee, times * self._trips(instruction))

        visit(self._entry, 1)
        return runs

    def _trips(self, instruction: Instruction) -> int:
        """How often a loop's body runs: what the compiler says, or else the number that its
        condition compares the counter with. 1 where there is none, and for other instructions."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.text)
        if known:
            return int(known[1])
        condition = re.search(r"\bcondition=%?([\w.\-]+)", instruction.text)
        if instruction.opcode != "while" or condition is None:
            return 1
        numbers = [
            int(found[1])
            for inside in self.computations.get(condition[1], ())
            if (found := re.match(r"s(?:32|64)\[\]\S* constant\((\d+)\)", inside.text))
        ]
        return max(numbers, default=1)

    def collectives(self) -> dict[str, Sent]:
        """Kind -> what one device sends or receives, whichever is more."""
        result: dict[str, Sent] = {}
        for name, times in self.runs.items():
            for instruction in self.computations.get(name, ()):
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                size = _sent_bytes(kind, instruction)
                sent = result.setdefault(kind, Sent())
                sent.count += times
                sent.bytes += times * size
                sent.largest_bytes = max(sent.largest_bytes, size)
        return result

    def bytes_accessed(self) -> int:
        """Bytes that instructions read and write in memory, loops counted as often as they run.

        An upper bound: what stays in a cache or on the chip between two instructions counts too.
        """
        total = 0
        for name, times in self.runs.items():
            if name in self._fused:
                continue
            by_name = {i.name: i for i in self.computations.get(name, ())}
            for instruction in by_name.values():
                if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                    total += times * self._moved(instruction, by_name)
        return total

    def _moved(self, instruction: Instruction, by_name: Mapping[str, Instruction]) -> int:
        """What one instruction reads and writes."""
        operands = [by_name[name].bytes if name in by_name else 0 for name in instruction.operands]
        match instruction.opcode:
            case "dynamic-slice" | "slice" | "gather" | "broadcast":
                return 2 * instruction.bytes
            case "dynamic-update-slice":
                return 2 * operands[1]
            case "fusion":
                return self._moved_by_fusion(instruction, operands)
        return instruction.bytes + sum(operands)

    def _moved_by_fusion(self, fusion: Instruction, operands: list[int]) -> int:
        """Of a stack, a fusion reads the slices that it takes, and writes those that it puts."""
        body = self.computations.get(fusion.called[0], [])
        by_name = {i.name: i for i in body}
        users = collections.defaultdict(list)
        for instruction in body:
            for operand in instruction.operands:
                users[operand].append(instruction)
        read = 0
        for i in body:
            if i.opcode != "parameter":
                continue
            number = int(re.search(r"parameter\((\d+)\)", i.text)[1])
            whole = operands[number] if number < len(operands) else 0
            parts = [_part_used(i.name, user, by_name) for user in users[i.name]]
            read += whole if None in parts else min(whole, sum(parts))
        written = fusion.bytes
        for i in body:
            if i.root and i.opcode == "dynamic-update-slice":
                written = by_name[i.operands[1]].bytes
        return read + written


def _part_used(name: str, user: Instruction, by_name: Mapping[str, Instruction]) -> int | None:
    """Bytes that an instruction uses of an operand; None for all."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return user.bytes
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0
    return None


def _parse(root: str | None, name: str, rest: str) -> Instruction:
    """An instruction of `type opcode(operands), attributes`."""
    end = _end_of_type(rest)
    match = re.match(r"\s*([\w\-]+)\((.*)", rest[end:])
    if match is None:
        return Instruction(name, rest[:end], "", (), rest, bool(root))
    inside = match[2].split(")", 1)[0]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        word.split()[-1] for word in inside.split(",") if word.strip()
    )
    return Instruction(name, rest[:end], match[1], operands, rest, bool(root))


def _end_of_type(rest: str) -> int:
    """Where the type ends: at the first blank outside brackets."""
    depth = 0
    for i, letter in enumerate(rest):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return i
    return len(rest)


def _sent_bytes(kind: str, instruction: Instruction) -> int:
    parts = [_bytes_of(*shape) for shape in _SHAPE.findall(instruction.type)]
    started = instruction.opcode.endswith("-start")
    if started and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
        return max(parts, default=0)
    if kind == "reduce-scatter":
        return sum(parts) * _group_size(instruction.text)
    return sum(parts)


def _group_size(text: str) -> int:
    """Devices per group of `replica_groups`, written as lists or as `[groups,size]<=[...]`."""
    short = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if short:
        return int(short[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(json.loads(f"[{listed[1]}]")) if listed else 1
