"""Paired gains against hand-computed numbers, an enumeration of all draws, and simulated truth."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from scipy import stats

from moe_jax.core.errors import UserError
from moe_jax.evaluation import gains
from moe_jax.evaluation.paired import compare, sentences, text_table


def rows(**score_TxK):
    """Rows of arm -> scores [T][K]; tasks a, b, ...; seeds 0, 1, ..."""
    return [
        {"arm": arm, "task": "abcdefghijklmnop"[t], "seed": k, "score": float(score)}
        for arm, table in score_TxK.items()
        for t, line in enumerate(table)
        for k, score in enumerate(line)
    ]


DIFFERENT = rows(
    dense=[[0.4, 0.6] * 2, [0.2, 0.2] * 2] * 3, moe=[[0.6, 0.6] * 2, [0.2, 0.3] * 2] * 3
)  # fmt: skip


def test_by_hand():
    found = compare(DIFFERENT)
    assert (found.tasks, found.seeds, found.near_zero) == (6, 4, ())
    assert found.score == pytest.approx(0.35)
    (moe,) = found.arms.values()
    assert moe.score == pytest.approx(1.7 / 4)
    # differences: 0.2 0.0 / 0.0 0.1, all of them several times
    assert moe.difference.value == pytest.approx(0.3 / 4)
    assert moe.relative.value == pytest.approx(0.3 / 4 / 0.35)
    # gains: of a 0.1 over 0.5, of b 0.05 over 0.2
    assert moe.arg.value == pytest.approx((0.2 + 0.25) / 2)
    for figure, least, most in (
        (moe.difference, 0.0, 0.2),
        (moe.relative, 0.0, 0.5),  # 0.2 over 0.4 and 0.1 over 0.2
        (moe.arg, 0.0, 0.5),  # 0.1 over the mean 0.2
    ):
        low, high = figure.interval
        assert least <= low < figure.value < high <= most


def every_draw(dense_TxK, moe_TxK):
    """(difference, relative, mean gain) [n, 3] of all equally likely samples."""
    tasks, seeds = dense_TxK.shape
    task_AxD = np.array(list(itertools.product(range(tasks), repeat=tasks - 1)))
    seed_BxD = np.array(list(itertools.product(range(seeds), repeat=seeds - 1)))

    def means(values_TxK):
        return values_TxK[task_AxD[:, None, :, None], seed_BxD[:, None, :]].mean((2, 3)).ravel()

    gain_TxK = (moe_TxK - dense_TxK) / dense_TxK.mean(1, keepdims=True)
    dense, moe, gain = map(means, (dense_TxK, moe_TxK, gain_TxK))
    return np.transpose([moe - dense, moe / dense - 1, gain])


def level(values_TxK):
    """The share of draws below an interval, by Satterthwaite's degrees of freedom."""
    tasks, seeds = values_TxK.shape
    of_tasks, of_seeds = stats.sem(values_TxK.mean(1)) ** 2, stats.sem(values_TxK.mean(0)) ** 2
    freedom = (of_tasks + of_seeds) ** 2 / (of_tasks**2 / (tasks - 1) + of_seeds**2 / (seeds - 1))
    return stats.norm.cdf(stats.t.ppf(0.025, freedom))


def test_against_every_draw():
    rng = np.random.default_rng(3)
    dense, moe = rng.uniform(0.2, 0.8, (2, 7, 3))
    dense[2] = 0.02, 0.05, 0.04  # near zero
    kept = [0, 1, 3, 4, 5, 6]
    all_draws, of_kept = every_draw(dense, moe), every_draw(dense[kept], moe[kept])
    assert len(all_draws) == 7**6 * 3**2 and len(of_kept) == 6**5 * 3**2
    comparison = compare(rows(dense=dense, moe=moe), samples=40_000)
    assert comparison.near_zero == ("c",)
    found = comparison.arms["moe"]
    ratio = moe[kept].mean(1) / dense[kept].mean(1) - 1
    assert found.arg.value == pytest.approx(ratio.mean())
    assert found.relative.value == pytest.approx(moe.mean() / dense.mean() - 1)
    below = level(moe - dense)
    gain = (moe - dense)[kept] / dense[kept].mean(1, keepdims=True)
    for figure, exact, share in (
        (found.difference, all_draws[:, 0], below),
        (found.relative, all_draws[:, 1], below),
        (found.arg, of_kept[:, 2], level(gain)),
    ):
        assert 0.005 < share < 0.024
        for end, at in zip(figure.interval, (share, 1 - share), strict=True):
            # Within the noise of so many samples.
            lowest, highest = np.quantile(exact, [at - 0.002, at + 0.002])
            assert lowest - 1e-9 <= end <= highest + 1e-9
            assert np.abs(exact - end).min() < 1e-9  # it is the value of a possible draw


