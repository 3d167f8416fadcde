"""Sections of the report on few-shot adaptation and on tasks that lose by sharing a model."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from moe_jax.core.errors import UserError
from moe_jax.evaluation import gains as gain
from moe_jax.evaluation import paired
from moe_jax.evaluation.bootstrap import bootstrap_interval
from moe_jax.report import figures, names, page
from moe_jax.report.inputs import Run
from moe_jax.report.page import Link
from moe_jax.report.sections import Section, clearly_best


def adaptation(rows: list[dict] | None, place: str | os.PathLike | None) -> Section:
    """Gains over direct fine-tuning and over the dense model, and the underlying scores.

    Args:
        rows: the runs of few-shot adaptation; None if there are none.
        place: the directory in which they were looked for, if one was given.
    """
    result = Section("adaptation", "Few-shot adaptation to unseen tasks")
    if rows is None:
        why = "No fine-tuning runs were given" if place is None else f"{place} has no runs.jsonl"
        result.lack(f"{why}, so there are no relative gains.")
        return result
    try:
        rows = [row | {"start": names.named(row["start"])} for row in rows]
        gains = gain.relative_gains(rows, names.DIRECT)
        over_dense = paired.compare(gain.score_rows(gains))
    except UserError as e:
        result.lack(f"Relative gains are left out: {e}.")
        return result
    result.numbers = gains | {"over_dense": dataclasses.asdict(over_dense)}
    for start, sentence in zip_longest(gains["starts"], gain.sentences(gains)):
        result.find(sentence, main=start == names.MIXTURE)
    for start, sentence in zip_longest(over_dense.arms, paired.sentences(over_dense)):
        result.find(f"Few-shot, {sentence}" if start else sentence, main=start == names.MIXTURE)
    baseline, others, seeds = gains["baseline"], list(gains["starts"]), len(gains["seeds"])
    result.explain(
        f"The relative gain of a task is (score − {baseline}) / {baseline}, with scores "
        f"averaged over {gain.count(seeds, 'seed')}; learning rate and batch size are "
        "chosen on dev, per task, start and seed. ARG is the mean over tasks. Its interval is "
        "Student's, over seeds; the one over tasks is a bootstrap. Where an interval includes "
        "0, the gain may be chance."
    )
    result.table(
        [
            *page.texts("start"),
            *page.numbers(1, "ARG", percent=True),
            *page.texts("95 % over seeds", "95 % over tasks"),
            *page.numbers(1, "median gain", percent=True),
            *page.numbers(3, "mean score difference"),
            *page.numbers(0, "tasks", "without relative gain"),
        ],
        [
            [
                start,
                total["arg"],
                _range(total["ci95"]),
                _range(total["ci95_tasks"]),
                total["median"],
                total["mean_difference"],
                total["tasks"],
                len(total["no_relative_gain"]),
            ]
            for start, total in gains["starts"].items()
        ],
    )
    starts = [baseline, *others]
    result.draw(
        "few-shot scores",
        figures.dots(
            list(gains["tasks"]),
            {s: [cells[s]["mean"] for cells in gains["tasks"].values()] for s in starts},
            title="Few-shot score of every unseen task",
            intervals={
                s: [_ends(_seeds(cells[s])) for cells in gains["tasks"].values()] for s in starts
            },
        ),
        "Bars reach from the lowest to the highest seed.",
    )
    rows_, bold = [], []
    for task, cells in gains["tasks"].items():
        row = [task, gains["metrics"][task], cells[baseline]["mean"], cells[baseline]["std"]]
        for start in others:
            cell = cells[start]
            row += [cell["mean"], cell["std"], cell["relative_gain"]]
        rows_.append(row)
        best = clearly_best({s: _seeds(cells[s]) for s in starts}, gain.t_interval)
        columns = [2, *(4 + 3 * i for i in range(len(others)))]
        bold.append(None if best is None else columns[starts.index(best)])
    result.table(
        [*page.texts("task", "metric"), *page.numbers(3, baseline, "±")]
        + [
            column
            for s in others
            for column in (
                *page.numbers(3, s, "±"),
                *page.numbers(1, f"gain of {s}", percent=True),
            )
        ],
        rows_,
        bold,
    )
    result.explain(
        "± is the standard deviation over seeds. A score is bold if the 95 % interval of its "
        "difference from every other, paired by seed, excludes 0."
    )
    return result


def transfer(
    runs: Sequence[Run],
    single: Mapping[str, Mapping[str, Mapping[str, Any]]] | None,
    gains: Mapping[str, Any] | None,
    links: Mapping[str, str],
) -> Section:
    """Tasks that score lower than with a model of their own.

    Args:
        single: {split: {task: line of scores.jsonl}} of models trained on one task each.
        gains: the value of `relative_gains`, whose baseline is training on an unseen task alone.
    """
    result = Section("transfer", "Tasks that lose by sharing a model", numbers={})
    for split, alone in (single or {}).items():
        for run in runs:
            scored = {
                task: line
                for lines in run.scores.values()
                for task, line in lines.items()
                if line.get("split") == split and task in alone
            }
            if scored:
                _against_single(result, run.name, split, scored, alone, links)
    if not single:
        result.lack("No runs of single tasks were given (--single DIR).")
    for start in (gains or {}).get("starts", {}):
        _against_direct(result, start, gains)
    return result


def _against_single(
    result: Section,
    run: str,
    split: str,
    scored: Mapping[str, Mapping[str, Any]],
    alone: Mapping[str, Mapping[str, Any]],
    links: Mapping[str, str],
) -> None:
    difference = {t: scored[t]["score"] - alone[t]["score"] for t in scored}
    losing = sorted((t for t in scored if difference[t] < -1e-9), key=difference.get)
    mean = float(np.mean(list(difference.values())))
    ci95 = bootstrap_interval(list(difference.values()))
    result.numbers.setdefault(split, {})[run] = {
        "tasks": len(scored),
        "mean_difference": mean,
        "ci95_tasks": ci95,
        "differences": difference,
        "losing": losing,
    }
    interval = f", 95 % interval over tasks {ci95[0]:+.3f} to {ci95[1]:+.3f}" if ci95 else ""
    result.find(
        f"“{run}” scores {mean:+.3f} against training on single tasks ({split}{interval}); "
        f"{len(losing)} of {gain.count(len(scored), 'task')} lose.",
        main=True,
    )
    if losing:
        result.table(
            [
                *page.texts("losing task", "category"),
                *page.numbers(3, "alone", run, "difference"),
            ],
            [
                [
                    Link(t, links.get(t, "")),
                    scored[t].get("category"),
                    alone[t]["score"],
                    scored[t]["score"],
                    difference[t],
                ]
                for t in losing
            ],
        )


def _against_direct(result: Section, start: str, gains: Mapping[str, Any]) -> None:
    losing, clearly = [], []
    for task, cells in gains["tasks"].items():
        pairs = zip(_seeds(cells[start]), _seeds(cells[gains["baseline"]]), strict=True)
        difference_K = np.array([a - b for a, b in pairs])
        interval = gain.t_interval(difference_K)
        if difference_K.mean() < -1e-9:
            losing.append(task)
            clearly += [task] if interval and interval[1] < 0 else []
    result.numbers.setdefault("few-shot", {})[start] = {"losing": losing, "clearly": clearly}
    named = f" ({', '.join(clearly)})" if clearly else ""
    result.find(
        f"Few-shot, {start} scores lower than {gains['baseline']} on {len(losing)} of "
        f"{gain.count(len(gains['tasks']), 'unseen task')}, on {len(clearly)} of them with an "
        f"interval over seeds below 0{named}."
    )


def _seeds(cell: Mapping[str, Any]) -> list[float]:
    return list(cell["per_seed"].values())


def _ends(values: list[float]) -> list[float] | None:
    return [min(values), max(values)] if len(values) > 1 else None


def _range(interval: list[float] | None) -> str | None:
    return interval and f"{gain.percent(interval[0])} to {gain.percent(interval[1])}"
