"""Rank classification: how likely each answer choice of an example is."""

import dataclasses
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

    The pairs of example and choice become rows of their own, those of like length in one batch,
    so that few shapes compile. An input is encoded once for every choice.

    Args:
        score: (batch [R, L], the numbers of the examples in its first rows) -> (float [R] sums over
            the tokens of the targets, int [R] tokens).
        examples: with `choices`, by any number.
        lengths: {"inputs": L_in, "targets": L_out}; what is longer is truncated.
        rows: R.
        length_penalty: power of the number of tokens; 1 is the mean per token, 0 the sum.

    Returns:
        For every example the likelihoods [C] of its choices, in their order.
    """
    eos = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    pairs = [
        (index, number, np.array([*vocabulary.encode(text), *eos], np.int32))
        for index, example in examples.items()
        for number, text in enumerate(example.choices)
    ]
    pairs.sort(key=lambda pair: (len(examples[pair[0]].inputs), len(pair[2])))
    found = {index: [0.0] * len(example.choices) for index, example in examples.items()}
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        filled = [[dataclasses.replace(examples[i], targets=tokens)] for i, _, tokens in part]
        filled += [[]] * (rows - len(part))
        numbers = [index for index, _, _ in part]
        sums_R, tokens_R = score(packing.build(filled, lengths, vocabulary), numbers)
        for (index, number, _), total, count in zip(part, sums_R, tokens_R, strict=False):
            found[index][number] = float(total) / int(count) ** length_penalty
    return found
