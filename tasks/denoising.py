"""Ways to corrupt a text that a model then restores. On token ids, in NumPy.

infill    BART's text infilling (Lewis et al. 2020, arXiv 1910.13461)
permute   BART's sentence permutation
spans     T5's span corruption (Raffel et al. 2020, arXiv 1910.10683)
"""

from collections.abc import Sequence

import numpy as np


def infill(
    tokens_L: np.ndarray,
    rng: np.random.Generator,
    mask: int,
    rate: float = 0.3,
    mean_length: float = 3.0,
) -> np.ndarray:
    """`tokens_L` with spans replaced by one `mask` each; their lengths are Poisson distributed.

    A span of length 0 inserts a mask. No two spans touch. Unlike BART's, spans are counted in
    tokens, not in words.

    Args:
        tokens_L: int [L].
        rate: share of the tokens that are replaced, rounded to a whole number of tokens.
        mean_length: of the Poisson distribution.

    Returns:
        int [L'].
    """
    replaced = round(rate * len(tokens_L))
    lengths_S = rng.poisson(mean_length, replaced + 1)  # more than enough, unless most are 0
    lengths_S = lengths_S[: np.searchsorted(lengths_S.cumsum(), replaced) + 1]
    lengths_S[-1] -= lengths_S.sum() - replaced  # the last span is cut, or takes what is left
    # Each span stands before another one of the tokens that are kept, or at the end.
    kept = len(tokens_L) - replaced
    lengths_S = _merged(lengths_S, kept + 1)
    places_S = np.sort(rng.choice(kept + 1, len(lengths_S), replace=False))
    ends_S = places_S + lengths_S.cumsum()
    return _replaced(tokens_L, ends_S - lengths_S, ends_S, [mask] * len(ends_S))


def permute(
    tokens_L: np.ndarray, rng: np.random.Generator, ends_sentence_V: np.ndarray
) -> np.ndarray:
    """The sentences of `tokens_L` in random order.

    Args:
        ends_sentence_V: bool [V], whether a sentence ends with the token.
    """
    ends = np.flatnonzero(ends_sentence_V[tokens_L]) + 1
    sentences = [s for s in np.split(tokens_L, ends) if len(s)]
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def spans(
    tokens_L: np.ndarray,
    rng: np.random.Generator,
    sentinels: Sequence[int],
    rate: float = 0.15,
    mean_length: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """`tokens_L` with each span replaced by a sentinel, and the sentinels with their spans.

    Args:
        tokens_L: int [L], L at least 2.
        sentinels: at least `span_counts(L, rate, mean_length)[1]` ids, in the order of their use.
        rate: share of the tokens that are in spans.
        mean_length: mean length of the spans of a text.

    Returns:
        (int [L'], int [L"]), the inputs and the targets.
    """
    noise, count = span_counts(len(tokens_L), rate, mean_length)
    gaps_S = _parts(len(tokens_L) - noise, count, rng)
    lengths_S = _parts(noise, count, rng)
    ends_S = (gaps_S + lengths_S).cumsum()
    starts_S = ends_S - lengths_S
    inputs = _replaced(tokens_L, starts_S, ends_S, sentinels)
    shown = zip(sentinels, starts_S, ends_S, strict=False)
    targets = np.concatenate([[sentinel, *tokens_L[start:end]] for sentinel, start, end in shown])
    return inputs, targets.astype(tokens_L.dtype)


def span_counts(length: int, rate: float = 0.15, mean_length: float = 3.0) -> tuple[int, int]:
    """(tokens in spans, spans) of a text of at least 2 tokens, as in T5's published code."""
    noise = min(max(round(length * rate), 1), length - 1)
    return noise, min(max(round(noise / mean_length), 1), length - noise)


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` positive numbers that sum to `total`, all such being equally likely: int [count]."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _merged(lengths_S: np.ndarray, most: int) -> np.ndarray:
    """At most so many lengths, with the same sum."""
    if len(lengths_S) <= most:
        return lengths_S
    return np.append(lengths_S[: most - 1], lengths_S[most - 1 :].sum())


def _replaced(
    tokens_L: np.ndarray, starts_S: np.ndarray, ends_S: np.ndarray, by: Sequence[int]
) -> np.ndarray:
    """`tokens_L` with an id in place of each span [start, end)."""
    pieces, at = [], 0
    for start, end, token in zip(starts_S, ends_S, by, strict=False):
        pieces += [tokens_L[at:start], [token]]
        at = end
    return np.concatenate([*pieces, tokens_L[at:]]).astype(tokens_L.dtype)
