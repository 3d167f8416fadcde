"""Relative gain on unseen tasks: how much a start helps over direct fine-tuning.

The average relative gain (ARG) is CrossFit's measure (Ye, Lin and Ren 2021, arXiv 2104.08835,
section 4): the relative change of each unseen task's score, averaged over tasks. Here, with
b[t, s] and x[t, s] the test scores of the baseline and of another start on task t, seed s:

    gain[t, s] = (x[t, s] - b[t, s]) / mean over s of b[t, s]
    gain[t]    = mean over s of gain[t, s] = (mean x[t] - mean b[t]) / mean b[t]
    ARG[s]     = mean over t of gain[t, s]
    ARG        = mean over s of ARG[s] = mean over t of gain[t]

Dividing by the mean keeps a single seed that scores 0 from making a gain infinite. A task whose
mean baseline score is below `NEAR_ZERO` (correlations may be negative) has no relative gain: it is
named and left out of ARG, but counts in `mean_difference`. The rest is as published.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError, nearest, shown
from moe_jax.evaluation.bootstrap import bootstrap_interval

# Five right answers in a hundred. A gain over less is mostly noise: of 0.15 over 0.005, +2,900 %,
# which would outweigh all other tasks of an average.
NEAR_ZERO = 0.05

_KEYS = {
    "task": str,
    "metric": str,
    "start": str,
    "seed": int,
    "learning_rate": float,
    "batch_size": int,
    "dev_score": float,
    "test_score": float,
}
_LARGEST = 1e30


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a fine-tuning run's runs.jsonl.

    Raises:
        UserError: the file cannot be read, or a line is of another form.
    """
    rows = list(files.read_jsonl(path))
    for number, row in enumerate(rows, 1):
        if problem := _problem(row):
            raise UserError(f"{path}: fine-tuning run {number} {problem}")
    return rows


def relative_gains(rows: Iterable[Mapping[str, Any]], baseline: str = "untrained") -> dict:
    """Selects each run's grid point on dev and computes relative gains of its test score.

    Args:
        rows: the lines of a fine-tuning run's runs.jsonl, with keys task, metric, start, seed,
            learning_rate, batch_size, dev_score and test_score. For each (task, start, seed), the
            grid point with the best dev score counts; among equals, the first row. A point whose
            `test_score` is None is skipped; at least one must have a score.
        baseline: the start that is direct fine-tuning.

    Returns:
        The value of arg.json: `baseline`, `seeds`, `metrics` {task: metric}, `starts` {start:
        `arg`, `ci95` (t interval over seeds; None with one seed), `ci95_tasks` (bootstrap over
        tasks; None with fewer than `bootstrap.FEWEST`), `per_seed`, `median`, `mean_difference` (of
        scores, over all tasks), `tasks` (how many count), `no_relative_gain` (names)},
        `differences` (ARG of a later start minus that of an earlier one: `arg`, `ci95`, `per_seed`)
        and `tasks` {task: {start: `mean`, `std` (None with one seed), `per_seed`, `selected`,
        `relative_gain`}}. Gains are fractions (0.026 is 2.6 %); `relative_gain` is None if
        undefined.

    Raises:
        UserError: no rows; a row without a key or with a score that is not a finite number; a task
            that lacks a start, a seed or a grid point; a grid point with two different scores.
    """
    grid = _grid(rows)
    tasks, starts, seeds = (list(dict.fromkeys(key[i] for key in grid)) for i in range(3))
    if baseline not in starts:
        raise UserError(f"no fine-tuning run starts from {baseline!r}{nearest(baseline, starts)}")
    _check_complete(grid, tasks, starts, seeds)
    selected = {key: _best(points) for key, points in grid.items()}
    score_TxSxK = np.array(
        [[[selected[t, s, k]["test_score"] for k in seeds] for s in starts] for t in tasks]
    )
    base_TxK = score_TxSxK[:, starts.index(baseline)]
    scale_T = base_TxK.mean(-1)
    has_gain_T = scale_T >= NEAR_ZERO

    def per_seed(values_K) -> dict[str, float]:
        return {str(seed): float(value) for seed, value in zip(seeds, values_K, strict=True)}

    result_starts, arg_by_start, gain_TxS = {}, {}, np.full(score_TxSxK.shape[:2], np.nan)
    for i, start in enumerate(starts):
        if start == baseline:
            continue
        difference_TxK = score_TxSxK[:, i] - base_TxK
        gain_TxK = difference_TxK[has_gain_T] / scale_T[has_gain_T, None]
        gain_TxS[has_gain_T, i] = gain_TxK.mean(-1)
        arg_by_start[start] = gain_TxK.mean(0) if len(gain_TxK) else None
        result_starts[start] = {
            **_aggregate(arg_by_start[start], per_seed),
            "ci95_tasks": bootstrap_interval(gain_TxK.mean(-1)),
            "median": float(np.median(gain_TxK.mean(-1))) if len(gain_TxK) else None,
            "mean_difference": float(difference_TxK.mean()),
            "tasks": len(gain_TxK),
            "no_relative_gain": [t for t, has in zip(tasks, has_gain_T, strict=True) if not has],
        }
    others = list(arg_by_start)
    differences = {
        f"{b} - {a}": _aggregate(
            None if arg_by_start[a] is None else arg_by_start[b] - arg_by_start[a], per_seed
        )
        for i, a in enumerate(others)
        for b in others[i + 1 :]
    }

    def cell(t: int, s: int) -> dict[str, Any]:
        values_K = score_TxSxK[t, s]
        result = {
            "mean": float(values_K.mean()),
            "std": float(values_K.std(ddof=1)) if len(seeds) > 1 else None,
            "per_seed": per_seed(values_K),
            "selected": {
                str(k): {
                    name: selected[tasks[t], starts[s], k][name]
                    for name in ("learning_rate", "batch_size", "dev_score")
                }
                for k in seeds
            },
        }
        if starts[s] != baseline:
            gain = float(gain_TxS[t, s])
            result["relative_gain"] = None if math.isnan(gain) else gain
        return result

    return {
        "baseline": baseline,
        "seeds": [str(seed) for seed in seeds],
        "metrics": {t: selected[t, baseline, seeds[0]]["metric"] for t in tasks},
        "starts": result_starts,
        "differences": differences,
        "tasks": {
            task: {start: cell(t, s) for s, start in enumerate(starts)}
            for t, task in enumerate(tasks)
        },
    }


