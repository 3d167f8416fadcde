"""Paths: of files and directories of this machine. A URL is none, and is refused in one line."""

import os
import re
from pathlib import Path

from moe_jax.core.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash is what `Path` leaves of two


def parse(path: str | os.PathLike) -> Path:
    """The path of a file or directory.

    Raises:
        UserError: it is a URL.
    """
    text = os.fspath(path)
    if is_url(text):
        raise UserError(f"{text}: it is no path of this machine, and no other kind is supported")
    return Path(text)


def is_url(text: str) -> bool:
    """Whether a path names a place that is not a file system's."""
    return _URL.match(text) is not None
