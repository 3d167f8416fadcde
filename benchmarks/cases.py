"""Cases of a benchmark, run so that one that fails, hangs or ends its process loses no other.

The cases run one after the other in one process, so that they share what starting costs. A case
that fails ends it, and with it all memory and what a GPU may be left in; another process runs the
rest.
"""

import faulthandler
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.common import Report, show
from moe_jax.core import files
from moe_jax.core.errors import UserError, first_line, say

RUNNING, DONE = "running", "done"


def supervise(
    command: Sequence[str], names: Sequence[str], json_file: Path, limit_s: float
) -> None:
    """Runs the cases in other processes, until all are done or the time is over.

    Args:
        command: starts a process that calls `run_cases` with the names that are appended to it, and
            with a report that continues `json_file`.
        json_file: the report's file. Its "cases" says of each what became of it.
        limit_s: a case that runs then is killed.
    """
    begin, left, reason = time.monotonic(), list(names), f"{limit_s:.0f} s are over"
    json_file.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the other process, too
    while left and (remaining := limit_s - (time.monotonic() - begin)) > 0:
        try:
            code = subprocess.run([*command, *left], timeout=remaining, check=False).returncode
        except subprocess.TimeoutExpired:
            break
        found = json.loads(json_file.read_text()).get("cases", {}) if json_file.exists() else {}
        if not found.keys() & set(left):  # it did not even begin, and would not next time
            if not found:
                sys.exit(code or 1)
            reason = f"no process begins any more: exit code {code}"
            break
        for name, state in found.items():
            if state == RUNNING:
                _note(json_file, name, f"ended its process with exit code {code}")
        left = [name for name in left if name not in found]
    for name in left:
        _note(json_file, name, reason)
    result = json.loads(json_file.read_text())
    if "machine" in result:  # at least one began
        show(result)


def _note(json_file: Path, name: str, state: str) -> None:
    """Writes what became of a case."""
    result = json.loads(json_file.read_text()) if json_file.exists() else {}
    if result.setdefault("cases", {}).get(name, RUNNING) == RUNNING:
        result["cases"][name] = state
        files.write_json(json_file, result)
        say(f"{name}: {state}")


def run_cases(
    cases: Mapping[str, Callable[[Report], object]], report: Report, case_limit_s: float
) -> None:
    """Runs the cases in this process; returns, or exits with 1, after the first that fails.

    Args:
        case_limit_s: a case that takes longer ends the process; it shows where it was.
    """
    begin = time.monotonic()
    for name, case in cases.items():
        print(f"{name}, after {time.monotonic() - begin:.0f} s", flush=True)
        report.case(name, RUNNING)
        faulthandler.dump_traceback_later(case_limit_s, exit=True)
        try:
            case(report)
        except (UserError, ImportError) as e:  # others need neither data nor PyTorch
            state = f"left out: {first_line(e)}"
        except Exception as e:
            traceback.print_exc()
            report.case(name, f"failed: {type(e).__name__}: {first_line(e)}")
            sys.exit(1)
        else:
            state = DONE
        finally:
            faulthandler.cancel_dump_traceback_later()
        report.case(name, state)
