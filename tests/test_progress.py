"""Progress bars: lines in a file, a bar on a terminal."""

import contextlib
import os
import pty
import subprocess
import sys
import termios

# Three bars: one inside another, and one that is left without an end.
CODE = """
import time
from moe_jax.core import progress
from moe_jax.core.errors import say
progress.PERIOD = 0.2
for _ in progress.progress(range(4), desc="outer", unit="task"):
    for _ in progress.progress(range(4), desc="inner", leave=False):
        time.sleep(0.1)
for _ in progress.progress(range(3), desc="quick"):
    pass
bar = progress.progress(total=9, desc="cut short")
time.sleep(0.3)
bar.update(2)
say("news")
raise SystemExit("error: no more")
"""


def test_a_file_gets_a_line_now_and_then():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and "\x1b" not in done.stderr and "" not in lines
    assert "error: no more" in lines and "news" in lines
    outer = [line for line in lines if line.startswith("outer")]
    inner = [line for line in lines if line.startswith("inner")]
    assert 2 <= len(outer) <= 5 and "100%" in outer[-1] and "4/4" in outer[-1]
    assert len({line.partition("[")[0] for line in outer}) == len(outer)  # each once
    assert 1 <= len(inner) <= 2 * 4
    assert not any("quick" in line for line in lines)
    assert any("cut short" in line and "2/9" in line for line in lines)


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", CODE], stderr=theirs)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # when the terminal's other end is closed
        while part := os.read(ours, 4096):
            text += part
    process.wait()
    os.close(ours)
    assert text.count(b"\r") > 10 and b"quick: 100%" in text
    before, news, after = text.partition(b"news\r\n")
    assert before.endswith(b" \r") and news  # the bar is wiped out, and comes again
    assert b"cut short" in after
