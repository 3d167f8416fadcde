"""Processes that work together: they meet at the start, and each is told when another is lost.

JAX looks after its processes as well. But it waits without a word, needs 100 s to miss a process,
and then ends the others with stacks of C++. So they meet here before JAX connects them. Process 0
listens at the coordinator's address until all have come; the connections stay, and one that breaks,
or is silent, tells which process is lost.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from moe_jax.core.errors import UserError, say

_WORD = "moe_jax"  # key of a process's number in what it says first
_BEAT = 5.0  # seconds between signs of life
_SILENCE = 40.0  # seconds without one after which a process is lost
_SAY = 10.0  # seconds between lines about who is waited for
_PATIENCE = 300.0  # seconds to wait for all
_GRACE = 1.0  # seconds in which a process may say itself why it ends
_HELD = 3.0  # seconds that messages of C++ libraries are held back
_CHATTER = b"[Gloo] Rank"  # of which nobody needs to hear


class Peers:
    """The processes of one run. `meet` first; `leave` at the end.

    Args:
        address: host:port of process 0.
        count: number of processes.
        index: of this process.
        end: ends this process with one line, from any thread.

    Raises:
        UserError: the address or the numbers cannot be.
    """

    def __init__(self, address: str, count: int, index: int, end: Callable[[str], NoReturn]):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f"the coordinator's address must be HOST:PORT, not {address!r}")
        if not 0 <= index < count:
            raise UserError(f"there is no process {index} of {count}: they count from 0")
        self._address, self._count, self._index, self._end = address, count, index, end
        self._host, self._port = host.strip("[]"), int(port)
        self._others: dict[int, _Peer] = {}
        self._ending = threading.Lock()  # taken by whoever ends the process; never released

    def meet(self) -> None:
        """Waits until all processes have come, and watches them from then on.

        Every ten seconds a line says who is missing.

        Raises:
            UserError: the port is in use, or the processes disagree about their number or indices.
        """
        if self._index == 0:
            self._listen()
        else:
            self._connect()
        for index, peer in self._others.items():
            threading.Thread(target=self._watch, args=(index, peer), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def leave(self, why: str | None = None) -> None:
        """Tells the others that this process ends: having done its work, or why not.

        If it fails because another is lost, that one is what the user hears of: the process ends
        here.
        """
        if why is not None:
            time.sleep(_GRACE)
            if not self._ending.acquire(blocking=False):
                time.sleep(_SILENCE)  # another thread is about to end the process
        self._tell(end=why)

    # ---- meeting ----

    def _listen(self) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            server = socket.create_server(
                ("", self._port), family=family, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError as e:
            raise UserError(f"cannot listen at port {self._port}: {e.strerror or e}") from e
        with server:
            server.settimeout(0.2)
            for _ in self._waiting(lambda: [i for i in range(1, self._count)
                                            if i not in self._others]):  # fmt: skip
                with contextlib.suppress(OSError):
                    self._admit(_Peer(server.accept()[0]))
        self._tell(go=True)

    def _admit(self, peer: "_Peer") -> None:
        """Takes in a process that says who it is."""
        try:
            hello = peer.receive(_GRACE)
            index, count, peer.host = int(hello[_WORD]), hello["count"], hello["host"]
        except (ValueError, KeyError, TypeError):
            return  # a stranger
        problem = None
        if count != self._count:
            problem = (
                f"process {index} was started as one of {count}, process 0 as one of {self._count}"
            )
        elif not 0 < index < self._count or index in self._others:
            problem = f"two processes were started as process {index}"
        if problem is not None:
            peer.send(refused=problem)
            self._tell(refused=problem)
            raise UserError(problem)
        self._others[index] = peer

    def _connect(self) -> None:
        for _ in self._waiting(lambda: [0] * (not self._others)):
            try:
                peer = _Peer(socket.create_connection((self._host, self._port), timeout=_BEAT))
                peer.host = self._host
                hello = {_WORD: self._index, "count": self._count, "host": socket.gethostname()}
                peer.send(**hello)
                self._others[0] = peer
            except OSError:
                time.sleep(0.2)
        answer: dict[str, Any] = {}
        while "go" not in answer:
            try:
                answer = self._others[0].receive(_PATIENCE)
            except (OSError, ValueError):
                answer = {"refused": f"process 0 at {self._address} ended at the start"}
            if "refused" in answer:
                raise UserError(answer["refused"])
            if "waiting" in answer:
                say(answer["waiting"])

    def _waiting(self, missing: Callable[[], list[int]]) -> Iterator[None]:
        """Yields as long as processes are missing; says so now and then, and ends at last."""
        start = time.monotonic()
        said = 0.0
        while absent := missing():
            waited = time.monotonic() - start
            names = ", ".join(map(str, absent[:8])) + ", ..." * (len(absent) > 8)
            who = f"process {names} of {self._count}"
            if waited > _PATIENCE:
                line = (
                    f"{who} did not come within {_PATIENCE:.0f} s; start every process, with the"
                    f" same coordinator address {self._address}"
                )
                self._tell(refused=line)
                self._end(line)
            if waited >= said + _SAY:
                said += _SAY
                line = f"waiting for {who} at {self._address} ({said:.0f} s)"
                self._tell(waiting=line)
                say(line)
            yield

    # ---- watching ----

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT)
            self._tell()

    def _watch(self, index: int, peer: "_Peer") -> None:
        how = "is lost: it was killed, or its machine is out of reach"
        message: dict[str, Any] = {}
        try:
            while "end" not in message and "line" not in message:
                message = peer.receive(_SILENCE)
        except (OSError, ValueError):
            message = {"end": how}
        else:
            if message.get("end", "") is None:
                return  # it has done its work
            how = f"has ended: {message.get('end')}"
            time.sleep(_GRACE)  # this process may have a reason of its own
        line = message.get("line") or (
            f"process {index} of {self._count} on {peer.host} {how}; start all processes again, and"
            " training goes on from its last checkpoint"
        )
        if self._ending.acquire(blocking=False):
            self._tell(line=line)
            self._end(line)

    def _tell(self, **message: Any) -> None:
        for peer in self._others.values():
            peer.send(**message)


class _Peer:
    """A connection to another process, over which objects of JSON go, one a line."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._lines = connection.makefile("rb")
        self.host = ""

    def send(self, **message: Any) -> None:
        """Sends; that the other is gone is noticed by who receives."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> Any:
        """The next message.

        Raises:
            OSError, ValueError: there is none within so many seconds, or it is none of ours.
        """
        self._connection.settimeout(seconds)
        return json.loads(self._lines.readline(2**16))


def hold_back_libraries() -> None:
    """What C++ libraries print reaches standard error 3 s late, and never if the process ends.

    When a process is lost, JAX and Gloo write pages about it in the others and abort them at once.
    An abort waits for 6 s, in which the process ends with the one line that names the lost one.
    """
    read, write = os.pipe()
    own = {}
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        stream.flush()
        own[name] = open(  # noqa: SIM115 (stays open)
            os.dup(number), "w", buffering=1, encoding=stream.encoding, errors="backslashreplace"
        )
        os.dup2(write, number)
    os.close(write)
    sys.stdout = sys.__stdout__ = own["stdout"]
    sys.stderr = sys.__stderr__ = own["stderr"]
    faulthandler.enable(own["stderr"])
    # The handler is `sleep`, whose argument is the signal's number: 6.
    libc = ctypes.CDLL(None)
    libc.signal(ctypes.c_int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))

    def pass_on() -> None:
        while data := os.read(read, 2**16):
            time.sleep(_HELD)
            lines = [line for line in data.splitlines(True) if not line.startswith(_CHATTER)]
            os.write(own["stderr"].fileno(), b"".join(lines))

    threading.Thread(target=pass_on, daemon=True).start()
