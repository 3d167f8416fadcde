"""Errors that a user can fix: one clear line, no traceback."""

import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SHOWN = 80  # characters of a bad value


class UserError(Exception):
    """Bad input: a file, a name, a setting. Commands print it as one line and exit with 1."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Returns a hint such as `; did you mean 'a' or 'b'?`, or '' when no option is similar."""
    return did_you_mean(difflib.get_close_matches(name, list(choices), n=count, cutoff=0.5))


def did_you_mean(values: Iterable[Any]) -> str:
    """The hint of `nearest`, at these values; '' without any, or if they are too long to read."""
    values = " or ".join(map(repr, values))
    return f"; did you mean {values}?" if 0 < len(values) <= 500 else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without what libraries write below; '' if nothing."""
    return next(iter(str(error).strip().splitlines()), "")


def system_reason(error: BaseException) -> str | None:
    """What the operating system said, also where a library made another error of it; or None."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or first_line(error) or type(error).__name__
    if code := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", text):  # TensorStore, Rust
        return os.strerror(int(code[1] or code[2]))
    full = os.strerror(errno.ENOSPC)  # ArrayRecord
    return full if full in text else None


def shown(value: Any) -> str:
    """`repr` in one line of at most 83 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # a number of thousands of digits; endless nesting
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def quoted(value: str) -> str:
    """A value as a shell takes it, in double quotes if need be and they are enough."""
    safe = shlex.quote(value)
    return safe if safe == value or set('"$`\\!') & set(value) else f'"{value}"'


def say(text: str) -> None:
    """One line of news for the user, on standard error: what a command prints is for programs.

    A progress bar makes room for it.
    """
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
