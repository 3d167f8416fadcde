"""LayerNorm and RMS norm against plain ones, differentiated by JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.norm import norm

EPSILON = 1e-3
SHAPE = (3, 5, 8)
KINDS = pytest.mark.parametrize("kind", ["layer", "rms"])


def plain(x, scale, bias):
    """The definition, in the dtype of x."""
    centred = x if bias is None else x - x.mean(-1, keepdims=True)
    y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale
    return y if bias is None else y + bias


def arguments(kind, dtype="float32"):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2, 3, SHAPE), dtype)
    scale, bias = (jnp.asarray(rng.normal(1, 0.5, SHAPE[-1]), jnp.float32) for _ in range(2))
    return x, scale, bias if kind == "layer" else None


def gradients(function, args, dy):
    y, pull_back = jax.vjp(function, *args)
    return y, pull_back(dy.astype(y.dtype))


@KINDS
def test_values_and_gradients(kind):
    args = arguments(kind)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)
    found = gradients(partial(norm, epsilon=EPSILON), args, dy)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found,
        gradients(plain, args, dy),
    )  # fmt: skip


@KINDS
def test_bfloat16_is_computed_in_float32(kind):
    x, *rest = arguments(kind, "bfloat16")
    dy = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.bfloat16)
    y, grads = gradients(partial(norm, epsilon=EPSILON), (x, *rest), dy)
    exact, exact_grads = gradients(plain, (x.astype(jnp.float32), *rest), dy)
    assert [g.dtype for g in jax.tree.leaves((y, grads))][:3] == [x.dtype, x.dtype, "float32"]
    np.testing.assert_array_equal(y, exact.astype(x.dtype))
    np.testing.assert_allclose(
        grads[0].astype(jnp.float32), exact_grads[0], rtol=2**-8, atol=1e-5
    )  # rounded once
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), grads[1:], exact_grads[1:])


@KINDS
def test_the_backward_pass_keeps_the_input_and_two_numbers_of_each_vector(kind):
    x, *rest = arguments(kind, "bfloat16")
    _, pull_back = jax.vjp(partial(norm, epsilon=EPSILON), x, *rest)
    kept = sorted((a.dtype.name, a.size) for a in jax.tree.leaves(pull_back))
    numbers = [("float32", x.size // SHAPE[-1])] * (2 if kind == "layer" else 1)
    assert kept == sorted([("bfloat16", x.size), ("float32", SHAPE[-1]), *numbers])
