"""Locks that are free again after a kill, and children that end with their parent."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from moe_jax.core import processes
from moe_jax.core.errors import UserError

HOLD = """
import sys, time
from moe_jax.core.processes import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
CHILD = """
import os, signal, sys, time
from moe_jax.core.processes import end_with_parent
end_with_parent()
signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), sys.exit(7)))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import signal, sys
from moe_jax.core.processes import call
signal.signal(signal.SIGTERM, signal.default_int_handler)
call([sys.executable, "-c", sys.argv[1]])
"""


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(pid: int, seconds: float) -> bool:
    """Whether a process that is not ours to wait for ends within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as f:
                if f.read().rpartition(")")[2].split()[0] == "Z":  # waits for its new parent
                    return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_lock_names_its_holder_and_is_free_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 0.2)
    holder = python(HOLD, tmp_path / "run")
    assert holder.stdout.readline() == "held\n"
    expected = f"{tmp_path}/run is in use by process {holder.pid} on {socket.gethostname()}; "
    with pytest.raises(UserError) as error, processes.lock(tmp_path / "run"):
        pass
    assert str(error.value).startswith(expected)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    for _ in range(2):  # free again, also after a holder that ended well
        with processes.lock(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on")


def test_a_lock_that_is_waited_for(tmp_path, capsys):
    holder = python(HOLD, tmp_path)
    holder.stdout.readline()
    killer = python(
        "import os, sys, time; time.sleep(0.5); os.kill(int(sys.argv[1]), 9)", holder.pid
    )
    with processes.lock(tmp_path, wait=True):
        assert holder.wait() == -signal.SIGKILL
    assert capsys.readouterr().err.startswith(f"waiting for process {holder.pid} on ")
    for process in (holder, killer):
        process.communicate()


def test_where_no_lock_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with (
            pytest.raises(UserError, match="file is a file, not a directory"),
            processes.lock(tmp_path / place),
        ):
            pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(number):
    parent = python(PARENT, CHILD)
    pid = int(parent.stdout.readline())
    parent.send_signal(number)
    assert gone(pid, 10)
    out, err = parent.communicate()
    # Asked to stop, the parent asks the child; killed, it cannot.
    assert out == ("asked\n" if number == signal.SIGTERM else "")
    assert parent.returncode != 0 and (number == signal.SIGKILL or "KeyboardInterrupt" in err)


def test_a_childs_lock_outlives_its_parent(tmp_path):
    """What a child holds is not free before the child has ended."""
    read, write = os.pipe()
    with processes.lock(tmp_path) as lock:
        child = subprocess.Popen([sys.executable, "-c", f"import os; os.read({read}, 1)"],
                                 pass_fds=[lock, read])  # fmt: skip
    with open(tmp_path / ".lock") as file:
        with pytest.raises(BlockingIOError):
            processes.fcntl.flock(file, processes.fcntl.LOCK_EX | processes.fcntl.LOCK_NB)
        os.write(write, b"x")
        assert child.wait() == 0
        processes.fcntl.flock(file, processes.fcntl.LOCK_EX | processes.fcntl.LOCK_NB)
    for end in (read, write):
        os.close(end)


def test_the_exit_code_is_the_childs():
    assert processes.call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
