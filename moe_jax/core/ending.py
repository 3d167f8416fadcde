"""How a command ends: in one line on standard error, which says what the user can do.

SIGTERM and SIGINT stop a command at once, unless it handles them itself (`moe_jax.runs.stopping`).
Processes that work with this one are told why it ends.
"""

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from moe_jax.core import outages, paths
from moe_jax.core.errors import UserError, first_line
from moe_jax.core.peers import Peers

AGAIN = os.EX_TEMPFAIL  # exit code: the same command goes on from what is saved
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LESS_MEMORY = (
    "try StepConfig.groups_at_once=1, ModelConfig.kept_activations='products' or more"
    " MeshConfig.fsdp; `moe_jax plan` tells what fits"
)
# Functions called where Python drops exceptions: destructors, and JAX's at a garbage collection.
_DROPPING = ("__del__", "_xla_gc_callback")
_SOON = 0.01  # seconds
_peers: Peers | None = None  # the processes that this one works with


class Stopped(KeyboardInterrupt):
    """A signal has asked this process to stop.

    Attributes:
        together: all processes stop, after the same step, and everything is saved.
    """

    def __init__(self, words: str, together: bool = False):
        super().__init__(words)
        self.together = together


def stop_now(number: int, frame: FrameType | None) -> None:
    """A handler of signals: raises `Stopped`, or a moment later where it would be dropped."""
    while frame is not None:
        if frame.f_code.co_name in _DROPPING:
            signal.signal(signal.SIGALRM, lambda _, frame: stop_now(number, frame))
            signal.setitimer(signal.ITIMER_REAL, _SOON)
            return
        frame = frame.f_back
    raise Stopped(
        f"stopped by {signal.Signals(number).name}; the same command goes on from what is saved"
    )


def tell(peers: Peers) -> None:
    """From now on, these processes are told why this one ends."""
    global _peers
    _peers = peers


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Context of a command: ends the process where the command cannot go on.

    Bad input (`UserError`), files that cannot be read or written and a device without enough memory
    end in one line and exit code 1; signals and a bucket that is out of reach in one line and
    `AGAIN`. Without a word and with the exit code of SIGPIPE, where nobody reads the output any
    more. Another exception is a bug, and keeps its traceback.
    """
    outages.end_command(_end_together)
    for number in SIGNALS:
        signal.signal(number, stop_now)
    try:
        yield
        sys.stdout.flush()
    except Stopped as e:
        _leave(None if e.together else str(e))
        if e.together and _peers is not None:
            import jax  # imported above, it would delay commands that do without

            jax.distributed.shutdown()  # the others are as far
        end(str(e), AGAIN)
    except BrokenPipeError:  # the reader has enough, such as `head`
        _leave("nobody reads its output any more")
        os._exit(128 + signal.SIGPIPE)
    except Exception as e:
        if error := _explained(e):
            _leave(first_line(error))
            fail(error)
        if _peers is None:
            raise
        _leave(f"{type(e).__name__}: {first_line(e)}")
        # JAX would wait for the others, and then end with a dump.
        end(traceback.format_exc().rstrip(), 1)
    _leave(None)


def _explained(error: Exception) -> UserError | None:
    """What to tell the user of an error; None of a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, paths.errors()):  # where neither `files` nor the reader explains it
        where = getattr(error, "filename", "") or "cannot write"
        return UserError(f"{where}: {paths.reason(error)}")
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"out of device memory ({first_line(error)}); {_LESS_MEMORY}")
    return None


def _end_together(line: str) -> NoReturn:
    """Ends the process, which the same command may bring further; the others are told why."""
    _leave(line)
    end(line, AGAIN)


def _leave(why: str | None) -> None:
    if _peers is not None:
        _peers.leave(why)


def fail(error: Exception) -> NoReturn:
    """Ends the process: one line on standard error and exit code 1, or `AGAIN` while a bucket is
    out of reach."""
    # Gin appends where a configurable was called from; the first line is ours.
    end(f"error: {first_line(error)}", AGAIN if outages.is_on() else 1)


def end(line: str, code: int) -> NoReturn:
    """Ends the process: one line on standard error."""
    # Threads of a failed save print as well: they may finish a line; later ones are dropped.
    stderr, sys.stderr = sys.stderr, io.StringIO()
    time.sleep(0.1)
    print(line, file=stderr)
    for stream in (sys.stdout, stderr):
        stream.flush()
    # Not `sys.exit`: those threads would go on.
    os._exit(code)
