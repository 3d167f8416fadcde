"""Applies a task's own functions to a model's answers; before a run, to targets in their place.

Both by the same code, which `tasks check` uses too: otherwise a mistake in a function would end the
run at its first evaluation.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_jax.data.cache import PreparedMixture, PreparedTask
from moe_jax.data.calls import call_postprocess, task_metrics
from moe_jax.data.example import Example
from moe_jax.data.vocabulary import Vocabulary

_TRIED = 8  # examples


def apply_functions(
    task: PreparedTask,
    vocabulary: Vocabulary,
    examples: Mapping[int, Example],
    lines: Mapping[int, dict[str, Any]],
    texts: Mapping[int, str],
    tokens: Mapping[int, np.ndarray],
) -> dict[str, float]:
    """The task's own metrics by name. Each line gets its `prediction`, if there is an answer.

    All are by the index of the example.

    Args:
        lines: their `references`, and `log_likelihood` and `aux` as far as metrics take them.
        texts, tokens: the answers.

    Raises:
        UserError: a function fails; the message names it and the task.
    """
    order = sorted(lines)
    rows = [lines[index] for index in order]
    if task.seqio is None:
        postprocess = partial(call_postprocess, task.name, task.postprocess_fn(), is_target=False)
        for index, text in texts.items():
            lines[index]["prediction"] = postprocess(text)
        return task_metrics(task, rows)
    from moe_jax.evaluation.by_seqio import BySeqio  # imports TensorFlow

    registered = BySeqio(task, vocabulary)
    for index, text in texts.items():
        lines[index]["prediction"] = registered.postprocess(text, examples[index])
    return registered.metrics(
        [examples[index] for index in order], rows, [tokens.get(index) for index in order]
    )


def try_functions(mixture: PreparedMixture, names: Sequence[str], split: str) -> None:
    """Applies the functions of tasks to the targets of a few examples.

    Args:
        names: tasks of the mixture that have the split.

    Raises:
        UserError: one of them would end an evaluation.
    """
    for name in names:
        task = mixture.task(name)
        records = task.records(split)
        examples = {index: records[index] for index in range(min(_TRIED, len(records)))}
        score_targets(task, mixture.vocabulary, examples)


def score_targets(
    task: PreparedTask, vocabulary: Vocabulary, examples: Mapping[int, Example]
) -> tuple[dict[str, float], dict[int, dict[str, Any]]]:
    """The metrics of a model that answers with the targets, of log-likelihood -1 for each token.

    Args:
        examples: by index.

    Returns:
        (metrics by name, lines by index), as `apply_functions` has them.

    Raises:
        UserError: a function fails; the message names it and the task.
    """
    lines = {}
    for index, example in examples.items():
        likelihood = -float(len(example.targets))
        lines[index] = {
            "references": example.references,
            "log_likelihood": likelihood,
            "aux": {"scores": likelihood},
        }
    answers = examples if task.outputs - {"score"} else {}
    tokens = {index: example.targets for index, example in answers.items()}
    texts = {index: vocabulary.decode(row.tolist()) for index, row in tokens.items()}
    return apply_functions(task, vocabulary, examples, lines, texts, tokens), lines
