"""Scores a task as SeqIO's own Evaluator does. Imports SeqIO and TensorFlow.

For tasks whose metrics or postprocessing only SeqIO can run: `metric_objs`, metrics of
`aux_values`, closures, and postprocess functions that look at the example of a prediction.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_jax.data import registry
from moe_jax.data.cache import SPEC, PreparedTask
from moe_jax.data.calls import add_metric, call_postprocess
from moe_jax.data.example import Example
from moe_jax.data.registry import seqio
from moe_jax.data.seqio_tokenizers import SeqioTokenizers
from moe_jax.data.vocabulary import Vocabulary


class BySeqio:
    """The task as it is registered, with a run's vocabulary.

    Raises:
        UserError: its modules cannot or may not be imported, or no longer register it.
    """

    def __init__(self, prepared: PreparedTask, vocabulary: Vocabulary):
        scoring = prepared.seqio
        registry.set_environment(scoring.environment)
        modules = registry.load_task_modules(scoring.task_modules, prepared.directory / SPEC)
        (self._task,) = registry.find_tasks(prepared.name, modules)
        # SeqIO's objects for plain functions do not tell the functions' names.
        self._named = (*self._task._metric_objs_constructor_args, *self._task.metric_fns)
        self._pad_id = vocabulary.pad_id
        sides = {"inputs": vocabulary.inputs, "targets": vocabulary}
        self._features = {
            name: dataclasses.replace(feature, vocabulary=SeqioTokenizers(sides[name]))
            if name in sides
            else feature
            for name, feature in self._task.output_features.items()
        }

    def postprocess(self, text: str, example: Example) -> Any:
        """A decoded prediction as metrics take it, for JSON."""
        return call_postprocess(
            self._task.name, self._task.postprocess_fn, text, example=_row(example), is_target=False
        )

    def metrics(
        self,
        examples: Sequence[Example],
        lines: Sequence[Mapping[str, Any]],
        tokens: Sequence[np.ndarray],
    ) -> dict[str, float]:
        """The task's scores, by name.

        Args:
            examples: N examples.
            lines: of each its `log_likelihood` and `aux`, as far as metrics take them.
            tokens: of each the answer's token ids, where metrics take them.

        Raises:
            UserError: a metric fails, or two have one name.
        """
        rows = [_row(example) for example in examples]
        found: dict[str, float] = {}
        name = self._task.name
        for metric, own in zip(self._task.metric_objs, self._named, strict=True):
            match metric.model_output_type.name:
                case "SCORE":
                    output = np.array([line["log_likelihood"] for line in lines], np.float32)
                case "PREDICTION":
                    output = _padded(tokens, self._pad_id)
                case _:
                    scores = np.array([line["aux"]["scores"] for line in lines], np.float32)
                    output = (_padded(tokens, self._pad_id), {"scores": scores})
            add_metric(found, name, own, partial(self._computed, metric, rows, output))
        return found

    def _computed(self, metric: Any, rows: Sequence[Mapping[str, Any]], output: Any) -> Any:
        """What a metric makes of the examples and the model's output."""
        made = metric.from_model_output(rows, output, self._features, "targets")
        if isinstance(made, seqio.metrics.CollectingMetric):
            return made.actual_compute(rows, self._features, "targets", None)[0]
        return made.compute()


def _row(example: Example) -> dict[str, Any]:
    """An example as SeqIO gives it to metrics and postprocess functions."""
    return {**example.features, "inputs": example.inputs, "targets": example.targets}


def _padded(tokens: Sequence[np.ndarray], pad_id: int) -> np.ndarray:
    """Tokens of unequal number as int32 [N, L]."""
    length = max(map(len, tokens))
    return np.stack([
        np.pad(np.asarray(row, np.int32), (0, length - len(row)), constant_values=pad_id)
        for row in tokens
    ])  # fmt: skip
