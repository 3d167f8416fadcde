"""Reads the files of run directories that a report shows."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.core import files
from moe_jax.core.errors import UserError

NO_CATEGORY = "(no category)"


@dataclasses.dataclass(frozen=True)
class Routes:
    """The routes of T tasks, ordered by category, subcategory and name.

    `route_TxNxE` float64; `layers` [N] such as `encoder.0`, encoder first.
    """

    step: int
    layers: list[str]
    tasks: list[str]
    categories: list[str]
    subcategories: list[str]
    route_TxNxE: np.ndarray

    @property
    def experts(self) -> int:
        return self.route_TxNxE.shape[2]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory; fields of missing files are empty or None.

    `train` and `eval` are the lines of metrics.jsonl, one per step; `scores` are {evaluation:
    {task: line of scores.jsonl}}.
    """

    name: str
    path: Path
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    scores: dict[str, dict[str, dict[str, Any]]]
    routes: Routes | None


def read_run(name: str, path: str | os.PathLike) -> Run:
    """Reads metrics.jsonl, routes.json and eval/*/scores.jsonl, if they exist.

    Raises:
        UserError: the directory is missing, or a file in it is malformed.
    """
    path = Path(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.+ -]*", name):
        raise UserError(f"run name {name!r} must start with a letter or digit, then [\\w.+ -]")
    if not path.is_dir():
        raise UserError(f"run {name!r}: {path} is not a directory")
    train, eval_ = _read_metrics(path / "metrics.jsonl")
    scores = {}
    for file in sorted(path.glob("eval/*/scores.jsonl")):
        scores |= _read_scores(file)
    routes = path / "routes.json"
    return Run(name, path, train, eval_, scores, read_routes(routes) if routes.exists() else None)


def read_finetune(path: str | os.PathLike) -> list[dict[str, Any]] | None:
    """Lines of DIR/runs.jsonl; None if there is no such file.

    Raises:
        UserError: the directory is missing, or the file is malformed.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"fine-tuning directory {path} is not a directory")
    file = path / "runs.jsonl"
    return list(files.read_jsonl(file)) if file.exists() else None


def read_routes(path: Path) -> Routes:
    """Reads routes.json.

    Raises:
        UserError: a key is missing; a route is not N distributions over E experts.
    """
    value = files.read_json(path)
    try:
        layers, experts, tasks = list(value["layers"]), int(value["experts"]), value["tasks"]
        step = int(value["step"])
        rows = [
            (row.get("category") or NO_CATEGORY, row.get("subcategory") or "", task, row["route"])
            for task, row in tasks.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not a file of routes: {type(e).__name__} {e}") from e
    if not rows or not layers:
        raise UserError(f"{path}: no tasks or no routed layers")
    # Tasks without a category come last.
    rows.sort(key=lambda row: (row[0] == NO_CATEGORY, *row[:3]))
    shape = (len(layers), experts)
    for *_, task, route in rows:
        try:
            route_NxE = np.asarray(route, np.float64)
        except (TypeError, ValueError) as e:
            raise UserError(f"{path}: the route of {task!r} is not an array of numbers") from e
        if route_NxE.shape != shape:
            raise UserError(
                f"{path}: the route of {task!r} has shape {route_NxE.shape}, expected {shape}"
            )
        if not (np.all(route_NxE >= 0) and np.allclose(route_NxE.sum(-1), 1, atol=1e-2)):
            raise UserError(f"{path}: the route of {task!r} is not a distribution in every layer")
    categories, subcategories, names, routes = map(list, zip(*rows, strict=True))
    return Routes(step, layers, names, categories, subcategories, np.asarray(routes, np.float64))


def _read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """Returns train and eval lines by step. If a step was written twice, the last line counts."""
    kinds: dict[str, dict[int, dict]] = {"train": {}, "eval": {}}
    if path.exists():
        for number, line in enumerate(files.read_jsonl(path), 1):
            if not isinstance(line, Mapping) or not isinstance(line.get("step"), int):
                raise UserError(f"{path}: entry {number} has no integer 'step'")
            kinds.setdefault(str(line.get("kind")), {})[line["step"]] = dict(line)
    return tuple([lines[step] for step in sorted(lines)] for lines in list(kinds.values())[:2])


def _read_scores(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns {evaluation: {task: line}}. A task's score is its first metric.

    An evaluation is named after its folder, and after the split if there are several.
    """
    by_split: dict[str, dict[str, dict[str, Any]]] = {}
    for number, line in enumerate(files.read_jsonl(path), 1):
        if not isinstance(line, Mapping) or not {"task", "metric", "score"} <= line.keys():
            raise UserError(f"{path}: entry {number} lacks 'task', 'metric' or 'score'")
        score = line["score"]
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise UserError(f"{path}: the score of {line['task']!r} is {score!r}, not a number")
        by_split.setdefault(str(line.get("split")), {}).setdefault(line["task"], dict(line))
    folder = path.parent.name
    if len(by_split) == 1:
        return {folder: next(iter(by_split.values()))}
    return {f"{folder}/{split}": lines for split, lines in by_split.items()}
