"""Reads the files of run directories that a report shows."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError, shown
from moe_jax.evaluation import gains

NO_CATEGORY = "(no category)"
_TEXTS = ("task", "metric", "category", "subcategory", "split")
PREDICTION = {"task", "input", "prediction", "references"}


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

    def labels(self, level: str) -> list[str]:
        """The label of each task at a level of the ontology; see `label`."""
        pairs = zip(self.categories, self.subcategories, strict=True)
        return [label(level, category, subcategory) for category, subcategory in pairs]


def label(level: str, category: str | None, subcategory: str | None) -> str:
    """A task's `category`, or its `subcategory` after that: two categories may have one of a name.

    A task without a subcategory is labelled by its category at both levels.
    """
    category = category or NO_CATEGORY
    return f"{category} / {subcategory}" if level == "subcategory" and subcategory else category


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory; fields of missing files are empty or None.

    `origin` is its date, version and commit, `config` its settings; `train` and `eval` are the
    lines of metrics.jsonl, one per step; `scores` are {evaluation: {task: line of scores.jsonl}}.
    """

    name: str
    path: Path
    origin: dict[str, Any]
    config: dict[str, Any]
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    scores: dict[str, dict[str, dict[str, Any]]]
    routes: Routes | None


def read_run(name: str, path: str | os.PathLike) -> Run:
    """Reads origin.json, config.json, metrics.jsonl, routes.json and eval/*/scores.jsonl, if they
    exist.

    Raises:
        UserError: the directory is missing, or a file in it is malformed.
    """
    path = paths.parse(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.+ -]*", name):
        raise UserError(f"run name {name!r} must start with a letter or digit, then [\\w.+ -]")
    if not path.is_dir():
        raise UserError(f"run {name!r}: {path} is not a directory")
    origin, config = (
        files.read_object(path / file) if (path / file).exists() else {}
        for file in ("origin.json", "config.json")
    )
    train, eval_ = _read_metrics(path / "metrics.jsonl")
    scores = _read_evaluations(path)
    routes = read_routes(path / "routes.json") if (path / "routes.json").exists() else None
    return Run(name, path, origin, config, train, eval_, scores, routes)


def read_history(path: Path, final: Routes) -> dict[int, np.ndarray]:
    """{step: routes [T, N, E]} of routes/STEP.json in a run, in the order of the final routes,
    which come last. A file with other tasks or layers is left out.

    Raises:
        UserError: a file is malformed.
    """
    history = {}
    for file in sorted((path / "routes").glob("*.json")):
        then = read_routes(file)
        if then.tasks == final.tasks and then.layers == final.layers and then.step < final.step:
            history[then.step] = then.route_TxNxE
    return dict(sorted(history.items())) | {final.step: final.route_TxNxE}


