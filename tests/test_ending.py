"""How commands end: one line, and an exit code that says whether to start them again."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from toy_run import bindings, flags_of, free_port, start

from moe_jax.core import processes

BODY = """
import os, signal, sys, time
from moe_jax.core.ending import one_line
from moe_jax.core.errors import UserError
with one_line():
    {body}
print("after")
"""
TOO_LONG = "x" * 300  # no file system takes such a name


def body(code: str) -> tuple[int, str, str]:
    """(exit code, output, what standard error says) of a process whose command is `code`."""
    command = [sys.executable, "-c", BODY.format(body=code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("code", "ends"), [
    ("print(1)", (0, "1\nafter\n", "")),
    ("print(1); raise UserError('no room\\nof which more')", (1, "1\n", "error: no room\n")),
    ("open('/absent/file')", (1, "", "error: /absent/file: No such file or directory\n")),
    ("raise OSError(28, os.strerror(28))",
     (1, "", f"error: cannot write: {os.strerror(errno.ENOSPC)}\n")),
    *(
        (f"os.kill(os.getpid(), signal.{name}); time.sleep(9)",
         (75, "", f"stopped by {name}; the same command goes on from what is saved\n"))
        for name in ("SIGTERM", "SIGINT")
    ),
    ("sys.exit(3)", (3, "", "")),
])  # fmt: skip
def test_what_ends_a_command(code, ends):
    assert body(code) == ends


@pytest.mark.parametrize("name", ["__del__", "_xla_gc_callback"])
def test_a_signal_is_not_lost_where_python_drops_exceptions(name):
    begin = f"def {name}(*_): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)"
    use = (
        f"exec({begin!r}); "
        + {
            "__del__": "A = type('A', (), dict(__del__=__del__)); A()",
            "_xla_gc_callback": "import gc; gc.callbacks.append(_xla_gc_callback); gc.collect()",
        }[name]
    )
    line = "stopped by SIGTERM; the same command goes on from what is saved\n"
    assert body(f"{use}; time.sleep(9)") == (75, "", line)


def test_a_bug_keeps_its_traceback():
    code, _, err = body("[][0]")
    assert code == 1 and err.startswith("Traceback") and err.endswith("list index out of range\n")


@pytest.mark.parametrize("lines", [1, 100_000])  # the first is still in a buffer at the end
def test_a_reader_that_has_enough_is_no_error(lines):
    """As other programs, which end by SIGPIPE without a word."""
    read, write = os.pipe()
    os.close(read)
    code = BODY.format(body=f"print('line\\n' * {lines})")
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(("command", "arguments", "reason"), [
    ("convert", ["from-t5x", TOO_LONG, "out"], os.strerror(errno.ENAMETOOLONG)),
    ("report", [f"--run=it={TOO_LONG}", "--output=out"], os.strerror(errno.ENAMETOOLONG)),
    ("tasks", ["list", "--task_modules=absent.py"], "no such module file: absent.py"),
])  # fmt: skip
def test_commands_without_gin_end_in_the_same_way(command, arguments, reason):
    process = start(command, arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert reason in err


def test_how_a_child_ended():
    for code, words in (
        ("raise SystemExit(3)", "failed with exit code 3: see above"),
        ("import os; os.kill(os.getpid(), 15)", "was killed by SIGTERM"),
        ("import os; os.kill(os.getpid(), 9)",
         "was killed by SIGKILL; the kernel does so when memory is full"),
    ):  # fmt: skip
        assert processes.ending(processes.call([sys.executable, "-c", code])) == words


def test_several_processes_do_not_adapt_together(tmp_path):
    arguments = [
        *flags_of(bindings(tmp_path, DENSE_DIR="x")),
        "--multiprocess_gpu", f"--coordinator_address=127.0.0.1:{free_port()}", "--process_count=2",
    ]  # fmt: skip
    started = [start("finetune", [*arguments, f"--process_index={index}"]) for index in range(2)]
    for process in started:
        _, err = process.communicate(timeout=120)
        # The second may hear of the first's end before its own.
        assert process.returncode in (1, 75) and "Traceback" not in err, err
        assert "finetune runs in one process" in err.splitlines()[-1]
    assert not (tmp_path / ".lock").exists()
