"""Intervals against simulated truth: they hold it about as often as they say, also of few tasks."""

import numpy as np
import pytest

from moe_jax.evaluation.bootstrap import FEWEST, Bootstrap, bootstrap_interval
from moe_jax.evaluation.paired import compare

DRAWN = {
    "normal": (2.0, lambda rng, n: rng.normal(2, 1, n)),
    "skewed": (np.exp(0.7**2 / 2), lambda rng, n: rng.lognormal(0, 0.7, n)),
    "better, equal or worse": (0.3, lambda rng, n: rng.choice([-1, 0, 1], n, p=[0.1, 0.5, 0.4])),
}


@pytest.mark.parametrize(
    ("kind", "tasks", "least"),
    [
        ("normal", 6, 0.92),
        ("normal", 8, 0.92),
        ("normal", 12, 0.93),
        ("normal", 22, 0.93),
        ("skewed", 6, 0.86),
        ("skewed", 12, 0.87),
        ("better, equal or worse", 6, 0.88),
        ("better, equal or worse", 12, 0.92),
    ],
)
def test_interval_over_tasks_holds_the_truth(kind, tasks, least):
    truth, draw = DRAWN[kind]
    rng = np.random.default_rng(3)
    ends = [bootstrap_interval(draw(rng, tasks), samples=1000, seed=i) for i in range(1000)]
    low, high = np.transpose(ends)
    held = np.mean((low - 1e-9 <= truth) & (truth <= high + 1e-9))
    assert least <= held <= 0.98


@pytest.mark.parametrize(
    ("of_tasks", "of_seeds", "of_cells"), [(0.1, 0, 0.02), (0.05, 0.03, 0.02), (0, 0.1, 0.02)]
)
def test_interval_over_tasks_and_seeds_holds_the_truth(of_tasks, of_seeds, of_cells):
    rng = np.random.default_rng(4)
    held, trials = 0, 400
    for trial in range(trials):
        values = rng.normal(0, of_tasks, (22, 1)) + rng.normal(0, of_seeds, (1, 5))
        values += rng.normal(0, of_cells, (22, 5))
        low, high = Bootstrap(22, 5, samples=1000, seed=trial).interval(values)
        held += low <= 0 <= high
    assert 0.9 <= held / trials <= 0.98


def test_a_sample_has_the_variance_of_a_mean():
    values = np.random.default_rng(0).normal(size=6)
    share_BxT = Bootstrap(6, samples=100_000, seed=1).task_BxT
    np.testing.assert_allclose(share_BxT.sum(1), 1.0)
    assert np.var(share_BxT @ values) == pytest.approx(np.var(values, ddof=1) / 6, rel=0.02)


def test_fewer_than_six_tasks_have_no_interval():
    """Of two to five that are as often better as worse, one would exclude 0 too often."""
    values = [0.1, 0.2, 0.1, 0.2, 0.1, 0.2]
    low, high = bootstrap_interval(values)
    assert 0.1 - 1e-12 <= low < 0.15 < high <= 0.2 + 1e-12
    for few in range(FEWEST):
        assert bootstrap_interval(values[:few]) is None
        assert few == 0 or Bootstrap(few, 8).interval(np.full((few, 8), 0.1)) is None


def test_ends_are_never_beyond_the_values():
    for values in ([0.0] * 6, [0.0] * 5 + [1.0], [0.3] * 8, [1e-200, 0, 0, 0, 0, 0]):
        low, high = bootstrap_interval(values)
        assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def test_one_difference_has_one_interval():
    """Of one seed, the interval of a comparison is that over tasks."""
    dense_T, moe_T = np.random.default_rng(2).uniform(0.2, 0.8, (2, 9))
    rows = [
        {"arm": arm, "task": str(t), "seed": 0, "score": float(score)}
        for arm, scores in (("dense", dense_T), ("moe", moe_T))
        for t, score in enumerate(scores)
    ]
    found = compare(rows).arms["moe"]
    assert list(found.difference.interval) == bootstrap_interval(moe_T - dense_T)
    assert found.arg.interval == pytest.approx(bootstrap_interval((moe_T - dense_T) / dense_T))
