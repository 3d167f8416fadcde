"""Properties of the encoder-decoder: packing, decoding with a cache, gathered experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.cache import CachedDecoder
from moe_jax.decoding.rows import RowModel, row_routes
from moe_jax.model.attention import relative_buckets, segment_mask
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.experts import gather
from moe_jax.model.task_moe import TaskMoE

E, L_IN, L_OUT, VOCABULARY = 3, 12, 10, 17
# (input length, target length) of the examples of one row; they leave padding at its end.
LENGTHS = [(4, 3), (5, 2), (2, 4)]


@functools.cache
def model(architecture):
    """Routed and vanilla layers in turn; parameters far from their initial values."""
    config = ModelConfig(
        architecture=architecture,
        vocabulary_size=VOCABULARY,
        d_model=8,
        d_ff=12,
        heads=2,
        encoder_layers=2,
        decoder_layers=3,
        encoder_vanilla_layers=(0,),
        decoder_vanilla_layers=(1,),
        max_positions=L_IN,
        relative_buckets=8,
        relative_max_distance=10,
        experts=E,
        dropout_rate=0.0,
    )
    module = EncoderDecoder(config)
    batch = {k: jnp.ones((1, 1), jnp.int32) for k in BATCH}
    init = functools.partial(module.init, jax.random.key(0), batch, jnp.ones((3, E)))
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.asarray(rng.normal(path[-1].key == "scale", 0.4, p.shape), jnp.float32),
        nn.meta.unbox(jax.eval_shape(init)["params"]),
    )
    weights = jnp.asarray(rng.dirichlet(np.ones(E), 3), jnp.float32)
    return config, params, weights


BATCH = (
    "inputs", "input_segments", "input_positions",
    "decoder_inputs", "target_segments", "target_positions",
)  # fmt: skip


def packed_and_separate():
    """Row 0 holds all examples, row i only example i; padding is filled with random tokens.

    Returns:
        (batch, places of each example's targets in row 0).
    """
    rng = np.random.default_rng(1)
    rows = 1 + len(LENGTHS)
    batch = {k: np.zeros((rows, L_IN if "input" in k else L_OUT), np.int32) for k in BATCH}
    batch["decoder_inputs"] = rng.integers(0, VOCABULARY, (rows, L_OUT), np.int32)
    batch["inputs"] = rng.integers(0, VOCABULARY, (rows, L_IN), np.int32)
    places, start = [], [0, 0]
    for i, lengths in enumerate(LENGTHS):
        sides = (BATCH[:3], BATCH[3:])
        for side, ((tokens, segments, positions), n) in enumerate(zip(sides, lengths, strict=True)):
            at = slice(start[side], start[side] + n)
            example = rng.integers(0, VOCABULARY, n, np.int32)
            for row, where, segment in ((0, at, i + 1), (i + 1, slice(0, n), 1)):
                batch[tokens][row, where] = example
                batch[segments][row, where] = segment
                batch[positions][row, where] = np.arange(n)
            start[side] += n
        places.append(at)
    return {k: jnp.asarray(v) for k, v in batch.items()}, places


@functools.cache
def forward(architecture, experts):
    config, _, _ = model(architecture)
    module = EncoderDecoder(config)
    return jax.jit(lambda params, batch, weights: module.apply({"params": params}, batch, weights))


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_packed_row_equals_separate_rows(architecture):
    _, params, weights = model(architecture)
    batch, places = packed_and_separate()
    logits = np.asarray(forward(architecture, E)(params, batch, weights))
    for i, at in enumerate(places):
        n = at.stop - at.start
        np.testing.assert_allclose(logits[0, at], logits[i + 1, :n], rtol=1e-4, atol=1e-4)
        # The comparison can fail: other examples differ.
        assert np.abs(logits[0, at][0] - logits[(i + 1) % 3 + 1, 0]).max() > 0.05


@pytest.mark.parametrize("used", [1, E])
@pytest.mark.parametrize("architecture", ["bart", "t5", "t5_1_0"])
def test_cached_steps_equal_teacher_forcing(architecture, used):
    """Every row has its own route. With one expert per layer, rows are sorted by expert."""
    config, params, _ = model(architecture)
    batch, _ = packed_and_separate()
    batch = {k: v[1:] for k, v in batch.items()}  # one example per row
    rows = len(LENGTHS)
    rng = np.random.default_rng(2)
    routes_RxNxE = rng.dirichlet(np.ones(E), (rows, 3)).astype(np.float32)
    if used == 1:
        routes_RxNxE = np.eye(E, dtype=np.float32)[routes_RxNxE.argmax(-1)]
    routes = row_routes(routes_RxNxE, np.arange(rows), used)

    @jax.jit
    def steps(params, batch, routes):
        row_model = RowModel(TaskMoE(config, RouterConfig(), rows), params, routes)
        encoded, segments = row_model.encode(batch), batch["input_segments"]
        # A cache longer than the target: unwritten places must have no effect.
        decoder = CachedDecoder(row_model, encoded, segments, L_OUT + 2)

        def step(cache, token_and_place):
            token_R, place = token_and_place
            seen = (jnp.arange(L_OUT + 2) <= place)[None, None]
            logits, cache = decoder.step(token_R[:, None], place, cache, seen)
            return cache, logits[:, 0]

        tokens = (batch["decoder_inputs"].T, jnp.arange(L_OUT))
        return jax.lax.scan(step, decoder.cache(), tokens)[1].swapaxes(0, 1)

    logits = steps(params, batch, routes)
    whole = forward(architecture, E)
    for row, (_, n) in enumerate(LENGTHS):
        alone = whole(params, batch, jnp.asarray(routes_RxNxE[row]))[row, :n]
        np.testing.assert_allclose(logits[row, :n], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_gathered_expert_equals_one_hot_route(architecture):
    _, params, _ = model(architecture)
    batch, _ = packed_and_separate()
    index_NxK = jnp.array([[2], [0], [1]])
    one_hot = jax.nn.one_hot(index_NxK[:, 0], E)
    whole = forward(architecture, E)(params, batch, one_hot)
    plain = forward(architecture, 1)(gather(params, index_NxK), batch, jnp.ones((3, 1)))
    real = np.asarray(batch["target_segments"]) > 0
    np.testing.assert_allclose(plain[real], whole[real], rtol=1e-4, atol=1e-4)


def test_segment_mask():
    queries, keys = np.array([[1, 1, 2, 0]]), np.array([[1, 2, 2, 0, 0]])
    expected = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    mask = segment_mask(jnp.asarray(queries), jnp.asarray(keys))
    np.testing.assert_array_equal(mask, np.array(expected, bool)[None, None])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20)])
def test_relative_buckets(bidirectional, buckets, farthest):
    """Against the paper's description in exact arithmetic, distance by distance."""
    exact = (buckets // 2 if bidirectional else buckets) // 2

    def bucket(query, key):
        distance, count, offset = query - key, buckets, 0
        if bidirectional:
            count //= 2
            offset = count if distance < 0 else 0
            distance = abs(distance)
        distance = max(distance, 0)
        if distance < exact:
            return offset + distance
        # The largest n with (farthest / exact) ** (n / (count - exact)) <= distance / exact.
        n = 0
        while n < count - exact - 1 and farthest ** (n + 1) * exact ** (
            count - exact - n - 1
        ) <= distance ** (count - exact):
            n += 1
        return offset + exact + n

    positions = np.arange(200)
    ours = relative_buckets(
        jnp.asarray(positions[:, None] - positions),
        bidirectional=bidirectional,
        buckets=buckets,
        max_distance=farthest,
    )
    cache = {d: bucket(max(d, 0), max(-d, 0)) for d in range(-199, 200)}
    expected = [[cache[q - k] for k in positions.tolist()] for q in positions.tolist()]
    np.testing.assert_array_equal(ours, expected)
