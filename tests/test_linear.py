"""The layers' matrix product and bias against plain JAX, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.linear import add_bias, linear


@pytest.mark.parametrize("spec, x_shape, kernel_shape", [
    ("rld,df->rlf", (2, 3, 4), (4, 5)),
    ("rld,dck->rlck", (2, 3, 4), (4, 3, 10)),
    ("rld,dchk->rlchk", (2, 3, 4), (4, 3, 2, 5)),
])  # fmt: skip
def test_product_and_gradients_are_those_of_einsum(spec, x_shape, kernel_shape):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x_shape, kernel_shape))
    ours, pull_back = jax.vjp(linear, x, kernel)
    theirs, einsum_pull_back = jax.vjp(lambda x, k: jnp.einsum(spec, x, k), x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    dy = jnp.asarray(rng.normal(size=ours.shape), jnp.float32)
    for got, expected in zip(pull_back(dy), einsum_pull_back(dy), strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_under_vmap():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(4, 3, 5)), jnp.float32)
    grads = jax.vmap(jax.grad(lambda k: jnp.sum(linear(x, k) ** 2)))(kernels)
    for k, grad in zip(kernels, grads, strict=True):
        np.testing.assert_allclose(grad, 2 * x.T @ (x @ k), rtol=1e-4, atol=1e-5)


def test_gradient_of_a_bias_is_summed_in_float32():
    """In bfloat16, a sum of 4,096 equal numbers would stop at 256 of them."""
    dy = jnp.full((8, 512, 3), 0.3, jnp.bfloat16)
    y, pull_back = jax.vjp(add_bias, dy, jnp.ones(3))
    d_y, d_bias = jax.jit(pull_back)(dy)
    assert (y.dtype, d_y.dtype, d_bias.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(d_bias, np.float64(dy[0, 0]) * 4096, rtol=1e-5)
    np.testing.assert_array_equal(add_bias(dy, None), dy)
