"""Sections of the report on runs, scores, training and single tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.evaluation.bootstrap import bootstrap_interval
from moe_jax.evaluation.gains import count
from moe_jax.report import figures, page
from moe_jax.report.features import FEATURES, answer
from moe_jax.report.inputs import NO_CATEGORY, Run
from moe_jax.report.page import DASH, Link
from moe_jax.report.sections import Section, clearly_best

SHOWN = 5  # predictions of a task
LONGEST = 300  # characters of a text
SETTINGS = {
    "tasks": "DataConfig.mixture_or_task_name",
    "steps": "RunConfig.train_steps",
    "experts": "ModelConfig.experts",
    "selection": "RouterConfig.selection",
    "seed": "RunConfig.seed",
}


def provenance(runs: Sequence[Run], model: Run | None) -> Section:
    """Date, code and configuration of every run."""
    result = Section("runs", "Runs", numbers={})
    rows = []
    for run in runs:
        result.numbers[run.name] = {"path": str(run.path), **run.origin, "config": run.config}
        settings = [run.config.get(name) for name in SETTINGS.values()]
        rows.append(
            [
                f"{run.name} (this page's model)" if run is model else run.name,
                run.origin.get("date"),
                run.origin.get("commit"),
                *(None if value is None else str(value) for value in settings),
                str(run.path),
            ]
        )
    if model is not None:
        result.add(
            page.paragraph(
                f"This page is about one model, “{model.name}”: routes, agreement, experts and "
                "predictions are its own. The scores of other runs stand beside its scores."
            )
        )
    result.table(page.texts("run", "started (UTC)", "commit", *SETTINGS, "directory"), rows)
    lacking = [run.name for run in runs if not run.origin]
    if lacking:
        result.lack(f"No origin.json, so no date and commit: {', '.join(lacking)}.")
    for run in runs:
        if run.config:
            lines = [[name, str(value)] for name, value in run.config.items()]
            columns = page.texts("setting", "value", wide=True)
            result.add(page.details(f"Configuration of {run.name}", page.table(columns, lines)))
    return result


def scores(runs: Sequence[Run], links: Mapping[str, str]) -> Section:
    """Per-task scores of each evaluation across runs, means by category, paired differences."""
    result = Section("scores", "Scores", numbers={})
    lacking = [run.name for run in runs if not run.scores]
    if lacking:
        result.lack(f"No eval/*/scores.jsonl, left out here: {', '.join(lacking)}.")
    evaluations = dict.fromkeys(name for run in runs for name in run.scores)
    for evaluation in evaluations:
        of_run = {run.name: run.scores[evaluation] for run in runs if evaluation in run.scores}
        _evaluation(result, evaluation, of_run, links)
    return result


def _evaluation(
    result: Section,
    evaluation: str,
    of_run: Mapping[str, Mapping[str, Mapping[str, Any]]],
    links: Mapping[str, str],
) -> None:
    lines = {task: line for scored in reversed(of_run.values()) for task, line in scored.items()}
    place = {
        task: (line.get("category") or NO_CATEGORY, line.get("subcategory") or "")
        for task, line in lines.items()
    }
    tasks = sorted(lines, key=lambda t: (place[t][0] == NO_CATEGORY, *place[t], t))
    score = {
        run: {t: scored[t]["score"] if t in scored else None for t in tasks}
        for run, scored in of_run.items()
    }
    names = list(of_run)
    common = [t for t in tasks if all(score[run][t] is not None for run in names)]
    result.add(page.heading(f"Evaluation “{evaluation}”"))
    if len(common) < len(tasks):
        result.lack(
            f"{len(tasks) - len(common)} of {len(tasks)} tasks were not scored by every run; "
            "means and differences below are over the others."
        )
    if not common:
        return
    members = {"all tasks": common}
    for task in common:
        members.setdefault(place[task][0], []).append(task)
    means = {
        run: {c: float(np.mean([score[run][t] for t in ts])) for c, ts in members.items()}
        for run in names
    }
    numbers: dict[str, Any] = {
        "tasks": len(common),
        "mean": {run: means[run].pop("all tasks") for run in names},
        "category_mean": means,
        "differences": _differences(
            {run: np.array([score[run][t] for t in common]) for run in names}
        ),
        "scores": {
            t: {run: score[run][t] for run in names} | {"metric": lines[t]["metric"]} for t in tasks
        },
    }
    result.numbers[evaluation] = numbers
    result.find(_score_sentence(evaluation, numbers), main=True)
    if len(names) > 1:
        result.explain(
            f"In brackets, the difference from {names[0]} on the same tasks with a bootstrap "
            "interval over tasks; where that includes 0, the difference may be chance. A mean "
            "is bold if this interval excludes 0 for its difference from every other run."
        )
    rows, bold = [], []
    for category, inside in members.items():
        samples = {run: [score[run][t] for t in inside] for run in names}
        best = clearly_best(samples, bootstrap_interval)
        bold.append(None if best is None else 2 + names.index(best))
        rows.append([category, len(inside), *(float(np.mean(v)) for v in samples.values())])
    result.table(
        [*page.texts("category"), *page.numbers(0, "tasks"), *page.numbers(3, *names)], rows, bold
    )
    result.draw(
        f"scores {evaluation}",
        figures.dots(
            tasks,
            {run: [score[run][t] for t in tasks] for run in names},
            title=f"Score of every task, {evaluation}",
            links=[links.get(t, "") for t in tasks],
        ),
        "Each task has its own metric, so compare dots in a row, not rows.",
    )
    result.table(
        [
            *page.texts("task", "category", "subcategory", "metric"),
            *page.numbers(0, "examples"),
            *page.numbers(3, *names),
        ],
        [
            [Link(t, links.get(t, "")), *place[t], lines[t]["metric"], lines[t].get("examples")]
            + [score[run][t] for run in names]
            for t in tasks
        ],
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
            "ci95_tasks": bootstrap_interval(difference_T),
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
    tasks = count(numbers["tasks"], "task")
    return f"Mean score on “{evaluation}” ({tasks}): {'; '.join(clauses)}."


def losses(runs: Sequence[Run]) -> Section:
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
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                steps, values = map(list, zip(*points, strict=True))
                every = curves.setdefault(quantity, {r.name: ([], []) for r in runs})
                every[run.name] = (steps, values)  # each run has its colour in all figures
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
        result.lack(f"No metrics.jsonl, left out here: {', '.join(lacking)}.")
    for quantity, of_run in curves.items():
        result.add(page.heading(f"{quantity.capitalize()} by step"))
        result.draw(quantity, figures.lines(of_run, title=f"{quantity} by step"))
    if not curves:
        return result
    keys = ("first", "last", "lowest", "highest")
    result.table(
        [
            *page.texts("run", "quantity"),
            *page.numbers(0, "last step"),
            *page.numbers(3, *keys),
        ],
        [
            [run, quantity, n["last_step"], *(n[k] for k in keys)]
            for run, by_quantity in result.numbers.items()
            for quantity, n in by_quantity.items()
        ],
    )
    last = [
        f"{run} {q['training loss']['last']:.3f} at step {q['training loss']['last_step']}"
        for run, q in result.numbers.items()
        if "training loss" in q
    ]
    if last:
        result.findings.append(f"Last training loss: {', '.join(last)}.")
    return result


def tasks(
    model: Run,
    lines: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
    features: Mapping[str, Mapping[str, float]],
    links: Mapping[str, str],
) -> Section:
    """The measured features of every task, and some of its predictions.

    Args:
        lines: {task: (evaluation, line of predictions.jsonl)}.
    """
    result = Section("tasks", f"Tasks and predictions of “{model.name}”", numbers=dict(features))
    if not lines:
        result.lack("No eval/*/predictions.jsonl, so no predictions and features.")
        return result
    result.explain("; ".join(f"{name}: {meaning}" for name, meaning in FEATURES.items()) + ".")
    result.table(
        [*page.texts("task"), *page.numbers(2, *FEATURES)],
        [[Link(t, links[t]), *features[t].values()] for t in lines],
    )
    result.explain(f"Up to {SHOWN} predictions of each task, evenly spaced over its examples.")
    for task, of_task in lines.items():
        rows = [
            [
                _short(line["input"]),
                _short(line["prediction"]),
                _short(answer(line["references"]) or DASH),
            ]
            for _, line in figures.spread(of_task, SHOWN)
        ]
        places = dict.fromkeys(f"eval/{evaluation}/predictions.jsonl" for evaluation, _ in of_task)
        result.add(
            page.details(
                task,
                page.table(page.texts("input", "prediction", "reference", wide=True), rows),
                page.soft(f"{count(len(of_task), 'prediction')} in {', '.join(places)}"),
                name=links[task].removeprefix("#"),
            )
        )
    return result


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
