"""Fuzzing with a seed: damaged bytes, changed JSON, and what must become of either.

An input is either accepted, and an independent check agrees with what was read, or refused by a
UserError of one line. Anything else fails: another exception, nonsense, or ten seconds without an
end.
"""

import contextlib
import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import TABLES

from moe_jax.core.errors import UserError

SECONDS = 10
# What no one means, and what someone may.
VALUES = [
    None, True, False, 0, 1, -1, 2, 3.5, 1e308, -0.0, 10**30, 2**31, -(2**63), float("nan"),
    float("inf"), "", " ", "x", "0", "None", "\0", "a\nb", "\ud800", "é" * 300, "../../x", "{", "%",
    [], {}, [None], [[]], [1] * 300, ["x", "x"], {"": 0}, {"a": {"b": []}}, [{"a": "b"}],
]  # fmt: skip
_PIECES = [
    b"\xff", b"\xc3", b"\0", b"\n", b"\r\n", b"\t", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":",
    b"null", b"1e999", b"NaN", b"\\ud800", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"-", b"[" * 20_000,
]  # fmt: skip


class Hang(BaseException):
    """Not an Exception: no one may take it for a bad input."""


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three bits flipped, pieces dropped, doubled, moved or put in."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = at + rng.randrange(1, 30)
        match rng.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at:end]
            case 2:
                content[at:at] = content[at:end]
            case 3:
                content[at:end] = content[at:end][::-1]
            case 4 if rng.randrange(5) == 0:
                del content[at:]
            case _:
                content[at:at] = rng.choice(_PIECES)
    return bytes(content)


def changed(rng: random.Random, value: Any) -> Any:
    """A JSON value in which one to three of its parts are replaced, dropped, doubled or renamed."""
    top = [json.loads(json.dumps(value))]
    for _ in range(rng.randrange(1, 4)):
        places = list(_places(top))
        if not places:
            break
        inside, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, list):
                inside.insert(key, inside[key])
            case 1 | 2 if isinstance(inside, dict):
                inside[rng.choice(["x", key.upper(), f"{key}\n", "\ud800", ""])] = inside.pop(key)
            case _:
                # A copy: it may be changed itself.
                inside[key] = copy.deepcopy(rng.choice(VALUES))
    return top[0] if top else copy.deepcopy(rng.choice(VALUES))


def changed_text(rng: random.Random, value: Any) -> bytes:
    """JSON of a changed value, or damaged bytes of JSON of the value."""
    if rng.randrange(3) == 0:
        return damaged(rng, json.dumps(value, ensure_ascii=False, indent=1).encode())
    text = json.dumps(changed(rng, value), ensure_ascii=rng.randrange(2) == 0)
    return text.encode(errors="surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every part of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


class Count:
    """How many inputs of a kind were tried, and what became of them."""

    def __init__(self, kind: str, tries: int):
        self.kind, self.accepted, self.refused = kind, 0, 0
        self._tries = tries

    def __iter__(self) -> Iterator[random.Random]:
        """A seeded source of randomness for each input."""
        for number in range(self._tries):
            yield random.Random(f"{self.kind} {number}")

    def outcome(self, named: Any, shown: Any, read: Callable[..., Any], *arguments: Any) -> Any:
        """What `read(*arguments)` returns, or the UserError that it raises.

        Args:
            named: what the error has to name.
            shown: the input, for the message of a test that fails.
        """
        try:
            with _soon():
                value = read(*arguments)
        except UserError as e:
            line = str(e)
            assert line.strip() and len(line.splitlines()) == 1 and len(line) < 1500, (shown, line)
            assert str(named) in line, (shown, line)
            line.encode()
            self.refused += 1
            return e
        except BaseException as e:
            e.add_note(f"{self.kind}: {str(shown)[:2000]!r}")
            raise
        self.accepted += 1
        return value

    def __str__(self) -> str:
        total = self.accepted + self.refused
        return f"{self.kind}: {total} inputs, {self.accepted} accepted, {self.refused} refused"


@contextlib.contextmanager
def _soon() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(kind: str, short: int, long: int) -> Callable:
    """Decorates a test that goes through the inputs of its argument `count`.

    `short` of them by default; `long` of them, with the marker `slow`.
    """

    def decorate(test: Callable) -> Callable:
        @pytest.mark.parametrize(
            "tries", [short, pytest.param(long, marks=pytest.mark.slow)], ids=["short", "long"]
        )
        def run(tries: int, tmp_path: Any, request: pytest.FixtureRequest) -> None:
            count = Count(kind, tries)
            test(count, tmp_path)
            assert count.accepted and count.refused, count  # a fuzzer that sees both
            if tries == long:
                request.config.stash[TABLES].append(f"fuzzed {count}")

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