def test_arg_is_that_of_gains():
    """The same figure as `relative_gains` computes over the same baseline."""
    rng = np.random.default_rng(5)
    lines = rows(**{arm: rng.uniform(0, 0.6, (9, 4)) ** 2 for arm in ("dense", "moe", "other")})
    runs = [
        {"task": r["task"], "start": r["arm"], "seed": r["seed"], "test_score": r["score"]}
        | {"metric": "EM", "learning_rate": 1e-4, "batch_size": 8, "dev_score": 0.5}
        for r in lines
    ]
    over_dense = gains.relative_gains(runs, baseline="dense")
    found = compare(lines)
    for arm, gain in found.arms.items():
        expected = over_dense["starts"][arm]
        assert gain.arg.value == pytest.approx(expected["arg"])
        assert gain.difference.value == pytest.approx(expected["mean_difference"])
        assert list(found.near_zero) == expected["no_relative_gain"]
    assert gains.score_rows(over_dense) == [
        r | {"seed": str(r["seed"])} for r in sorted(lines, key=lambda r: (r["task"], r["arm"]))
    ]


def test_is_paired():
    """What makes a task or a seed easy for both arms changes neither difference nor interval."""
    rng = np.random.default_rng(0)
    dense, moe = rng.uniform(0.2, 0.4, (2, 8, 4))
    easy = rng.uniform(0, 0.5, (8, 4))
    alone, both = (compare(rows(dense=dense + e, moe=moe + e)) for e in (0, easy))
    alone, both = (c.arms["moe"].difference for c in (alone, both))
    assert both.value == pytest.approx(alone.value)
    assert both.interval == pytest.approx(alone.interval)


@pytest.mark.parametrize(
    ("task_spread", "seed_spread", "least"), [(0.1, 0.0, 0.9), (0.05, 0.03, 0.9), (0, 0.1, 0.84)]
)
def test_intervals_cover_the_truth(task_spread, seed_spread, least):
    """Tasks and seeds that differ in what they gain: by 0.03 on average."""
    rng = np.random.default_rng(2)
    trials, hits = 200, np.zeros(3)
    for trial in range(trials):
        dense = np.full((16, 5), 0.5)
        gain = 0.03 + rng.normal(0, task_spread, (16, 1)) + rng.normal(0, seed_spread, (1, 5))
        moe = dense + gain + rng.normal(0, 0.02, (16, 5))
        found = compare(rows(dense=dense, moe=moe), samples=400, seed=trial).arms["moe"]
        for i, figure in enumerate((found.difference, found.relative, found.arg)):
            low, high = figure.interval
            hits[i] += low <= (0.03 if i == 0 else 0.06) <= high
    assert (hits / trials >= least).all() and (hits / trials <= 0.995).all()


def test_one_seed_or_few_tasks():
    moe = [0.6, 0.8, 0.5, 0.7, 0.7, 0.4]
    for few in range(1, 6):  # which have all one sign by chance too often
        for seeds in (1, 2, 8):
            table = rows(dense=[[0.5] * seeds] * few, moe=[[x] * seeds for x in moe[:few]])
            found = compare(table)
            gain = found.arms["moe"]
            assert gain.difference.interval is gain.relative.interval is gain.arg.interval is None
            assert "too few for intervals" in text_table(found)
    one_seed = compare(rows(dense=[[0.5]] * 6, moe=[[x] for x in moe]))
    assert "with one seed" in text_table(one_seed)
    low, high = one_seed.arms["moe"].difference.interval
    assert -0.1 < low < 0.7 / 6 < high < 0.3
    # Of six tasks, five count in ARG.
    near = compare(rows(dense=[[0.5]] * 5 + [[0.0]], moe=[[x] for x in moe])).arms["moe"]
    assert near.arg.value == pytest.approx(0.32) and near.arg.interval is None
    assert near.difference.interval is not None


