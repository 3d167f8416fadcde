"""A cache in a bucket: what is needed of it is copied to this machine once, checked and read here.

Directories of a cache never change, and have checksums, which are written last: what has none is
not complete. The copy is in the home directory, below .cache/moe_jax/buckets/BUCKET/.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_jax.core import checksums, files, paths, processes
from moe_jax.core.errors import UserError, say
from moe_jax.data.cache import directories
from moe_jax.data.request import Request

_THREADS = 8  # they wait for the network most of the time


def here(directory: str | os.PathLike) -> Path:
    """Where a directory is on this machine: the copy's place if it is in a bucket."""
    if not paths.in_bucket(directory):
        return paths.parse(directory)
    name = os.fspath(directory).removeprefix(paths.BUCKET)
    return Path.home() / ".cache" / "moe_jax" / "buckets" / name


def fetch(cache_dir: str | os.PathLike, request: Request) -> Path:
    """Copies what a bucket has of a request, as far as it is not here; says what is damaged.

    Returns:
        The cache on this machine.

    Raises:
        UserError: the bucket cannot be read, or there is no room.
    """
    copy, source = here(cache_dir), paths.parse(cache_dir)
    if not paths.in_bucket(source):
        return copy
    with processes.lock(copy, wait=True):
        for name in request.names:
            file, own = request.path(source, name), request.path(copy, name)
            if file.exists():
                content = files.read_bytes(file)
                try:
                    names = directories(files.read_json(file))
                except (UserError, KeyError, TypeError):
                    names = []  # who reads the copy says that it is damaged
                _each(_fetch_directory, source, copy, names)
                files.write_bytes(own, content)
            else:
                own.unlink(missing_ok=True)
    return copy


def publish(cache_dir: str | os.PathLike, request: Request) -> None:
    """Copies what was prepared here to the bucket; nothing for a cache that is no bucket's.

    Raises:
        UserError: the bucket cannot be written to.
    """
    copy, source = here(cache_dir), paths.parse(cache_dir)
    if paths.in_bucket(source):
        for name in request.names:
            file = request.path(copy, name)
            _each(_publish_directory, copy, source, directories(files.read_json(file)))
            files.write_bytes(request.path(source, name), files.read_bytes(file))


def fetch_vocabulary(directory: paths.Path) -> Path:
    """The vocabulary of a run as a directory of this machine."""
    copy = here(directory)
    if paths.in_bucket(directory):
        for path in directory.iterdir():
            files.write_bytes(copy / path.name, files.read_bytes(path))
    return copy


def _each(
    act: Callable[..., None], source: paths.Path, target: paths.Path, names: Iterable[str]
) -> None:
    """Calls a function with every directory's place in both, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: act(source / name, target / name), names))


def _fetch_directory(source: paths.Path, target: Path) -> None:
    if not checksums.is_sealed(source) or _same_checksums(source, target):
        return
    if target.exists():
        paths.remove_tree(target)
    try:
        with files.new_directory(target) as new:
            for name in [*checksums.read(source), checksums.FILE]:
                files.write_bytes(new / name, files.read_bytes(source / name))
            if problem := checksums.damage(new):
                raise UserError(problem.replace(str(new), str(source)))
    except UserError as e:
        if not _is_damage(e):
            raise
        say(f"damaged, and prepared again: {e}")
        (source / checksums.FILE).unlink(missing_ok=True)  # so that it is written again


def _is_damage(error: BaseException) -> bool:
    """Whether an error is about what the bucket holds: not that it cannot be reached, or that there
    is no room here."""
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, FileNotFoundError) or not isinstance(error, paths.errors())


def _publish_directory(source: Path, target: paths.Path) -> None:
    if not _same_checksums(source, target):
        for name in [*checksums.read(source), checksums.FILE]:
            files.write_bytes(target / name, files.read_bytes(source / name))


def _same_checksums(one: paths.Path, other: paths.Path) -> bool:
    """Whether both directories have the same checksums.json."""
    if not checksums.is_sealed(other):
        return False
    return files.read_bytes(one / checksums.FILE) == files.read_bytes(other / checksums.FILE)
