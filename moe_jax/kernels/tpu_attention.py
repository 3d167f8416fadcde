"""The kernels of `attention` for TPUs.

Scores stay on the chip: a program holds those of one block of queries with all keys of a row, so
the softmax needs no second pass. Scores are transposed, keys by queries: sums over keys then run
along the axis that a TPU adds fastest, and no product transposes scores.

A bias has one number for each distance from key to query. The first row spreads it into tiles of
scores, which stay on the chip for the rows after it; the last row sums the gradients of tiles.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels.attention_form import (
    BY_COLUMNS,
    BY_ROWS,
    MASKED,
    Attended,
    Form,
    Packed,
    dot,
    padded,
    split,
    weight_number,
)
from moe_jax.kernels.dropout import is_kept

# The number of columns in a TPU's tile of an array, and of queries at a time.
LANES = 128
# The memory on the chip that a program may always take, and the most that it may take: TPUs v5e and
# v6e have 128 MiB, and what is left holds arrays of the programs around it.
LEAST_CHIP_BYTES, MOST_CHIP_BYTES = 16 * 2**20, 100 * 2**20


@dataclasses.dataclass(frozen=True)
class _Tiled(Form):
    """A form, and how the kernels cut it."""

    @property
    def heads_at_once(self) -> int:
        """The smallest divisor of H whose heads fill whole tiles; H if there is none."""
        fit = (n for n in range(1, self.heads) if self.heads % n == 0)
        return next((n for n in fit if n * self.width % LANES == 0), self.heads)

    @property
    def of_log_sums(self) -> tuple[int, int, int, int]:
        """The shape of `Attended.log_sums_RxHxLq`, with the heads of one program in one axis."""
        n = self.heads_at_once
        return self.rows, self.heads // n, n, self.queries

    @property
    def block(self) -> int:
        """Queries at a time."""
        return self.queries if self.queries % LANES else LANES

    @property
    def tile_keys(self) -> int:
        """Keys of a tile of the bias; its queries are a block."""
        return self.keys if self.keys % LANES else LANES

    @property
    def tiles(self) -> int:
        """How many tiles differ: those on a diagonal of the scores are equal."""
        return self.queries // self.block + self.keys // self.tile_keys - 1

    @property
    def window(self) -> int:
        """How many numbers of the bias a tile is made of, and some more to fill lanes."""
        return _round_up(self.tile_keys + self.block)

    def chip_bytes(self, biased: bool) -> int:
        """An upper bound of what a program takes of the memory on the chip."""
        n, item = self.heads_at_once, self.dtype.itemsize
        blocks = 4 * (self.queries + self.keys) * n * max(self.width, LANES // n) * item
        sums = 2 * self.keys * n * self.width * 4
        if biased:  # and its gradient
            blocks += 2 * n * 8 * (self.queries + self.keys + 2 * LANES) * 4
            sums += 2 * n * self.tiles * self.tile_keys * _round_up(self.block) * 4
        scores = 16 * self.keys * self.block * 4
        # Blocks twice, because the next ones are read while these are in use.
        return max(LEAST_CHIP_BYTES, 2 * blocks + sums + scores)


def takes(form: Form, biased: bool) -> bool:
    """Whether all keys of a row fit on the chip. For two heads of width 64, 4,096 tokens do;
    lengths that are no multiples of 128 take more."""
    return _Tiled(**vars(form)).chip_bytes(biased) <= MOST_CHIP_BYTES


def forward(form: Form, packed: Packed, *, interpret: bool = False) -> Attended:
    """The result, and what the backward pass needs."""
    y, log_sums = _call(form, _forward_kernel, packed, split(packed.projected), interpret)
    return Attended(y, log_sums.reshape(form.rows, form.heads, form.queries))


def backward(form: Form, packed: Packed, attended: Attended, dy, *, interpret: bool = False):
    """Gradients by `packed.projected` and the bias."""
    log_sums = attended.log_sums_RxHxLq.reshape(_Tiled(**vars(form)).of_log_sums)
    arrays = (*split(packed.projected), dy, log_sums)
    dq, dk, dv, *d_bias = _call(form, _backward_kernel, packed, arrays, interpret)
    return packed.joined(dq, dk, dv), d_bias[0][:, 0, : form.distances] if d_bias else None


def _call(form: Form, kernel, packed: Packed, arrays, interpret: bool) -> list[jax.Array]:
    """Runs a kernel for all blocks of heads and, within each, all rows."""
    form = _Tiled(**vars(form))
    n = form.heads_at_once
    backward = kernel is _backward_kernel

    def of_row(length: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, length, n * form.width), lambda h, r: (r, 0, h))

    words = jax.lax.bitcast_convert_type(packed.dropout_words_4, jnp.int32)
    numbers = jnp.concatenate([words, packed.heads_2])
    segments = packed.query_segments_RxLq[:, None], packed.key_segments_RxLk[:, :, None]
    biases = []
    if packed.bias_HxS is not None:  # filled up for what the last tile reads
        space = _round_up(form.queries + form.keys) + LANES
        biases = [padded(packed.bias_HxS, {1: space})[:, None]]
    of_query, of_key = of_row(form.queries), of_row(form.keys)
    of_biases = [pl.BlockSpec((n, 1, b.shape[2]), lambda h, r: (h, 0, 0)) for b in biases]
    tiles = [pltpu.VMEM((n, form.tiles, form.tile_keys, form.block), jnp.float32) for _ in biases]
    inputs = [numbers, *segments, *biases, *arrays]
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, form.queries), lambda h, r: (r, 0, 0)),
        pl.BlockSpec((1, form.keys, 1), lambda h, r: (r, 0, 0)),
        *of_biases,
        of_query, of_key, of_key,
    ]  # fmt: skip
    of_log_sums = pl.BlockSpec((1, 1, n, form.queries), lambda h, r: (r, h, 0, 0))
    results = [arrays[0], jax.ShapeDtypeStruct(form.of_log_sums, jnp.float32)]
    out_specs, scratch = [of_query, of_log_sums], tiles
    if backward:
        in_specs += [of_query, of_log_sums]
        results = [*arrays[:3], *biases]
        out_specs = [of_query, of_key, of_key, *of_biases]
        scratch = [pltpu.VMEM((form.keys, n * form.width), jnp.float32)] * 2 + 2 * tiles
    return pl.pallas_call(
        partial(kernel, form, bool(biases)),
        grid=(form.heads // n, form.rows),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=form.chip_bytes(bool(biases)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=form.products(5 if backward else 2),
            transcendentals=form.rows * form.heads * form.queries * form.keys,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*inputs, *results)),
        ),
        interpret=interpret,
        name="attention_backward" if backward else "attention",
    )(*inputs)


def _forward_kernel(form: _Tiled, biased: bool, numbers, query_segments, key_segments, *refs):
    bias, (q, k, v, y, log_sums, *tiles) = refs[:biased], refs[biased:]
    if biased:
        pl.when(pl.program_id(1) == 0)(partial(_spread, form, bias[0], tiles[0]))

    def block(queries, places, seen, kept):
        results = []
        for head in range(form.heads_at_once):
            own = slice(head * form.width, (head + 1) * form.width)
            bias_KxQ = _read(tiles[0], head, places) if biased else None
            scores = _scores(form, q[0, queries, own], k[0, :, own], seen, bias_KxQ)
            most = jnp.max(scores, axis=0, keepdims=True)
            powers = jnp.exp(scores - most)
            total = jnp.sum(powers, axis=0, keepdims=True)
            log_sums[0, 0, head : head + 1, queries] = most + jnp.log(total)
            weights = powers * (1.0 / total)
            if form.rate:
                weights = jnp.where(kept(head), weights / (1.0 - form.rate), 0.0)
            results.append(dot(v[0, :, own], weights.astype(form.dtype), BY_COLUMNS))
        y[0, queries] = _side_by_side(results, form.dtype)

    _for_blocks(form, numbers, query_segments, key_segments, block)


def _backward_kernel(form: _Tiled, biased: bool, numbers, query_segments, key_segments, *refs):
    bias, (q, k, v, dy, log_sums, dq, dk, dv, *refs) = refs[:biased], refs[biased:]
    d_bias, (dk_sum, dv_sum, *tiles) = refs[:biased], refs[biased:]
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    if biased:  # its gradient is summed over rows, which come one after the other

        @pl.when(pl.program_id(1) == 0)
        def _():
            _spread(form, bias[0], tiles[0])
            tiles[1][...] = jnp.zeros_like(tiles[1])

    def block(queries, places, seen, kept):
        results = []
        for head in range(form.heads_at_once):
            own = slice(head * form.width, (head + 1) * form.width)
            q_QxD, k_KxD, dy_QxD = q[0, queries, own], k[0, :, own], dy[0, queries, own]
            bias_KxQ = _read(tiles[0], head, places) if biased else None
            scores = _scores(form, q_QxD, k_KxD, seen, bias_KxQ)
            weights = jnp.exp(scores - log_sums[0, 0, head : head + 1, queries])
            dropped, d_weights = weights, dot(v[0, :, own], dy_QxD, BY_ROWS)
            if form.rate:
                keep = kept(head)
                dropped = jnp.where(keep, weights / (1.0 - form.rate), 0.0)
                d_weights = jnp.where(keep, d_weights / (1.0 - form.rate), 0.0)
            dv_sum[:, own] += dot(dropped.astype(form.dtype), dy_QxD)
            mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
            d_scores = jnp.where(seen, weights * (d_weights - mean), 0.0)
            if biased:
                _add_to(tiles[1], head, places, d_scores)
            d_scores = d_scores.astype(form.dtype)
            results.append(dot(k_KxD, d_scores, BY_COLUMNS) * form.scale)
            dk_sum[:, own] += dot(d_scores, q_QxD) * form.scale
        dq[0, queries] = _side_by_side(results, form.dtype)

    _for_blocks(form, numbers, query_segments, key_segments, block)
    dk[0] = dk_sum[...].astype(form.dtype)
    dv[0] = dv_sum[...].astype(form.dtype)
    if biased:
        last = pl.program_id(1) == form.rows - 1
        pl.when(last)(partial(_collapse, form, tiles[1], d_bias[0]))


def _for_blocks(form: _Tiled, numbers, query_segments, key_segments, function) -> None:
    """Calls a function for each block of queries, with their place in the row, the places of their
    tiles of the bias, which keys they see (bool [K, Q]), and a function from a head to its dropout
    mask [K, Q]."""
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
            return is_kept([weight_number(form, head, query, key)], words, form.rate)

        across = form.keys // form.tile_keys
        function(queries, [number + across - 1 - i for i in range(across)], seen, kept)
        return 0

    jax.lax.fori_loop(0, form.queries // form.block, one, 0)


def _spread(form: _Tiled, bias, tiles) -> None:
    """Fills the tiles of the bias: row k of a tile is its window, moved by k."""

    def one(tile, _):
        window = pl.ds(pl.multiple_of(tile * LANES, LANES), form.window)
        for head in range(form.heads_at_once):
            x = pltpu.roll(bias[head, :, window], (1 - form.tile_keys) % form.window, 1)
            while len(x) < form.tile_keys:
                x = jnp.concatenate([x, pltpu.roll(x, len(x), 1)], axis=0)
            tiles[head, tile] = x[: form.tile_keys, : form.block]
        return 0

    jax.lax.fori_loop(0, form.tiles, one, 0)


def _collapse(form: _Tiled, tiles, d_bias) -> None:
    """Sums tiles along their diagonals, the transpose of `_spread`."""
    d_bias[...] = jnp.zeros_like(d_bias)
    rows = 2 ** (form.tile_keys - 1).bit_length()

    def one(tile, _):
        window = pl.ds(pl.multiple_of(tile * LANES, LANES), form.window)
        for head in range(form.heads_at_once):
            space = ((0, rows - form.tile_keys), (0, form.window - form.block))
            x = jnp.pad(tiles[head, tile], space)
            while len(x) > 1:
                half = len(x) // 2
                x = x[:half] + pltpu.roll(x[half:], form.window - half, 1)
            d_bias[head, :, window] += pltpu.roll(x, form.tile_keys - 1, 1)
        return 0

    jax.lax.fori_loop(0, form.tiles, one, 0)


def _read(tiles, head: int, places: list[jax.Array]) -> jax.Array:
    """The bias of a block of queries: [K, Q]."""
    return jnp.concatenate([tiles[head, place] for place in places], axis=0)


def _add_to(tiles, head: int, places: list[jax.Array], x_KxQ: jax.Array) -> None:
    size = tiles.shape[2]
    for i, place in enumerate(places):
        tiles[head, place] += x_KxQ[i * size : (i + 1) * size]


def _scores(form: _Tiled, q_QxD, k_KxD, seen, bias) -> jax.Array:
    """float32 [K, Q]."""
    scores = dot(k_KxD, q_QxD, BY_ROWS) * form.scale
    if bias is not None:
        scores += bias
    return jnp.where(seen, scores, MASKED)


def _side_by_side(parts_DxQ: list[jax.Array], dtype) -> jax.Array:
    """The results of some heads: [Q, heads * D]."""
    return jnp.concatenate(parts_DxQ, axis=0).T.astype(dtype)


def _round_up(number: int) -> int:
    """The next multiple of `LANES`."""
    return -(-number // LANES) * LANES
