"""Sections of the report on scores, adaptation and training. Each returns a `Section`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_jax.core.errors import UserError
from moe_jax.evaluation import gains as gain
from moe_jax.report import page, plots
from moe_jax.report.inputs import NO_CATEGORY, Run


@dataclasses.dataclass
class Section:
    """One section of the page: its markup, its findings in words, its numbers, its figures."""

    name: str
    title: str
    parts: list[str] = dataclasses.field(default_factory=list)
    findings: list[str] = dataclasses.field(default_factory=list)
    numbers: Any = None
    figures: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)

    def draw(self, name: str, figure: Figure, alt: str, caption: str = "") -> str:
        """Renders the figure as NAME.png and returns its markup."""
        self.figures[name] = plots.png(figure)
        return page.figure(self.figures[name], alt, caption)


def scores(runs: Sequence[Run], colours: Mapping[str, str]) -> Section:
    """Per-task scores of each evaluation across runs, means by category, paired differences."""
    result = Section("scores", "Scores", numbers={})
    lacking = [run.name for run in runs if not run.scores]
    if lacking:
        result.add(page.missing(f"No eval/*/scores.jsonl, left out here: {', '.join(lacking)}."))
    evaluations = dict.fromkeys(name for run in runs for name in run.scores)
    for evaluation in evaluations:
        of_run = {run.name: run.scores[evaluation] for run in runs if evaluation in run.scores}
        _evaluation(result, evaluation, of_run, colours)
    return result


def _evaluation(
    result: Section,
    evaluation: str,
    of_run: Mapping[str, Mapping[str, Mapping[str, Any]]],
    colours: Mapping[str, str],
) -> None:
    lines = {task: line for scored in reversed(of_run.values()) for task, line in scored.items()}
    place = {
        task: (line.get("category") or NO_CATEGORY, line.get("subcategory") or "")
        for task, line in lines.items()
    }
    tasks = sorted(lines, key=lambda t: (place[t][0] == NO_CATEGORY, *place[t], t))
    categories, subcategories = ([place[t][i] for t in tasks] for i in range(2))
    score = {
        run: [scored[t]["score"] if t in scored else None for t in tasks]
        for run, scored in of_run.items()
    }
    names = list(of_run)
    common = [i for i in range(len(tasks)) if all(score[run][i] is not None for run in names)]
    result.add(page.heading(f"Evaluation “{evaluation}”"))
    if len(common) < len(tasks):
        result.add(
            page.missing(
                f"{len(tasks) - len(common)} of {len(tasks)} tasks were not scored by every run; "
                "means and differences below are over the others."
            )
        )
    if not common:
        return
    numbers: dict[str, Any] = {"tasks": len(common), "mean": {}, "category_mean": {}}
    by_category = {
        c: [i for i in common if categories[i] == c]
        for c in dict.fromkeys(categories[i] for i in common)
    }
    for run in names:
        numbers["mean"][run] = float(np.mean([score[run][i] for i in common]))
        numbers["category_mean"][run] = {
            c: float(np.mean([score[run][i] for i in indices]))
            for c, indices in by_category.items()
        }
    numbers["differences"] = _differences(
        {run: np.array([score[run][i] for i in common]) for run in names}
    )
    numbers["scores"] = {
        t: {run: score[run][i] for run in names} | {"metric": lines[t]["metric"]}
        for i, t in enumerate(tasks)
    }
    result.numbers[evaluation] = numbers
    result.findings.append(_score_sentence(evaluation, numbers))
    result.add(page.paragraph(result.findings[-1]))
    if len(names) > 1:
        result.add(
            page.soft(
                f"In brackets, the difference from {names[0]} on the same tasks with a bootstrap "
                "interval over tasks; where that includes 0, the difference may be chance."
            )
        )
    slug = "".join(c if c.isalnum() or c in "-_" else "_" for c in evaluation)
    means = {run: list(numbers["category_mean"][run].values()) for run in names}
    result.add(
        page.pair(
            result.draw(
                f"category_means_{slug}",
                plots.category_means(list(by_category), means, colours),
                f"Mean score by category, {evaluation}",
            ),
            page.table(
                [*page.texts("category"), *page.numbers(0, "tasks"), *page.numbers(3, *names)],
                [
                    [c, len(by_category[c]), *(numbers["category_mean"][run][c] for run in names)]
                    for c in by_category
                ]
                + [["all tasks", len(common), *(numbers["mean"][run] for run in names)]],
                best=range(2, 2 + len(names)),
            ),
        ),
        result.draw(
            f"scores_{slug}",
            plots.scores(tasks, categories, subcategories, score, colours),
            f"Score of every task, {evaluation}",
            "Each task has its own metric, so compare dots in a row, not rows.",
        ),
        page.table(
            [
                *page.texts("task", "category", "subcategory", "metric"),
                *page.numbers(0, "examples"),
                *page.numbers(3, *names),
            ],
            [
                [t, *place[t], lines[t]["metric"], lines[t].get("examples")]
                + [score[run][i] for run in names]
                for i, t in enumerate(tasks)
            ],
            best=range(5, 5 + len(names)),
        ),
    )


def _differences(score_by_run: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Paired differences of every later run from the first: {run - first: ...}."""
    (first, reference_T), *others = score_by_run.items()
    result = {}
    for run, score_T in others:
        difference_T = score_T - reference_T
        better, worse = int((difference_T > 1e-9).sum()), int((difference_T < -1e-9).sum())
        result[f"{run} - {first}"] = {
            "mean": float(difference_T.mean()),
            "ci95_tasks": gain.bootstrap_interval(difference_T),
            "better": better,
            "worse": worse,
            "equal": len(difference_T) - better - worse,
        }
    return result


