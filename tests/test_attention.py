"""Fused attention against the plain one: results, gradients, dropout masks.

All of its forms: the kernels for TPUs and GPUs, interpreted, and the loop of other devices.
"""

import dataclasses
import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_residuals
from jax.extend.core import jaxprs_in_params

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.kernels import gpu_attention, tpu_attention
from moe_jax.kernels.attention import fused_attention
from moe_jax.kernels.attention_form import Form
from moe_jax.kernels.blockwise_attention import BLOCK
from moe_jax.model.attention import (
    Visible,
    attend,
    attend_fused,
    relative_buckets,
    segment_mask,
)
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE
from moe_jax.planning.flops import flops
from moe_jax.training.grouped_loss import group_loss

ROOT = Path(__file__).resolve().parent.parent
R, H, D = 2, 4, 8
KEY = jax.random.key(5, impl="rbg")
forms = pytest.mark.parametrize("interpret", ["tpu", "cuda", None], ids=["tpu", "cuda", "loop"])


def inputs(queries: int, keys: int, dtype=jnp.float32, heads=H, width=D, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(R, queries, heads, width), *[(R, keys, heads, width)] * 2]
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
    arrays.append(jnp.asarray(rng.normal(size=(heads, queries + keys - 1)), jnp.float32))
    return arrays, jnp.asarray(rng.normal(size=shapes[0]), dtype)


def packed(length: int, ends: list[list[int]]) -> jax.Array:
    """Segments 1, 2, ... of each row, up to these ends, then padding."""
    rows = [np.searchsorted(np.asarray(e), np.arange(length), side="right") + 1 for e in ends]
    padded = [np.where(np.arange(length) < e[-1], r, 0) for e, r in zip(ends, rows, strict=True)]
    return jnp.asarray(np.stack(padded), jnp.int32)


def by_place(bias_HxS: jax.Array, queries: int, keys: int) -> jax.Array:
    """The bias of each query and key: [1, H, L_q, L_k]."""
    distance = np.arange(queries)[:, None] - np.arange(keys)
    return bias_HxS[:, distance + keys - 1][None]


def projected(q, k, v) -> tuple[jax.Array, ...]:
    """One array for self-attention, two for cross-attention."""
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    if q.shape == k.shape:
        return (jnp.stack([q, k, v], 2),)
    return q[:, :, None], jnp.stack([k, v], 2)


def with_gradients(function, arrays, dy):
    y, pull_back = jax.vjp(function, *arrays)
    return y, pull_back(dy)


def fused(interpret, query_segments, key_segments, causal, bias, rate, scale=0.3):
    def run(q, k, v, b):
        return fused_attention(
            projected(q, k, v), query_segments, key_segments, b if bias else None,
            KEY if rate else None, heads=q.shape[2], causal=causal, scale=scale,
            dropout_rate=rate, interpret=interpret,
        ).reshape(q.shape)  # fmt: skip

    return jax.jit(partial(with_gradients, run))


def plain(query_segments, key_segments, causal, bias, rate, scale=0.3):
    def run(q, k, v, b):
        mask = Visible(query_segments, key_segments, causal).mask()
        settings = {"scale": scale, "dropout_rate": rate, "dropout_key": KEY if rate else None}
        settings["bias"] = by_place(b, *mask.shape[2:]) if bias else None
        return attend(q, k, v, mask, **settings)

    return jax.jit(partial(with_gradients, run))


def assert_near(got, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        # Of a single key, the gradient by queries is 0, up to rounding of numbers of size 1.
        absolute = tolerance * np.abs(b).max() + 1e-6
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=absolute)


@forms
@pytest.mark.parametrize(
    "causal, bias, rate",
    [(False, False, 0.0), (True, True, 0.0), (True, False, 0.3), (False, True, 0.3)],
)  # fmt: skip
def test_self_attention_is_the_plain_one(causal, bias, rate, interpret):
    segments = packed(16, [[5, 9, 16], [4, 11]])
    arrays, dy = inputs(16, 16)
    case = (segments, segments, causal, bias, rate)
    assert_near(fused(interpret, *case)(arrays, dy), plain(*case)(arrays, dy), 1e-5)


