"""Decoding of one task's rows with a key/value cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.experts import Params


class DecodingIds(NamedTuple):
    """Token ids that steer decoding; from the vocabulary."""

    start: int
    eos: int
    pad: int


def greedy(
    backbone: EncoderDecoder,
    params: Params,
    weights_NxK: jax.Array | None,
    inputs_RxL: jax.Array,
    input_segments_RxL: jax.Array,
    input_positions_RxL: jax.Array,
    *,
    length: int,
    ids: DecodingIds,
) -> jax.Array:
    """The likeliest token at every position, until each row has ended.

    Args:
        input_segments_RxL: one example per row; a row of zeros is empty and ends at once.
        length: most tokens decoded, the end of sequence included.

    Returns:
        int32 [R, length]; `ids.pad` after the end of sequence.
    """

    def call(method, *args):
        return backbone.apply({"params": params}, *args, method=method)

    encoded = call("encode", inputs_RxL, input_segments_RxL, input_positions_RxL, weights_NxK)
    rows = inputs_RxL.shape[0]
    start = (
        jnp.int32(0),
        jnp.full((rows,), ids.start, jnp.int32),
        jnp.full((rows, length), ids.pad, jnp.int32),
        ~jnp.any(input_segments_RxL > 0, axis=1),
        call("start_cache", encoded, length),
    )

    def unfinished(state):
        index, _, _, ended_R, _ = state
        return (index < length) & ~jnp.all(ended_R)

    def step(state):
        index, token_R, tokens_RxL, ended_R, cache = state
        logits_RxV, cache = call(
            "decode_step", token_R, index, cache, input_segments_RxL, weights_NxK
        )
        token_R = jnp.where(ended_R, ids.pad, jnp.argmax(logits_RxV, -1).astype(jnp.int32))
        tokens_RxL = jax.lax.dynamic_update_slice_in_dim(
            tokens_RxL, token_R[:, None], index, axis=1
        )
        return index + 1, token_R, tokens_RxL, ended_R | (token_R == ids.eos), cache

    return jax.lax.while_loop(unfinished, step, start)[2]