def test_baseline_of_zeros():
    nothing = compare(rows(dense=[[0.0, 0.0]] * 3, moe=[[0.1, 0.2]] * 3))
    moe = nothing.arms["moe"]
    assert moe.relative is None and moe.arg is None and moe.difference.value > 0
    assert nothing.near_zero == ("a", "b", "c")
    # One task of six is above 0: in two fifths of the samples, the gain is infinite.
    zeros = np.zeros((6, 2))
    dense, gained = zeros.copy(), zeros + 0.1
    dense[0] = 0.3
    most = compare(rows(dense=dense, moe=dense + gained)).arms["moe"]
    assert most.relative.value == pytest.approx(0.1 / 0.05)
    assert most.relative.interval is None
    assert most.arg.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("shift", [-0.05, 0.0, 0.05])
def test_relative_gain_and_difference_have_one_sign(shift):
    rng = np.random.default_rng(7)
    dense = rng.uniform(0.1, 0.6, (10, 3))
    found = compare(rows(dense=dense, moe=dense + shift + rng.normal(0, 0.05, (10, 3))))
    ends = [np.sign(f.interval) for f in (found.arms["moe"].difference, found.arms["moe"].relative)]
    assert (ends[0] == ends[1]).all()


def test_order_of_rows_and_json():
    rng = np.random.default_rng(1)
    lines = rows(**{arm: rng.uniform(0.1, 0.9, (6, 3)) for arm in ("dense", "moe", "average")})
    found = compare(lines)
    assert compare(iter(lines)) == found  # the same seed
    assert compare(lines, seed=1) != found
    value = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
    assert list(value["arms"]) == ["moe", "average"]
    assert value["arms"]["moe"]["arg"]["value"] == found.arms["moe"].arg.value
    assert value["arms"]["moe"]["arg"]["interval"] == list(found.arms["moe"].arg.interval)
    backwards = compare(lines[::-1])
    for arm, gain in found.arms.items():
        assert backwards.arms[arm].arg.value == pytest.approx(gain.arg.value)


def test_table_and_sentences_show_the_figures():
    found = compare(DIFFERENT)
    (line,) = [line for line in text_table(found).splitlines() if line.startswith("moe")]
    assert line.split("  ")[0] == "moe"
    for text in ("0.425", "+0.075", "+0.020 to +0.160", "+21.4 %", "+22.5 %", "+8.0 % to +40.0 %"):
        assert text in line
    assert sentences(found)[0] == (
        "moe minus dense: +0.075 (+0.020 to +0.160); relative +21.4 % (+3.8 % to +44.4 %); "
        "ARG over dense +22.5 % (+8.0 % to +40.0 %)."
    )
    assert "6 tasks and 4 seeds" in sentences(found)[1]
    near = compare(rows(dense=[[0.4, 0.6], [0.0, 0.08]], moe=[[0.6, 0.6], [0.2, 0.3]]))
    assert "scores below 0.05 there: b." in text_table(near).splitlines()[-1]


FULL = rows(dense=[[0.5, 0.6]] * 2, moe=[[0.5, 0.6]] * 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no scores"),
        ([{"arm": "dense", "task": "a", "score": 1.0}], "score 1 lacks 'seed'"),
        (FULL[:-1], "arm 'moe', task 'b', seed 1 has no score"),
        ([*FULL, FULL[0]], "arm 'dense', task 'a', seed 0 has two scores"),
        ([FULL[0] | {"score": float("nan")}], "score is nan"),
        ([FULL[0] | {"score": None}], "score is None"),
        ([FULL[0] | {"arm": "dens"}], "no arm is called 'dense'; did you mean 'dens'"),
    ],
)
def test_bad_rows_end_in_one_clear_line(lines, message):
    with pytest.raises(UserError) as error:
        compare(lines)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
