"""Locks in a bucket: objects that their holders write anew every few seconds.

No lock of a bucket becomes free when its holder is killed. Who finds one unchanged for a minute
takes it over, and at once where the holder was on this machine and is gone. It is written only if
it still is what was read, a condition that the bucket checks: so one process alone succeeds.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore

from moe_jax.core import paths
from moe_jax.core.errors import UserError, say

RENEWAL = 10.0  # seconds between two writes
EXPIRY = 60.0  # seconds after which one that is not written anew is free
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def lease(path: paths.Path, wait: bool) -> Iterator[None]:
    """Context: this process alone holds the lock `path`.

    Args:
        wait: for as long as another process holds it, and says so.

    Raises:
        UserError: another process holds it (its host and number are named), or the bucket cannot
            be written to.
    """
    try:
        held = _Lease(path, wait)
    except (ValueError, OSError) as e:  # TensorStore's
        raise UserError(f"cannot write {path}: {paths.reason(e)}") from e
    with held:
        yield


class _Lease:
    def __init__(self, path: paths.Path, wait: bool):
        self._path = path
        self._store = tensorstore.KvStore.open(f"{path.parent}/").result()
        self._mine = (
            f"process {os.getpid()} on {socket.gethostname()}\n{_machine()}\n{uuid.uuid4()}"
        )
        self._generation = self._acquire(wait)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(ValueError, OSError):
            self._write(None, self._generation)

    def _write(self, value: str | None, if_generation: bytes) -> bytes:
        """Writes or removes the object if it is of that generation; b"" where it was not."""
        done = self._store.write(self._path.name, value, if_equal=if_generation).result()
        return done.generation

    def _acquire(self, wait: bool) -> bytes:
        seen, since, said = None, 0.0, False
        while True:
            found = self._store.read(self._path.name).result()
            generation = found.stamp.generation
            if generation != seen:
                changed, seen, since = seen is not None, generation, time.monotonic()
                holder, machine = [*found.value.decode(errors="replace").split("\n"), "", ""][:2]
                if changed and found.value and not wait:
                    place = self._path.parent
                    raise UserError(f"{place} is in use by {holder}; wait for it, or stop it")
            old = time.monotonic() - since > EXPIRY
            if found.value.decode(errors="replace") == self._mine:
                return generation  # the answer to our write was lost
            if not found.value or old or _is_gone(holder, machine):
                own = self._write(self._mine, generation)
                if own:
                    return own
                continue  # another process was quicker
            if not said:
                say(f"waiting for {holder}, which works in {self._path.parent}, or did")
                said = True
            time.sleep(min(1.0, RENEWAL / 10))

    def _renew(self) -> None:
        while not self._done.wait(RENEWAL):
            try:
                generation = self._write(self._mine, self._generation)
                if not generation:
                    found = self._store.read(self._path.name).result()
                    if found.value.decode(errors="replace") != self._mine:
                        say(f"error: {self._path.parent} was taken over by another process")
                        os._exit(1)
                    generation = found.stamp.generation  # the answer to a write of ours was lost
            except (ValueError, OSError):  # no connection for now
                continue
            self._generation = generation


def _machine() -> str:
    """What tells this machine, since it was started, from all others."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""


def _is_gone(holder: str, machine: str) -> bool:
    """Whether a holder was a process of this machine, and has ended."""
    words = holder.split()
    if len(words) != 4 or words[3] != socket.gethostname() or not machine or machine != _machine():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
