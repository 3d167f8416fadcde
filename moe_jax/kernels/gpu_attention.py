"""The kernels of `attention` for NVIDIA GPUs, in Triton: FlashAttention 2 (arXiv 2307.08691).

A program holds a block of queries and reads keys block by block, with a softmax that is corrected as
it goes; or it holds a block of keys and reads queries. It reads no blocks of other segments or, in
causal rows, of later keys. Gradients by queries and by keys have a kernel each, and so has that by
the bias, which sums tiles of scores along diagonals of tiles, where distances are the same.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax.kernels.attention_form import Form, Packed, padded, sums_by_head
from moe_jax.kernels.diagonals import sum_diagonals
from moe_jax.kernels.dropout import is_kept

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX plans to remove it
    triton = None

LEAST_BLOCK, MOST_BLOCK = 16, 64  # queries or keys of a block: a power of two
WIDTHS = (16, 32, 64, 128)  # of a head
_MASKED = float(jnp.finfo(jnp.float32).min)
_ROWS_OF, _FIRST = ((1,), (1,)), ((0,), (0,))  # contracted axes: a @ b.T, and a.T @ b


def takes(form: Form, biased: bool) -> bool:
    """Whether the kernels are for heads of this width."""
    del biased
    return triton is not None and form.width in WIDTHS


def forward(form: Form, packed: Packed, *, interpret: bool = False) -> jax.Array:
    """The result: [R, L_q, H * D]."""
    x = _Arrays.of(form, packed)
    (y,) = _call(form, _forward_kernel, x.keys_of.shape[1], x, [x.q], 2, interpret)
    return y[:, : form.queries]


def backward(form: Form, packed: Packed, y: jax.Array, dy: jax.Array, *, interpret: bool = False):
    """Gradients by q, k, v and the bias."""
    x = _Arrays.of(form, packed)
    filled = {1: x.q.shape[1]}
    sums = padded(sums_by_head(form, y, dy), filled).swapaxes(1, 2)
    x = x._replace(dy=padded(dy, filled), sums=sums)
    # Products that several kernels compute count once.
    dq, log_sums = _call(form, _query_kernel, x.keys_of.shape[1], x, [x.q, sums], 2, interpret)
    x = x._replace(log_sums=log_sums)
    dk, dv = _call(form, _key_kernel, x.queries_of.shape[1], x, [x.k, x.v], 3, interpret)
    d_bias = None if x.bias is None else _bias_gradient(form, x, interpret)
    return dq[:, : form.queries], dk[:, : form.keys], dv[:, : form.keys], d_bias


class _Arrays(NamedTuple):
    """What kernels read: `Packed`, filled up to whole blocks, and in the backward pass three more.
    In a kernel, these are references to one row and head, or to all rows and one head.

    Attributes:
        query_segments, key_segments: what is filled up is in no segment.
        keys_of: [R, blocks of queries, 2], the first and the end of the blocks of keys to read.
        queries_of: the same for blocks of keys.
        bias: [H, ...]; that of a query and a key is at `query - key + L_k - 1`, with L_k as in `k`.
        sums: [R, H, L_q], what the gradient of a softmax subtracts.
        log_sums: [R, H, L_q], logarithms of the sums of a softmax.
    """

    words: jax.Array
    heads: jax.Array
    query_segments: jax.Array
    key_segments: jax.Array
    keys_of: jax.Array
    queries_of: jax.Array
    bias: jax.Array | None
    q: jax.Array
    k: jax.Array
    v: jax.Array
    dy: jax.Array | None = None
    sums: jax.Array | None = None
    log_sums: jax.Array | None = None

    @classmethod
    def of(cls, form: Form, packed: Packed) -> "_Arrays":
        size = _block_size(form)
        queries, keys = (-(-length // size) * size for length in (form.queries, form.keys))
        at_query = padded(packed.query_segments_RxLq, {1: queries}, -1)
        at_key = padded(packed.key_segments_RxLk, {1: keys}, -2)
        bias = packed.bias_HxS
        if bias is not None:
            bias = jnp.pad(bias, ((0, 0), (keys - form.keys, queries - form.queries + 1)))
        return cls(
            packed.dropout_words_4, packed.heads_2, at_query, at_key,
            *_blocks_to_read(at_query, at_key, size, form.causal), bias,
            *(padded(a, {1: n}) for a, n in zip(packed[:3], (queries, keys, keys), strict=True)),
        )  # fmt: skip

    def specs(self, form: Form, rows: int) -> "_Arrays":
        """One head of one row or of all, for a grid (block, head, row)."""

        def of_row(*shape: int) -> pl.BlockSpec:
            return pl.BlockSpec((rows, *shape), lambda _, h, r: (r, *(0 for _ in shape)))

        def of_head(x: jax.Array) -> pl.BlockSpec:
            return pl.BlockSpec((rows, x.shape[1], form.width), lambda _, h, r: (r, 0, h))

        numbers = [pl.BlockSpec(x.shape, lambda *_: (0,)) for x in self[:2]]
        by_row = [of_row(*x.shape[1:]) for x in self[2:6]]
        bias = None
        if self.bias is not None:
            bias = pl.BlockSpec((1, self.bias.shape[1]), lambda _, h, r: (h, 0))
        by_head = [None if x is None else of_head(x) for x in (self.q, self.k, self.v, self.dy)]
        sums = pl.BlockSpec((rows, 1, self.q.shape[1]), lambda _, h, r: (r, h, 0))
        by_query = [None if x is None else sums for x in self[11:]]
        return _Arrays(*numbers, *by_row, bias, *by_head, *by_query)


def _block_size(form: Form) -> int:
    longest = max(form.queries, form.keys)
    return min(max(pl.next_power_of_2(longest), LEAST_BLOCK), MOST_BLOCK)


def _blocks_to_read(at_query, at_key, size: int, causal: bool) -> tuple[jax.Array, jax.Array]:
    """`keys_of` and `queries_of`: blocks whose ranges of segments overlap. Segments ascend in packed
    rows, and padding, 0, comes last."""

    def ranges(segments):
        blocks = segments.reshape(len(segments), -1, size)
        most = jnp.iinfo(jnp.int32).max
        order = jnp.where(blocks == 0, most, blocks)
        return jnp.where(order < 0, most, order).min(2), order.max(2)

    (first_q, last_q), (first_k, last_k) = ranges(at_query), ranges(at_key)
    seen = (first_q[:, :, None] <= last_k[:, None]) & (first_k[:, None] <= last_q[:, :, None])
    if causal:
        seen &= jnp.tril(jnp.ones(seen.shape[1:], bool))

    def bounds(seen):
        end = seen.shape[2] - jnp.argmax(seen[:, :, ::-1], axis=2)
        both = jnp.stack([jnp.argmax(seen, axis=2), end], axis=-1)
        return jnp.where(seen.any(2)[..., None], both, 0).astype(jnp.int32)

    return bounds(seen), bounds(seen.swapaxes(1, 2))


def _call(form: Form, kernel, blocks: int, x: _Arrays, results, products: int, interpret: bool):
    """Runs a kernel for all blocks of every row and head.

    Args:
        results: arrays like the results.
    """
    specs = x.specs(form, 1)
    by_array = {id(a): s for a, s in zip(x, specs, strict=True)}
    return pl.pallas_call(
        partial(kernel, form),
        grid=(blocks, form.heads, form.rows),
        in_specs=[specs],
        out_specs=[by_array[id(a)] for a in results],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results],
        compiler_params=_settings(),
        cost_estimate=_cost(form, x, products),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(x)


def _settings():
    return triton.CompilerParams(num_warps=4, num_stages=2)


def _cost(form: Form, x: _Arrays, products: int) -> pl.CostEstimate:
    scores = form.rows * form.heads * form.queries * form.keys
    read = sum(a.size * a.dtype.itemsize for a in x if a is not None)
    return pl.CostEstimate(
        flops=form.products(products), transcendentals=scores, bytes_accessed=read
    )


class _Block(NamedTuple):
    """Some queries or keys of a head."""

    first: jax.Array
    x: jax.Array  # [block, D]
    segments: jax.Array  # [block]


def _block(x, segments, number, size: int, row=0) -> _Block:
    place = pl.ds(number * size, size)
    return _Block(number * size, x[row, place, :], segments[row, place])


def _scores(form: Form, x: _Arrays, q: _Block, k: _Block):
    """(float32 scores, which of them are seen), both [queries, keys]."""
    query, key = _places(q, k)
    scores = _dot(q.x, k.x, _ROWS_OF) * form.scale
    if x.bias is not None:
        scores += x.bias[0, query - key + x.k.shape[1] - 1]
    seen = q.segments[:, None] == k.segments[None, :]
    if form.causal:
        seen &= key <= query
    return jnp.where(seen, scores, _MASKED), seen


def _places(q: _Block, k: _Block) -> tuple[jax.Array, jax.Array]:
    shape = (len(q.segments), len(k.segments))
    query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    return q.first + query, k.first + key


def _head(x: _Arrays, row) -> jax.Array:
    """The number of a row's head among those of all rows. Not for loops: an interpreted program does
    not know its index there."""
    return row * x.heads[1] + x.heads[0] + pl.program_id(1)


def _dropped(form: Form, x: _Arrays, q: _Block, k: _Block, head, *weights: jax.Array):
    """The weights, or their gradients, after dropout."""
    if not form.rate:
        return weights
    query, key = _places(q, k)
    number = (head * form.queries + query) * form.keys + key  # in [R, H, L_q, L_k]
    kept = is_kept(number.astype(jnp.uint32), [x.words[i] for i in range(4)], form.rate)
    return tuple(jnp.where(kept, w / (1.0 - form.rate), 0.0) for w in weights)


def _forward_kernel(form: Form, x: _Arrays, y) -> None:
    size, number = _block_size(form), pl.program_id(0)
    head = _head(x, pl.program_id(2))
    q = _block(x.q, x.query_segments, number, size)

    def read(number, sums):
        y, total, most = sums
        k = _block(x.k, x.key_segments, number, size)
        scores, _ = _scores(form, x, q, k)
        highest = jnp.maximum(most, scores.max(1))
        weights = jnp.exp(scores - highest[:, None])
        correction = jnp.exp(most - highest)
        total = correction * total + weights.sum(1)
        (weights,) = _dropped(form, x, q, k, head, weights)
        values = x.v[0, pl.ds(k.first, size), :]
        y = correction[:, None] * y + _dot(weights.astype(form.dtype), values)
        return y, total, highest

    nothing = jnp.zeros(size, jnp.float32)
    sums = (jnp.zeros(q.x.shape, jnp.float32), nothing, nothing + _MASKED)
    y_QxD, total, _ = jax.lax.fori_loop(*_bounds(x.keys_of, number), read, sums)
    y[0, pl.ds(q.first, size), :] = (y_QxD / _not_zero(total)[:, None]).astype(form.dtype)


def _query_kernel(form: Form, x: _Arrays, dq, log_sums) -> None:
    size, number = _block_size(form), pl.program_id(0)
    head = _head(x, pl.program_id(2))
    q = _block(x.q, x.query_segments, number, size)
    own = pl.ds(q.first, size)
    dy, sums = x.dy[0, own, :], x.sums[0, 0, own]
    bounds = _bounds(x.keys_of, number)

    def add(number, sums):
        total, most = sums
        scores, _ = _scores(form, x, q, _block(x.k, x.key_segments, number, size))
        highest = jnp.maximum(most, scores.max(1))
        weights = jnp.exp(scores - highest[:, None])
        return jnp.exp(most - highest) * total + weights.sum(1), highest

    nothing = jnp.zeros(size, jnp.float32)
    total, most = jax.lax.fori_loop(*bounds, add, (nothing, nothing + _MASKED))
    logs = most + jnp.log(_not_zero(total))
    log_sums[0, 0, own] = logs

    def read(number, dq):
        k = _block(x.k, x.key_segments, number, size)
        _, d_scores = _gradients(form, x, q, k, head, dy, sums, logs)
        return dq + _dot(d_scores.astype(form.dtype), k.x)

    dq_QxD = jax.lax.fori_loop(*bounds, read, jnp.zeros(q.x.shape, jnp.float32))
    dq[0, own, :] = (form.scale * dq_QxD).astype(form.dtype)


def _key_kernel(form: Form, x: _Arrays, dk, dv) -> None:
    size, number = _block_size(form), pl.program_id(0)
    head = _head(x, pl.program_id(2))
    k = _block(x.k, x.key_segments, number, size)

    def read(number, gradients):
        dk, dv = gradients
        q = _block(x.q, x.query_segments, number, size)
        place = pl.ds(q.first, size)
        dy, sums, logs = x.dy[0, place, :], x.sums[0, 0, place], x.log_sums[0, 0, place]
        weights, d_scores = _gradients(form, x, q, k, head, dy, sums, logs)
        dv += _dot(weights.astype(form.dtype), dy, _FIRST)
        dk += _dot(d_scores.astype(form.dtype), q.x, _FIRST)
        return dk, dv

    nothing = jnp.zeros(k.x.shape, jnp.float32)
    dk_KxD, dv_KxD = jax.lax.fori_loop(*_bounds(x.queries_of, number), read, (nothing, nothing))
    own = pl.ds(k.first, size)
    dk[0, own, :] = (form.scale * dk_KxD).astype(form.dtype)
    dv[0, own, :] = dv_KxD.astype(form.dtype)


def _bias_gradient(form: Form, x: _Arrays, interpret: bool) -> jax.Array:
    size = _block_size(form)
    count = x.keys_of.shape[1] + x.queries_of.shape[1] - 1
    tiles = pl.pallas_call(
        partial(_bias_kernel, form),
        grid=(count, form.heads, 1),
        in_specs=[x.specs(form, form.rows)],
        out_specs=pl.BlockSpec((1, 1, size, size), lambda t, h, r: (h, t, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((form.heads, count, size, size), jnp.float32),
        compiler_params=_settings(),
        cost_estimate=_cost(form, x, 0),
        interpret=interpret,
        name="bias_kernel",
    )(x)
    # Tile t has distances from t * size on, and as many of tile t + 1.
    windows = jnp.pad(sum_diagonals(tiles), ((0, 0), (0, 0), (0, 1)))
    near, far = jnp.split(windows, 2, axis=-1)
    d_bias = jnp.pad(near, ((0, 0), (0, 1), (0, 0))) + jnp.pad(far, ((0, 0), (1, 0), (0, 0)))
    first = x.k.shape[1] - form.keys
    return d_bias.reshape(form.heads, -1)[:, first : first + form.distances]


def _bias_kernel(form: Form, x: _Arrays, tile) -> None:
    size = _block_size(form)
    across, down = x.k.shape[1] // size, x.q.shape[1] // size
    ahead = pl.program_id(0) - (across - 1)  # of the block of keys is that of queries
    first, end = jnp.maximum(0, -ahead), jnp.minimum(across, down - ahead)
    first_head = _head(x, 0)

    def of_row(row, tile):
        head = first_head + row * x.heads[1]

        def add(number, tile):
            q = _block(x.q, x.query_segments, number + ahead, size, row)
            k = _block(x.k, x.key_segments, number, size, row)
            place = pl.ds(q.first, size)
            dy, sums, logs = x.dy[row, place, :], x.sums[row, 0, place], x.log_sums[row, 0, place]
            return tile + _gradients(form, x, q, k, head, dy, sums, logs, row)[1]

        return jax.lax.fori_loop(first, end, add, tile)

    nothing = jnp.zeros((size, size), jnp.float32)
    tile[0, 0] = jax.lax.fori_loop(0, form.rows, of_row, nothing)


def _gradients(form: Form, x: _Arrays, q, k, head, dy, sums, log_sums, at=0):
    """(weights after dropout, gradient of scores), both [queries, keys].

    Args:
        at: where in `x` the row is.
    """
    scores, seen = _scores(form, x, q, k)
    weights = jnp.exp(scores - log_sums[:, None])
    d_weights = _dot(dy, x.v[at, pl.ds(k.first, len(k.segments)), :], _ROWS_OF)
    dropped, d_weights = _dropped(form, x, q, k, head, weights, d_weights)
    return dropped, jnp.where(seen, weights * (d_weights - sums[:, None]), 0.0)


def _bounds(blocks, number) -> tuple[jax.Array, jax.Array]:
    return blocks[0, number, 0], blocks[0, number, 1]


def _not_zero(sums: jax.Array) -> jax.Array:
    """Sums of a softmax; 1 where nothing was read."""
    return jnp.where(sums > 0, sums, 1.0)


def _dot(a: jax.Array, b: jax.Array, axes=((1,), (0,))) -> jax.Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)
