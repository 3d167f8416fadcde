"""Attention of packed rows in a loop over blocks of queries, forward and backward, for any device;
its reference is `model.attention`.

The scores of one block of queries with all keys, and their bias, are in memory at a time, so memory
grows with the length of rows, and not with its square. The backward pass computes scores and
dropout masks again from queries and keys; nothing else is kept.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.diagonals import from_diagonals, sum_diagonals
from moe_jax.kernels.dropout import is_kept

BLOCK = 128  # queries at a time, at most


class Dropout(NamedTuple):
    """Dropout of attention weights: the mask of an array [R, all heads, L_q, L_k]."""

    rate: float
    words: jax.Array  # of `kernels.dropout.key_words`
    first_head: jax.Array  # these are the heads from this one on
    all_heads: jax.Array


class Rows(NamedTuple):
    """What both passes read.

    Attributes:
        bias_HxN: added to the scores, as in `attention.fused_attention`, and filled up to
            N >= L_q + BLOCK + L_k; None for no bias.
        query_segments_RxLq, key_segments_RxLk: a query sees the keys of its segment.
    """

    q_RxLqxHxD: jax.Array
    k_RxLkxHxD: jax.Array
    v_RxLkxHxD: jax.Array
    bias_HxN: jax.Array | None
    query_segments_RxLq: jax.Array
    key_segments_RxLk: jax.Array


def forward(rows: Rows, dropout: Dropout, causal: bool, scale: float) -> tuple[jax.Array]:
    """The result, [R, L_q, H, D] in the dtype of `q`."""

    def one(block):
        weights_RxHxQxK, _, kept = _weights(rows, block, dropout, causal, scale)
        weights = _dropped(weights_RxHxQxK, kept, dropout.rate).astype(rows.v_RxLkxHxD.dtype)
        return jnp.einsum("rhqk,rkhd->rqhd", weights, rows.v_RxLkxHxD)

    return (_joined(jax.lax.map(one, _blocks(rows)), rows),)


def backward(
    rows: Rows, dy_RxLqxHxD: jax.Array, dropout: Dropout, causal: bool, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients by q, k, v, in their dtype, and by the bias, float32."""
    _, k, v, bias, *_ = rows

    def one(sums, block_dy):
        (dk, dv, d_bias), (block, dy) = sums, block_dy
        weights, seen, kept = _weights(rows, block, dropout, causal, scale)
        d_weights = _dropped(_product("rqhd,rkhd->rhqk", dy, v), kept, dropout.rate)
        dropped = _dropped(weights, kept, dropout.rate).astype(v.dtype)
        dv += _product("rhqk,rqhd->rkhd", dropped, dy)
        mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_scores = jnp.where(seen, weights * (d_weights - mean), 0.0)
        if bias is not None:
            d_window = _window(d_bias, block, k.shape[1]) + sum_diagonals(d_scores.sum(0))
            d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, d_window, block.first, 1)
        d_products = (scale * d_scores).astype(k.dtype)
        dk += _product("rhqk,rqhd->rkhd", d_products, block.q)
        return (dk, dv, d_bias), jnp.einsum("rhqk,rkhd->rqhd", d_products, k)

    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (k, v, bias))
    blocks = (_blocks(rows), _cut(dy_RxLqxHxD))
    (dk, dv, d_bias), dq = jax.lax.scan(one, nothing, blocks)
    return _joined(dq, rows), dk.astype(k.dtype), dv.astype(v.dtype), d_bias


class _Block(NamedTuple):
    """Some queries; in a loop's arrays, with a leading axis of blocks."""

    q: jax.Array
    segments: jax.Array
    first: jax.Array  # place of the first query in the row


def _blocks(rows: Rows) -> _Block:
    q = _cut(rows.q_RxLqxHxD)
    count, size = q.shape[0], q.shape[2]
    first = jnp.arange(count, dtype=jnp.int32) * size
    segments = _cut(rows.query_segments_RxLq, fill=-1)  # what is filled up sees nothing
    return _Block(q, segments, first)


def _cut(x_NxLqx: jax.Array, fill: int = 0) -> jax.Array:
    """The blocks of the second axis in a new leading axis; the last one is filled up."""
    length = x_NxLqx.shape[1]
    count = math.ceil(length / BLOCK)
    size = math.ceil(length / count)
    widths = [(0, count * size - length if axis == 1 else 0) for axis in range(x_NxLqx.ndim)]
    x = jnp.pad(x_NxLqx, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _joined(blocks: jax.Array, rows: Rows) -> jax.Array:
    """The array whose `_cut` these are."""
    x = jnp.moveaxis(blocks, 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x[:, : rows.q_RxLqxHxD.shape[1]]


def _weights(rows: Rows, block: _Block, dropout: Dropout, causal: bool, scale: float):
    """(softmax over keys before dropout, float32 [R, H, Q, K]; which keys are seen; which weights
    are kept, or None without dropout)."""
    queries, keys = rows.q_RxLqxHxD.shape[1], rows.k_RxLkxHxD.shape[1]
    scores = _product("rqhd,rkhd->rhqk", block.q, rows.k_RxLkxHxD) * scale
    if rows.bias_HxN is not None:
        scores += from_diagonals(_window(rows.bias_HxN, block, keys), block.q.shape[1], keys)
    row, head, query, key = (
        jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(4)
    )
    query += block.first
    seen = block.segments[:, None, :, None] == rows.key_segments_RxLk[:, None, None, :]
    if causal:
        seen = seen & (key <= query)
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min))
    if not dropout.rate:
        return weights, seen, None
    head = row * dropout.all_heads + dropout.first_head + head
    number = (head * queries + query) * keys + key
    return weights, seen, is_kept(number.astype(jnp.uint32), dropout.words, dropout.rate)


def _window(bias_HxN: jax.Array, block: _Block, keys: int) -> jax.Array:
    """The part of the bias that these queries need."""
    return jax.lax.dynamic_slice_in_dim(bias_HxN, block.first, block.q.shape[1] + keys - 1, axis=1)


def _dropped(x: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0.0)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