@forms
@pytest.mark.parametrize("rate", [0.0, 0.2])
# JAX's own attention mixes bfloat16 and float32.
@jax.numpy_dtype_promotion("standard")
def test_cross_attention_in_bfloat16_with_several_blocks(rate, interpret):
    """Several blocks of queries and of heads. No key has the segment of some queries: what these
    get is not defined, and nothing may depend on it."""
    queries, keys = packed(256, [[100, 256], [30, 90, 200]]), packed(24, [[7, 24], [9, 20]])
    arrays, dy = inputs(256, 24, jnp.bfloat16, width=64)
    seen = Visible(queries, keys).mask().any(-1)[:, 0, :, None, None]
    assert not seen.all()
    dy = jnp.where(seen, dy, 0)
    case = (queries, keys, False, False, rate)
    (y, grads), wanted = fused(interpret, *case)(arrays, dy), plain(*case)(arrays, dy)
    assert jnp.isfinite(y).all()
    got, wanted = (jnp.where(seen, y, 0), grads), (jnp.where(seen, wanted[0], 0), wanted[1])
    assert_near(got, wanted, 0.03)
    y, grads = plain(*case)(*jax.tree.map(lambda a: a.astype(jnp.float32), (arrays, dy)))
    exact = jnp.where(seen, y, 0), grads

    def error(result):
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(exact), strict=True)
        return sum(float(jnp.sum((a.astype(jnp.float32) - b) ** 2)) for a, b in pairs)

    assert error(got) < 1.1 * error(wanted)


@pytest.mark.parametrize("interpret, queries, keys", [
    (None, 131, 131),  # a loop of two blocks of 66 queries, the second one filled up
    ("tpu", 256, 384),  # a kernel with 2 + 3 - 1 different tiles of the bias
    ("tpu", 40, 256),
    ("tpu", 256, 40),
    ("tpu", 1, 1),
    ("cuda", 131, 131),  # three blocks of queries and of keys, the last ones filled up
    ("cuda", 40, 256),
    ("cuda", 256, 40),
    ("cuda", 2, 3),
])  # fmt: skip
def test_blocks_and_tiles_of_any_size(interpret, queries, keys):
    at_query, at_key = (packed(n, [[n // 2, n], [n]]) for n in (queries, keys))
    arrays, dy = inputs(queries, keys, heads=2, width=4)
    case = (at_query, at_key, queries == keys, True, 0.3)
    assert_near(fused(interpret, *case)(arrays, dy), plain(*case)(arrays, dy), 1e-5)


@forms
def test_groups_side_by_side_have_masks_of_their_own(interpret):
    segments = packed(8, [[3, 8], [8]])
    (q, k, v, bias), dy = inputs(8, 8)
    keys = jax.random.split(KEY, 2)

    def fused_group(q, bias, key):
        def run(q, bias):
            settings = {"heads": H, "scale": 0.3, "dropout_rate": 0.5, "interpret": interpret}
            arrays = projected(q, k, v)
            y = fused_attention(arrays, segments, segments, bias, key, **settings)
            return y.reshape(q.shape)

        return with_gradients(run, (q, bias), dy)

    def plain_group(q, bias, key):
        def run(q, bias):
            settings = {"scale": 0.3, "dropout_rate": 0.5, "bias": by_place(bias, 8, 8)}
            return attend(q, k, v, segment_mask(segments, segments), dropout_key=key, **settings)

        return with_gradients(run, (q, bias), dy)

    qs, biases = jnp.stack([q, 2 * q]), jnp.stack([bias, -bias])
    together = jax.jit(jax.vmap(fused_group))(qs, biases, keys)
    for g in range(2):
        wanted = plain_group(qs[g], biases[g], keys[g])
        assert_near(jax.tree.map(lambda a, g=g: a[g], together), wanted, 1e-5)


@forms
@pytest.mark.parametrize("keys", [8, 5], ids=["self", "cross"])
def test_heads_spread_over_devices(interpret, keys):
    mesh = make_mesh(MeshConfig(data=1, model=2), jax.devices()[:2])
    segments, at_key = packed(8, [[3, 8], [8]]), packed(keys, [[2, keys], [keys]])
    arrays, dy = inputs(8, keys)
    causal = keys == 8

    def run(q, k, v, b):
        visible = Visible(segments, at_key, causal)
        return attend_fused(
            projected(q, k, v), visible, heads=H, bias_HxS=b, scale=0.3, dropout_rate=0.5,
            dropout_key=KEY, interpret=interpret,
        ).reshape(q.shape)  # fmt: skip

    with jax.set_mesh(mesh):
        spread = jax.jit(partial(with_gradients, run))(arrays, dy)
    assert_near(spread, plain(segments, at_key, causal, True, 0.5)(arrays, dy), 1e-5)


def test_heads_that_do_not_spread_evenly():
    segments, arrays = jnp.ones((R, 8), jnp.int32), (jnp.ones((R, 8, 3, 3 * 16)),)
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=1, model=2), jax.devices()[:2])),
        pytest.raises(UserError, match=r"heads 3 is no multiple of MeshConfig\.model 2"),
    ):
        attend_fused(arrays, Visible(segments, segments), heads=3, scale=0.3)


