"""Plain text for pre-training: where it is, which files, which lines. No TensorFlow here.

    PRETRAINING_DIR/**/*.{txt,tsv}        or, in CrossFit's layout (see `crossfit_data`):
    PRETRAINING_DIR/<task>/*train.tsv     of the tasks that a partition trains on

A document is a line, of a line with tabs what is before the first one: of a task's examples the
inputs. So no label is read, and of the partition's unseen tasks nothing.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import gin

from moe_jax.core.errors import UserError, nearest

from . import crossfit_data
from .data_directory import absolute, data_directory

DATA_DIR = "PRETRAINING_DIR"
PARTITION = "PRETRAINING_PARTITION"
CHARACTERS = "PRETRAINING_CHARACTERS"
COPIES = "PRETRAINING_COPIES"


@gin.configurable("pretraining")
def settings(
    data_dir: str | None = None,
    partition: str | None = None,
    characters: int | None = None,
    copies: int | None = None,
) -> dict[str, str]:
    """The gin settings as environment variables: {"PRETRAINING_DIR": absolute path, ...}.

    Those of `crossfit` are added: its partitions are read here, and what is trained on text may
    share a vocabulary with what is trained on CrossFit's tasks.

    Args:
        data_dir: the directory of texts.
        partition: in CrossFit's layout, the partition whose training tasks are read; `random`
            unless set.
        characters: at most about so many of each file, in lines evenly spaced; all unless set.
        copies: how often each text is there, corrupted anew each time; 1 unless set.
    """
    others = {PARTITION: partition, CHARACTERS: characters, COPIES: copies}
    given = {name: str(value) for name, value in others.items() if value is not None}
    return crossfit_data.settings() | absolute(**{DATA_DIR: data_dir}) | given


def directory() -> Path | None:
    """PRETRAINING_DIR, or None where it is unset or empty.

    Raises:
        UserError: it is no directory.
    """
    return data_directory(DATA_DIR)


def copies() -> int:
    """PRETRAINING_COPIES, or 1. Raises a UserError where it is no number of at least 1."""
    return _count(COPIES) or 1


def files(path: Path) -> list[Path]:
    """The files that texts are read from, sorted.

    Raises:
        UserError: there is none, or no such partition.
    """
    tasks = crossfit_data.present(path)
    if tasks:
        known, name = crossfit_data.partitions(), os.environ.get(PARTITION) or "random"
        if name not in known:
            raise UserError(f"{PARTITION}={name}: no such partition{nearest(name, known)}")
        tasks = [task for task in tasks if task in known[name]["train"]]
        found = {file for task in tasks for file in (path / task).glob("*train.tsv")}
    else:
        found = {file for ending in ("txt", "tsv") for file in path.rglob(f"*.{ending}")}
    if not found:
        raise UserError(f"{DATA_DIR}={path}: holds no text to train on")
    return sorted(found)


def documents(paths: list[Path]) -> list[str]:
    """The distinct documents of the files, in order.

    Raises:
        UserError: a file cannot be read, or is not in UTF-8; with the line number.
    """
    limit = _count(CHARACTERS)
    texts = (_evenly(list(dict.fromkeys(_lines(path))), limit) for path in paths)
    return list(dict.fromkeys(itertools.chain.from_iterable(texts)))


def _evenly(texts: list[str], limit: int | None) -> list[str]:
    """Every k-th text, so that they have about `limit` characters."""
    characters = sum(map(len, texts))
    return texts[:: max(1, -(-characters // limit))] if limit else texts


def _lines(path: Path) -> Iterator[str]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8").partition("\t")[0].removeprefix("\ufeff").strip()
        except UnicodeDecodeError as e:
            raise UserError(f"{path}:{number}: not valid UTF-8 ({e.reason})") from e
        if text:
            yield text


def _count(variable: str) -> int | None:
    value = os.environ.get(variable)
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{variable}={value}: must be a number of at least 1")
    return int(value)
