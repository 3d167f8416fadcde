"""SIGTERM and SIGINT in training, which stops after the step at hand and saves what it has."""

import contextlib
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.core.ending import SIGNALS, Stopped, stop_now


class Stop:
    """Whether training has been asked to stop; see `after_a_step`."""

    def __init__(self, mesh: Mesh):
        self._signal: int | None = None
        self._at_once = False
        # One flag per device; whatever process a signal reaches, all agree, one step later.
        self._flags = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._waiting: jax.Array | None = None

    def handle(self, number: int, frame) -> None:
        """A handler of signals; a second SIGINT ends the process at once."""
        if self._at_once or (number == signal.SIGINT and self._signal is not None):
            stop_now(number, frame)
        self._signal = number

    def agreed(self) -> bool:
        """Whether all processes stop after this step. Call it once a step, on all of them."""
        if jax.process_count() == 1:
            return self._signal is not None
        earlier, asked = self._waiting, np.int32(self._signal is not None)
        self._waiting = self._any(
            jax.make_array_from_callback(
                (self._flags.mesh.size,), self._flags, lambda index: np.full(1, asked)
            )
        )
        return earlier is not None and bool(earlier)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal stops a single process at once: everything is saved."""
        self._at_once = jax.process_count() == 1
        try:
            if self._at_once and self._signal is not None:
                stop_now(self._signal, None)
            yield
        finally:
            self._at_once = False

    def stopped(self, step: int) -> Stopped:
        """What to raise after a step whose state is saved."""
        name = signal.Signals(self._signal).name if self._signal else "a signal to another process"
        words = f"stopped by {name} after step {step}; the same command goes on from there"
        return Stopped(words, together=True)


@contextlib.contextmanager
def after_a_step(mesh: Mesh) -> Iterator[Stop]:
    """Context in which signals are noted, for a loop of steps to look at."""
    stop = Stop(mesh)
    before = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