def test_a_model_learns_the_same():
    """T5's layers, with the gradient of their table of relative positions."""
    config = dataclasses.replace(
        test_residuals.CONFIG, architecture="t5", kept_activations="products"
    )
    batch = test_residuals.packed_batch()
    params = nn.meta.unbox(jax.jit(EncoderDecoder(config).init)(jax.random.key(0), batch)["params"])
    results = []
    for attention in ("fused", "plain"):
        model = TaskMoE(dataclasses.replace(config, attention=attention), RouterConfig(), 1)
        loss = partial(group_loss, model, dispatch=None, group=batch, key=KEY)
        results.append(jax.jit(jax.value_and_grad(loss))(params))
    got, wanted = results
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got[1], wanted[1]
    )


@forms
@pytest.mark.parametrize("biased", [False, True])
def test_memory_grows_with_length_and_not_with_its_square(interpret, biased):
    def largest(length: int) -> int:
        segments = jnp.ones((R, length), jnp.int32)
        (*arrays, _), dy = inputs(length, length)
        dy = dy.reshape(R, length, H * D)
        settings = {"heads": H, "scale": 0.3, "dropout_rate": 0.1, "interpret": interpret}

        def run(q, k, v, table):
            bias = None
            if table is not None:  # as `backbone.Side` makes T5's
                distances, half = jnp.arange(1 - length, length), len(table) // 2
                sizes = {"buckets": len(table), "max_distance": 4 * half}
                bias = table[relative_buckets(distances, bidirectional=True, **sizes)].T
            return fused_attention(projected(q, k, v), segments, segments, bias, KEY, **settings)

        table = jnp.zeros((8, H)) if biased else None
        jaxpr = jax.make_jaxpr(partial(with_gradients, run))((*arrays, table), dy).jaxpr
        return max(v.aval.size for v in outside_kernels(jaxpr))

    def outside_kernels(jaxpr):
        for equation in jaxpr.eqns:
            yield from equation.outvars
            if equation.primitive.name != "pallas_call":
                for inner in jaxprs_in_params(equation.params):
                    yield from outside_kernels(inner)

    # The kernel for GPUs sums its bias in 2 L / 64 - 1 tiles.
    assert 4 * largest(256) <= largest(1024) < 4.5 * largest(256)


# JAX 0.11 and newer warn that they will lose Triton.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_each_platform_runs_its_own_form(platform):
    length = 3 * BLOCK
    arrays = [jax.ShapeDtypeStruct((R, length, H, 64), jnp.bfloat16)] * 3
    dy = jax.ShapeDtypeStruct((R, length, H * 64), jnp.bfloat16)
    segments = jnp.ones((R, length), jnp.int32)

    def run(q, k, v, dy):
        function = partial(fused_attention, heads=H, scale=0.3, dropout_rate=0.1, dropout_key=KEY)
        call = lambda *qkv: function(projected(*qkv), segments, segments)  # noqa: E731
        return with_gradients(call, (q, k, v), dy)

    # Newer versions of JAX ask which GPU it is.
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu if platform == "cuda" else None)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(*arrays, dy).lower(lowering_platforms=(platform,)).as_text()
    assert ("tpu_custom_call" in text) == (platform == "tpu")
    assert ("xla.gpu.triton" in text) == (platform == "cuda")
    assert (f"{BLOCK}x{length}xf32" in text) == (platform == "rocm")  # scores of a block
    assert f"{length}x{length}x" not in text


