"""Beam search with the rules of Hugging Face's `generate` (transformers 5)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.decoding.cache import Cache, CachedDecoder

WORST = -1.0e9  # the score of a missing beam


class _State(NamedTuple):
    """R rows, Q beams, L positions.

    The cache is never reordered: the keys and values of a beam's past stay in the columns of the
    beams that wrote them, and `seen_RxQxC` marks these columns.
    """

    index: jax.Array
    token_RxQ: jax.Array  # the last token of every open beam
    score_RxQ: jax.Array  # log-likelihoods of the open beams, best first
    tokens_RxQxL: jax.Array
    seen_RxQxC: jax.Array
    cache: Cache
    done_score_RxQ: jax.Array  # scores of finished beams, with the length penalty, best first
    done_tokens_RxQxL: jax.Array
    done_RxQ: jax.Array  # whether there is such a beam
    hope_R: jax.Array  # an open beam may still beat the finished ones


def beam_search(
    decoder: CachedDecoder,
    constrain: Callable[[jax.Array, jax.Array], jax.Array],
    empty_R: jax.Array,
    *,
    length: int,
    beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
    start: int,
    eos: int,
    pad: int,
) -> jax.Array:
    """Returns the best finished beam of every row.

    Args:
        constrain: (log-probabilities [R, Q, V], index) -> the same, with -inf for forbidden tokens.
        empty_R: empty rows, which need no answer.
        length_penalty, early_stopping: see `DecodingConfig`.
        start, eos, pad: token ids.

    Returns:
        int32 [R, length]; `pad` after the end of sequence.
    """
    rows = empty_R.shape[0]
    beam_C = jnp.arange(length * beams) % beams
    position_C = jnp.arange(length * beams) // beams
    own_QxC = jnp.arange(beams)[:, None] == beam_C

    def ended(state: _State) -> jax.Array:
        full_R = jnp.all(state.done_RxQ, -1) if early_stopping is True else False
        return ~state.hope_R | full_R

    def step(state: _State) -> _State:
        index = state.index
        # Each beam sees its past and the column that it writes in this step.
        seen = state.seen_RxQxC | (own_QxC & (position_C == index))
        logits, cache = decoder.step(state.token_RxQ, index, state.cache, seen)
        likelihood = constrain(jax.nn.log_softmax(logits), index) + state.score_RxQ[..., None]
        # 2 Q candidates: at most Q of them end here, so at least Q can continue.
        vocabulary = logits.shape[-1]
        score_RxP, place_RxP = jax.lax.top_k(likelihood.reshape(rows, -1), 2 * beams)
        parent_RxP, token_RxP = place_RxP // vocabulary, place_RxP % vocabulary
        tokens_RxPxL = _take(state.tokens_RxQxL, parent_RxP).at[:, :, index].set(token_RxP)
        ends_RxP = (token_RxP == eos) | (index + 1 == length)

        # The best unfinished beams continue.
        score_RxQ, chosen = jax.lax.top_k(jnp.where(ends_RxP, score_RxP + WORST, score_RxP), beams)
        parent = jnp.take_along_axis(parent_RxP, chosen, 1)

        # The best finished beams; only the first Q candidates may finish.
        finished_RxP = ends_RxP & (jnp.arange(2 * beams) < beams)
        barred_R = ended(state)
        final_RxP = score_RxP / (index + 1).astype(jnp.float32) ** length_penalty
        final_RxP = jnp.where(finished_RxP & ~barred_R[:, None], final_RxP, WORST)
        both = jnp.concatenate([state.done_score_RxQ, final_RxP], 1)
        done_score, best = jax.lax.top_k(both, beams)
        done_tokens = _take(jnp.concatenate([state.done_tokens_RxQxL, tokens_RxPxL], 1), best)
        done = _take(jnp.concatenate([state.done_RxQ, finished_RxP & ~barred_R[:, None]], 1), best)

        # The best score that an open beam can still reach, against the worst finished beam.
        end = length if early_stopping == "never" and length_penalty > 0 else index + 1
        hoped_R = score_RxQ[:, 0] / jnp.float32(end) ** length_penalty
        worst_R = jnp.min(jnp.where(done, jnp.min(done_score, 1, keepdims=True), WORST), 1)
        return _State(
            index + 1,
            jnp.take_along_axis(token_RxP, chosen, 1),
            score_RxQ,
            _take(tokens_RxPxL, chosen),
            _take(seen, parent),
            cache,
            done_score,
            done_tokens,
            done,
            state.hope_R & (hoped_R > worst_R),
        )

    tokens = jnp.full((rows, beams, length), pad, jnp.int32)
    first = _State(
        index=jnp.int32(0),
        token_RxQ=jnp.full((rows, beams), start, jnp.int32),
        # All beams are equal at first, so only one may be continued.
        score_RxQ=jnp.where(jnp.arange(beams) == 0, 0.0, WORST) + jnp.zeros((rows, 1)),
        tokens_RxQxL=tokens,
        seen_RxQxC=jnp.zeros((rows, beams, length * beams), bool),
        cache=decoder.cache(),
        done_score_RxQ=jnp.full((rows, beams), WORST, jnp.float32),
        done_tokens_RxQxL=tokens,
        done_RxQ=jnp.zeros((rows, beams), bool),
        hope_R=~empty_R,
    )

    def unfinished(state: _State) -> jax.Array:
        return (state.index < length) & ~jnp.all(ended(state))

    return jax.lax.while_loop(unfinished, step, first).done_tokens_RxQxL[:, 0]


def _take(x_RxQx: jax.Array, beam_RxP: jax.Array) -> jax.Array:
    """Selects beams of each row: [R, Q, ...] -> [R, P, ...]."""
    index = beam_RxP.reshape(*beam_RxP.shape, *[1] * (x_RxQx.ndim - 2))
    return jnp.take_along_axis(x_RxQx, index, 1)
