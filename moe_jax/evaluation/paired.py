"""Arms compared with a baseline, paired by task and seed, with intervals over both.

With x[t, s] and b[t, s] the scores of an arm and of the baseline on task t, seed s:

    difference = mean over t, s of x[t, s] - b[t, s]
    relative   = difference / mean over t, s of b[t, s]
    arg        = mean over t, s of (x[t, s] - b[t, s]) / mean over s of b[t, s]

`arg` is the average relative gain of `gains`, here over another baseline: the dense multi-task
model. It leaves out tasks whose baseline is near zero; the other two count every task.

`bootstrap` makes the intervals.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.core.errors import UserError, nearest
from moe_jax.evaluation.bootstrap import FEWEST, Bootstrap
from moe_jax.evaluation.gains import NEAR_ZERO, aligned, count, percent


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    The interval is None if fewer than `bootstrap.FEWEST` tasks count, or if an end is infinite
    because the baseline scores 0 on most tasks.
    """

    value: float
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Gain:
    """What an arm gains over the baseline; `relative` and `arg` are fractions (0.026 is 2.6 %).

    `relative` is None if the baseline's mean score is 0 or below, `arg` if it is near zero on every
    task.
    """

    score: float
    difference: Estimate
    relative: Estimate | None
    arg: Estimate | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms against a baseline; `dataclasses.asdict` gives its JSON.

    Attributes:
        baseline: its name.
        score: its mean score.
        tasks: number of tasks.
        seeds: number of seeds.
        near_zero: tasks that `arg` leaves out: the baseline's mean score is below `NEAR_ZERO`.
        arms: the other arms by name.
    """

    baseline: str
    score: float
    tasks: int
    seeds: int
    near_zero: tuple[str, ...]
    arms: Mapping[str, Gain]


def compare(
    rows: Iterable[Mapping[str, Any]], baseline: str = "dense", samples: int = 5000, seed: int = 0
) -> Comparison:
    """Compares all arms with the baseline.

    Args:
        rows: one per arm, task and seed, with keys arm, task, seed and score. A seed is one
            repetition of everything that chance decides (training, few-shot sample), under any
            name; rows of one seed belong together.
        baseline: an arm, in the paper's claim the dense multi-task model.
        samples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        UserError: no rows; a row without a key or with a score that is not a finite number; an arm
            that lacks a task or a seed, or has it twice; no arm of the baseline's name.
    """
    score_AxTxK, arms, tasks, seeds = _table(rows)
    if baseline not in arms:
        raise UserError(f"no arm is called {baseline!r}{nearest(baseline, arms)}")
    base_TxK = score_AxTxK[arms.index(baseline)]
    counts_T = base_TxK.mean(1) >= NEAR_ZERO
    drawn = Bootstrap(len(tasks), len(seeds), samples, seed)
    counted = Bootstrap(int(counts_T.sum()), len(seeds), samples, seed)

    def gain(score_TxK: np.ndarray) -> Gain:
        difference_TxK = score_TxK - base_TxK
        difference = float(difference_TxK.mean())
        relative = arg = None
        if base_TxK.mean() > 0:
            interval = drawn.interval(difference_TxK, base_TxK)
            relative = Estimate(difference / float(base_TxK.mean()), interval)
        if counts_T.any():
            gain_TxK = difference_TxK[counts_T] / base_TxK[counts_T].mean(1, keepdims=True)
            arg = Estimate(float(gain_TxK.mean()), counted.interval(gain_TxK))
        return Gain(
            score=float(score_TxK.mean()),
            difference=Estimate(difference, drawn.interval(difference_TxK)),
            relative=relative,
            arg=arg,
        )

    return Comparison(
        baseline=baseline,
        score=float(base_TxK.mean()),
        tasks=len(tasks),
        seeds=len(seeds),
        near_zero=tuple(task for task, counts in zip(tasks, counts_T, strict=True) if not counts),
        arms={a: gain(score_AxTxK[i]) for i, a in enumerate(arms) if a != baseline},
    )


def text_table(comparison: Comparison) -> str:
    """An aligned table for the terminal: a line per arm, then what it leaves out."""
    base = comparison.baseline
    lines = [["arm", "score", f"minus {base}", "95 %", "relative", "95 %", f"ARG over {base}"]]
    lines[0] += ["95 %"]
    lines.append([base, f"{comparison.score:.3f}", *[""] * 6])
    for arm, gain in comparison.arms.items():
        line = [arm, f"{gain.score:.3f}"]
        line += [f"{gain.difference.value:+.3f}", _interval(gain.difference, "{:+.3f}".format)]
        for figure in (gain.relative, gain.arg):
            line += [percent(figure and figure.value), _interval(figure, percent)]
        lines.append(line)
    return "\n".join([*aligned(lines, left=1), "", *_notes(comparison)]) + "\n"


def sentences(comparison: Comparison) -> list[str]:
    """The results in words: a sentence for each arm and one for the tasks left out."""
    result = []
    base = comparison.baseline
    for arm, gain in comparison.arms.items():
        clauses = [
            f"{arm} minus {base}: {gain.difference.value:+.3f}"
            f" ({_interval(gain.difference, '{:+.3f}'.format)})"
        ]
        for name, figure in (("relative", gain.relative), (f"ARG over {base}", gain.arg)):
            if figure is not None:
                clauses.append(f"{name} {percent(figure.value)} ({_interval(figure, percent)})")
        result.append("; ".join(clauses) + ".")
    return result + _notes(comparison)


def _notes(comparison: Comparison) -> list[str]:
    tasks, seeds = count(comparison.tasks, "task"), count(comparison.seeds, "seed")
    notes = [f"Paired by task and seed; 95 % intervals over {tasks} and {seeds}."]
    if comparison.tasks < FEWEST:
        notes = [f"Paired by task and seed; {tasks} are too few for intervals."]
    elif comparison.seeds == 1:
        notes[0] = notes[0][:-1] + ": with one seed, what its luck did is not in them."
    if comparison.near_zero:
        notes.append(
            f"Not in ARG over {comparison.baseline}, which scores below {NEAR_ZERO} there: "
            f"{', '.join(comparison.near_zero)}."
        )
    return notes


def _interval(figure: Estimate | None, form) -> str:
    if figure is None or figure.interval is None:
        return "–"
    return " to ".join(map(form, figure.interval))


def _table(
    rows: Iterable[Mapping[str, Any]],
) -> tuple[np.ndarray, Sequence[str], Sequence[str], Sequence[Hashable]]:
    """(scores [A, T, K] float64, arms [A], tasks [T], seeds [K]) in the rows' order."""
    score: dict[tuple, float] = {}
    for number, row in enumerate(rows, 1):
        missing = [key for key in ("arm", "task", "seed", "score") if key not in row]
        if missing:
            raise UserError(f"score {number} lacks {', '.join(map(repr, missing))}")
        key = row["arm"], row["task"], row["seed"]
        value = row["score"]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise UserError(f"{_name(key)}: score is {value!r}, expected a finite number")
        if key in score:
            raise UserError(f"{_name(key)} has two scores")
        score[key] = float(value)
    if not score:
        raise UserError("there are no scores to compare")
    axes = [list(dict.fromkeys(key[i] for key in score)) for i in range(3)]
    arms, tasks, seeds = axes
    for key in ((a, t, s) for a in arms for t in tasks for s in seeds):
        if key not in score:
            raise UserError(f"{_name(key)} has no score")
    return np.array([[[score[a, t, s] for s in seeds] for t in tasks] for a in arms]), *axes


def _name(key: tuple) -> str:
    return f"arm {key[0]!r}, task {key[1]!r}, seed {key[2]!r}"
