"""Checksums of a directory's files: written when it is complete, compared when it is read.

Those of objects in a bucket are the bucket's own, which it checks whenever one is written or read:
a list of them tells that all are there and what was written, and nothing need be read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError

FILE = "checksums.json"
_THREADS = 4  # hashing leaves Python's lock


def of_bytes(data: bytes) -> str:
    """The checksum of what a file holds."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: str | os.PathLike) -> str:
    """The checksum of a file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Short hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return of_bytes(text.encode(errors="surrogatepass"))[:16]  # file names may be no UTF-8


def seal(directory: Path, without: Iterable[str] = ()) -> None:
    """Writes the checksums of all files below a directory, and one of these.

    Args:
        without: names of files that may still change.

    Raises:
        UserError: the file cannot be written.
        OSError: a file cannot be read.
    """
    if paths.in_bucket(directory):
        left_out = {*without, FILE}
        sums = {k: v for k, v in paths.objects(directory).items() if k not in left_out}
    else:
        names = [name for name in _names(directory) if name not in without]
        with ThreadPoolExecutor(_THREADS) as pool:
            sums = dict(zip(names, pool.map(lambda n: of_file(directory / n), names), strict=True))
    files.write_json(directory / FILE, {"files": sums, "self": _of_content(sums)})


def is_sealed(directory: Path) -> bool:
    """Whether there are checksums."""
    return (directory / FILE).exists()


def damage(directory: Path, below: Iterable[str] = ("",)) -> str | None:
    """What is wrong with a sealed directory, in words that name the file; None where nothing is.

    Args:
        below: only files whose names begin so are compared.
    """
    try:
        sums = read(directory)
    except UserError as e:
        return str(e)
    names = [name for name in sums if name.startswith(tuple(below))]
    objects = paths.objects(directory) if paths.in_bucket(directory) else None

    def problem(name: str) -> str | None:
        try:
            found = of_file(directory / name) if objects is None else objects.get(name)
        except OSError as e:
            return f"{directory / name} cannot be read: {e.strerror or e}"
        if found != sums[name]:
            return f"{directory / name} is not what was written: its checksum differs"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(problem, names)), None)


def read(directory: Path) -> dict[str, str]:
    """The checksum of each file of a sealed directory, by name.

    Raises:
        UserError: the file of checksums is not what was written.
    """
    path = directory / FILE
    content = files.read_json(path)
    if isinstance(content, dict) and content.keys() == {"files", "self"}:
        sums = content["files"]
        if content["self"] == _of_content(sums):
            return sums
    raise UserError(f"{path} is not what was written")


def _of_content(sums: Any) -> str:
    return of_bytes(json.dumps(sums, sort_keys=True).encode())


def _names(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != FILE and not files.is_half_written(path):
            yield path.relative_to(directory).as_posix()