@forms
def test_products_are_counted(interpret):
    """Forward two products per head, backward these and three more; the softmax does not count."""
    (q, k, v, _), dy = inputs(16, 24)
    segments = jnp.ones((R, 16), jnp.int32), jnp.ones((R, 24), jnp.int32)

    def run(q, k, v):
        settings = {"heads": H, "scale": 0.3, "interpret": interpret}
        return fused_attention(projected(q, k, v), *segments, **settings)

    one = 2 * R * H * 16 * 24 * D
    assert flops(run, q, k, v) == 2 * one
    dy = dy.reshape(R, 16, H * D)
    assert flops(partial(with_gradients, run), (q, k, v), dy) == (2 + 5) * one


def skip_without(what: str, *modules: str):
    missing = not any(importlib.util.find_spec(module) for module in modules)
    return pytest.mark.skipif(missing, reason=f"{what} is not installed")


@pytest.mark.parametrize("topology, kernel", [
    pytest.param("v5e:2x2", "tpu_custom_call", marks=skip_without("libtpu", "libtpu")),
    pytest.param("h100:2", "xla.gpu.triton", marks=skip_without(
        "JAX's plugin for CUDA", "jax_cuda12_plugin", "jax_cuda13_plugin")),
])  # fmt: skip
def test_compiles_with_heads_on_two_devices(topology, kernel):
    program = """
import sys
from moe_jax.planning.devices import topology_devices
topology, kernel = sys.argv[1:]
devices = topology_devices(topology)
import jax, jax.numpy as jnp
from moe_jax.core.sharding import MeshConfig, make_mesh, replicated
from moe_jax.model.attention import Visible, attend_fused
mesh = make_mesh(MeshConfig(data=1, model=2), devices[:2])

def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

def run(qkv, bias, segments, words):
    visible, key = Visible(segments, segments, True), jax.random.wrap_key_data(words, impl="rbg")
    settings = {"bias_HxS": bias, "dropout_rate": 0.1, "dropout_key": key}
    y = attend_fused((qkv,), visible, heads=4, scale=0.1, **settings)
    return y.astype(jnp.float32).sum()

qkv, bias = array(2, 384, 3, 256), array(4, 767, dtype=jnp.float32)
others = array(2, 384, dtype=jnp.int32), array(4, dtype=jnp.uint32)
with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(run, (0, 1))).lower(qkv, bias, *others).compile()
assert kernel in compiled.as_text()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program,
         topology, kernel], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_rows_too_long_for_the_chip_are_read_in_the_loop():
    def has_kernel(length: int, bias: bool) -> bool:
        form = Form(1, length, length, 2, 64, jnp.dtype(jnp.bfloat16), False, 0.1, 0.0)
        return tpu_attention.takes(form, bias)

    assert has_kernel(6144, False) and has_kernel(4096, True) and not has_kernel(6144, True)


@pytest.mark.parametrize("dtype, width, kernel", [
    ("bfloat16", 64, True), ("bfloat16", 128, True), ("float32", 64, True),
    ("float32", 128, False), ("bfloat16", 24, False), ("bfloat16", 256, False),
])  # fmt: skip
def test_heads_that_a_gpu_takes(dtype, width, kernel):
    form = Form(1, 8, 8, 2, width, jnp.dtype(dtype), False, 0.1, 0.0)
    assert gpu_attention.takes(form, biased=True) == kernel


def test_blocks_that_a_gpu_reads():
    """Two blocks of queries of segments 1 and 2, and one of padding and nothing."""
    at_query = jnp.asarray([[1, 1, 1, 2, 0, -1]])
    at_key = jnp.asarray([[1, 1, 2, 2, 3, 0]])
    keys_of, queries_of = gpu_attention._blocks_to_read(at_query, at_key, 2, causal=False)
    np.testing.assert_array_equal(keys_of, [[[0, 1], [0, 2], [2, 3]]])
    np.testing.assert_array_equal(queries_of, [[[0, 2], [1, 2], [2, 3]]])
    keys_of, queries_of = gpu_attention._blocks_to_read(at_query, at_query, 2, causal=True)
    np.testing.assert_array_equal(keys_of, [[[0, 1], [0, 2], [2, 3]]])
    np.testing.assert_array_equal(queries_of, [[[0, 2], [1, 2], [2, 3]]])
    nothing = gpu_attention._blocks_to_read(at_query, jnp.full((1, 6), 4), 2, causal=False)
    np.testing.assert_array_equal(nothing[0], [[[0, 0]] * 3])


def test_rows_at_a_time_are_for_plain_attention():
    with pytest.raises(UserError, match="attention_rows 2 is for ModelConfig"):
        ModelConfig(attention="fused", attention_rows=2)
