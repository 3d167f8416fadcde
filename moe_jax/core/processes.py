"""Child processes that end with their parent, and locks that end with their process."""

import contextlib
import fcntl
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moe_jax.core import paths
from moe_jax.core.errors import UserError, say

LOCK = ".lock"
_PARENT = "MOE_JAX_PARENT"  # environment of a child: the pipe that closes when its parent ends
_GRACE = 30.0  # seconds that a child which is asked to stop may take to save
_PATIENCE = 5.0  # seconds in which the orphans of a process that was killed are gone


def call(command: Sequence[str], env: Mapping[str, str] | None = None, keep: Sequence[int] = ()):
    """Runs a command of this package and returns its exit code.

    The child has a session of its own, so that a terminal interrupts this process alone; if this
    process is stopped, it asks the child to stop, and if it is killed, the child ends at once.

    Args:
        env: its environment; this process's by default.
        keep: file descriptors that it inherits, such as a lock's.
    """
    read, write = os.pipe()
    environment = {**(os.environ if env is None else env), _PARENT: str(read)}
    child = subprocess.Popen(
        command, env=environment, pass_fds=[read, *keep], start_new_session=True,
        stderr=sys.__stderr__,
    )  # fmt: skip
    os.close(read)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
        child.kill()
        child.wait()
        raise
    finally:
        os.close(write)


def ending(code: int) -> str:
    """How a child ended that did not do its work, from its exit code."""
    if code >= 0:
        return f"failed with exit code {code}: see above"
    killed = "; the kernel does so when memory is full" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{killed}"


def end_with_parent() -> None:
    """Lets this process, if `call` started it, be killed when its parent ends."""
    pipe = os.environ.pop(_PARENT, None)
    if pipe is None:
        return

    def watch() -> None:
        os.read(int(pipe), 1)  # returns when no one holds the other end
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def lock(directory: str | os.PathLike, wait: bool = False) -> Iterator[int | None]:
    """Context: this process alone works in a directory, which is made if needed.

    The lock is free when all who hold its file have ended, however they ended.

    Args:
        wait: for as long as another process holds it, and says so.

    Yields:
        The lock's file descriptor, for a child that is to hold it as well; None in a bucket.

    Raises:
        UserError: another process holds it; its host and number are named. Or there is no such
            directory, and none can be made.
    """
    path = paths.parse(directory) / LOCK
    if paths.in_bucket(path):
        from moe_jax.core.leases import lease  # TensorStore takes a while to import

        with lease(path, wait):
            yield None
        return
    if taken := next(filter(Path.is_file, path.parents), None):
        raise UserError(f"{taken} is a file, not a directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    with file:
        _acquire(file, path, wait)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield file.fileno()
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _acquire(file, path: Path, wait: bool) -> None:
    end = time.monotonic() + (math.inf if wait else _PATIENCE)
    said = False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
        except OSError as e:
            return say(
                f"{path} cannot be locked ({e.strerror}): start nothing else that writes there"
            )
        if time.monotonic() > end:
            raise UserError(f"{path.parent} is in use by {holder}; wait for it, or stop it")
        if wait and not said:
            say(f"waiting for {holder}, which works in {path.parent}")
            said = True
        time.sleep(0.1)
