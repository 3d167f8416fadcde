"""The loss against NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training import loss as losses
from moe_jax.training.loss import summed_loss, token_losses


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


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("most", [1000, 7 * 32, 100])
def test_parts_give_the_loss_and_gradients_of_the_whole(monkeypatch, most, multiple):
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((14, 5), (5, 31)))
    targets = jnp.asarray(rng.integers(0, 31, 14))
    weights = jnp.asarray(rng.uniform(0, 2, 14) * (np.arange(14) % 3 > 0), jnp.float32)

    def whole(hidden, kernel):
        return 3 * jnp.sum(weights * token_losses(hidden @ kernel, targets, 0.1))

    def parts(hidden, kernel):
        return 3 * summed_loss(hidden, kernel, targets, weights, 0.1, multiple)

    wanted = jax.value_and_grad(whole, (0, 1))(hidden, kernel)
    monkeypatch.setattr(losses, "MOST_LOGITS", most)
    differentiated = jax.jit(jax.value_and_grad(parts, (0, 1)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        differentiated(hidden, kernel), wanted,
    )  # fmt: skip
    np.testing.assert_allclose(parts(hidden, kernel), wanted[0], rtol=1e-5)
    # All arrays as wide as the logits, forward and backward, except the kernel and its gradient.
    width = 31 + -31 % multiple
    text = str(differentiated.trace(hidden, kernel).jaxpr)
    shapes = set(re.findall(rf"f32\[(\d+),{width}\]", text)) - {"5"}
    assert shapes and max(map(int, shapes)) * width <= max(most, width)


def test_bfloat16_states_get_the_gradient_of_float32_but_for_rounding():
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 16), (16, 50)))
    targets, weights = jnp.asarray(rng.integers(0, 50, 64)), jnp.ones(64)

    def grads(dtype):
        grad = jax.grad(lambda h, k: summed_loss(h, k, targets, weights, 0.1, 128), (0, 1))
        return grad(hidden.astype(dtype), kernel), grad

    (wanted, wanted_kernel), _ = grads("float32")
    (actual, actual_kernel), grad = grads("bfloat16")
    assert (actual.dtype, actual_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    for a, b in ((actual.astype(jnp.float32), wanted), (actual_kernel, wanted_kernel)):
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)
    # Products read bfloat16 only.
    text = str(jax.make_jaxpr(grad)(hidden.astype(jnp.bfloat16), kernel))
    assert text.count("dot_general") == 3 and text.count("preferred_element_type=float32") == 2


def test_parts_take_less_memory(monkeypatch):
    hidden, kernel = jax.ShapeDtypeStruct((512, 16), "float32"), jnp.zeros((16, 2**15))
    targets, weights = jnp.zeros(512, jnp.int32), jnp.ones(512)

    def memory(most):
        monkeypatch.setattr(losses, "MOST_LOGITS", most)
        grad = jax.grad(lambda h: summed_loss(h, kernel, targets, weights, 0.1))
        return jax.jit(grad).lower(hidden).compile().memory_analysis().temp_size_in_bytes

    assert memory(2**20) < memory(2**25) / 4
