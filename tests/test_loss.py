"""The loss against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training.loss import token_losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_is_cross_entropy_against_the_smoothed_distribution(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (2, 5))
    log_p = logits.astype(np.float64)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    wanted = (1 - smoothing) * np.eye(7)[targets] + smoothing / 7
    found = token_losses(jnp.asarray(logits), jnp.asarray(targets), smoothing)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, -(wanted * log_p).sum(-1), rtol=1e-5)


def test_large_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    targets = jnp.array([0, 1])
    loss, grads = jax.value_and_grad(lambda x: token_losses(x, targets, 0.1).sum())(logits)
    assert np.isfinite(loss) and np.isfinite(grads).all()
    np.testing.assert_allclose(token_losses(logits, targets, 0.0), [0.0, np.log(3)], atol=1e-3)


def test_the_gradient_vanishes_at_the_smoothed_distribution():
    wanted = np.array([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], np.float32)
    grad = jax.grad(lambda x: token_losses(x, jnp.int32(0), 0.1))(jnp.log(wanted))
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)
