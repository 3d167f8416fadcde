"""Calls the functions that a task brings: its metrics and its postprocess function.

Whatever they do, an error names the task and the function.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from moe_jax.core.errors import UserError, shown
from moe_jax.core.files import to_json
from moe_jax.core.user_code import what_failed
from moe_jax.data.cache import PreparedTask


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, or of that which a `functools.partial` calls."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def add_metric(
    metrics: dict[str, float], task: str, metric: Callable[..., Any], call: Callable[[], Any]
) -> None:
    """Adds what a metric returns to the others of its task, as plain numbers by name.

    Those of SeqIO's values that are no `Scalar`, such as texts and histograms, are left out.

    Args:
        metric: names it in errors.
        call: computes it.

    Raises:
        UserError: it fails, returns anything but finite numbers by name, or a name is taken.
    """
    who = f"task {task!r}: metric {name_of(metric)}"
    found = call_user_function(who, call)
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{who} must return {{name: number}}, returned {shown(found)}")
    for name, value in found.items():
        name = str(name)
        if type(value).__module__ == "seqio.metrics":
            value = getattr(value, "value", None)
            if value is None:
                continue
        try:
            score = float(value)
        except (OverflowError, TypeError, ValueError) as e:
            raise UserError(f"{who}: {name!r} must be a number, is {shown(value)}") from e
        if not math.isfinite(score):
            raise UserError(f"{who}: {name!r} must be a finite number, is {value}")
        if name in metrics:
            raise UserError(
                f"task {task!r}: two metrics are called {name!r}; {name_of(metric)} gives the"
                " second"
            )
        metrics[name] = score


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
            values = [row[key] for row in rows]
            add_metric(metrics, task.name, function, partial(function, references, values))
    if not metrics:
        raise UserError(f"task {task.name!r} has no metrics, so it cannot be evaluated")
    return metrics


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
        raise UserError(f"{who} fails: {what_failed(e)}") from e
