"""The kernels of `attention` for NVIDIA GPUs, in Triton: FlashAttention 2 (arXiv 2307.08691).

A program holds a block of queries and reads keys block by block, with a softmax that is corrected
as it goes; or it holds a block of keys and reads queries. It reads no blocks of other segments or,
in causal rows, of later keys. Gradients by queries and by keys have a kernel each, and so has that
by the bias, which sums gradients of scores along diagonals of blocks, where distances are the same.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax.kernels.attention_form import (
    BY_ROWS,
    MASKED,
    Attended,
    Form,
    Packed,
    dot,
    padded,
    softmax_sums,
    weight_number,
)
from moe_jax.kernels.diagonals import sum_diagonals
from moe_jax.kernels.dropout import is_kept

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX plans to remove it
    triton = None

LEAST_BLOCK, MOST_BLOCK = 16, 64  # queries or keys of a block: a power of two
WIDTHS = (16, 32, 64, 128)  # of a head
MOST_WIDTH_BYTES = 256  # with more, blocks do not fit the shared memory of small GPUs


def takes(form: Form, biased: bool) -> bool:
    """Whether the kernels are for heads of this width."""
    del biased
    fits = form.width * form.dtype.itemsize <= MOST_WIDTH_BYTES
    return triton is not None and form.width in WIDTHS and fits


def forward(form: Form, packed: Packed, *, interpret: bool = False) -> Attended:
    """The result, and what the backward pass needs."""
    x = _Arrays.of(form, packed)
    queries = x.queries.shape[1]
    results = [
        jax.ShapeDtypeStruct((form.rows, queries, form.heads * form.width), form.dtype),
        jax.ShapeDtypeStruct((form.rows, form.heads, queries), jnp.float32),
    ]
    y, log_sums = _call(form, _forward_kernel, x.keys_of.shape[1], x, results, 2, interpret)
    return Attended(y[:, : form.queries], log_sums[:, :, : form.queries])


def backward(form: Form, packed: Packed, attended: Attended, dy, *, interpret: bool = False):
    """Gradients by `packed.projected` and the bias."""
    x = _Arrays.of(form, packed)
    queries = x.queries.shape[1]
    y, dy = (padded(a, {1: queries}) for a in (attended.y, dy))
    x = x._replace(y=y, dy=dy, log_sums=padded(attended.log_sums_RxHxLq, {2: queries}))
    # Products that several kernels compute count once.
    results = [x.queries, x.log_sums]
    dq, sums = _call(form, _query_kernel, x.keys_of.shape[1], x, results, 2, interpret)
    x = x._replace(y=None, sums=sums)
    # In self-attention, the gradients by keys and values go into the array of those by queries.
    together = len(packed.projected) == 1
    x = x._replace(written=dq if together else None)
    (dkv,) = _call(form, _key_kernel, x.queries_of.shape[1], x, [x.keys], 3, interpret)
    d_bias = None if x.bias is None else _bias_gradient(form, x, interpret)
    gradients = zip((dkv,) if together else (dq, dkv), packed.projected, strict=True)
    return tuple(d[:, : p.shape[1]].reshape(p.shape) for d, p in gradients), d_bias


class _Arrays(NamedTuple):
    """What kernels read: `Packed`, filled up to whole blocks, and some more in the backward pass.
    In a kernel, these are references to one row or to all.

    Attributes:
        query_segments, key_segments: what is filled up is in no segment.
        keys_of: [R, blocks of queries, 2], the first and the end of the blocks of keys to read.
        queries_of: the same for blocks of keys.
        queries, keys: the arrays with queries, and with keys and values, which may be the same:
            [R, L, N * H * D].
        bias: [H, ...]; that of a query and a key is at `query - key + L_k - 1`, L_k as in `keys`.
        y, dy: [R, L_q, H * D].
        log_sums: [R, H, L_q], as in `Attended`.
        sums: [R, H, L_q], what the gradient of a softmax subtracts.
        written: the array that a kernel adds its results to.
    """

    words: jax.Array
    heads: jax.Array
    query_segments: jax.Array
    key_segments: jax.Array
    keys_of: jax.Array
    queries_of: jax.Array
    queries: jax.Array
    keys: jax.Array
    bias: jax.Array | None
    y: jax.Array | None = None
    dy: jax.Array | None = None
    log_sums: jax.Array | None = None
    sums: jax.Array | None = None
    written: jax.Array | None = None

    @classmethod
    def of(cls, form: Form, packed: Packed) -> "_Arrays":
        size = _block_size(form)
        queries, keys = (-(-length // size) * size for length in (form.queries, form.keys))
        at_query = padded(packed.query_segments_RxLq, {1: queries}, -1)
        at_key = padded(packed.key_segments_RxLk, {1: keys}, -2)
        flat = [x.reshape(*x.shape[:2], -1) for x in packed.projected]
        bias = packed.bias_HxS
        if bias is not None:
            bias = jnp.pad(bias, ((0, 0), (keys - form.keys, queries - form.queries + 1)))
        return cls(
            packed.dropout_words_4, packed.heads_2, at_query, at_key,
            *_blocks_to_read(at_query, at_key, size, form.causal),
            padded(flat[0], {1: queries}), padded(flat[-1], {1: keys}), bias,
        )  # fmt: skip

    def specs(self, rows: int) -> "_Arrays":
        """One row or all, for a grid (block, head, row)."""
        whole = {"words", "heads", "bias"}
        return _Arrays(**{
            name: None if x is None else _spec(x.shape[0] if name in whole else rows, x)
            for name, x in self._asdict().items()
        })  # fmt: skip


def _spec(rows: int, x) -> pl.BlockSpec:
    """Some rows of an array; kernels pick their head and their block."""
    row = (lambda r: r) if rows < x.shape[0] else (lambda r: 0)
    return pl.BlockSpec((rows, *x.shape[1:]), lambda _, h, r: (row(r), *(0 for _ in x.shape[1:])))


def _block_size(form: Form) -> int:
    longest = max(form.queries, form.keys)
    return min(max(pl.next_power_of_2(longest), LEAST_BLOCK), MOST_BLOCK)


def _blocks_to_read(at_query, at_key, size: int, causal: bool) -> tuple[jax.Array, jax.Array]:
    """`keys_of` and `queries_of`: blocks whose ranges of segments overlap. Segments ascend in a
    packed row, and padding, 0, comes last."""

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
        results: what has the shapes and dtypes of the results.
    """
    aliases = {} if x.written is None else {len(jax.tree.leaves(x)) - 1: 0}
    return pl.pallas_call(
        partial(kernel, form),
        grid=(blocks, form.heads, form.rows),
        in_specs=[x.specs(1)],
        out_specs=[_spec(1, result) for result in results],
        out_shape=[jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results],
        input_output_aliases=aliases,
        interpret=interpret,
        name=kernel.__name__.strip("_"),
        **_settings(form, x, results, products),
    )(x)