def t_interval(values_K) -> list[float] | None:
    """95 % Student interval of the mean of [K] floats; None when K < 2."""
    values_K = np.asarray(values_K, np.float64)
    if len(values_K) < 2:
        return None
    half = stats.t.ppf(0.975, len(values_K) - 1) * values_K.std(ddof=1) / math.sqrt(len(values_K))
    return [float(values_K.mean() - half), float(values_K.mean() + half)]


def write(directory: str | os.PathLike, gains: Mapping[str, Any]) -> None:
    """Writes arg.json, arg.csv and arg.txt of `relative_gains`' value into `directory`."""
    directory = paths.parse(directory)
    files.write_json(directory / "arg.json", gains)
    files.write_text(directory / "arg.csv", csv_table(gains))
    files.write_text(directory / "arg.txt", text_table(gains))


def csv_table(gains: Mapping[str, Any]) -> str:
    """One line per task and start, then one per start whose task is `ARG`; fractions, not %."""
    seeds = gains["seeds"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["task", "metric", "start", "mean", "std", "relative_gain", "ci95_low", "ci95_high"]
        + [f"seed_{seed}" for seed in seeds]
    )
    for task, starts in gains["tasks"].items():
        for start, cell in starts.items():
            numbers = [cell["mean"], cell["std"], cell.get("relative_gain"), None, None]
            per_seed = [cell["per_seed"][seed] for seed in seeds]
            writer.writerow([task, gains["metrics"][task], start, *numbers, *per_seed])
    for start, total in gains["starts"].items():
        numbers = [None, None, total["arg"], *(total["ci95"] or (None, None))]
        per_seed = [total["per_seed"].get(seed) for seed in seeds]
        writer.writerow(["ARG", None, start, *numbers, *per_seed])
    return out.getvalue()


def text_table(gains: Mapping[str, Any]) -> str:
    """An aligned table for the terminal: test scores per task and start, gains, ARG."""
    others = list(gains["starts"])
    header = ["task", "metric", gains["baseline"]]
    header += [column for start in others for column in (start, "gain")]
    lines = [header]
    for task, starts in gains["tasks"].items():
        line = [task, gains["metrics"][task], _mean_std(starts[gains["baseline"]])]
        for start in others:
            line += [_mean_std(starts[start]), percent(starts[start]["relative_gain"])]
        lines.append(line)
    return "\n".join([*aligned(lines, left=2), "", *sentences(gains)]) + "\n"


def aligned(lines: list[list[str]], left: int) -> list[str]:
    """The cells of a table in columns, the first `left` of them flush left; a rule below line 1."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    result = [
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    result.insert(1, "-" * max(map(len, result)))
    return result


def score_rows(gains: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The test scores that `relative_gains` compared, as rows of `paired.compare`."""
    return [
        {"arm": start, "task": task, "seed": seed, "score": score}
        for task, starts in gains["tasks"].items()
        for start, cell in starts.items()
        for seed, score in cell["per_seed"].items()
    ]


