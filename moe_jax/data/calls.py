"""Calls the functions that a task brings: its metrics and its postprocess function.

Whatever they do, an error names the task and the function.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax.core.errors import UserError, first_line, shown
from moe_jax.core.files import to_json
from moe_jax.data.cache import PreparedTask


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, or of that which a `functools.partial` calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def call_metric(
    task: str, function: Callable[..., Any], targets: Sequence[Any], values: Sequence[Any]
) -> dict[str, float]:
    """What a metric of (targets, predictions) or (targets, scores) returns, as plain numbers.

    Raises:
        UserError: it fails, or returns anything but finite numbers by name.
    """
    found = call_user_function(metric_name(task, function), function, targets, values)
    return numbers(task, function, found)


def numbers(task: str, metric: Callable[..., Any], found: Any) -> dict[str, float]:
    """What a metric returned, as plain numbers by name.

    Those of SeqIO's values that are no `Scalar`, such as texts and histograms, are left out.

    Raises:
        UserError: it is anything but finite numbers by name.
    """
    who = metric_name(task, metric)
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{who} must return {{name: number}}, returned {shown(found)}")
    scores = {}
    for name, value in found.items():
        if type(value).__module__ == "seqio.metrics":
            value = getattr(value, "value", None)
            if value is None:
                continue
        try:
            scores[str(name)] = float(value)
        except (TypeError, ValueError) as e:
            raise UserError(f"{who}: {name!r} must be a number, is {shown(value)}") from e
        if not math.isfinite(scores[str(name)]):
            raise UserError(f"{who}: {name!r} must be a finite number, is {value}")
    return scores


def call_postprocess(
    task: str, function: Callable[..., Any] | None, text: str, **arguments: Any
) -> Any:
    """What a task's postprocess function makes of a text, as a value that JSON can hold.

    Args:
        function: None leaves the text as it is.
        arguments: `is_target`, and `example` for a target.

    Raises:
        UserError: it fails, or returns something else.
    """
    if function is None:
        return text
    who = f"task {task!r}: postprocess_fn {name_of(function)}"
    value = call_user_function(who, function, text, **arguments)
    try:
        return to_json(value)
    except (TypeError, ValueError) as e:
        raise UserError(f"{who} returned {shown(value)}: {e}") from e


def task_metrics(task: PreparedTask, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The task's own metrics: those of predictions first, as SeqIO has them.

    Args:
        rows: one per example: its `references`, and `prediction` (after the task's postprocessing)
            or `log_likelihood`, as the metrics need them.

    Raises:
        UserError: the task has none, one fails, or two have one name.
    """
    references = [row["references"] for row in rows]
    metrics: dict[str, float] = {}
    for functions, key in (
        (task.metric_fns(), "prediction"), (task.score_metric_fns(), "log_likelihood"),
    ):  # fmt: skip
        for function in functions:
            found = call_metric(task.name, function, references, [row[key] for row in rows])
            add(metrics, task.name, function, found)
    if not metrics:
        raise UserError(f"task {task.name!r} has no metrics, so it cannot be evaluated")
    return metrics


def add(
    metrics: dict[str, float], task: str, function: Callable[..., Any], found: Mapping[str, float]
) -> None:
    """Adds what a metric returned to a task's other metrics.

    Raises:
        UserError: one has the same name.
    """
    if twice := sorted(found.keys() & metrics.keys()):
        raise UserError(
            f"task {task!r}: two metrics are called {twice[0]!r}; {name_of(function)} gives the"
            " second"
        )
    metrics.update(found)


def metric_name(task: str, metric: Callable[..., Any]) -> str:
    """A metric as errors name it."""
    return f"task {task!r}: metric {name_of(metric)}"


def call_user_function(who: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What a user's function returns.

    Args:
        who: names it in errors.

    Raises:
        UserError: whatever it raises.
    """
    try:
        return function(*arguments, **more)
    except UserError as e:
        raise UserError(f"{who}: {e}") from e
    except Exception as e:  # of any kind: it is the user's code
        raise UserError(f"{who} fails: {type(e).__name__}: {first_line(e)}") from e
