"""Files that are either whole or absent.

On a file system every write goes to a temporary name first. In a bucket an object is so by itself.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_jax.core import paths
from moe_jax.core.errors import UserError, system_reason

_HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")  # in UTF-16, of two
NEW = ".new"  # suffix of what is being written, whose name also begins with a dot


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically, making parent directories.

    Raises:
        UserError: the file cannot be written (permissions, full disk). Temporary files are removed.
    """
    path = paths.parse(path)
    temporary = _temporary(path)
    try:
        if paths.in_bucket(path):
            return paths.put(path, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(temporary) as f:
            try:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except paths.errors() as e:
        raise UserError(f"cannot write {path}: {paths.reason(e)}") from e


def is_half_written(path: Path) -> bool:
    """Whether this is what a process is writing, or was writing when it was killed."""
    return path.name.startswith(".") and path.name.endswith(NEW)


def _temporary(path: Path) -> Path:
    """Where `path` is written first: always there, so that the next writer of `path` removes what
    one that was killed has left."""
    return path.parent / f".{path.name}{NEW}"


def _alone(temporary: Path) -> BinaryIO:
    """Opens a temporary file, empty, that no other process writes until this one closes it."""
    while True:
        file = open(temporary, "ab")  # noqa: SIM115 (the caller closes it)
        if _locked(file.fileno(), temporary, fcntl.LOCK_EX):
            file.truncate(0)
            return file
        file.close()


def _locked(descriptor: int, temporary: Path, how: int) -> bool:
    """Locks what is open; False if another process has it, or has finished it meanwhile."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:  # nothing can be locked there
        pass
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(temporary))
    except FileNotFoundError:
        return False


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes indented JSON atomically; see `write_bytes`. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Writes one JSON value per line atomically; see `write_bytes`."""
    write_text(path, "".join(json_line(row) for row in rows))


def append_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    """Adds one JSON value per line at the end of a file; returns when they are on the disk.

    Raises:
        UserError: the file cannot be written.
    """
    path, more = paths.parse(path), "".join(json_line(row) for row in rows).encode()
    if paths.in_bucket(path):  # where nothing grows: it is written anew
        before = read_bytes(path) if path.exists() else b""
        return write_bytes(path, before + more)
    try:
        with open(path, "ab", buffering=0) as f:
            while more:  # a disk that becomes full takes a part, without a word
                more = more[f.write(more) :]
            os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def json_line(value: Any) -> str:
    """One line of a JSON-lines file. NaN is refused: it is not JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def to_json(value: Any) -> Any:
    """The value that JSON has in place of a value of NumPy, bytes, a tuple or a mapping.

    Raises:
        TypeError: it has none.
        ValueError: a number is not finite.
    """
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic | np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} is no value of JSON")


def read_bytes(path: str | os.PathLike) -> bytes:
    """What a file holds.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    try:
        return paths.parse(path).read_bytes()
    except paths.errors() as e:
        raise UserError(f"cannot read {path}: {paths.reason(e)}") from e


def read_text(path: str | os.PathLike) -> str:
    """Reads UTF-8 text.

    Raises:
        UserError: the file is missing, cannot be read or is no UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8: byte {e.start} is 0x{e.object[e.start]:02x}") from e


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file, in which every key is there once and every number is finite.

    Raises:
        UserError: the file is missing or not JSON; the message names file and line.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON: {_reason(e)}") from e


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds an object; see `read_json`.

    Raises:
        UserError: also where it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be {{name: value}}")
    return value


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file, one per non-empty line.

    Raises:
        UserError: the file is missing, or a line is no JSON object; the message names file and
            line.
    """
    try:
        with paths.parse(path).open("rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        value = parse_json(line.decode("utf-8"))
                    except (ValueError, RecursionError) as e:
                        raise UserError(f"{path}:{number}: not valid JSON: {_reason(e)}") from e
                    if not isinstance(value, dict):
                        raise UserError(f"{path}:{number}: not a JSON object")
                    yield value
    except paths.errors() as e:
        raise UserError(f"cannot read {path}: {paths.reason(e)}") from e


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError, RecursionError: it is no JSON, or has a key twice, a number that is infinite, or
            half a character, which no text of ours can hold.
    """
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    if _HALF.search(text):  # perhaps with its other half
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"{e.object[e.start]!a} is half a character") from e
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def check_new(path: str | os.PathLike) -> None:
    """Raises a UserError if `path` is in a bucket, or exists and is no empty directory."""
    path = paths.local(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists: give another place, or remove it")


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a temporary directory, renamed to `path` if the block ends without error.

    Raises:
        UserError: the directory cannot be made, another process makes it, or `path` exists.
    """
    path = paths.local(path)
    new = _temporary(path)
    try:
        new.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(new, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    try:
        if not _locked(descriptor, new, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise UserError(f"cannot write {path}: another process is writing it")
        try:
            _empty(new)
            yield new
            os.rename(new, path)
        except BaseException as e:
            shutil.rmtree(new, ignore_errors=True)
            if reason := system_reason(e):
                raise UserError(f"cannot write {path}: {reason}") from e
            raise
    finally:
        os.close(descriptor)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
