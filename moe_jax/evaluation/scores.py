"""What was scored: of one task, of a dataset's prompts, of all; and the files that say so."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.core import files, paths
from moe_jax.data.cache import PreparedMixture, PreparedTask
from moe_jax.model.task_moe import TaskMoE


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One task's score and what it was computed from."""

    task: PreparedTask
    split: str
    metric: str
    score: float
    metrics: dict[str, float]
    predictions: list[dict[str, Any]]


def route_json(route_NxE: np.ndarray) -> list:
    """A route for JSON: N expert numbers where it is one-hot, else N x E weights."""
    if np.all(np.max(route_NxE, -1) == 1.0):
        return np.argmax(route_NxE, -1).tolist()
    return np.round(route_NxE.astype(float), 6).tolist()


def mean_score(scores: Iterable[TaskScore]) -> float:
    """Mean over tasks of each task's first metric."""
    return float(np.mean([score.score for score in scores]))


def over_prompts(scores: Iterable[TaskScore]) -> list[dict[str, Any]]:
    """Of every dataset that is there in several wordings: mean, median and range over its prompts.

    Returns:
        {dataset, split, metric, prompts (their number), mean, median, min, max}, sorted.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for score in scores:
        if score.task.dataset:
            key = (score.task.dataset, score.split, score.metric)
            found.setdefault(key, []).append(score.score)
    return [
        {
            "dataset": dataset,
            "split": split,
            "metric": metric,
            "prompts": len(values),
            "mean": float(np.mean(values)),
            "median": float(np.median(values)),
            "min": min(values),
            "max": max(values),
        }
        for (dataset, split, metric), values in sorted(found.items())
    ]


def write_predictions(directory: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes predictions.jsonl. Scores that are there are of others, and are removed."""
    directory = paths.parse(directory)
    for earlier in ("scores.jsonl", "prompts.jsonl"):
        (directory / earlier).unlink(missing_ok=True)
    files.write_jsonl(directory / "predictions.jsonl", rows)


def write_scores(directory: str | Path, scores: list[TaskScore]) -> None:
    """Writes predictions.jsonl, prompts.jsonl where tasks are prompts, and scores.jsonl.

    The last means that all is there.
    """
    directory = paths.parse(directory)
    write_predictions(directory, (row for score in scores for row in score.predictions))
    if rows := over_prompts(scores):
        files.write_jsonl(directory / "prompts.jsonl", rows)
    rows = []
    for score in scores:
        routes = [row["route"] for row in score.predictions]
        # Examples with routes of their own have no route in common.
        route = routes[0] if routes and all(route == routes[0] for route in routes) else None
        experts = None if route is None else [int(np.argmax(r)) if np.ndim(r) else r for r in route]
        rows += [
            {
                "task": score.task.name,
                "split": score.split,
                "metric": metric,
                "score": value,
                "examples": len(score.predictions),
                "category": score.task.category,
                "subcategory": score.task.subcategory,
                "experts": experts,
            }
            for metric, value in score.metrics.items()
        ]
    files.write_jsonl(directory / "scores.jsonl", rows)


def write_routes(
    path: str | Path,
    model: TaskMoE,
    routes_TxNxE: np.ndarray,
    step: int,
    mixture: PreparedMixture,
    task_ids: Mapping[str, int],
) -> None:
    """Writes routes.json: the route and the human category of every task in the table."""
    files.write_json(
        path,
        {
            "step": step,
            "experts": model.config.experts,
            "layers": list(model.config.routed_layers),
            "tasks": {
                task.name: {
                    "route": np.round(routes_TxNxE[task_ids[task.name]].astype(float), 6).tolist(),
                    "category": task.category,
                    "subcategory": task.subcategory,
                }
                for task in mixture.tasks
                if task.name in task_ids
            },
        },
    )
