"""Whether what tasks are made of has changed.

A source is a file, a directory with all that is below it, a pattern of file names, or, where its
path ends in a slash, the names in a directory alone.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from moe_jax.core import checksums
from moe_jax.core.checksums import digest

State = tuple[str, str]  # (digest of sizes and times, digest of contents)


def exists(path: str) -> bool:
    """Whether there is such a file or directory, or one that fits the pattern."""
    return next(_files(path), None) is not None or os.path.isdir(path)


def content(path: str) -> str:
    """Digest of the names and contents of all files."""
    return digest([(name, file and checksums.of_file(file)) for name, file in _files(path)])


def state(path: str) -> State:
    """What `changed` compares."""
    return _quick(path), content(path)


def changed(path: str, before: State) -> bool:
    """Whether a source differs. One that is gone does not: a cache may travel without sources."""
    if not exists(path) or _quick(path) == before[0]:
        return False
    return content(path) != before[1]


def _quick(path: str) -> str:
    found = []
    for name, file in _files(path):
        status = os.stat(file) if file else None
        found.append((name, status and (status.st_size, status.st_mtime_ns)))
    return digest(found)


def _files(path: str) -> Iterator[tuple[str, str]]:
    """(name, path) of every file, in order of their names; '' where the name alone counts."""
    if path.endswith("/"):
        names = os.listdir(path) if os.path.isdir(path) else []
        yield from ((name, "") for name in sorted(names))
    elif os.path.isfile(path):
        yield os.path.basename(path), path
    elif os.path.isdir(path):
        found = sorted(file for file in Path(path).rglob("*") if file.is_file())
        yield from ((file.relative_to(path).as_posix(), str(file)) for file in found)
    elif glob.has_magic(path):
        found = sorted(filter(os.path.isfile, glob.glob(path)))
        yield from ((os.path.basename(file), file) for file in found)
