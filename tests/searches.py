"""Greedy and beam search for one row, in plain Python."""

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax
from toy_run import EOS, PAD

from moe_jax.decoding.search import DecodingConfig

Answer = tuple[int, ...]
Logits = Callable[[Answer], np.ndarray]  # logits of a row's next token, given the decoded tokens


def following(
    logits: Logits, decoded: Answer, length: int, config: DecodingConfig
) -> dict[int, float]:
    """Log-probabilities of the tokens that may follow."""
    if config.forced_eos_id is not None and len(decoded) == length - 1:
        return {config.forced_eos_id: 0.0}
    if config.forced_bos_id is not None and not decoded:
        return {config.forced_bos_id: 0.0}
    scores = dict(enumerate(log_softmax(logits(decoded).astype(np.float64)).tolist()))
    if len(decoded) < config.min_length:
        del scores[EOS]
    return scores


def greedy(logits: Logits, length: int, config: DecodingConfig) -> Answer:
    """Greedy search: the most likely token at every step."""
    decoded: Answer = ()
    while len(decoded) < length and EOS not in decoded:
        scores = following(logits, decoded, length, config)
        decoded += (max(scores, key=scores.get),)
    return decoded


def beams(logits: Logits, length: int, config: DecodingConfig) -> tuple[Answer, int]:
    """Beam search: the answer and the number of steps."""
    count, penalty = config.num_beams, config.length_penalty
    unfinished: list[tuple[float, Answer]] = [(0.0, ())]
    finished: list[tuple[float, Answer]] = []
    for size in range(1, length + 1):
        candidates = sorted(
            (
                (score + more, (*decoded, token))
                for score, decoded in unfinished
                for token, more in following(logits, decoded, length, config).items()
            ),
            reverse=True,
        )[: 2 * count]
        ended = [size == length or answer[-1] == EOS for _, answer in candidates]
        finished += [
            (score / size**penalty, answer)
            for (score, answer), end in zip(candidates[:count], ended, strict=False)
            if end
        ]
        finished = sorted(finished, reverse=True)[:count]
        unfinished = [c for c, end in zip(candidates, ended, strict=True) if not end][:count]
        if size == length or not unfinished:
            break
        if len(finished) == count:
            longest = length if config.early_stopping == "never" and penalty > 0 else size
            hope = unfinished[0][0] / longest**penalty
            if config.early_stopping is True or hope <= finished[-1][0]:
                break
    return finished[0][1], size


def padded(answers: list[Answer], length: int, pad: int = PAD) -> np.ndarray:
    """[R, length]."""
    return np.array([[*answer, *[pad] * (length - len(answer))] for answer in answers])
