"""The order in which the tasks of a mixture are drawn."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

_PERIOD = 1024  # number of groups scheduled at a time


class Schedule:
    """The task of the j-th group, for given shares, which hold exactly in the long run.

    The n-th group of a task with share p is placed near (n + phase) / p, with random jitter of up
    to half the distance between its groups. So every stretch has close to its share, the groups of
    one batch are of different tasks while 2 G p < 1, and the order never repeats.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        self._shares_T = np.asarray(shares, np.float64) / np.sum(shares)
        self._seed = (seed, seed_of("schedule"))
        self._phases_T = np.random.default_rng(self._seed).random(len(self._shares_T))
        self._period = functools.lru_cache(2)(self._arranged)

    def _counts(self, period: int) -> np.ndarray:
        """int64 [T], number of groups of each task before a period."""
        ideal_T = period * _PERIOD * self._shares_T + self._phases_T
        return np.floor(ideal_T).astype(np.int64)

    def _arranged(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Tasks and their running numbers, both int64, in the order of a period's groups."""
        first_T = self._counts(period)
        counts_T = self._counts(period + 1) - first_T
        tasks = np.repeat(np.arange(len(counts_T)), counts_T)
        starts_T = np.cumsum(counts_T) - counts_T
        numbers = np.arange(len(tasks)) - starts_T[tasks] + first_T[tasks]
        jitter = np.random.default_rng([*self._seed, period]).random(len(tasks)) / 2
        times = (numbers + 1 - self._phases_T[tasks] + jitter) / self._shares_T[tasks]
        order = np.argsort(times, kind="stable")
        return tasks[order], numbers[order]

    def _find(self, group: int) -> tuple[int, int]:
        """(period, place in it) of group `group` of the run."""
        # A period holds _PERIOD groups, up to rounding, so the guess is off by at most one unless
        # there are many tasks.
        period = group // _PERIOD
        while self._counts(period).sum() > group:
            period -= 1
        while self._counts(period + 1).sum() <= group:
            period += 1
        return period, group - int(self._counts(period).sum())

    def __call__(self, group: int) -> tuple[int, int]:
        """(task, number of that task's earlier groups) for group `group` of the run."""
        period, place = self._find(group)
        tasks, numbers = self._period(period)
        return int(tasks[place]), int(numbers[place])

    def before(self, group: int) -> np.ndarray:
        """int64 [T], number of groups of each task before group `group` of the run."""
        period, place = self._find(group)
        first_T = self._counts(period)
        return first_T + np.bincount(self._period(period)[0][:place], minlength=len(first_T))


def seed_of(text: str) -> int:
    """A seed made from a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
