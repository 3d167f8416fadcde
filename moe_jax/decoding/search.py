"""Decoding: greedy, sampling (`sampling`) and beam search (`beam`)."""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.core.configuration import Configuration, Range, Seed, Temperature, TokenId
from moe_jax.core.errors import UserError
from moe_jax.data.batch import Batch
from moe_jax.decoding.beam import beam_search
from moe_jax.decoding.cache import CachedDecoder
from moe_jax.decoding.rows import RowModel
from moe_jax.decoding.sampling import sample

Length = Annotated[int, Range(0, 2**20)]


class DecodingIds(NamedTuple):
    """Special token ids for decoding, from the vocabulary."""

    start: int
    eos: int
    pad: int


@dataclasses.dataclass(frozen=True)
class DecodingConfig(Configuration):
    """How answers are decoded. Names and meanings are those of Hugging Face's `generate`, except
    that lengths do not count the start token.

    Attributes:
        num_beams: beams kept per row; 1 is greedy.
        length_penalty: a finished beam's log-likelihood is divided by its length to this power.
        early_stopping: True ends a row when `num_beams` beams have finished; False when no open
            beam would beat them at its current length; 'never' when none could at any length.
        sample: draws tokens at random instead of taking the most likely one.
        temperature: of sampling.
        top_k: samples from the k most likely tokens; 0 for all.
        top_p: samples from the fewest tokens whose probabilities reach this sum.
        seed: seed of sampling. A row's draws depend only on the seed and the row's number.
        max_length: maximum number of decoded tokens, including the end of sequence; 0 takes the
            length of targets.
        min_length: minimum number of tokens before the end of sequence.
        forced_bos_id: the first token.
        forced_eos_id: the last token, if `max_length` is reached.
        choice_length_penalty: for tasks with answer choices, which are ranked and not decoded. A
            choice's log-likelihood is divided by its length to this power.
    """

    num_beams: Annotated[int, Range(1, 1024)] = 1
    length_penalty: Annotated[float, Range(-10, 10)] = 1.0
    early_stopping: bool | Literal["never"] = False
    sample: bool = False
    temperature: Temperature = 1.0
    top_k: Annotated[int, Range(0, 2**24)] = 0
    top_p: Annotated[float, Range(1e-6, 1)] = 1.0
    seed: Seed = 0
    max_length: Length = 0
    min_length: Length = 0
    forced_bos_id: TokenId | None = None
    forced_eos_id: TokenId | None = None
    choice_length_penalty: Annotated[float, Range(0, 10)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and self.num_beams > 1:
            raise UserError(
                f"DecodingConfig.num_beams is {self.num_beams}; sampling keeps one beam"
            )
        if 0 < self.max_length < self.min_length:
            raise UserError(
                f"DecodingConfig.min_length is {self.min_length}, above max_length "
                f"{self.max_length}"
            )


def constrain(
    scores_xV: jax.Array, index: jax.Array, length: int, config: DecodingConfig, eos: int
) -> jax.Array:
    """Scores of the token at position `index` of `length`, with -inf for forbidden tokens."""
    token_V = jnp.arange(scores_xV.shape[-1])
    if config.min_length:
        banned_V = (token_V == eos) & (index < config.min_length)
        scores_xV = jnp.where(banned_V, -jnp.inf, scores_xV)
    for token, place in ((config.forced_bos_id, 0), (config.forced_eos_id, length - 1)):
        if token is not None:
            forced_V = jnp.where(token_V == token, 0.0, -jnp.inf).astype(scores_xV.dtype)
            scores_xV = jnp.where(index == place, forced_V, scores_xV)
    return scores_xV


def first_largest(x_RxV: jax.Array) -> jax.Array:
    """`argmax` over the last axis, int32, as two reductions: much faster than argmax on CPU."""
    largest = jnp.max(x_RxV, -1, keepdims=True)
    index_V = jnp.arange(x_RxV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x_RxV == largest, index_V, x_RxV.shape[-1] - 1), -1)


def decode(
    model: RowModel,
    batch: Batch,
    row_R: jax.Array,
    *,
    length: int,
    config: DecodingConfig,
    ids: DecodingIds,
) -> jax.Array:
    """Decodes every row until it has ended.

    Args:
        batch: inputs, input_segments, input_positions [R, L_in], one example per row. A row whose
            segments are zeros is empty and ends at once.
        row_R: int, the number of each row, which seeds its samples.
        length: maximum number of decoded tokens, including the end of sequence.

    Returns:
        int32 [R, length]; `ids.pad` after the end of sequence.
    """
    segments_RxL = batch["input_segments"]
    decoder = CachedDecoder(model, model.encode(batch), segments_RxL, length, config.num_beams)
    empty_R = ~jnp.any(segments_RxL > 0, axis=1)

    def constrained(scores_xV, index):
        return constrain(scores_xV, index, length, config, ids.eos)

    if config.num_beams > 1:
        return beam_search(
            decoder, constrained, empty_R, length=length, beams=config.num_beams,
            length_penalty=config.length_penalty, early_stopping=config.early_stopping,
            start=ids.start, eos=ids.eos, pad=ids.pad,
        )  # fmt: skip

    keys_R = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(config.seed), row))(row_R)

    def choose(logits_RxV, index):
        if not config.sample:
            return first_largest(logits_RxV)
        now_R = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys_R)
        return sample(logits_RxV, now_R, config.temperature, config.top_k, config.top_p)

    def unfinished(state):
        index, _, _, ended_R, _ = state
        return (index < length) & ~jnp.all(ended_R)

    def step(state):
        index, token_R, tokens_RxL, ended_R, cache = state
        seen = (jnp.arange(length) <= index)[None, None]
        logits, cache = decoder.step(token_R[:, None], index, cache, seen)
        token_R = choose(constrained(logits[:, 0], index), index)
        token_R = jnp.where(ended_R, ids.pad, token_R)
        tokens_RxL = jax.lax.dynamic_update_slice_in_dim(
            tokens_RxL, token_R[:, None], index, axis=1
        )
        return index + 1, token_R, tokens_RxL, ended_R | (token_R == ids.eos), cache

    rows = segments_RxL.shape[0]
    start = (
        jnp.int32(0),
        jnp.full((rows,), ids.start, jnp.int32),
        jnp.full((rows, length), ids.pad, jnp.int32),
        empty_R,
        decoder.cache(),
    )
    return jax.lax.while_loop(unfinished, step, start)[2]
