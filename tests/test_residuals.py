"""What layers keep for the backward pass: less memory, the same gradients."""

import dataclasses
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import residuals
from moe_jax.model.attention import attend, attend_by_rows, segment_mask
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE
from moe_jax.training.grouped_loss import group_loss

R, L = 3, 16
CONFIG = ModelConfig(
    vocabulary_size=31, d_model=16, d_ff=32, heads=2, encoder_layers=2, decoder_layers=2,
    max_positions=L, relative_buckets=8, dropout_rate=0.1, attention_dropout_rate=0.2,
    activation_dropout_rate=0.3,
)  # fmt: skip


def packed_batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0]], 4, axis=1).repeat(R, axis=0), jnp.int32)
    positions = jnp.asarray(np.tile(np.arange(4), (R, 4)), jnp.int32)
    tokens = {
        name: jnp.asarray(rng.integers(0, 31, (R, L)), jnp.int32)
        for name in ("inputs", "decoder_inputs", "targets")
    }
    sides = {f"{side}_segments": segments for side in ("input", "target")}
    return tokens | sides | {f"{side}_positions": positions for side in ("input", "target")}


@cache
def loss_and_gradients(architecture: str, kept: str, unroll: int):
    config = dataclasses.replace(
        CONFIG, architecture=architecture, kept_activations=kept, unroll_layers=unroll
    )
    module, batch = EncoderDecoder(config), packed_batch()
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), batch)["params"])
    loss = partial(group_loss, TaskMoE(config, RouterConfig(), 1))
    key = jax.random.key(7)
    return jax.jit(jax.value_and_grad(lambda p: loss(p, None, batch, key, 0.1)))(params)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
@pytest.mark.parametrize("kept, unroll", [("products", 1), ("products", 2)])
def test_gradients_with_dropout_are_those_of_keeping_all(architecture, kept, unroll):
    loss, grads = loss_and_gradients(architecture, kept, unroll)
    wanted_loss, wanted = loss_and_gradients(architecture, "all", 1)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, wanted)


@pytest.mark.parametrize("architecture, multiples, statistics", [
    # The layer's input, q, k and v, the heads' result, two sums, the hidden units (4 D). Mean and
    # deviation of two norms.
    ("bart", 1 + 3 + 1 + 2 + 4, 4),
    # Gated: twice as many hidden units. The second sum is the next layer's input. No means.
    ("t5", 1 + 3 + 1 + 1 + 8, 2),
])  # fmt: skip
# Fused attention keeps a number of each head.
@pytest.mark.parametrize("attention, of_heads", [("plain", 0), ("fused", 2)])
# JAX's own attention mixes bfloat16 and float32.
@jax.numpy_dtype_promotion("standard")
def test_a_layer_keeps_only_the_inputs_of_products_and_norms(
    architecture, multiples, statistics, attention, of_heads
):
    config = ModelConfig(
        architecture=architecture, vocabulary_size=31, d_model=64, d_ff=256, heads=2,
        encoder_layers=3, decoder_layers=3, attention_dropout_rate=0.1,
        activation_dropout_rate=0.1, dtype="bfloat16", kept_activations="products",
        attention=attention,
    )  # fmt: skip
    arrays = residuals.saved(config, "encoder")
    of_tokens = [a for a in arrays if residuals.LENGTH in a.shape and a.shape[0] == 3]
    tokens = 3 * residuals.ROWS * residuals.LENGTH
    sizes = dict.fromkeys(("bfloat16", "float32"), 0)
    for a in of_tokens:
        sizes[a.dtype.name] += a.size
    assert sizes["bfloat16"] == multiples * tokens * 64
    assert sizes["float32"] == (statistics + of_heads) * tokens
    everything = residuals.saved(dataclasses.replace(config, kept_activations="all"), "encoder")
    total, most = (sum(map(residuals.size_in_bytes, x)) for x in (arrays, everything))
    assert total < most / (4 if attention == "plain" else 1.4)


def test_the_compiler_does_not_keep_what_is_computed_again():
    """XLA merges equal computations of one loop."""

    def memory(kept):
        config = dataclasses.replace(
            CONFIG, d_model=64, d_ff=256, encoder_layers=4, decoder_layers=4, kept_activations=kept
        )
        module, batch = EncoderDecoder(config), packed_batch()
        params = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), batch)["params"])
        loss = partial(group_loss, TaskMoE(config, RouterConfig(), 1))
        grad = jax.jit(jax.grad(lambda p: loss(p, None, batch, jax.random.key(7))))
        return grad.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory("products") < 0.78 * memory("all")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_attention_by_rows_is_that_of_each_row(rows, rate):
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.normal(size=(R, L, 2, 4)), jnp.float32) for _ in range(4))
    bias = jnp.asarray(rng.normal(size=(1, 2, L, L)), jnp.float32)
    segments = packed_batch()["input_segments"]
    mask, key = segment_mask(segments, segments), jax.random.key(3)
    settings = {"scale": 0.3, "dropout_rate": rate}

    def by_rows(q, k, v, bias):
        return attend_by_rows(rows, q, k, v, mask, bias=bias, dropout_key=key, **settings)

    def each(q, k, v, bias):
        keys = jax.random.split(key, R)
        arrays = [[a[r : r + 1] for a in (q, k, v, mask)] for r in range(R)]
        return jnp.concatenate([
            attend(*arrays[r], bias=bias, dropout_key=keys[r], **settings) for r in range(R)
        ])  # fmt: skip

    def run(function):
        y, pull_back = jax.vjp(function, q, k, v, bias)
        return y, pull_back(dy)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.jit(partial(run, by_rows))(), jax.jit(partial(run, each))(),
    )  # fmt: skip
