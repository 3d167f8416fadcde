"""Configurations: dataclasses whose fields say beside their types what they may hold.

    @dataclasses.dataclass(frozen=True)
    class MyConfig(Configuration):
        steps: Annotated[int, Range(1, 1000)] = 10
        rates: Annotated[Sequence[Annotated[float, Range(0, 1)]], Size(1, 9)] = (0.1,)
        name: Name | None = None

`bool`, a `Literal` and another configuration say it by their type; a number, a text and a
collection need a rule. All fields are checked when an instance is made, wherever its values come
from: gin, a run's config.json, Python.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from moe_jax.core import paths
from moe_jax.core.errors import UserError, did_you_mean, nearest, shown

INT32 = 2**31 - 1  # what JAX counts with


@dataclasses.dataclass(frozen=True)
class Range:
    """A number from `low` to `high`; with `below`, it stays below `high`.

    Both ends are finite: so NaN and infinities are in no range.
    """

    low: float
    high: float
    below: bool = False

    def allows(self, value: float) -> bool:
        """Whether the number is in the range."""
        return self.low <= value < self.high if self.below else self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {_number(self.low)} to {'below ' if self.below else ''}{_number(self.high)}"


@dataclasses.dataclass(frozen=True)
class Size(Range):
    """A collection of `low` to `high` values."""

    def allows(self, value: Any) -> bool:
        """Whether the collection has so many values."""
        return super().allows(len(value))

    def __str__(self) -> str:
        many = "" if self.low == self.high else f"{_number(self.low)} to "
        return f"of {many}{_number(self.high)} values"


@dataclasses.dataclass(frozen=True)
class Text(Size):
    """A text of `low` to `high` characters, none of which is a control character."""

    def allows(self, value: str) -> bool:
        """Whether the text is a line that a file can hold."""
        # Below the space, DEL to 0x9F, and surrogates, which no UTF-8 file can hold.
        good = all(
            c >= " " and not "\x7f" <= c < "\xa0" and not "\ud800" <= c <= "\udfff" for c in value
        )
        return super().allows(value) and good

    def __str__(self) -> str:
        return f"of {_number(self.low)} to {_number(self.high)} printable characters"


@dataclasses.dataclass(frozen=True)
class Place(Text):
    """A path of a file or directory, which may be in a bucket unless it must be `here`."""

    here: bool = False

    def allows(self, value: str) -> bool:
        """Whether there can be such a path."""
        usable = not paths.is_url(value) if self.here else paths.is_usable(value)
        return super().allows(value) and usable

    def __str__(self) -> str:
        bucket = "" if self.here else " or gs://BUCKET/PATH"
        return f"{super().__str__()}, a path of this machine{bucket}"


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """One of the keys of a registry, to which more may be added."""

    names: Mapping[str, Any]

    def allows(self, value: str) -> bool:
        """Whether there is such a name."""
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


# What several fields are.
Name = Annotated[str, Text(1, 4096)]  # of a mixture, a module, a split
PathName = Annotated[str, Place(1, 4096)]
Names = Annotated[Sequence[Name], Size(0, 4096)]
Seed = Annotated[int, Range(0, INT32)]
Steps = Annotated[int, Range(1, INT32)]
Period = Annotated[int, Range(0, INT32)]  # 0 for never
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 1000)]  # of learning
Temperature = Annotated[float, Range(1e-7, 1e6)]  # whose inverse float32 holds
Rows = Annotated[int, Range(1, 2**20)]
Examples = Annotated[int, Range(1, INT32)] | None
TokenId = Annotated[int, Range(0, INT32)]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What all configurations share: their fields are checked as soon as there is an instance.

    A subclass that checks more, such as relations between fields, does so in `__post_init__`,
    after `super().__post_init__()`.

    Attributes:
        called: the name in gin and in messages; the class's own unless it gives another:
            `class EvalConfig(Configuration, called="eval")`.
    """

    called: ClassVar[str]

    def __init_subclass__(cls, called: str = "") -> None:
        # Gin makes subclasses, which inherit the name.
        cls.called = called or getattr(cls, "called", cls.__name__)

    def __post_init__(self) -> None:
        """Raises a UserError naming the first field that holds what it may not, and its range."""
        for name, hint in hints(type(self)).items():
            check(f"{self.called}.{name}", getattr(self, name), hint)


