"""Statistics of the dropout masks: rate, and independence of places, steps and kinds of key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.dropout import dropout

N = 1 << 18


def kept(key, rate=0.5, shape=(N,)):
    return np.asarray(dropout(jnp.ones(shape), rate, key)) > 0


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_scale(impl, rate):
    y = np.asarray(dropout(jnp.ones(N), rate, jax.random.key(3, impl=impl)))
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - rate)], rtol=1e-6)
    # Five standard deviations of a binomial share.
    assert abs((y == 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / N)


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_masks_of_other_keys_and_places_are_independent(impl):
    key = jax.random.key(0, impl=impl)
    # Neighbouring keys, as steps and layers have them.
    masks = [kept(jax.random.fold_in(key, i)) for i in range(4)]
    masks += [kept(jax.random.key(seed, impl=impl)) for seed in (1, 2)]
    masks += [kept(k) for k in jax.random.split(jax.random.key(1, impl=impl), 4)]
    masks += [np.roll(masks[0], shift) for shift in (1, 2, 64, 768, 1024)]
    correlations = np.corrcoef(np.stack(masks).astype(np.float64))
    assert np.abs(correlations - np.eye(len(masks))).max() < 5 / np.sqrt(N)


def test_blocks_of_a_mask_are_uniform():
    """Counts of the 256 patterns of 8 neighbours: chi-squared with 255 degrees of freedom."""
    patterns = np.packbits(kept(jax.random.key(7, impl="rbg")))
    counts = np.bincount(patterns, minlength=256)
    expected = len(patterns) / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 2, 3)])
def test_any_shape(shape):
    assert dropout(jnp.ones(shape), 0.5, jax.random.key(0)).shape == shape


def test_a_rate_next_to_one():
    assert not dropout(jnp.ones(8), 1 - 1e-12, jax.random.key(0)).any()


def test_bfloat16_stays():
    assert dropout(jnp.ones(4, jnp.bfloat16), 0.1, jax.random.key(0)).dtype == jnp.bfloat16


def test_the_backward_pass_draws_the_mask_again():
    x, key = jnp.ones(N), jax.random.key(5, impl="rbg")
    y, pull_back = jax.vjp(lambda x: dropout(x, 0.25, key), x)
    assert all(array.size <= 4 for array in jax.tree.leaves(pull_back))  # the key alone is kept
    np.testing.assert_array_equal(pull_back(x)[0], y)