def _score_sentence(evaluation: str, numbers: Mapping[str, Any]) -> str:
    """The mean scores and each run's paired difference from the first, as one sentence."""
    (first, mean), *others = numbers["mean"].items()
    clauses = [f"{first} {mean:.3f}"]
    for run, mean in others:
        d = numbers["differences"][f"{run} - {first}"]
        clause = f"{run} {mean:.3f} ({d['mean']:+.3f}"
        if d["ci95_tasks"]:
            clause += f", 95 % interval over tasks {d['ci95_tasks'][0]:+.3f} to "
            clause += f"{d['ci95_tasks'][1]:+.3f}"
        clauses.append(f"{clause}; better on {d['better']}, worse on {d['worse']})")
    tasks = gain.count(numbers["tasks"], "task")
    return f"Mean score on “{evaluation}” ({tasks}): {'; '.join(clauses)}."


def adaptation(rows: list[dict] | None, colours: Mapping[str, str]) -> Section:
    """ARG of each start over direct fine-tuning, and the underlying scores."""
    result = Section("adaptation", "Few-shot adaptation to unseen tasks")
    if rows is None:
        result.add(page.missing("No fine-tuning runs were given, so there are no relative gains."))
        return result
    try:
        gains = gain.relative_gains(rows)
    except UserError as e:
        result.add(page.missing(f"Relative gains are left out: {e}."))
        return result
    result.numbers = gains
    result.findings = gain.sentences(gains)
    baseline, others, seeds = gains["baseline"], list(gains["starts"]), len(gains["seeds"])
    result.add(
        *map(page.paragraph, result.findings),
        page.soft(
            f"The relative gain of a task is (score − {baseline}) / {baseline}, with scores "
            f"averaged over {gain.count(seeds, 'seed')}; learning rate and batch size are "
            "chosen on dev, per task, start and seed. ARG is the mean over tasks. Its interval is "
            "Student's, over seeds; the one over tasks is a bootstrap. Where an interval includes "
            "0, the gain may be chance."
        ),
        page.table(
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
        ),
    )
    with_gain = [t for t, cells in gains["tasks"].items() if _has_gain(cells)]
    if others and with_gain:
        result.add(
            result.draw(
                "relative_gains",
                plots.gains(
                    with_gain,
                    {s: [gains["tasks"][t][s]["relative_gain"] for t in with_gain] for s in others},
                    {s: (gains["starts"][s]["arg"], gains["starts"][s]["ci95"]) for s in others},
                    colours,
                ),
                "Relative gain of every unseen task and the average",
                "Bars at ARG are 95 % intervals over seeds.",
            )
        )
    result.add(
        page.table(
            [*page.texts("task", "metric"), *page.numbers(3, baseline, "±")]
            + [
                column
                for s in others
                for column in (
                    *page.numbers(3, s, "±"),
                    *page.numbers(1, f"gain of {s}", percent=True),
                )
            ],
            [_gain_row(task, gains, baseline, others) for task in gains["tasks"]],
            best=[2, *(4 + 3 * i for i in range(len(others)))],
        ),
        page.soft("± is the standard deviation over seeds."),
    )
    return result


