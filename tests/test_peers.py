"""Processes that work together: who is missing or lost is named in one line, soon."""

import signal
import socket
import subprocess
import sys
import time

import pytest
from toy_run import free_port

from moe_jax.core.errors import UserError
from moe_jax.core.peers import Peers

# Two processes that add up numbers over the network until one is gone.
JAX = """
import sys
import numpy as np
from jax.experimental import multihost_utils
from moe_jax.core.errors import UserError
from moe_jax.runs import flags
from moe_jax.runs.config import Config

def work(config):
    step = 0
    while True:
        multihost_utils.process_allgather(np.float32(1))
        step += 1
        if step == 3:
            print("works", flush=True)
        if step >= 3 and sys.stdin.readline() == "fail\\n":
            raise UserError("the disk is full")

flags.run(work, Config)
"""
# Without JAX: says "met", then does what a line of its input says.
PLAIN = """
import os, sys, time
from moe_jax.core import peers
peers._SAY, peers._PATIENCE, peers._BEAT, peers._SILENCE = 0.5, float(sys.argv[4]), 0.2, 1.5
def end(line):
    print(line, flush=True)
    os._exit(75)
own = peers.Peers(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), end)
try:
    own.meet()
except peers.UserError as e:
    sys.exit(f"error: {e}")
print("met", flush=True)
why = sys.stdin.readline().strip()
own.leave(None if why == "done" else why)
if why == "done":
    time.sleep(2)
"""


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def plain(port, count, index, patience=60):
    return python(PLAIN, f"127.0.0.1:{port}", count, index, patience)


def started(processes):
    for process in processes:
        assert process.stdout.readline() == "met\n"
    return processes


def end_of(process, code):
    process.wait(timeout=60)  # its input stays open
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out + err


LOST = (
    "process {} of {} on {} is lost: it was killed, or its machine is out of reach; start all"
    " processes again, and training goes on from its last checkpoint\n"
)


@pytest.mark.parametrize(
    ("index", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP),
                       (2, signal.SIGSTOP)],
)  # fmt: skip
def test_the_lost_one_is_named_by_all_others(index, how):
    """Also one that is silent, as one on a machine that has failed."""
    port = free_port()
    processes = started([plain(port, 3, i) for i in range(3)])
    processes[index].send_signal(how)
    host = socket.gethostname() if index else "127.0.0.1"
    for i, process in enumerate(processes):
        if i != index:
            assert end_of(process, 75) == LOST.format(index, 3, host)
    processes[index].kill()
    processes[index].communicate()


def test_one_that_has_done_its_work_is_not_lost():
    port = free_port()
    processes = started([plain(port, 3, i) for i in range(3)])
    for process in processes:
        process.stdin.write("done\n")
        process.stdin.flush()
    for process in processes:
        assert end_of(process, 0) == ""


@pytest.mark.parametrize("index", [0, 1])
def test_why_one_has_ended_is_told_to_the_others(index):
    port = free_port()
    processes = started([plain(port, 2, i) for i in range(2)])
    processes[index].communicate("no room\n", timeout=60)
    line = end_of(processes[1 - index], 75)
    assert line.startswith(f"process {index} of 2 on ")
    assert " has ended: no room; start all processes again" in line and line.count("\n") == 1


@pytest.mark.parametrize("here", [0, 1])
def test_one_that_never_comes(here):
    port = free_port()
    process = plain(port, 2, here, patience=1.8)
    missing = 1 - here
    lines = end_of(process, 75).splitlines()
    assert lines[0].startswith(f"process {missing} of 2 did not come within 2 s; start every")
    waiting = [f"waiting for process {missing} of 2 at 127.0.0.1:{port} ({s} s)" for s in (0, 1, 2)]
    assert lines[1:] == waiting


def test_who_waits_hears_for_whom():
    port = free_port()
    processes = [plain(port, 3, i) for i in range(2)]
    for process in processes:
        while not process.stderr.readline().startswith("waiting for process 2 of 3 at "):
            assert process.poll() is None
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        (3, 1, "error: process 1 was started as one of 3, process 0 as one of 2"),
        (2, 0, "error: cannot listen at port {}: Address already in use"),
    ],
)
def test_processes_that_disagree(count, index, message):
    port = free_port()
    first = plain(port, 2, 0)
    while True:  # until it listens
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                s.sendall(b"GET / HTTP/1.1\r\n\r\n")  # a stranger, who is not let in
                break
    second = plain(port, count, index)
    assert message.format(port) in end_of(second, 1)
    if index:
        assert message in end_of(first, 1)
    if first.poll() is None:
        first.kill()
        first.communicate()


def test_two_processes_of_one_number():
    port = free_port()
    processes = [plain(port, 3, i) for i in (0, 1, 1)]
    for process in processes:
        assert "error: two processes were started as process 1" in end_of(process, 1)


@pytest.mark.parametrize(
    ("address", "count", "index", "message"),
    [
        ("host", 2, 0, "the coordinator's address must be HOST:PORT, not 'host'"),
        ("host:99999", 2, 0, "the coordinator's address must be HOST:PORT"),
        ("host:1234", 2, 2, "there is no process 2 of 2: they count from 0"),
    ],
)
def test_what_cannot_be(address, count, index, message):
    with pytest.raises(UserError, match=message):
        Peers(address, count, index, print)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("how", ["kill", pytest.param("fail", marks=pytest.mark.slow)])
def test_jax_ends_with_the_one_line(index, how):
    """No dump of C++ before it, and within seconds; JAX and Gloo take a minute."""
    port = free_port()
    processes = [
        python(
            JAX, "--multiprocess_gpu", f"--coordinator_address=127.0.0.1:{port}",
            "--process_count=2", f"--process_index={i}", "--gin.MIXTURE_OR_TASK_NAME=none",
            '--gin.TASK_FEATURE_LENGTHS={"inputs": 8, "targets": 8}',
        )
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "works\n"
    start, host = time.monotonic(), socket.gethostname() if index else "127.0.0.1"
    if how == "kill":
        processes[index].kill()
        expected, said = LOST.format(index, 2, host), ""
    else:
        processes[index].stdin.write("fail\n")
        processes[index].stdin.flush()
        expected = f"process {index} of 2 on {host} has ended: the disk is full; start all"
        said = "error: the disk is full\n"
    other = processes[1 - index]
    other.stdin.write("go on\n")  # into the sum, in which it waits for the lost one
    other.stdin.flush()
    line = end_of(other, 75)
    assert time.monotonic() - start < 30
    assert line.startswith(expected) and line.count("\n") == 1
    assert processes[index].communicate(timeout=60)[1] == said