def sentences(gains: Mapping[str, Any]) -> list[str]:
    """The results in words: a sentence for each start, each difference and the tasks left out."""
    result, seeds = [], len(gains["seeds"])
    for start, total in gains["starts"].items():
        if total["arg"] is None:
            result.append(f"ARG of {start} over {gains['baseline']}: no task has a relative gain.")
            continue
        result.append(
            f"ARG of {start} over {gains['baseline']}: {percent(total['arg'])}"
            f" ({_interval(total['ci95'], seeds)};"
            f" {count(total['tasks'], 'task')};"
            f" median {percent(total['median'])})."
            f" Its mean score differs by {total['mean_difference']:+.3f} over all tasks."
        )
        gain_by_task = {
            task: cells[start]["relative_gain"]
            for task, cells in gains["tasks"].items()
            if cells[start]["relative_gain"] is not None
        }
        top = max(gain_by_task, key=lambda task: abs(gain_by_task[task]))
        size = sum(map(abs, gain_by_task.values()))
        if len(gain_by_task) > 2 and abs(gain_by_task[top]) > size / 2:
            result[-1] += f" Most of the ARG comes from {top} alone ({percent(gain_by_task[top])})."
    for name, difference in gains["differences"].items():
        if difference["arg"] is not None:
            result.append(
                f"ARG of {name.replace(' - ', ' minus ARG of ')}: {percent(difference['arg'])}"
                f" ({_interval(difference['ci95'], seeds)}; paired by seed)."
            )
    without = next((s["no_relative_gain"] for s in gains["starts"].values()), [])
    if without:
        result.append(
            f"No relative gain, since direct fine-tuning scores below {NEAR_ZERO}:"
            f" {', '.join(without)} ({len(without)} of {len(gains['tasks'])} tasks, not averaged)."
        )
    return result


def count(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def percent(fraction: float | None) -> str:
    """`+2.6 %`; a dash if there is no number."""
    return "–" if fraction is None else f"{100 * fraction:+.1f} %"


def _interval(ci95: list[float] | None, seeds: int) -> str:
    if ci95 is None:
        return "one seed, no interval"
    return f"95 % interval over {count(seeds, 'seed')} {percent(ci95[0])} to {percent(ci95[1])}"


def _mean_std(cell: Mapping[str, Any]) -> str:
    return f"{cell['mean']:.3f}" + ("" if cell["std"] is None else f" ±{cell['std']:.3f}")


def _aggregate(arg_K: np.ndarray | None, per_seed) -> dict[str, Any]:
    if arg_K is None:
        return {"arg": None, "ci95": None, "per_seed": {}}
    return {"arg": float(arg_K.mean()), "ci95": t_interval(arg_K), "per_seed": per_seed(arg_K)}


def _problem(row: Any) -> str | None:
    """What is wrong with a row, in words; None where nothing is."""
    for key, kind in _KEYS.items():
        if not isinstance(row, Mapping) or key not in row:
            return f"lacks {key!r}"
        value = row[key]
        if key == "test_score" and value is None:
            continue
        good = isinstance(value, int | float if kind is float else kind)
        if isinstance(value, bool) or not good or (kind is not str and not abs(value) < _LARGEST):
            words = {str: "a text", int: "a whole number", float: "a finite number"}
            return f"is of no use: {key} is {shown(value)}, not {words[kind]}"
    return None


def _grid(rows: Iterable[Mapping[str, Any]]) -> dict[tuple, dict[tuple, Mapping[str, Any]]]:
    """Returns {(task, start, seed): {(learning_rate, batch_size): row}} in the rows' order."""
    grid: dict[tuple, dict[tuple, Mapping[str, Any]]] = {}
    for number, row in enumerate(rows, 1):
        if problem := _problem(row):
            raise UserError(f"fine-tuning run {number} {problem}")
        where = f"task {row['task']!r}, start {row['start']!r}, seed {row['seed']}"
        points = grid.setdefault((row["task"], row["start"], row["seed"]), {})
        point = (row["learning_rate"], row["batch_size"])
        old = points.setdefault(point, row)
        if (old["dev_score"], old["test_score"]) != (row["dev_score"], row["test_score"]):
            raise UserError(f"{where}: {_name(point)} is given twice, with different scores")
    if not grid:
        raise UserError("there are no fine-tuning runs to compare")
    return grid


def _check_complete(grid, tasks: list, starts: list, seeds: list) -> None:
    for start in starts:
        points = dict.fromkeys(p for key in grid if key[1] == start for p in grid[key])
        for task in tasks:
            have = [seed for seed in seeds if (task, start, seed) in grid]
            if not have:
                raise UserError(f"task {task!r} has no fine-tuning run from start {start!r}")
            if len(have) < len(seeds):
                lacking = ", ".join(str(seed) for seed in seeds if seed not in have)
                raise UserError(f"task {task!r}, start {start!r} lacks seed {lacking}")
            for seed in seeds:
                for point in points:
                    if point not in grid[task, start, seed]:
                        raise UserError(
                            f"task {task!r}, start {start!r}, seed {seed} lacks {_name(point)}"
                        )
                if all(row["test_score"] is None for row in grid[task, start, seed].values()):
                    raise UserError(
                        f"task {task!r}, start {start!r}, seed {seed} has no test score"
                    )


def _best(points: Mapping[tuple, Mapping[str, Any]]) -> Mapping[str, Any]:
    tested = [row for row in points.values() if row["test_score"] is not None]
    return max(tested, key=lambda row: row["dev_score"])  # `max` keeps the first of equals


def _name(point: tuple) -> str:
    return f"learning_rate {point[0]}, batch_size {point[1]}"
