"""Buckets that are out of reach: a line every ten seconds, and after a minute the command's end.

A bucket's clients try again by themselves, and say nothing: gcsfs for half a minute, TensorStore,
which writes checkpoints and locks, for a quarter of an hour. So in a command a thread asks the
bucket every few seconds whether it answers, whatever it answers.
"""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import NoReturn

from moe_jax.core.errors import say

PERIOD = 10.0  # seconds between two questions, and between two lines
PATIENCE = 60.0  # seconds without an answer after which a command ends
_WAIT = 5.0  # seconds for one answer


_end: Callable[[str], NoReturn] | None = None
_watch: "Watch | None" = None


def end_command(end: Callable[[str], NoReturn]) -> None:
    """Tells how an outage ends this process, which is a command: with one line, from any thread."""
    global _end
    _end = end


def watch(bucket: str, url: str) -> None:
    """Watches a bucket from now on, in a command. One is enough: all are in the same place."""
    global _watch
    if _end is not None and _watch is None:
        _watch = Watch(bucket, url, _end)


def is_on() -> bool:
    """Whether the bucket that is watched is out of reach."""
    return _watch is not None and _watch.out_of_reach


class Watch:
    """A thread that asks a bucket whether it answers.

    Args:
        bucket: its name in what is said.
        url: of a request that it answers, if only with a refusal.
        end: ends this process with one line.

    Attributes:
        out_of_reach: whether the last question found no answer.
    """

    def __init__(self, bucket: str, url: str, end: Callable[[str], NoReturn]):
        self._bucket, self._url, self._end = bucket, url, end
        self.out_of_reach = False
        self._since = self._said = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._ask()
            time.sleep(PERIOD / 10 if self.out_of_reach else PERIOD)

    def _ask(self) -> None:
        asked = time.monotonic()
        problem = _problem(self._url)
        if problem is None:
            if self._said:
                say(f"{self._bucket} answers again")
            self.out_of_reach, self._said = False, 0.0
            return
        if not self.out_of_reach:
            self.out_of_reach, self._since = True, asked
        waited = time.monotonic() - self._since
        if waited >= PATIENCE:
            self._end(
                f"error: {self._bucket} has been out of reach for {PATIENCE:.0f} s: {problem};"
                " the same command goes on from what is saved"
            )
        elif waited >= self._said + PERIOD:
            self._said += PERIOD
            say(f"{self._bucket} is out of reach, waiting ({self._said:.0f} s): {problem}")


def _problem(url: str) -> str | None:
    """Why there is no answer, in a few words; None where there is one."""
    try:
        with urllib.request.urlopen(url, timeout=_WAIT):
            return None
    except urllib.error.HTTPError as e:  # it may not tell us, but it is there
        return f"{e.code} {e.reason}" if e.code >= 500 else None
    except OSError as e:
        error = getattr(e, "reason", e)
        return getattr(error, "strerror", None) or str(error)
    except Exception as e:  # what answers is no bucket
        return f"{type(e).__name__}: {e}"
