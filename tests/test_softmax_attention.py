"""Attention with its own backward pass against JAX's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.dropout import dropout
from moe_jax.kernels.softmax_attention import softmax_attention

R, LQ, LK, H, D = 3, 5, 7, 2, 4
SCALE = 0.3


def arrays(dtype, bias_shape):
    rng = np.random.default_rng(0)
    shapes = [(R, LQ, H, D), (R, LK, H, D), (R, LK, H, D)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    bias = None if bias_shape is None else jnp.asarray(rng.normal(size=bias_shape), jnp.float32)
    return (q, k, v, bias), jnp.asarray(rng.normal(size=(R, LQ, H, D)), dtype)


@pytest.mark.parametrize(
    "dtype, bias_shape, masked, tolerance",
    [
        ("float32", None, False, 1e-5),
        ("float32", (1, H, LQ, LK), True, 1e-5),
        ("float32", (R, 1, LQ, LK), True, 1e-5),
        ("bfloat16", None, True, 0.04),
    ],
)
def test_results_and_gradients_are_those_of_jax(dtype, bias_shape, masked, tolerance):
    inputs, dy = arrays(dtype, bias_shape)
    mask = None
    if masked:  # the first row's second query sees nothing
        mask = jnp.asarray(np.random.default_rng(1).random((R, 1, LQ, LK)) < 0.6)
        mask = mask.at[0, 0, 1].set(False)

    def ours(q, k, v, bias):
        return softmax_attention(q, k, v, mask, bias, None, SCALE)

    def reference(q, k, v, bias):
        return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=SCALE)

    found = with_gradients(ours, inputs, dy)
    with jax.numpy_dtype_promotion("standard"):  # JAX's mixes bfloat16 and float32
        wanted = with_gradients(reference, inputs, dy)
    assert_near(found, wanted, tolerance)


@pytest.mark.parametrize("bias_shape", [None, (1, H, LQ, LK)])
def test_dropout_of_weights(bias_shape):
    inputs, dy = arrays("float32", bias_shape)
    mask = jnp.asarray(np.random.default_rng(1).random((R, 1, LQ, LK)) < 0.6)
    mask = mask.at[..., 0].set(True)
    key = jax.random.key(3)

    def ours(q, k, v, bias):
        return softmax_attention(q, k, v, mask, bias, key, SCALE, 0.3)

    def reference(q, k, v, bias):
        scores = SCALE * jnp.einsum("rqhd,rkhd->rhqk", q, k) + (0.0 if bias is None else bias)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("rhqk,rkhd->rqhd", dropout(weights, 0.3, key), v)

    assert_near(*(with_gradients(f, inputs, dy) for f in (ours, reference)), 1e-5)


def test_with_dropout_scores_are_still_float32():
    """With large scores, those of bfloat16 are off by more than weights are."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 64, 2, 64)), jnp.bfloat16) for _ in range(3))
    key = jax.random.key(0)

    def error(rate):
        y = softmax_attention(q, k, v, None, None, key, 1.0, rate)
        exact = [x.astype(jnp.float32) for x in (q, k, v)]
        wanted = softmax_attention(*exact, None, None, None, 1.0)
        return jnp.linalg.norm(y.astype(jnp.float32) - wanted)

    assert error(1e-12) < 1.1 * error(0.0)  # such a rate drops nothing


@partial(jax.jit, static_argnums=0)
def with_gradients(function, inputs, dy):
    y, pull_back = jax.vjp(function, *inputs)
    return y, pull_back(dy)


def assert_near(found, wanted, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        size = float(jnp.abs(y.astype(jnp.float32)).max())
        assert size > 0.1
        difference = x.astype(jnp.float32) - y.astype(jnp.float32)
        assert float(jnp.abs(difference).max()) < tolerance * size