def _settings(form: Form, x: _Arrays, results, products: int) -> dict[str, Any]:
    arrays = {id(a): a for a in (*jax.tree.leaves(x._replace(written=None)), *results)}
    cost = pl.CostEstimate(
        flops=form.products(products),
        transcendentals=form.rows * form.heads * form.queries * form.keys,
        bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays.values()),
    )
    warps = 4 if form.width <= 64 else 8  # with 4, a width of 128 needs too many registers
    params = triton.CompilerParams(num_warps=warps, num_stages=2)
    return {"compiler_params": params, "cost_estimate": cost}


class _Head(NamedTuple):
    """Which head a program works on. Made at its begin: an interpreted program does not know its
    place in the grid inside a loop."""

    row: int | jax.Array  # where `_Arrays` has it
    head: jax.Array
    number: jax.Array  # among the heads of all rows and devices

    @classmethod
    def of(cls, x: _Arrays) -> "_Head":
        row, head = pl.program_id(2), pl.program_id(1)
        return cls(0, head, row * x.heads[1] + x.heads[0] + head)

    def columns(self, form: Form, n: int = 0):
        """Where an array [L, N * H * D] has this head."""
        return pl.ds((n * form.heads + self.head) * form.width, form.width)


class _Block(NamedTuple):
    """Some queries or keys of a head."""

    place: Any  # slice of a row
    first: jax.Array
    x: jax.Array  # [block, D]
    segments: jax.Array  # [block]

    @classmethod
    def of(cls, form: Form, at: _Head, number, x, segments, n: int = 0) -> "_Block":
        size = _block_size(form)
        place = pl.ds(number * size, size)
        x = x[at.row, place, at.columns(form, n)]
        return cls(place, number * size, x, segments[at.row, place])


def _queries(form: Form, x: _Arrays, at: _Head, number) -> _Block:
    return _Block.of(form, at, number, x.queries, x.query_segments)


