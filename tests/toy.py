"""The tasks of toy_tasks.py, prepared once for all tests of a process."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moe_jax.core import processes
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.prepared import ensure_prepared, look_up
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import VocabularyConfig

TASKS = str(Path(__file__).with_name("toy_tasks.py"))
VOCABULARY = VocabularyConfig(size=400)
NAMES = ("toy_train", "toy_unseen")
REQUEST = Request.make(NAMES, TASKS, VOCABULARY)


def prepare(cache_dir: str | Path, *what: Any, **more: Any) -> dict[str, PreparedMixture]:
    """`ensure_prepared` without a child process: this one imports TensorFlow."""
    from moe_jax.data.materialise import materialise

    request = Request.make(*what, **more)
    with processes.lock(cache_dir, wait=True):
        materialise(Path(cache_dir), request)
    return look_up(cache_dir, request)


@functools.cache
def toy_cache() -> Path:
    """Directory of a cache that holds both mixtures."""
    directory = tempfile.mkdtemp(prefix="toy_cache_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    ensure_prepared(directory, REQUEST)
    return Path(directory)


def toy_mixtures(cache_dir: Path | None = None) -> tuple[PreparedMixture, PreparedMixture]:
    """`toy_train` and `toy_unseen`; from `cache_dir` if another process has prepared them."""
    return tuple(ensure_prepared(cache_dir or toy_cache(), REQUEST).values())
