"""Attention of packed rows, forward and backward, whose memory grows with the length of rows
and not with its square; its reference is `model.attention`.

On TPUs a kernel. On other devices, and for rows that are too long for the kernel, the loop of
`blockwise_attention`.

In the kernel, scores stay on the chip: a program holds those of one block of queries with all keys
of a row, so the softmax needs no second pass. The backward pass computes scores and dropout masks
again from queries and keys; nothing else is kept. Scores are transposed, keys by queries: sums over
keys then run along the axis that a TPU adds fastest, and no product transposes scores.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels import blockwise_attention as blockwise
from moe_jax.kernels.dropout import is_kept, key_words

# The number of columns in a TPU's tile of an array, and of queries at a time.
LANES = 128
# The memory on the chip that a program may always take, and the most that it may take: TPUs v5e and
# v6e have 128 MiB, and what is left holds arrays of the programs around it.
LEAST_CHIP_BYTES, MOST_CHIP_BYTES = 16 * 2**20, 100 * 2**20
_MASKED = float(jnp.finfo(jnp.float32).min)
_ROWS_OF, _FIRST = ((1,), (1,)), ((0,), (0,))  # contracted axes: a @ b.T, and a.T @ b


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is fixed for one program: shapes and settings."""

    rows: int
    queries: int
    keys: int
    heads: int
    width: int
    dtype: Any
    causal: bool
    scale: float
    rate: float
    interpret: bool

    @property
    def heads_at_once(self) -> int:
        """The smallest divisor of H whose heads fill whole tiles; H if there is none."""
        fit = (n for n in range(1, self.heads) if self.heads % n == 0)
        return next((n for n in fit if n * self.width % LANES == 0), self.heads)

    @property
    def block(self) -> int:
        """Queries at a time."""
        return self.queries if self.queries % LANES else LANES

    def chip_bytes(self, bias: jax.Array | None) -> int:
        """An upper bound of what a program takes of the memory on the chip."""
        n, item = self.heads_at_once, self.dtype.itemsize
        blocks = 4 * (self.queries + self.keys) * n * max(self.width, LANES // n) * item
        if bias is not None:  # and its float32 gradient
            blocks += n * self.queries * self.keys * (bias.dtype.itemsize + 4)
        sums = 2 * self.keys * n * self.width * 4
        scores = 16 * self.keys * self.block * 4
        # Blocks twice, because the next ones are read while these are in use.
        return max(LEAST_CHIP_BYTES, 2 * blocks + sums + scores)


def fused_attention(
    q_RxLqxHxD: jax.Array,
    k_RxLkxHxD: jax.Array,
    v_RxLkxHxD: jax.Array,
    query_segments_RxLq: jax.Array,
    key_segments_RxLk: jax.Array,
    bias_HxLqxLk: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    *,
    causal: bool = False,
    scale: float,
    dropout_rate: float = 0.0,
    first_head: jax.Array | int = 0,
    all_heads: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multi-head attention of packed rows, as `model.attention.attend` defines it.

    Scores and softmax are float32. The kernel for TPUs is used where all keys of a row fit on the
    chip, for two heads of width 64: 4,096 tokens do, with a bias 1,024. Lengths that are no
    multiples of 128 take more.

    Args:
        query_segments_RxLq, key_segments_RxLk: int32; a query sees the keys of its segment.
        bias_HxLqxLk: added to the scores.
        causal: a query sees no key after it.
        dropout_rate: dropout of the attention weights, with the mask that `kernels.dropout` draws
            for an array [R, H, L_q, L_k].
        first_head, all_heads: which part of all heads these are, if they are on several devices.
        interpret: runs the kernel for TPUs, interpreted: for tests on other devices.

    Returns:
        [R, L_q, H, D] in the dtype of `q`.
    """
    rows, queries, heads, width = q_RxLqxHxD.shape
    keys = k_RxLkxHxD.shape[1]
    bias = None if bias_HxLqxLk is None else jnp.swapaxes(bias_HxLqxLk, 1, 2)
    dtype = q_RxLqxHxD.dtype
    form = _Form(rows, queries, keys, heads, width, dtype, causal, scale, dropout_rate, interpret)
    words = jnp.zeros(4, jnp.uint32) if dropout_key is None else key_words(dropout_key)
    place = jnp.stack([jnp.asarray(first_head, jnp.int32), jnp.int32(all_heads or heads)])
    numbers = jnp.concatenate([jax.lax.bitcast_convert_type(words, jnp.int32), place])
    # Heads and their width share one axis, because a TPU pads the last one to 128.
    flat = (a.reshape(*a.shape[:2], -1) for a in (q_RxLqxHxD, k_RxLkxHxD, v_RxLkxHxD))
    segments = (query_segments_RxLq[:, None], key_segments_RxLk[:, :, None])
    return _attend(form, *flat, bias, numbers, *segments).reshape(q_RxLqxHxD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, q, k, v, bias, numbers, query_segments, key_segments):
    (y,) = _call(form, _forward_kernel, (q, k, v), bias, numbers, query_segments, key_segments)
    return y


def _forward(form, *args):
    return _attend(form, *args), args


def _backward(form, args, dy):
    q, k, v, bias, *rest = args
    dq, dk, dv, *d_bias = _call(form, _backward_kernel, (q, k, v, dy), bias, *rest)
    return dq, dk, dv, d_bias[0].astype(bias.dtype) if d_bias else None, None, None, None


_attend.defvjp(_forward, _backward)


def _call(form: _Form, kernel, arrays, bias, *rest) -> tuple[jax.Array, ...]:
    """The results of a kernel: on TPUs its own, elsewhere those of a loop."""
    on_chip, in_loop = partial(_on_chip, form, kernel), partial(_in_loop, form)
    if form.interpret:
        return on_chip(arrays, bias, *rest)
    if form.chip_bytes(bias) > MOST_CHIP_BYTES:
        return in_loop(arrays, bias, *rest)
    return jax.lax.platform_dependent(arrays, bias, *rest, tpu=on_chip, default=in_loop)


def _in_loop(form: _Form, arrays, bias, numbers, query_segments, key_segments):
    """Runs the pass of `blockwise_attention` for (q, k, v) or (q, k, v, dy)."""
    q, k, v, *dy = (a.reshape(*a.shape[:2], form.heads, form.width) for a in arrays)
    bias = None if bias is None else jnp.swapaxes(bias, 1, 2)
    rows = blockwise.Rows(q, k, v, bias, query_segments[:, 0], key_segments[:, :, 0])
    words = jax.lax.bitcast_convert_type(numbers[:4], jnp.uint32)
    settings = (blockwise.Dropout(form.rate, words, *numbers[4:]), form.causal, form.scale)
    results = blockwise.backward(rows, *dy, *settings) if dy else blockwise.forward(rows, *settings)
    d_biases = [] if bias is None else [jnp.swapaxes(d, 1, 2) for d in results[3:]]
    return *(a.reshape(*a.shape[:2], -1) for a in results[:3]), *d_biases


def _on_chip(form: _Form, kernel, arrays, bias, numbers, query_segments, key_segments):
    """Runs a kernel for all blocks of heads and, within each, all rows."""
    n = form.heads_at_once
    backward = kernel is _backward_kernel

    def of_row(length: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, length, n * form.width), lambda h, r: (r, 0, h))

    of_query, of_key = of_row(form.queries), of_row(form.keys)
    of_bias = pl.BlockSpec((n, form.keys, form.queries), lambda h, r: (h, 0, 0))
    biases = [] if bias is None else [bias]
    inputs = [numbers, query_segments, key_segments, *biases, *arrays]
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, form.queries), lambda h, r: (r, 0, 0)),
        pl.BlockSpec((1, form.keys, 1), lambda h, r: (r, 0, 0)),
        *[of_bias for _ in biases],
        of_query, of_key, of_key,
    ]  # fmt: skip
    results, out_specs, scratch = arrays[:1], [of_query], []
    if backward:
        in_specs.append(of_query)
        d_biases = [jax.ShapeDtypeStruct(bias.shape, jnp.float32) for bias in biases]
        results = [*arrays[:3], *d_biases]
        out_specs = [of_query, of_key, of_key, *[of_bias for _ in biases]]
        scratch = [pltpu.VMEM((form.keys, n * form.width), jnp.float32)] * 2
    scores = form.rows * form.heads * form.queries * form.keys
    call = pl.pallas_call(
        partial(kernel, form, bool(biases)),
        grid=(form.heads // n, form.rows),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=form.chip_bytes(bias),
        ),
        cost_estimate=pl.CostEstimate(
            flops=(10 if backward else 4) * scores * form.width,
            transcendentals=scores,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*inputs, *results)),
        ),
        interpret=form.interpret,
        name="attention_backward" if backward else "attention",
    )
    return tuple(call(*inputs))


def _forward_kernel(form: _Form, biased: bool, numbers, query_segments, key_segments, *refs):
    *bias, q, k, v, y = refs

    def block(queries, seen, kept):
        results = []
        for head in range(form.heads_at_once):
            own = slice(head * form.width, (head + 1) * form.width)
            bias_KxQ = bias[0][head, :, queries] if biased else None
            weights = _weights(form, q[0, queries, own], k[0, :, own], seen, bias_KxQ)
            if form.rate:
                weights = jnp.where(kept(head), weights / (1.0 - form.rate), 0.0)
            results.append(_dot(v[0, :, own], weights.astype(form.dtype), _FIRST))
        y[0, queries] = _side_by_side(results, form.dtype)

    _for_blocks(form, numbers, query_segments, key_segments, block)


def _backward_kernel(form: _Form, biased: bool, numbers, query_segments, key_segments, *refs):
    bias, refs = refs[:biased], refs[biased:]
    q, k, v, dy, dq, dk, dv, *d_bias, dk_sum, dv_sum = refs
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    if biased:  # its gradient is summed over rows, which come one after the other

        @pl.when(pl.program_id(1) == 0)
        def _():
            d_bias[0][...] = jnp.zeros_like(d_bias[0])

    def block(queries, seen, kept):
        results = []
        for head in range(form.heads_at_once):
            own = slice(head * form.width, (head + 1) * form.width)
            q_QxD, k_KxD, dy_QxD = q[0, queries, own], k[0, :, own], dy[0, queries, own]
            bias_KxQ = bias[0][head, :, queries] if biased else None
            weights = _weights(form, q_QxD, k_KxD, seen, bias_KxQ)
            dropped, d_weights = weights, _dot(v[0, :, own], dy_QxD, _ROWS_OF)
            if form.rate:
                keep = kept(head)
                dropped = jnp.where(keep, weights / (1.0 - form.rate), 0.0)
                d_weights = jnp.where(keep, d_weights / (1.0 - form.rate), 0.0)
            dv_sum[:, own] += _dot(dropped.astype(form.dtype), dy_QxD)
            mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
            d_scores = jnp.where(seen, weights * (d_weights - mean), 0.0)
            if biased:
                d_bias[0][head, :, queries] += d_scores
            d_scores = d_scores.astype(form.dtype)
            results.append(_dot(k_KxD, d_scores, _FIRST) * form.scale)
            dk_sum[:, own] += _dot(d_scores, q_QxD) * form.scale
        dq[0, queries] = _side_by_side(results, form.dtype)

    _for_blocks(form, numbers, query_segments, key_segments, block)
    dk[0] = dk_sum[...].astype(form.dtype)
    dv[0] = dv_sum[...].astype(form.dtype)


def _for_blocks(form: _Form, numbers, query_segments, key_segments, function) -> None:
    """Calls a function for each block of queries, with their place in the row, which keys they see
    (bool [K, Q]), and a function from a head to its dropout mask [K, Q]."""
    shape = (form.keys, form.block)
    # Read here: an interpreted program's index is not known inside a loop.
    head_block, row = pl.program_id(0), pl.program_id(1)
    *words, first_head, all_heads = (numbers[i] for i in range(6))
    words = [word.astype(jnp.uint32) for word in words]

    def one(number, _):
        first = pl.multiple_of(number * form.block, form.block)
        queries = pl.ds(first, form.block)
        query = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        seen = key_segments[0] == query_segments[0, :, queries]
        if form.causal:
            seen &= key <= query

        def kept(head):
            head = row * all_heads + first_head + head_block * form.heads_at_once + head
            index = (head * form.queries + query) * form.keys + key  # in [R, H, L_q, L_k]
            return is_kept(index.astype(jnp.uint32), words, form.rate)

        function(queries, seen, kept)
        return 0

    jax.lax.fori_loop(0, form.queries // form.block, one, 0)


def _weights(form: _Form, q_QxD, k_KxD, seen, bias) -> jax.Array:
    """The softmax over keys, before dropout: float32 [K, Q]."""
    scores = _dot(k_KxD, q_QxD, _ROWS_OF) * form.scale
    if bias is not None:
        scores += bias.astype(jnp.float32)
    scores = jnp.where(seen, scores, _MASKED)
    powers = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    return powers * (1.0 / jnp.sum(powers, axis=0, keepdims=True))


def _side_by_side(parts_DxQ: list[jax.Array], dtype) -> jax.Array:
    """The results of some heads: [Q, heads * D]."""
    return jnp.concatenate(parts_DxQ, axis=0).T.astype(dtype)


def _dot(a: jax.Array, b: jax.Array, axes=((1,), (0,))) -> jax.Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)