def _keys(form: Form, x: _Arrays, at: _Head, number) -> _Block:
    return _Block.of(form, at, number, x.keys, x.key_segments, _key_and_value(form, x)[0])


def _values(form: Form, x: _Arrays, at: _Head, k: _Block) -> jax.Array:
    return x.keys[at.row, k.place, at.columns(form, _key_and_value(form, x)[1])]


def _key_and_value(form: Form, x: _Arrays) -> tuple[int, int]:
    """Which of the N arrays in `x.keys` they are: the last two."""
    count = x.keys.shape[2] // (form.heads * form.width)
    return count - 2, count - 1


def _scores(form: Form, x: _Arrays, at: _Head, q: _Block, k: _Block, axis: int = 0):
    """(float32 scores, which of them are seen).

    Args:
        axis: that of queries, of both results; the other one is that of keys.
    """
    query, key = _places(q, k, axis)
    scores = dot(*((k.x, q.x) if axis else (q.x, k.x)), BY_ROWS) * form.scale
    if x.bias is not None:
        scores += x.bias[at.head, query - key + x.keys.shape[1] - 1]
    seen = jnp.expand_dims(q.segments, 1 - axis) == jnp.expand_dims(k.segments, axis)
    if form.causal:
        seen &= key <= query
    return jnp.where(seen, scores, MASKED), seen


def _places(q: _Block, k: _Block, axis: int) -> tuple[jax.Array, jax.Array]:
    lengths = len(q.segments), len(k.segments)
    shape = lengths[::-1] if axis else lengths
    query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, a) for a in (axis, 1 - axis))
    return q.first + query, k.first + key


def _dropped(form: Form, x: _Arrays, at: _Head, q: _Block, k: _Block, axis: int, *weights):
    """The weights, or their gradients, after dropout."""
    if not form.rate:
        return weights
    query, key = _places(q, k, axis)
    number = weight_number(form, at.number, query, key)
    kept = is_kept([number], [x.words[i] for i in range(4)], form.rate)
    return tuple(jnp.where(kept, w / (1.0 - form.rate), 0.0) for w in weights)


def _forward_kernel(form: Form, x: _Arrays, y, log_sums) -> None:
    number, at = pl.program_id(0), _Head.of(x)
    q, bounds = _queries(form, x, at, number), [x.keys_of[0, number, i] for i in (0, 1)]

    def read(number, sums):
        y, total, most = sums
        k = _keys(form, x, at, number)
        scores, _ = _scores(form, x, at, q, k)
        highest = jnp.maximum(most, scores.max(1))
        weights, factor = jnp.exp(scores - highest[:, None]), jnp.exp(most - highest)
        total = factor * total + weights.sum(1)
        (weights,) = _dropped(form, x, at, q, k, 0, weights)
        values = _values(form, x, at, k)
        return factor[:, None] * y + dot(weights.astype(form.dtype), values), total, highest

    nothing = jnp.zeros(q.segments.shape, jnp.float32)
    sums = jnp.zeros(q.x.shape, jnp.float32), nothing, nothing + MASKED
    y_QxD, total, most = jax.lax.fori_loop(*bounds, read, sums)
    total = jnp.where(total > 0, total, 1.0)  # where nothing was read
    y[0, q.place, at.columns(form)] = (y_QxD / total[:, None]).astype(form.dtype)
    log_sums[0, at.head, q.place] = most + jnp.log(total)


def _query_kernel(form: Form, x: _Arrays, dq, sums) -> None:
    number, at = pl.program_id(0), _Head.of(x)
    q, bounds = _queries(form, x, at, number), [x.keys_of[0, number, i] for i in (0, 1)]
    y, dy = (a[0, q.place, at.columns(form)] for a in (x.y, x.dy))
    sums_Q = softmax_sums(y, dy)
    sums[0, at.head, q.place] = sums_Q
    read = dy, sums_Q, x.log_sums[0, at.head, q.place]

    def sum_up(number, dq):
        k = _keys(form, x, at, number)
        _, d_scores = _gradients(form, x, at, q, k, *read)
        return dq + dot(d_scores.astype(form.dtype), k.x)

    dq_QxD = jax.lax.fori_loop(*bounds, sum_up, jnp.zeros(q.x.shape, jnp.float32))
    dq[0, q.place, at.columns(form)] = (form.scale * dq_QxD).astype(form.dtype)


