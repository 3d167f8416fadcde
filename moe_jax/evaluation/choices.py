"""How likely answers are; of an example's choices, for rank classification."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.data import packing
from moe_jax.data.batch import Batch
from moe_jax.data.example import Example
from moe_jax.data.vocabulary import Vocabulary

Score = Callable[[Batch, Sequence[int]], tuple[np.ndarray, np.ndarray]]


def choice_likelihoods(
    score: Score,
    examples: Mapping[int, Example],
    lengths: Mapping[str, int],
    rows: int,
    vocabulary: Vocabulary,
    length_penalty: float = 1.0,
) -> dict[int, list[float]]:
    """Log-likelihood of every choice over its number of tokens, the end of sequence included.

    Args:
        examples: with `choices`, by any number.
        length_penalty: power of the number of tokens; 1 is the mean per token, 0 the sum.
        score, lengths, rows: as in `likelihoods`.

    Returns:
        For every example the likelihoods [C] of its choices, in their order.
    """
    answers = [
        (index, tokens_of(text, vocabulary))
        for index, example in examples.items()
        for text in example.choices
    ]
    found = iter(likelihoods(score, examples, answers, lengths, rows, vocabulary))
    return {
        index: [
            total / count**length_penalty
            for total, count in itertools.islice(found, len(example.choices))
        ]
        for index, example in examples.items()
    }


def likelihoods(
    score: Score,
    examples: Mapping[int, Example],
    answers: Sequence[tuple[int, np.ndarray]],
    lengths: Mapping[str, int],
    rows: int,
    vocabulary: Vocabulary,
) -> list[tuple[float, int]]:
    """Log-likelihood of each answer, summed over its tokens, and their number.

    The pairs of example and answer become rows of their own, those of like length in one batch,
    so that few shapes compile. An input is encoded once for every answer.

    Args:
        score: (batch [R, L], the numbers of the examples in its first rows) -> (float [R] sums over
            the tokens of the targets, int [R] tokens).
        examples: by any number.
        answers: (number of an example, tokens).
        lengths: {"inputs": L_in, "targets": L_out}; what is longer is truncated.
        rows: R.
    """

    def length(answer: int) -> tuple[int, int]:
        index, tokens = answers[answer]
        return len(examples[index].inputs), len(tokens)

    order = sorted(range(len(answers)), key=length)
    found = [(0.0, 0)] * len(answers)
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        pairs = [answers[answer] for answer in part]
        filled = [[dataclasses.replace(examples[i], targets=tokens)] for i, tokens in pairs]
        filled += [[]] * (rows - len(part))
        batch = packing.build(filled, lengths, vocabulary)
        sums_R, tokens_R = score(batch, [index for index, _ in pairs])
        for answer, total, count in zip(part, sums_R, tokens_R, strict=False):
            found[answer] = float(total), int(count)
    return found


def tokens_of(text: str, vocabulary: Vocabulary) -> np.ndarray:
    """An answer's tokens, with the end of sequence if the vocabulary has one."""
    eos = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    return np.array([*vocabulary.encode(text), *eos], np.int32)
