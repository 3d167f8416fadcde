"""Looks mixtures up in the cache; prepares those that are missing or stale."""

import os
import sys
import tempfile
from pathlib import Path

from moe_jax.core import files, processes
from moe_jax.core.errors import UserError
from moe_jax.data import cache, mirror, modules
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.request import Request


def ensure_prepared(cache_dir: str | os.PathLike, request: Request) -> dict[str, PreparedMixture]:
    """Looks mixtures up in the cache; prepares what is missing or stale in one child process.

    Args:
        cache_dir: directory of the cache; created if needed. Processes may share it.

    Returns:
        name -> mixture, in the order of `request.names`.

    Raises:
        UserError: unknown mixture (with the nearest names), unknown or empty split, a metric or
            postprocess function that another process cannot find, a target without EOS, an
            unreadable source or vocabulary, no space or permission to write, a child process that
            died, a module that may not be imported (see `modules.give`).
    """
    found = look_up(cache_dir, request)
    if None in found.values():
        with processes.lock(cache_dir, wait=True) as lock:
            # Another process may have prepared it while this one waited for the lock.
            found = look_up(cache_dir, request, quiet=True)
            if None in found.values():
                _run_child(cache_dir, request, lock)
                mirror.publish(cache_dir, request)
                found = look_up(cache_dir, request)
    for name, mixture in found.items():
        if mixture is None:
            raise UserError(f"the sources of {name!r} changed while they were being prepared")
    return found


def look_up(
    cache_dir: str | os.PathLike, request: Request, quiet: bool = False
) -> dict[str, PreparedMixture | None]:
    """The mixtures of a request as far as they are in the cache; see `cache.find`."""
    here = mirror.fetch(cache_dir, request)
    return {name: cache.find(here, request, name, quiet) for name in request.names}


def _run_child(cache_dir: str | os.PathLike, request: Request, lock: int | None) -> None:
    for name in request.task_modules:
        modules.check_module(name)
    request.vocabulary.check()
    if factory := request.vocabulary.factory:
        modules.check_function(factory)
    here = mirror.here(cache_dir)
    if lock is None:  # that of a bucket; its copy here has one of its own
        with processes.lock(here, wait=True) as own:
            return _run_child(here, request, own)
    with tempfile.TemporaryDirectory() as directory:
        error = Path(directory) / "error"
        job = {"cache_dir": str(here), "request": request.to_json(), "error": str(error),
               "given": modules.given()}  # fmt: skip
        files.write_json(Path(directory) / "job.json", job)
        # The child imports this package and the user's modules from the same places as this
        # process, and does not use the accelerator.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        code = processes.call(
            [sys.executable, "-m", "moe_jax.data.materialise", f"{directory}/job.json"],
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            keep=[lock],
        )
        if error.exists():
            raise UserError(error.read_text(encoding="utf-8"))
        if code != 0:
            names = ", ".join(request.names)
            raise UserError(f"preparing {names} {processes.ending(code)}")
