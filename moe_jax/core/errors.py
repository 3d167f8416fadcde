"""Errors that a user can fix: one clear line, no traceback."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(Exception):
    """Bad input: a file, a name, a setting. Commands print it as one line and exit with 1."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Returns a hint such as `; did you mean 'a' or 'b'?`, or '' when no option is similar."""
    near = difflib.get_close_matches(name, list(choices), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_fields(config: Any, name: str | None = None) -> None:
    """Checks that every field of a dataclass holds a value of its annotated type.

    An int is accepted as a float, and a list as a tuple.

    Args:
        name: the configuration's name in messages; its class name by default.

    Raises:
        UserError: names the first wrong field and, for a Literal, the nearest choices.
    """
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if not _fits(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            choices = ()
            if typing.get_origin(hint) is typing.Literal:
                choices = typing.get_args(hint)
                wanted = f"one of {', '.join(map(str, choices))}"
            raise UserError(
                f"{name or type(config).__name__}.{field} is {value!r}; it is "
                f"{wanted.replace('collections.abc.', '').replace('typing.', '')}"
                f"{nearest(str(value), map(str, choices))}"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if origin is None:
        return isinstance(value, hint)
    if isinstance(value, Mapping) or issubclass(origin, Mapping):
        return isinstance(value, origin) and all(
            _fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()
        )
    origin = (list, tuple) if origin is tuple else origin
    return isinstance(value, origin) and all(_fits(v, args[0]) for v in value)
