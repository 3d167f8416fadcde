"""Parses the text of a compiled program: its instructions and how often each one runs."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALL = re.compile(r"\s*([\w\-]+)\((.*)")
# The attributes that name the computations an instruction runs, by kind. Other computations, such
# as the sum of an all-reduce, are part of their instruction.
_CALLS = {
    "fusion": ("calls",),
    "call": ("to_apply",),
    "async": ("calls",),
    "while": ("body", "condition"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = type opcode(%operands), attributes`.

    Attributes:
        text: the text after the equals sign.
        root: whether its result is the result of the computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def kind(self) -> str:
        """The opcode without `-start`: what runs asynchronously is the same work."""
        return self.opcode.removesuffix("-start")

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        return [
            name
            for attribute in _CALLS.get(self.kind, ())
            for group in re.findall(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text)
            for name in re.findall(r"[\w.\-]+", group)
        ]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the text; None where it has no match."""
        match = re.search(pattern, self.text)
        return match and match[1]


def type_bytes(text: str, main_memory: bool = False) -> int:
    """Bytes of a type such as `f32[8,4]{1,0}`, or of all parts of a tuple.

    Args:
        main_memory: leave out arrays in other memory spaces, such as on-chip memory (`S(1)`).
    """
    total = 0
    for kind, dimensions, layout in _ARRAY.findall(text):
        if main_memory and re.search(r"S\([1-9]\d*\)", layout):
            continue
        bits = re.search(r"\d+", kind)
        bits = int(bits[0]) if bits else 8 if kind == "pred" else 0
        total += math.ceil(math.prod(int(d) for d in dimensions.split(",") if d) * bits / 8)
    return total


def tuple_parts(text: str) -> list[str]:
    """The types in a tuple type, or the one type."""
    if not text.startswith("("):
        return [text]
    parts, depth, start = [], 0, 1
    for i, letter in enumerate(text):
        if (letter == "," and depth == 1) or (letter == ")" and depth == 1):
            parts.append(text[start:i].strip())
            start = i + 1
        depth += (letter in "([{") - (letter in ")]}")
    return parts


class Program:
    """The computations of a compiled program, and how often each one runs on a device.

    Attributes:
        computations: name -> its instructions.
        runs: name -> how often it runs, for computations that run. Every branch counts as taken.
        unknown_loops: loops whose length is not in the text; their body counts once.
        fused: names of the computations of fusions.

    Args:
        text: the text from `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.unknown_loops: set[str] = set()
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            head = None if line.startswith((" ", "HloModule")) else _COMPUTATION.match(line)
            if head:
                current = self.computations.setdefault(head[2], [])
                if head[1]:
                    self._entry = head[2]
            elif match := _INSTRUCTION.match(line):
                current.append(_parse(*match.groups()))
        every = (i for instructions in self.computations.values() for i in instructions)
        self.fused = {name for i in every if i.kind == "fusion" for name in i.called}
        self.runs = self._count_runs()

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """Yields (name of the computation, instruction, how often it runs)."""
        for name, times in self.runs.items():
            for instruction in self.computations.get(name, ()):
                yield name, instruction, times

    def _count_runs(self) -> Mapping[str, int]:
        runs: collections.Counter[str] = collections.Counter()

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self.computations.get(name, ()):
                trips = self._trips(instruction) if instruction.opcode == "while" else 1
                for callee in instruction.called:
                    visit(callee, times * trips)

        visit(self._entry, 1)
        return runs

    def _trips(self, loop: Instruction) -> int:
        """How often a loop's body runs.

        The TPU compiler does not write the number, but it can be read from the loop's condition,
        which compares the counter with it. In JAX's `scan` loops, the counter starts at 0.
        """
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known:
            return int(known)
        condition = self.computations.get(loop.attribute(r"\bcondition=%?([\w.\-]+)") or "", ())
        numbers = [
            int(number)
            for instruction in condition
            if (number := instruction.attribute(r"^[su](?:32|64)\[\]\S* constant\((\d+)\)"))
        ]
        if len(numbers) != 1:
            self.unknown_loops.add(loop.name)
        return max(numbers, default=1)


def _parse(root: str | None, name: str, rest: str) -> Instruction:
    end = _end_of_type(rest)
    match = _CALL.match(rest[end:])
    opcode, inside = (match[1], match[2].split(")", 1)[0]) if match else ("", "")
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"([\w.\-]+)\s*(?:,|$)", inside)
    return Instruction(name, rest[:end], opcode, tuple(operands), rest, bool(root))


def _end_of_type(rest: str) -> int:
    """The end of the type: the first space outside brackets."""
    depth = 0
    for i, letter in enumerate(rest):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return i
    return len(rest)