def _gain_row(task: str, gains: Mapping, baseline: str, others: Sequence[str]) -> list:
    cells = gains["tasks"][task]
    row = [task, gains["metrics"][task], cells[baseline]["mean"], cells[baseline]["std"]]
    for start in others:
        row += [cells[start]["mean"], cells[start]["std"], cells[start]["relative_gain"]]
    return row


def _has_gain(cells: Mapping[str, Mapping]) -> bool:
    return any(cell.get("relative_gain") is not None for cell in cells.values())


def _range(interval: list[float] | None) -> str | None:
    return interval and f"{gain.percent(interval[0])} to {gain.percent(interval[1])}"


def losses(runs: Sequence[Run], colours: Mapping[str, str]) -> Section:
    """Training and evaluation curves of all runs."""
    result = Section("training", "Training", numbers={})
    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for run in runs:
        sources = {
            "training loss": (run.train, "loss"),
            "evaluation loss": (run.eval, "loss"),
            "mean score during training": (run.eval, "mean_score"),
        }
        for quantity, (lines, key) in sources.items():
            points = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
            if points:
                steps, values = map(list, zip(*points, strict=True))
                curves.setdefault(quantity, {})[run.name] = (steps, values)
                result.numbers.setdefault(run.name, {})[quantity] = {
                    "steps": len(steps),
                    "last_step": steps[-1],
                    "first": values[0],
                    "last": values[-1],
                    "lowest": min(values),
                    "highest": max(values),
                }
    lacking = [run.name for run in runs if run.name not in result.numbers]
    if lacking:
        result.add(page.missing(f"No metrics.jsonl, left out here: {', '.join(lacking)}."))
    if not curves:
        return result
    quantities = ("training loss", "evaluation loss", "mean score during training")
    ordered = {quantity: curves[quantity] for quantity in quantities if quantity in curves}
    result.add(
        result.draw(
            "losses",
            plots.losses(ordered, colours),
            "Loss and score by step",
            "Faint lines are single values, strong lines their running mean.",
        ),
        page.table(
            [
                *page.texts("run", "quantity"),
                *page.numbers(0, "last step"),
                *page.numbers(3, "first", "last", "lowest", "highest"),
            ],
            [
                [
                    run,
                    quantity,
                    n["last_step"],
                    *(n[k] for k in ("first", "last", "lowest", "highest")),
                ]
                for run, by_quantity in result.numbers.items()
                for quantity, n in by_quantity.items()
            ],
        ),
    )
    last = [
        f"{run} {q['training loss']['last']:.3f} at step {q['training loss']['last_step']}"
        for run, q in result.numbers.items()
        if "training loss" in q
    ]
    if last:
        result.findings.append(f"Last training loss: {', '.join(last)}.")
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
