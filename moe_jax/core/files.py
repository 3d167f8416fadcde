"""Files that are either whole or absent: every write goes to a temporary name first."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.core.errors import UserError

NEW = ".new-"  # prefix of directories that are being written


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically, making parent directories.

    Raises:
        UserError: the file cannot be written (permissions, full disk). Temporary files are removed.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as f:
            temporary = f.name
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


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
    """Adds one JSON value per line at the end of a file, in one write that reaches the disk.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with open(path, "ab", buffering=0) as f:
            f.write("".join(json_line(row) for row in rows).encode())
            os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def json_line(value: Any) -> str:
    """One line of a JSON-lines file. NaN is refused: it is not JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or not JSON; the message names file and line.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid JSON: {e}") from e


def read_jsonl(path: str | os.PathLike) -> Iterator[Any]:
    """Yields the values of a JSON-lines file, one per non-empty line.

    Raises:
        UserError: the file is missing, or a line is not JSON; the message names file and line.
    """
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as e:
                        raise UserError(f"{path}:{number}: not valid JSON: {e.msg}") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e


def check_new(path: str | os.PathLike) -> None:
    """Raises a UserError if `path` exists, unless it is an empty directory."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists")


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a temporary directory, renamed to `path` if the block ends without error.

    Raises:
        UserError: the directory cannot be made, or `path` exists.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=NEW, dir=path.parent))
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    try:
        yield new
        os.chmod(new, 0o755)
        os.rename(new, path)
    except BaseException as e:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(e, OSError):
            raise UserError(f"cannot write {path}: {e.strerror or e}") from e
        raise
