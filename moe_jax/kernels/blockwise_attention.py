"""The loop of `attention` over blocks of queries, for any device.

The scores of one block of queries with all keys, and their bias, are in memory at a time.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.attention_form import (
    MASKED,
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


def forward(form: Form, packed: Packed) -> jax.Array:
    """The result: [R, L_q, H * D]."""
    rows = _Rows.of(form, packed)

    def one(block):
        weights_RxHxQxK, _, kept = _weights(form, rows, block)
        weights = _dropped(weights_RxHxQxK, kept, form.rate).astype(form.dtype)
        return jnp.einsum("rhqk,rkhd->rqhd", weights, rows.v)

    return _joined(jax.lax.map(one, _blocks(rows)), form)


def backward(form: Form, packed: Packed, y: jax.Array, dy: jax.Array):
    """Gradients by `packed.projected` and the bias."""
    rows = _Rows.of(form, packed)
    sums_RxLqxH = softmax_sums(heads_apart(form, y), heads_apart(form, dy))

    def one(sums, block_dy):
        (dk, dv, d_bias), (block, dy, own_sums) = sums, block_dy
        weights, seen, kept = _weights(form, rows, block)
        d_weights = _dropped(product("rqhd,rkhd->rhqk", dy, rows.v), kept, form.rate)
        dropped = _dropped(weights, kept, form.rate).astype(form.dtype)
        dv += product("rhqk,rqhd->rkhd", dropped, dy)
        mean = own_sums.swapaxes(1, 2)[..., None]
        d_scores = jnp.where(seen, weights * (d_weights - mean), 0.0)
        if d_bias is not None:
            d_window = _window(d_bias, block, form.keys) + sum_diagonals(d_scores.sum(0))
            d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, d_window, block.first, 1)
        d_products = (form.scale * d_scores).astype(form.dtype)
        dk += product("rhqk,rqhd->rkhd", d_products, block.q)
        return (dk, dv, d_bias), jnp.einsum("rhqk,rkhd->rqhd", d_products, rows.k)

    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (rows.k, rows.v, rows.bias))
    blocks = (_blocks(rows), _cut(heads_apart(form, dy)), _cut(sums_RxLqxH))
    (dk, dv, d_bias), dq = jax.lax.scan(one, nothing, blocks)
    if d_bias is not None:
        d_bias = d_bias[:, : form.distances]
    dk, dv = (d.reshape(*d.shape[:2], -1).astype(form.dtype) for d in (dk, dv))
    return packed.joined(_joined(dq, form), dk, dv), d_bias


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
    """[blocks, R, Q, H, D] -> [R, L_q, H * D]."""
    y = jnp.moveaxis(blocks, 0, 1).reshape(form.rows, -1, form.heads * form.width)
    return y[:, : form.queries]


def _weights(form: Form, rows: _Rows, block: _Block):
    """(softmax over keys before dropout, float32 [R, H, Q, K]; which keys are seen; which weights
    are kept, or None without dropout)."""
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
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED))
    if not form.rate:
        return weights, seen, None
    first_head, all_heads = rows.others.heads_2
    head = row * all_heads + first_head + head
    number = weight_number(form, head, query, key)
    return weights, seen, is_kept([number], rows.others.dropout_words_4, form.rate)


def _window(bias_HxN: jax.Array, block: _Block, keys: int) -> jax.Array:
    """The part of the bias that these queries need."""
    return jax.lax.dynamic_slice_in_dim(bias_HxN, block.first, block.q.shape[1] + keys - 1, axis=1)


def _dropped(x: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0.0)
