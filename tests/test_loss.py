"""The loss against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training import loss as losses
from moe_jax.training.loss import token_losses, token_losses_in_chunks


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_is_cross_entropy_against_the_smoothed_distribution(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (2, 5))
    log_p = logits.astype(np.float64)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    wanted = (1 - smoothing) * np.eye(7)[targets] + smoothing / 7
    actual = token_losses(jnp.asarray(logits), jnp.asarray(targets), smoothing)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, -(wanted * log_p).sum(-1), rtol=1e-5)


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


@pytest.mark.parametrize("most", [1000, 7 * 31, 100, 31])
def test_chunks_give_the_losses_and_gradients_of_the_whole(monkeypatch, most):
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 7, 5), (5, 31)))
    targets = jnp.asarray(rng.integers(0, 31, (2, 7)))
    weights = jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)

    def total(function, hidden, kernel):
        actual = function(lambda x: x @ kernel, hidden, targets, 0.1)
        assert actual.shape == targets.shape
        return jnp.sum(weights * actual)

    def whole(logits, hidden, targets, smoothing):
        return token_losses(logits(hidden), targets, smoothing)

    wanted = jax.value_and_grad(lambda *x: total(whole, *x), (0, 1))(hidden, kernel)
    monkeypatch.setattr(losses, "MOST_LOGITS", most)
    in_chunks = jax.jit(jax.value_and_grad(lambda *x: total(token_losses_in_chunks, *x), (0, 1)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        in_chunks(hidden, kernel), wanted,
    )  # fmt: skip
    # All arrays of the forward and the backward pass, except those of the kernel's shape.
    shapes = set(re.findall(r"f32\[([\d,]*)31\]", str(in_chunks.trace(hidden, kernel).jaxpr)))
    made = [np.prod([int(n) for n in s.split(",") if n]) * 31 for s in shapes - {"5,"}]
    assert made and max(made) <= max(most, 31)


def test_chunks_take_less_memory(monkeypatch):
    hidden, kernel = jax.ShapeDtypeStruct((8, 64, 16), "float32"), jnp.zeros((16, 2**15))
    targets = jnp.zeros((8, 64), jnp.int32)

    def memory(most):
        monkeypatch.setattr(losses, "MOST_LOGITS", most)
        grad = jax.grad(
            lambda h: token_losses_in_chunks(lambda x: x @ kernel, h, targets, 0.1).sum()
        )
        return jax.jit(grad).lower(hidden).compile().memory_analysis().temp_size_in_bytes

    assert memory(2**20) < memory(2**25) / 4
