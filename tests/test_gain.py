"""Relative gains against hand-computed values, a second implementation and scipy's t interval."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.evaluation import gains as gain

ROOT = Path(__file__).resolve().parent.parent


def row(task, start, seed, test, dev=None, rate=1e-4, batch=8, metric="accuracy"):
    return {
        "task": task,
        "metric": metric,
        "start": start,
        "seed": seed,
        "learning_rate": rate,
        "batch_size": batch,
        "dev_score": test if dev is None else dev,
        "test_score": test,
    }


def table(scores):
    """Rows of {(task, start): scores per seed}."""
    return [row(t, s, seed, x) for (t, s), xs in scores.items() for seed, x in enumerate(xs)]


def test_crossfits_example():
    # Ye et al. 2021: F1 50 -> 70 is +40 %, accuracy 40 -> 30 is -25 %; ARG +7.5 %.
    rows = table(
        {
            ("a", "untrained"): [0.5],
            ("a", "moe"): [0.7],
            ("b", "untrained"): [0.4],
            ("b", "moe"): [0.3],
        }
    )
    gains = gain.relative_gains(rows)
    assert gains["starts"]["moe"]["arg"] == pytest.approx(0.075)
    assert gains["starts"]["moe"]["ci95"] is None  # one seed
    assert gains["tasks"]["a"]["moe"]["std"] is None
    assert gains["tasks"]["b"]["moe"]["relative_gain"] == pytest.approx(-0.25)


def test_runs_that_dev_did_not_choose_need_no_test_score():
    rows = table({("a", "untrained"): [0.5], ("a", "moe"): [0.7]})
    rows += [row("a", s, 0, None, dev=0.1, rate=1e-3) for s in ("untrained", "moe")]
    gains = gain.relative_gains(rows)
    assert gains["starts"]["moe"]["arg"] == pytest.approx(0.4)
    assert gains["tasks"]["a"]["moe"]["selected"]["0"]["learning_rate"] == 1e-4
    rows[1]["test_score"] = None
    with pytest.raises(UserError, match="task 'a', start 'moe', seed 0 has no test score"):
        gain.relative_gains(rows)


def test_against_second_implementation():
    rng = np.random.default_rng(0)
    tasks, seeds, starts = list("abcdef"), [13, 21, 42, 87], ["untrained", "dense", "moe"]
    score = rng.uniform(0.2, 0.9, (6, 3, 4))
    rows = [
        row(task, start, seed, score[t, s, k])
        for t, task in enumerate(tasks)
        for s, start in enumerate(starts)
        for k, seed in enumerate(seeds)
    ]
    gains = gain.relative_gains(rows)
    for s, start in enumerate(starts[1:], 1):
        of_task = score[:, s].mean(1) / score[:, 0].mean(1) - 1
        found = gains["starts"][start]
        assert found["arg"] == pytest.approx(of_task.mean())
        assert found["median"] == pytest.approx(np.median(of_task))
        assert found["mean_difference"] == pytest.approx((score[:, s] - score[:, 0]).mean())
        per_seed = [
            np.mean([(score[t, s, k] - score[t, 0, k]) / score[t, 0].mean() for t in range(6)])
            for k in range(4)
        ]
        assert list(found["per_seed"]) == ["13", "21", "42", "87"]
        assert list(found["per_seed"].values()) == pytest.approx(per_seed)
        interval = stats.t.interval(0.95, 3, loc=np.mean(per_seed), scale=stats.sem(per_seed))
        assert found["ci95"] == pytest.approx(interval)
        low, high = found["ci95_tasks"]
        assert of_task.min() - 1e-9 <= low < found["arg"] < high <= of_task.max() + 1e-9
        for t, task in enumerate(tasks):
            assert gains["tasks"][task][start]["std"] == pytest.approx(score[t, s].std(ddof=1))
    difference = gains["differences"]["moe - dense"]
    assert difference["arg"] == pytest.approx(
        gains["starts"]["moe"]["arg"] - gains["starts"]["dense"]["arg"]
    )


def test_grid_point_is_chosen_on_dev_and_the_first_of_equals():
    rows = [
        row("a", "untrained", 0, test=0.9, dev=0.1, rate=1e-3),
        row("a", "untrained", 0, test=0.5, dev=0.3, rate=1e-4),
        row("a", "untrained", 0, test=0.1, dev=0.3, rate=1e-5),
        row("a", "moe", 0, test=0.6, dev=0.7),
    ]
    gains = gain.relative_gains(rows)
    chosen = gains["tasks"]["a"]["untrained"]
    assert chosen["mean"] == 0.5
    assert chosen["selected"]["0"] == {"learning_rate": 1e-4, "batch_size": 8, "dev_score": 0.3}
    assert gains["starts"]["moe"]["arg"] == pytest.approx(0.2)


@pytest.mark.parametrize("baseline", [[0.0, 0.0], [-0.3, 0.1], [0.0, 0.098]])
def test_task_without_relative_gain_is_named_and_counted_apart(baseline):
    rows = table(
        {
            ("a", "untrained"): [0.4, 0.6],
            ("a", "moe"): [0.6, 0.6],
            ("zero", "untrained"): baseline,
            ("zero", "moe"): [0.2, 0.4],
        }
    )
    gains = gain.relative_gains(rows)
    moe = gains["starts"]["moe"]
    assert moe["no_relative_gain"] == ["zero"]
    assert moe["tasks"] == 1
    assert moe["arg"] == pytest.approx(0.2)
    assert moe["mean_difference"] == pytest.approx((0.1 + 0.3 - np.mean(baseline)) / 2)
    assert gains["tasks"]["zero"]["moe"]["relative_gain"] is None
    assert gains["tasks"]["zero"]["moe"]["mean"] == pytest.approx(0.3)
    last = gain.text_table(gains).splitlines()[-1]
    assert "scores below 0.05: zero (1 of 2 tasks, not averaged)" in last


def test_one_seed_at_zero_leaves_a_finite_gain():
    rows = table({("a", "untrained"): [0.0, 0.4], ("a", "moe"): [0.2, 0.4]})
    moe = gain.relative_gains(rows)["starts"]["moe"]
    assert moe["arg"] == pytest.approx(0.5)
    assert moe["per_seed"] == {"0": pytest.approx(1.0), "1": pytest.approx(0.0)}


def test_a_gain_that_outweighs_the_others_is_named():
    scores = {(t, "untrained"): [0.5, 0.5] for t in "abc"} | {("tiny", "untrained"): [0.0, 0.11]}
    scores |= {(t, "moe"): [0.55, 0.55] for t in ("a", "b", "c", "tiny")}
    sentence = gain.sentences(gain.relative_gains(table(scores)))[0]
    assert "Most of the ARG comes from tiny alone (+900.0 %)" in sentence
    del scores["tiny", "untrained"], scores["tiny", "moe"]
    assert "alone" not in gain.sentences(gain.relative_gains(table(scores)))[0]


def test_no_task_with_a_gain(tmp_path):
    rows = table({("a", "untrained"): [0.0, 0.0], ("a", "moe"): [0.2, 0.4]})
    gains = gain.relative_gains(rows)
    assert gains["starts"]["moe"]["arg"] is None
    gain.write(tmp_path, gains)
    assert json.loads((tmp_path / "arg.json").read_text())["starts"]["moe"]["ci95"] is None
    assert "no task has a relative gain" in (tmp_path / "arg.txt").read_text()


def test_equal_duplicates_count_once():
    rows = table({("a", "untrained"): [0.5], ("a", "moe"): [0.6]})
    assert gain.relative_gains(rows * 2) == gain.relative_gains(rows)


FULL = {(t, s): [0.5, 0.6] for t in "ab" for s in ("untrained", "dense")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no fine-tuning runs"),
        ([{"task": "a"}], "run 1 lacks 'metric'"),
        (["text"], "run 1 lacks 'task'"),
        (table(FULL)[:-2], "'b' has no fine-tuning run from start 'dense'"),
        (table(FULL)[:-1], "'b', start 'dense' lacks seed 1"),
        ([*table(FULL), row("a", "dense", 0, 0.5, rate=1.0)], "seed 1 lacks learning_rate 1.0"),
        ([*table(FULL), row("a", "dense", 0, 0.9)], "twice"),
        ([row("a", "untrained", 0, float("nan"))], "dev_score is nan"),
        ([row("a", "untrained", 0, "0.5")], "dev_score is '0.5'"),
        (table({("a", "dense"): [0.5]}), "no fine-tuning run starts from 'untrained'"),
    ],
)
def test_bad_rows_end_in_one_clear_line(rows, message):
    with pytest.raises(UserError) as error:
        gain.relative_gains(rows)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_baseline_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'untrained'"):
        gain.relative_gains(table(FULL), baseline="untrainde")


def test_files_agree(tmp_path):
    rows = table(
        {
            **FULL,
            ("a", "dense"): [0.7, 0.9],
            ("zero", "untrained"): [0, 0],
            ("zero", "dense"): [0.1, 0.1],
        }
    )
    gains = gain.relative_gains(rows)
    gain.write(tmp_path, gains)
    assert files.read_json(tmp_path / "arg.json") == gains
    lines = list(csv.DictReader((tmp_path / "arg.csv").read_text().splitlines()))
    assert len(lines) == 3 * 2 + 1
    (arg,) = [line for line in lines if line["task"] == "ARG"]
    assert float(arg["relative_gain"]) == gains["starts"]["dense"]["arg"]
    assert float(arg["ci95_low"]) == gains["starts"]["dense"]["ci95"][0]
    assert [float(arg[f"seed_{s}"]) for s in (0, 1)] == list(
        gains["starts"]["dense"]["per_seed"].values()
    )
    (zero,) = [line for line in lines if (line["task"], line["start"]) == ("zero", "dense")]
    assert zero["relative_gain"] == "" and float(zero["mean"]) == 0.1
    text = (tmp_path / "arg.txt").read_text().splitlines()
    body = text[: text.index("")]
    assert len(body) == 2 + 3
    ends = {line.rindex("%") for line in body if "%" in line}
    assert len(ends) == 1  # the columns are aligned


def test_needs_neither_jax_nor_tensorflow_nor_matplotlib():
    code = (
        "import sys, moe_jax.evaluation.gains\n"
        "print([m for m in ('jax', 'tensorflow', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
