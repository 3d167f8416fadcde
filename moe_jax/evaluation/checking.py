"""Checks whether a registered task is usable, by the code that `prepare` and evaluation use.

Imports TensorFlow.
"""

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from moe_jax.core.errors import UserError
from moe_jax.core.user_code import what_failed
from moe_jax.data import cache, registry, task_functions
from moe_jax.data.registry import Row, seqio
from moe_jax.data.vocabulary import SeqioVocabulary, TwoVocabularies
from moe_jax.evaluation.functions import score_targets


@dataclasses.dataclass(frozen=True)
class Check:
    """What is known of a task: facts and notes, and why it is not usable, each in one line."""

    facts: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def check(
    task: seqio.Task,
    limits: Mapping[str, int],
    count: int,
    modules: Sequence[ModuleType],
    at_most_one: Container[str],
) -> Check:
    """Checks splits, features, lengths and metrics.

    Args:
        limits: feature -> tokens, beyond which examples will be cut.
        count: at most so many examples of a split are read.
        modules: the task modules.
        at_most_one: names of scores that a perfect model brings to 1.
    """
    found = Check()
    if not task.splits:
        found.problems.append("no splits")
    for split in ("train", "validation", "test"):
        if split not in task.splits:
            found.facts.append(f"note: no {split} split")
    to_score = None
    for split in task.splits:
        try:
            rows = first_rows(task, split, count, limits)
        except UserError as e:
            found.problems.append(str(e))
            continue
        if not rows:
            found.problems.append(f"{split}: the split is empty")
            continue
        found.problems.extend(f"{split}: {problem}" for problem in _row_problems(task, rows))
        at_least = "at least " if len(rows) == count else ""
        found.facts.append(f"{split}: {at_least}{len(rows)} examples")
        if split.startswith("fewshot_"):
            continue  # they sample the other splits
        for feature, limit in limits.items():
            lengths = length_summary([len(row[feature]) for row in rows], limit)
            found.facts.append(f"  {feature:<8} {lengths}")
        if to_score is None or split in ("validation", "test"):
            to_score = split, rows
    if to_score is not None:
        try:
            found.facts.extend(_score(task, *to_score, modules, at_most_one))
        except UserError as e:
            found.problems.append(str(e))
    return found


def _row_problems(task: seqio.Task, rows: Sequence[Row]) -> Iterator[str]:
    for feature in registry.FEATURES:
        spec = task.output_features[feature]
        size = spec.vocabulary.vocab_size
        for index, row in enumerate(rows):
            ids = row[feature]
            if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
                yield f"{feature} must be 1-D integers, example {index} is {ids.dtype}{ids.shape}"
            elif not len(ids) or (spec.add_eos and len(ids) == 1):
                yield f"{feature} of example {index} is empty"
            elif spec.add_eos and ids[-1] != spec.vocabulary.eos_id:
                yield f"{feature} of example {index} has no EOS: add append_eos to preprocessors"
            elif ids.min() < 0 or ids.max() >= size:
                yield f"{feature} of example {index} has ids outside 0..{size - 1}"
            else:
                continue
            break  # one example is enough


def _score(
    task: seqio.Task,
    split: str,
    rows: Sequence[Row],
    modules: Sequence[ModuleType],
    at_most_one: Container[str],
) -> Iterator[str]:
    """Scores targets as answers; yields facts.

    Raises:
        UserError: they cannot be scored.
    """
    if not task.metric_objs:
        yield "note: no metrics: the task can be trained on, and is not evaluated"
        return
    prepared = scored(task, rows, modules)
    by_seqio = prepared.seqio is not None
    if by_seqio:
        yield f"note: scored {scored_by(prepared)}: evaluation imports TensorFlow"
    examples = {i: task_functions.example(task, row, by_seqio) for i, row in enumerate(rows)}
    sides = [SeqioVocabulary(own) for own in registry.own_vocabularies(task)]
    scores, lines = score_targets(prepared, TwoVocabularies(*sides), examples)
    what = f"targets of {split} as predictions"
    if prepared.outputs != {"prediction"}:
        what += ", -1 for every token"
    yield f"{what}: {', '.join(f'{name} {value:.4g}' for name, value in scores.items())}"
    if any(value < 0.999 for name, value in scores.items() if name in at_most_one):
        yield "note: a perfect model scores less than 1 (constant or unmatchable targets)"
    outside = sum(
        bool(example.choices)
        and lines[i].get("prediction", example.choices[0]) not in example.choices
        for i, example in examples.items()
    )
    if outside:
        yield f"note: {outside} targets of {split} are not among their answer choices"


def scored(
    task: seqio.Task, rows: Sequence[Row], modules: Sequence[ModuleType]
) -> cache.PreparedTask:
    """The task as evaluation would have it, without its examples.

    Raises:
        UserError: its metrics take what no model here gives.
    """
    spec = task_functions.scoring(task, rows, modules)
    spec |= dict.fromkeys(("category", "subcategory", "description", "dataset"), "")
    return cache.task_of({**spec, "splits": {}}, Path(), 1.0)


def scored_by(task: cache.PreparedTask) -> str:
    """Who scores a task: its functions by name, or SeqIO."""
    if task.seqio is not None:
        return f"by SeqIO, from {', '.join(task.seqio.outputs)}"
    return ", ".join([*task.metrics, *task.score_metrics]) or "none"


def length_summary(lengths: Sequence[int], limit: int) -> str:
    """Percentiles of token counts and the share of examples over `limit`, as one line."""
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
    share = np.mean(np.asarray(lengths) > limit)
    return (
        f"tokens: median {p50:.0f}, 90% {p90:.0f}, 99% {p99:.0f}, longest {max(lengths)}; "
        f"{share:.1%} truncated at {limit}"
    )


def first_rows(task: seqio.Task, split: str, count: int, lengths: Mapping[str, int]) -> list[Row]:
    """First examples of a split in the source's order, preprocessed and not truncated.

    Raises:
        UserError: no such split, or an error of the task's own code, as one line.
    """
    rows: list[Row] = []
    try:
        for _, batch in registry.read(task, [split], lengths):
            rows += batch
            if len(rows) >= count:
                break
    except UserError:
        raise
    except Exception as e:
        raise UserError(what_failed(e)) from e
    return rows[:count]
