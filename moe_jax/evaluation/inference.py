"""A model's answers to the examples of a task, in the form of T5X's `infer`."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import eval_batches
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.model.experts import Params

Mode = Literal["predict", "score", "predict_with_aux"]


def inferences(
    evaluator: Evaluator,
    params: Params,
    routes_TxNxE: np.ndarray | None,
    mixture: PreparedMixture,
    task: str,
    task_id: int | np.ndarray,
    split: str,
    mode: Mode,
) -> Iterator[dict[str, Any]]:
    """Yields one value per example, in order, with the keys of T5X.

    `inputs` holds `inputs_pretokenized` and `targets_pretokenized`. With `predict` there is the
    decoded `prediction`, neither chosen nor postprocessed; with `predict_with_aux` its
    log-likelihood as well, as `aux` {"scores"}; with `score` the log-likelihood of the targets.

    Args:
        task_id: the row of `routes_TxNxE` that all examples take, or int [n], that of each.

    Raises:
        UserError: no such split.
    """
    score = evaluator.scorer(params, routes_TxNxE, task_id)
    batches = eval_batches(mixture, task, split, lengths=evaluator.lengths, rows=evaluator.rows)
    for batch, examples in batches:
        numbers = [index for index, _ in examples]
        answers: dict[int, dict[str, Any]] = {index: {} for index in numbers}
        if mode == "score":
            sums_R, _ = score(batch, numbers)
            for answer, total in zip(answers.values(), sums_R, strict=False):
                answer["score"] = float(total)
        else:
            rows_R, numbers_R = evaluator.rows_of(task_id, numbers)
            rows = evaluator.tokens(params, routes_TxNxE, rows_R, batch, numbers_R)
            tokens = dict(zip(numbers, rows, strict=False))
            for index, row in tokens.items():
                answers[index]["prediction"] = evaluator.vocabulary.decode(row.tolist())
            if mode == "predict_with_aux":
                found = evaluator.answer_likelihoods(score, dict(examples), tokens)
                for index, total in found.items():
                    answers[index]["aux"] = {"scores": total}
        for index, example in examples:
            texts = {
                "inputs_pretokenized": example.inputs_text,
                "targets_pretokenized": example.targets_text,
            }
            yield {"inputs": texts, **answers[index]}
