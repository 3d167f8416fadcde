"""Activation functions against SciPy in float64, with gradients by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from moe_jax.kernels.activations import ACTIVATIONS
from moe_jax.model.family import FAMILIES

X = np.linspace(-6, 6, 1201)
EXACT = {
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * special.expit(x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name):
    y, pull_back = jax.vjp(ACTIVATIONS[name], jnp.asarray(X, jnp.float32))
    (dx,) = pull_back(jnp.ones_like(y))
    np.testing.assert_allclose(y, EXACT[name](X), atol=2e-6)
    away = np.abs(X) > 1e-3  # of the kink of `relu`
    slope = (EXACT[name](X + 1e-5) - EXACT[name](X - 1e-5)) / 2e-5
    np.testing.assert_allclose(dx[away], slope[away], atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"relu"}))  # which rounds nothing
def test_bfloat16_is_rounded_once(name):
    x = jnp.asarray(X, jnp.bfloat16)
    y, pull_back = jax.vjp(ACTIVATIONS[name], x)
    assert y.dtype == jnp.bfloat16
    exact = EXACT[name](np.asarray(x, np.float64))
    half_a_unit = 2.0**-8 * np.abs(exact) + 1e-5  # in the last place, at most
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= 1.01 * half_a_unit)
    # The input alone is kept.
    assert [leaf.shape for leaf in jax.tree.leaves(pull_back)] == [x.shape]
    assert pull_back(y)[0].dtype == jnp.bfloat16


def test_every_family_has_its_activation():
    assert {family.activation for family in FAMILIES.values()} <= set(ACTIVATIONS)
