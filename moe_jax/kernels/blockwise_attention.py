"""The loop of `attention` over blocks of queries, for any device.

The scores of one block of queries with all keys, and their bias, are in memory at a time.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.attention_form import (
    MASKED,
    Attended,
    Form,
    Packed,
    heads_apart,
    padded,
    product,
    softmax_sums,
    split,
    weight_number,
)
from moe_jax.kernels.diagonals import from_diagonals, sum_diagonals
from moe_jax.kernels.dropout import is_kept

BLOCK = 128  # queries at a time, at most


def forward(form: Form, packed: Packed) -> Attended:
    """The result, and what the backward pass needs."""
    rows = _Rows.of(form, packed)

    def one(block):
        scores_RxHxQxK, _, kept = _scores(form, rows, block)
        most = scores_RxHxQxK.max(axis=3)
        powers = jnp.exp(scores_RxHxQxK - most[..., None])
        total = powers.sum(axis=3)
        weights = _dropped(powers / total[..., None], kept, form.rate).astype(form.dtype)
        y_RxQxHxD = jnp.einsum("rhqk,rkhd->rqhd", weights, rows.v)
        return y_RxQxHxD, (most + jnp.log(total)).swapaxes(1, 2)

    y, log_sums = (_joined(x, form) for x in jax.lax.map(one, _blocks(rows)))
    return Attended(y.reshape(*y.shape[:2], -1), log_sums.swapaxes(1, 2))


def backward(form: Form, packed: Packed, attended: Attended, dy: jax.Array):
    """Gradients by `packed.projected` and the bias."""
    rows = _Rows.of(form, packed)
    dy = heads_apart(form, dy)
    sums_RxLqxH = softmax_sums(heads_apart(form, attended.y), dy)
    log_sums_RxLqxH = attended.log_sums_RxHxLq.swapaxes(1, 2)

    def one(sums, block_dy):
        (dk, dv, d_bias), (block, dy, *own_sums) = sums, block_dy
        mean, log_sums = (x.swapaxes(1, 2)[..., None] for x in own_sums)
        scores, seen, kept = _scores(form, rows, block)
        weights = jnp.exp(scores - log_sums)
        d_weights = _dropped(product("rqhd,rkhd->rhqk", dy, rows.v), kept, form.rate)
        dropped = _dropped(weights, kept, form.rate).astype(form.dtype)
        dv += product("rhqk,rqhd->rkhd", dropped, dy)
        d_scores = jnp.where(seen, weights * (d_weights - mean), 0.0)
        if d_bias is not None:
            d_window = _window(d_bias, block, form.keys) + sum_diagonals(d_scores.sum(0))
            d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, d_window, block.first, 1)
        d_products = (form.scale * d_scores).astype(form.dtype)
        dk += product("rhqk,rqhd->rkhd", d_products, block.q)
        return (dk, dv, d_bias), jnp.einsum("rhqk,rkhd->rqhd", d_products, rows.k)

    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (rows.k, rows.v, rows.bias))
    blocks = (_blocks(rows), *(_cut(x) for x in (dy, sums_RxLqxH, log_sums_RxLqxH)))
    (dk, dv, d_bias), dq = jax.lax.scan(one, nothing, blocks)
    if d_bias is not None:
        d_bias = d_bias[:, : form.distances]
    gradients = _joined(dq, form), dk, dv
    gradients = (d.reshape(*d.shape[:2], -1).astype(form.dtype) for d in gradients)
    return packed.joined(*gradients), d_bias


class _Rows(NamedTuple):
    """The arrays of `Packed` with an axis of heads: [R, L, H, D]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None  # filled up for what the last block reads
    others: Packed

    @classmethod
    def of(cls, form: Form, packed: Packed) -> "_Rows":
        bias = packed.bias_HxS
        if bias is not None:
            bias = padded(bias, {1: form.queries + BLOCK + form.keys})
        return cls(*(heads_apart(form, x) for x in split(packed.projected)), bias, packed)


class _Block(NamedTuple):
    """Some queries; in a loop's arrays, with a leading axis of blocks."""

    q: jax.Array
    segments: jax.Array
    first: jax.Array  # place of the first query in the row


def _blocks(rows: _Rows) -> _Block:
    q = _cut(rows.q)
    count, size = q.shape[0], q.shape[2]
    first = jnp.arange(count, dtype=jnp.int32) * size
    segments = _cut(rows.others.query_segments_RxLq, fill=-1)  # what is filled up sees nothing
    return _Block(q, segments, first)


def _cut(x_NxLqx: jax.Array, fill: int = 0) -> jax.Array:
    """The blocks of the second axis in a new leading axis; the last one is filled up."""
    length = x_NxLqx.shape[1]
    count = math.ceil(length / BLOCK)
    size = math.ceil(length / count)
    x = padded(x_NxLqx, {1: count * size}, fill)
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _joined(blocks: jax.Array, form: Form) -> jax.Array:
    """[blocks, R, Q, ...] -> [R, L_q, ...]."""
    x = jnp.moveaxis(blocks, 0, 1).reshape(form.rows, -1, *blocks.shape[3:])
    return x[:, : form.queries]


def _scores(form: Form, rows: _Rows, block: _Block):
    """(scores, float32 [R, H, Q, K]; which keys are seen; which weights are kept, or None without
    dropout)."""
    scores = product("rqhd,rkhd->rhqk", block.q, rows.k) * form.scale
    if rows.bias is not None:
        window = _window(rows.bias, block, form.keys)
        scores += from_diagonals(window, block.q.shape[1], form.keys)
    row, head, query, key = (
        jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(4)
    )
    query += block.first
    at_key = rows.others.key_segments_RxLk
    seen = block.segments[:, None, :, None] == at_key[:, None, None, :]
    if form.causal:
        seen = seen & (key <= query)
    scores = jnp.where(seen, scores, MASKED)
    if not form.rate:
        return scores, seen, None
    first_head, all_heads = rows.others.heads_2
    head = row * all_heads + first_head + head
    number = weight_number(form, head, query, key)
    return scores, seen, is_kept([number], rows.others.dropout_words_4, form.rate)


def _window(bias_HxN: jax.Array, block: _Block, keys: int) -> jax.Array:
    """The part of the bias that these queries need."""
    return jax.lax.dynamic_slice_in_dim(bias_HxN, block.first, block.q.shape[1] + keys - 1, axis=1)


def _dropped(x: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0.0)