def read_predictions(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(evaluation, line) of eval/*/predictions.jsonl in a run. Lines of targets that were only
    scored, as some metrics want it, hold no prediction and are left out.

    Raises:
        UserError: a line lacks a key.
    """
    for file in sorted(path.glob("eval/*/predictions.jsonl")):
        for number, line in enumerate(files.read_jsonl(file), 1):
            if "log_likelihood" in line and "prediction" not in line:
                continue
            if PREDICTION - line.keys():
                lacking = "', '".join(sorted(PREDICTION - set(line)))
                raise UserError(f"{file}: entry {number} lacks '{lacking}'")
            for key in ("task", "input"):
                if not isinstance(line[key], str):
                    raise UserError(f"{file}: entry {number}: {key} is {shown(line[key])}")
            yield file.parent.name, line


def read_disabling(path: Path) -> dict[str, dict[str, Any]]:
    """{evaluation: value of eval/*/disabling.json} in a run.

    Raises:
        UserError: a key is missing, or losses are not finite numbers [N, E].
    """
    result = {}
    for file in sorted(path.glob("eval/*/disabling.json")):
        value = files.read_json(file)
        try:
            layers, experts = value["layers"], value["experts"]
            if not _are(str, layers) or type(experts) is not int:
                raise UserError(f"{file}: its layers or experts are not those of routes")
            shape = (len(layers), experts)
            for task, row in value["tasks"].items():
                losses = np.asarray([row["loss"], *np.ravel(row["without"])], np.float64)
                if np.shape(row["without"]) != shape or not np.isfinite(losses).all():
                    raise UserError(f"{file}: the losses of {task!r} are not {shape} numbers")
                texts = [row.get(level) or "" for level in ("category", "subcategory")]
                if not _are(str, texts) or type(row["examples"]) is not int:
                    raise UserError(f"{file}: category or examples of {task!r} are of another kind")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as e:
            raise UserError(f"{file}: not a file of disabling: {type(e).__name__} {e}") from e
        result[file.parent.name] = value
    return result


def read_single(path: str | os.PathLike) -> dict[str, dict[str, dict[str, Any]]]:
    """{split: {task: line of scores.jsonl}} of the runs in a directory, each of one task.

    Raises:
        UserError: the directory is missing or has no scores, or a file is malformed.
    """
    path, result = paths.parse(path), {}
    for run in sorted(path.iterdir()) if path.is_dir() else []:
        for lines in _read_evaluations(run).values():
            for task, line in lines.items():
                result.setdefault(str(line.get("split")), {})[task] = line
    if not result:
        raise UserError(f"{path} has no runs of single tasks: no */eval/*/scores.jsonl")
    return result


def read_finetune(path: str | os.PathLike) -> list[dict[str, Any]] | None:
    """Lines of DIR/runs.jsonl; None if there is no such file.

    Raises:
        UserError: the directory is missing, or the file is malformed.
    """
    path = paths.parse(path)
    if not path.is_dir():
        raise UserError(f"fine-tuning directory {path} is not a directory")
    file = path / "runs.jsonl"
    return gains.read_rows(file) if file.exists() else None


def read_routes(path: Path) -> Routes:
    """Reads routes.json.

    Raises:
        UserError: a key is missing; a route is not N distributions over E experts.
    """
    value = files.read_json(path)
    try:
        layers, experts, step = value["layers"], value["experts"], value["step"]
        rows = [
            (row.get("category") or NO_CATEGORY, row.get("subcategory") or "", task, row["route"])
            for task, row in value["tasks"].items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not a file of routes: {type(e).__name__} {e}") from e
    if not _are(str, layers) or type(experts) is not int or not _is_step(step):
        raise UserError(f"{path}: its layers, experts or step are not those of routes")
    if not rows or not layers:
        raise UserError(f"{path}: no tasks or no routed layers")
    if not _are(str, [text for row in rows for text in row[:3]]):
        raise UserError(f"{path}: a category or subcategory is no text")
    # Tasks without a category come last.
    rows.sort(key=lambda row: (row[0] == NO_CATEGORY, *row[:3]))
    shape = (len(layers), experts)
    for *_, task, route in rows:
        try:
            route_NxE = np.asarray(route, np.float64)
        except (OverflowError, TypeError, ValueError) as e:
            raise UserError(f"{path}: the route of {task!r} is not an array of numbers") from e
        if route_NxE.shape != shape:
            raise UserError(
                f"{path}: the route of {task!r} has shape {route_NxE.shape}, expected {shape}"
            )
        if not (np.all(route_NxE >= 0) and np.allclose(route_NxE.sum(-1), 1, atol=1e-2)):
            raise UserError(f"{path}: the route of {task!r} is not a distribution in every layer")
    categories, subcategories, names, routes = map(list, zip(*rows, strict=True))
    return Routes(step, layers, names, categories, subcategories, np.asarray(routes, np.float64))


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _read_evaluations(run: Path) -> dict[str, dict[str, dict[str, Any]]]:
    scores = {}
    for file in sorted(run.glob("eval/*/scores.jsonl")):
        scores |= _read_scores(file)
    return scores


def _read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """Returns train and eval lines by step. If a step was written twice, the last line counts."""
    kinds: dict[str, dict[int, dict]] = {"train": {}, "eval": {}}
    if path.exists():
        for number, line in enumerate(files.read_jsonl(path), 1):
            if not _is_step(line.get("step")):
                raise UserError(f"{path}: entry {number} has no integer 'step'")
            for name, value in line.items():
                if name not in ("step", "kind") and not _is_number(value):
                    raise UserError(f"{path}: entry {number}: {name!r} is {shown(value)}")
            kinds.setdefault(str(line.get("kind")), {})[line["step"]] = line
    return tuple([lines[step] for step in sorted(lines)] for lines in list(kinds.values())[:2])


def _read_scores(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns {evaluation: {task: line}}. A task's score is its first metric.

    An evaluation is named after its folder, and after the split if there are several.
    """
    by_split: dict[str, dict[str, dict[str, Any]]] = {}
    for number, line in enumerate(files.read_jsonl(path), 1):
        if not {"task", "metric", "score"} <= line.keys():
            raise UserError(f"{path}: entry {number} lacks 'task', 'metric' or 'score'")
        texts = [line[name] or "" for name in _TEXTS if name in line]
        if not line["task"] or not _are(str, texts):
            raise UserError(f"{path}: entry {number}: one of {', '.join(_TEXTS)} is no text")
        if not _is_number(line["score"]):
            raise UserError(
                f"{path}: the score of {line['task']!r} is {shown(line['score'])}, not a number"
            )
        by_split.setdefault(str(line.get("split")), {}).setdefault(line["task"], line)
    folder = path.parent.name
    if len(by_split) == 1:
        return {folder: next(iter(by_split.values()))}
    return {f"{folder}/{split}": lines for split, lines in by_split.items()}
