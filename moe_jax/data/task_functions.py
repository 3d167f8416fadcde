"""How evaluation, in another process, finds the functions that score a task. Imports TensorFlow.

Functions at the top of a module are found by name, without SeqIO. Where metrics or postprocessing
are something else, SeqIO itself scores the task: see `moe_jax.evaluation.by_seqio`.
"""

import ast
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from moe_jax.core.errors import UserError
from moe_jax.core.files import to_json
from moe_jax.data import registry
from moe_jax.data.cache import SeqioScoring
from moe_jax.data.calls import call_postprocess
from moe_jax.data.example import Example
from moe_jax.data.modules import may_call, name_of
from moe_jax.data.registry import seqio


def reference(function: Any, task: seqio.Task, role: str) -> str:
    """'module:name' (or 'file.py:name') from which another process can import `function`.

    A `functools.partial` of such a function with literal keyword arguments becomes
    'module:name(argument=value)'.

    Raises:
        UserError: the function has no such name, for example a lambda or a closure.
    """
    if isinstance(function, functools.partial):
        arguments = ", ".join(f"{key}={value!r}" for key, value in function.keywords.items())
        if not function.args and _is_literal(list(function.keywords.values())):
            return f"{reference(function.func, task, role)}({arguments})"
    name = getattr(function, "__qualname__", "")
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    # Functions of Python's own library are not called by name: see `modules.resolve`.
    own = module is not None and module.__name__.partition(".")[0] not in sys.stdlib_module_names
    if name and "<" not in name and own:
        candidate = functools.reduce(lambda o, n: getattr(o, n, None), name.split("."), module)
        found = f"{name_of(module)}:{name}"
        if callable(candidate) and may_call(found):
            return found
    raise UserError(
        f"task {task.name!r}: {role} {function!r} cannot be found by name in another process;"
        " give a function defined at the top of a module"
    )


def _is_literal(value: Any) -> bool:
    """Whether another process can read `value` from its `repr`."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False


def metric_references(task: seqio.Task) -> tuple[list[str], list[str]]:
    """'module:name' of each metric function of (targets, predictions), and of (targets, scores).

    Raises:
        UserError: a metric that is another kind, or no function at the top of a module.
    """
    if task._metric_objs_constructor_args or task.predict_with_aux_metric_fns:
        raise UserError(f"task {task.name!r}: metric_objs and metrics of aux_values have no name")
    kinds = (task.predict_metric_fns, task.score_metric_fns)
    return tuple([reference(function, task, "the metric") for function in fns] for fns in kinds)


def scored_by_name(task: seqio.Task, rows: Sequence[registry.Row]) -> bool:
    """Whether evaluation can score `task` without SeqIO, by functions that it finds by name.

    It cannot where metrics or the postprocess function are closures, where there are metric_objs
    or metrics of aux_values, or where postprocessing a prediction takes its example, which is
    tried with the targets of `rows` as predictions.
    """
    if not task.metric_objs:
        return True
    try:
        metric_references(task)
        if task.postprocessor:
            reference(task.postprocessor, task, "the postprocess_fn")
    except UserError:
        return False
    for row in rows if task.postprocessor else ():
        target = registry.text(row, "targets", task.output_features["targets"].vocabulary)
        alone = _outcome(task.postprocess_fn, target, is_target=False)
        if alone != _outcome(task.postprocess_fn, target, example=row, is_target=False):
            return False
    return True


def _outcome(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What a user's function returns, for JSON; None where it fails."""
    try:
        return to_json(function(*arguments, **more))
    except Exception:  # of any kind: it is the user's code
        return None


def scoring(
    task: seqio.Task, rows: Sequence[registry.Row], modules: Sequence[ModuleType]
) -> dict[str, Any]:
    """The entries of a `spec.json` on how the task is scored, which some of its examples tell.

    Raises:
        UserError: see `outputs`.
    """
    spec = {"task": task.name, "metrics": [], "score_metrics": [], "postprocess": None}
    if scored_by_name(task, rows):
        spec["metrics"], spec["score_metrics"] = metric_references(task)
        if task.postprocessor and task.metric_objs:
            spec["postprocess"] = reference(task.postprocessor, task, "the postprocess_fn")
        return {**spec, "seqio": None}
    names = tuple(map(name_of, registry.owners(task.name, modules)))
    found = SeqioScoring(names, registry.environment([task.name], modules), outputs(task))
    return {**spec, "seqio": dataclasses.asdict(found)}


def example(task: seqio.Task, row: registry.Row, keep: bool) -> Example:
    """A row as examples are prepared; with all of its features if they are to be kept.

    Raises:
        UserError: the task's postprocess function fails.
    """
    features = task.output_features
    target = registry.text(row, "targets", features["targets"].vocabulary)
    return Example(
        row["inputs"],
        row["targets"],
        registry.text(row, "inputs", features["inputs"].vocabulary),
        call_postprocess(task.name, task.postprocessor, target, example=row, is_target=True),
        registry.choices(row),
        target,
        {k: v for k, v in row.items() if k not in registry.FEATURES} if keep else {},
    )


def outputs(task: seqio.Task) -> list[str]:
    """What of a model the metrics of `task` take: `prediction`, `score`, `prediction_with_aux`.

    Raises:
        UserError: something else.
    """
    names = {metric.model_output_type.name.lower() for metric in task.metric_objs}
    if unknown := names - {"prediction", "score", "prediction_with_aux"}:
        raise UserError(f"task {task.name!r}: no model here gives metrics a {min(unknown)}")
    return sorted(names)