def _key_kernel(form: Form, x: _Arrays, dkv) -> None:
    number, at = pl.program_id(0), _Head.of(x)
    k, bounds = _keys(form, x, at, number), [x.queries_of[0, number, i] for i in (0, 1)]

    def sum_up(number, gradients):
        dk, dv = gradients
        q = _queries(form, x, at, number)
        read = _read_gradients(form, x, at, q)
        # Keys by queries: so no product transposes what was just computed.
        weights, d_scores = _gradients(form, x, at, q, k, *read, axis=1)
        dv += dot(weights.astype(form.dtype), read[0])
        dk += dot(d_scores.astype(form.dtype), q.x)
        return dk, dv

    nothing = jnp.zeros(k.x.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(*bounds, sum_up, (nothing, nothing))
    for n, d in zip(_key_and_value(form, x), (form.scale * dk, dv), strict=True):
        dkv[0, k.place, at.columns(form, n)] = d.astype(form.dtype)


def _bias_gradient(form: Form, x: _Arrays, interpret: bool) -> jax.Array:
    size = _block_size(form)
    count = x.keys_of.shape[1] + x.queries_of.shape[1] - 1
    like_tiles = jax.ShapeDtypeStruct((form.heads, count, size, size), jnp.float32)
    x = x._replace(written=None)
    tiles = pl.pallas_call(
        partial(_bias_kernel, form),
        grid=(count, form.heads, 1),
        in_specs=[x.specs(form.rows)],
        out_specs=pl.BlockSpec((1, 1, size, size), lambda t, h, r: (h, t, 0, 0)),
        out_shape=like_tiles,
        interpret=interpret,
        name="bias_kernel",
        **_settings(form, x, [like_tiles], 0),
    )(x)
    # Tile t has distances from t * size on, and as many of tile t + 1.
    windows = jnp.pad(sum_diagonals(tiles), ((0, 0), (0, 0), (0, 1)))
    near, far = jnp.split(windows, 2, axis=-1)
    d_bias = jnp.pad(near, ((0, 0), (0, 1), (0, 0))) + jnp.pad(far, ((0, 0), (1, 0), (0, 0)))
    first = x.keys.shape[1] - form.keys
    return d_bias.reshape(form.heads, -1)[:, first : first + form.distances]


def _bias_kernel(form: Form, x: _Arrays, tile) -> None:
    first_row, size = _Head.of(x), _block_size(form)
    across, down = x.keys.shape[1] // size, x.queries.shape[1] // size
    ahead = pl.program_id(0) - (across - 1)  # of the block of keys is that of queries
    first, end = jnp.maximum(0, -ahead), jnp.minimum(across, down - ahead)

    def of_row(row, tile):
        at = first_row._replace(row=row, number=first_row.number + row * x.heads[1])

        def add(number, tile):
            q, k = _queries(form, x, at, number + ahead), _keys(form, x, at, number)
            return tile + _gradients(form, x, at, q, k, *_read_gradients(form, x, at, q))[1]

        def add_if_seen(number, tile):
            first, end = (x.keys_of[row, number + ahead, i] for i in (0, 1))
            seen = (first <= number) & (number < end)
            return jax.lax.cond(seen, partial(add, number), lambda tile: tile, tile)

        return jax.lax.fori_loop(first, end, add_if_seen, tile)

    nothing = jnp.zeros((size, size), jnp.float32)
    tile[0, 0] = jax.lax.fori_loop(0, form.rows, of_row, nothing)


def _read_gradients(form: Form, x: _Arrays, at: _Head, q: _Block):
    """The parts of `dy`, `sums` and `log_sums` of some queries."""
    dy = x.dy[at.row, q.place, at.columns(form)]
    return dy, x.sums[at.row, at.head, q.place], x.log_sums[at.row, at.head, q.place]


def _gradients(form: Form, x: _Arrays, at: _Head, q, k, dy, sums, log_sums, axis: int = 0):
    """(weights after dropout, gradients of scores); `axis` as in `_scores`."""
    scores, seen = _scores(form, x, at, q, k, axis)
    sums, log_sums = (jnp.expand_dims(x, 1 - axis) for x in (sums, log_sums))
    weights, values = jnp.exp(scores - log_sums), _values(form, x, at, k)
    d_weights = dot(*((values, dy) if axis else (dy, values)), BY_ROWS)
    dropped, d_weights = _dropped(form, x, at, q, k, axis, weights, d_weights)
    return dropped, jnp.where(seen, weights * (d_weights - sums), 0.0)
