"""A trace of some steps of training, which Perfetto and TensorBoard open."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax

from moe_jax.core import paths
from moe_jax.core.errors import UserError, say

Steps = tuple[int, int]  # the first and the last


def parse_steps(words: Sequence[str] | None) -> Steps | None:
    """The steps of --profile=FIRST,LAST.

    Raises:
        UserError: they are not two numbers, from 1 on and in order.
    """
    if words is None:
        return None
    try:
        first, last = map(int, words)
    except ValueError:
        first, last = 0, 0
    if not 1 <= first <= last:
        raise UserError(
            f"--profile={','.join(words)}: give the first and the last step, such as 10,12"
        )
    return first, last


class Trace:
    """Traces this process from the first to the last of some steps; a context of the loop.

    Raises:
        UserError: the loop, of steps `begin` to `end`, does not take all of them, or the directory
            is in a bucket.
    """

    def __init__(self, directory: Path, steps: Steps | None, begin: int, end: int):
        self._directory = directory if steps is None else paths.local(directory)
        self._first, self._last = steps or (0, 0)
        self._running = False
        if steps is not None and not begin <= self._first <= self._last <= end:
            raise UserError(
                f"--profile={self._first},{self._last}: this run takes steps {begin} to {end}"
            )

    def __enter__(self) -> Self:
        return self

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """The context of a step, which the trace shows by its number."""
        if number == self._first:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._running = True
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, step: int, result: Any) -> None:
        """Call it after each step, with an array that the step computes."""
        if step == self._last:
            jax.block_until_ready(result)
            self.__exit__()
            say(f"traced steps {self._first} to {step}: {self._directory}")

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
