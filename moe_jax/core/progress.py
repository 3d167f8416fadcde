"""Progress bars, which are lines now and then where nobody watches a terminal."""

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

PERIOD = 30.0  # seconds between two lines


def progress(iterable: Iterable | None = None, **settings: Any) -> tqdm:
    """tqdm's bar on standard error; a line every half minute if that is a file or a pipe.

    What takes less time writes no line.
    """
    if not sys.stderr.isatty():
        settings |= {"file": _Lines(sys.stderr), "delay": PERIOD}
        settings |= {"mininterval": PERIOD, "maxinterval": PERIOD}
    return tqdm(iterable, **settings)


class _Lines:
    """A stream to which a bar is written as lines: without what moves a terminal's cursor."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._written = ""

    def write(self, text: str) -> None:
        text = re.sub(r"\x1b\[A|[\r\n]", "", text).rstrip()
        done = text.partition("[")[0]  # without times
        if text and done != self._written:  # a bar that ends says once more how far it is
            self._stream.write(f"{text}\n")
            self._written = done

    def flush(self) -> None:
        self._stream.flush()
