"""Beam search against an implementation in plain Python."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import Logits, beams, padded
from toy_run import EOS, PAD, START

from moe_jax.decoding.beam import beam_search
from moe_jax.decoding.search import DecodingConfig, constrain

LENGTH = 8


class History:
    """A fake decoder: logits depend on all of a beam's past, which is read from the cache.

    The cache [R, C] holds the tokens fed in; each of those seen adds a row of its position's table.
    """

    def __init__(self, table_RxLxVxV: jax.Array, beams: int):
        self.table, self.beams, self.steps = table_RxLxVxV, beams, []

    def cache(self):
        return jnp.zeros((self.table.shape[0], self.table.shape[1] * self.beams), jnp.int32)

    def step(self, token_RxQ, index, cache_RxC, seen_RxQxC):
        jax.debug.callback(lambda: self.steps.append(1))
        rows, columns = cache_RxC.shape
        cache_RxC = jax.lax.dynamic_update_slice_in_dim(
            cache_RxC, token_RxQ, index * self.beams, axis=1
        )
        position_C = jnp.arange(columns) // self.beams
        more_RxCxV = self.table[jnp.arange(rows)[:, None], position_C, cache_RxC]
        return jnp.einsum("rqc,rcv->rqv", seen_RxQxC.astype(jnp.float32), more_RxCxV), cache_RxC


@pytest.mark.parametrize("count", [2, 4])
def test_beam_search(count):
    """All penalties and ways to stop, on rows that end early, late or never; empty rows."""
    rows, size = 30, 10
    rng = np.random.default_rng(count)
    shape = (rows, LENGTH, size, size)
    table = rng.normal(0, rng.uniform(0.2, 2, (rows, 1, 1, 1)), shape).astype(np.float32)
    table[..., EOS] += np.linspace(-0.3, 1.0, rows)[:, None, None]

    def logits_of(row: int) -> Logits:
        return lambda decoded: sum(table[row, i, t] for i, t in enumerate((START, *decoded)))

    different, stops = set(), []
    for penalty, early in itertools.product((-1.0, 0.0, 1.0, 2.0), (True, False, "never")):
        config = DecodingConfig(num_beams=count, length_penalty=penalty, early_stopping=early)
        history = History(jnp.asarray(table), count)
        search = jax.jit(
            lambda empty_R, config=config, history=history: beam_search(
                history, lambda s, i: constrain(s, i, LENGTH, config, EOS), empty_R, length=LENGTH,
                beams=count, length_penalty=config.length_penalty,
                early_stopping=config.early_stopping, start=START, eos=EOS, pad=PAD,
            )
        )  # fmt: skip
        wanted = [beams(logits_of(row), LENGTH, config) for row in range(rows)]
        answers = padded([answer for answer, _ in wanted], LENGTH)
        steps_R = np.array([steps for _, steps in wanted])
        # All rows; rows that stop early, which must not wait for the others; no rows.
        soon = np.sort(steps_R)[rows // 10]
        for empty_R in (np.arange(rows) == 7, steps_R > soon, np.ones(rows, bool)):
            history.steps.clear()
            actual = np.asarray(search(empty_R))
            jax.effects_barrier()
            np.testing.assert_array_equal(actual, np.where(empty_R[:, None], PAD, answers))
            assert len(history.steps) == max(steps_R[~empty_R], default=0)
        different.add(answers.tobytes())
        stops.append(soon)
    assert len(different) >= 8  # the settings matter
    assert len(set(stops)) > 2  # so does ending early