def check(name: str, value: Any, hint: Any) -> None:
    """Raises a UserError that names a setting, if it holds what a field of this type may not."""
    if not _fits(value, hint):
        raise UserError(f"{name} is {shown(value)}; it is {describe(hint)}{_near(value, hint)}")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field -> its type, with what is declared beside it."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def describe(hint: Any) -> str:
    """What a field of this type may hold, in words.

    Raises:
        TypeError: it declares no range.
    """
    kind, args, rule = _parts(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, args))}"
    if kind is types.UnionType:
        return " or ".join(map(describe, args))
    if kind is Sequence:
        return f"list {rule}, each {describe(args[0])}"
    if kind is Mapping:
        return f"{{{describe(args[0])}: {describe(args[1])}}} {rule}"
    if isinstance(rule, Known):
        return str(rule)
    each = {type(None): "None", bool: "True or False"}.get(kind, kind.__name__)
    return each if rule is None else f"{each} {rule}"


def _fits(value: Any, hint: Any) -> bool:
    kind, args, rule = _parts(hint)
    if kind is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if kind is types.UnionType:
        return any(_fits(value, arg) for arg in args)
    if kind is Sequence:
        return isinstance(value, list | tuple) and rule.allows(value) and all(
            _fits(v, args[0]) for v in value
        )  # fmt: skip
    if kind is Mapping:
        return isinstance(value, Mapping) and rule.allows(value) and all(
            _fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()
        )  # fmt: skip
    if kind in (int, float):  # an int is a float; a bool is neither
        number = isinstance(value, int if kind is int else int | float)
        return number and not isinstance(value, bool) and rule.allows(value)
    return isinstance(value, kind) and (rule is None or rule.allows(value))


def _parts(hint: Any) -> tuple[Any, tuple, Any]:
    """(kind, what it is of, rule): `Literal`, `UnionType`, `Sequence`, `Mapping` or a plain type.

    Raises:
        TypeError: it needs a rule and has none.
    """
    rule = None
    if typing.get_origin(hint) is Annotated:
        hint, rule = hint.__origin__, hint.__metadata__[0]
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    kind = {typing.Union: types.UnionType, tuple: Sequence}.get(kind, kind)
    free = (bool, Literal, types.UnionType, type(None))
    if rule is None and kind not in free and not dataclasses.is_dataclass(kind):
        raise TypeError(f"a configuration's field of type {hint} declares no range")
    return kind, args, rule


def _near(value: Any, hint: Any) -> str:
    """A hint at what a name, or the first wrong name in a list, may mean."""
    if isinstance(value, str) and _fits([value], hint):
        return did_you_mean([(value,)])
    if type(value) is int and 0 <= value < 10**12 and _fits(str(value), hint):
        return f"; a text of digits keeps its quotes in the shell: \"'{value}'\""
    choices = _choices(hint)
    names = value if isinstance(value, list | tuple) else [value]
    wrong = [name for name in names if isinstance(name, str) and name not in choices]
    return nearest(wrong[0], choices) if wrong else ""


def _choices(hint: Any) -> list[str]:
    """The names among which one that is nearly right may be meant."""
    kind, args, rule = _parts(hint)
    if kind is Literal:
        return [str(arg) for arg in args]
    inner = [arg for arg in args if arg is not Ellipsis]
    own = list(rule.names) if isinstance(rule, Known) else []
    return own + [choice for arg in inner for choice in _choices(arg)]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
