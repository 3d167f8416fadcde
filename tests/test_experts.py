"""Gathering, scattering and mixing of experts against plain NumPy indexing."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.experts import gather, init_experts, mix, scatter_add

E = 4
# Encoder: 3 routed layers; decoder: 2 routed and 1 vanilla.
DEPTH = {"encoder": 3, "decoder": 2}


def tree(rng, experts):
    """A backbone's tree with small arrays."""

    def stack(layers, copies):
        return {
            "kernel": rng.normal(size=(layers, copies, 3, 2)).astype(np.float32),
            "bias": rng.normal(size=(layers, copies, 2)).astype(np.float32),
        }

    return {
        "embedding": rng.normal(size=(5, 3)).astype(np.float32),
        "encoder": {"layers": {"routed": stack(3, experts)}, "norm": np.ones(3, np.float32)},
        "decoder": {
            "layers": {"routed": stack(2, experts), "vanilla": stack(1, 1)},
            "norm": np.ones(3, np.float32),
        },
    }


# One expert; several; all of them; the same one twice.
INDICES = [
    [[0], [3], [1], [2], [0]],
    [[0, 1], [3, 2], [1, 0], [2, 3], [0, 3]],
    [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [0, 1, 2, 3], [2, 3, 0, 1]],
    [[1, 1], [2, 2], [0, 0], [3, 3], [1, 2]],
]


@pytest.mark.parametrize("unroll", [1, 2, 3])
@pytest.mark.parametrize("index", INDICES)
def test_gather_and_scatter_add(index, unroll):
    rng = np.random.default_rng(0)
    index_NxK = np.array(index, np.int32)
    total, addend = tree(rng, E), tree(rng, index_NxK.shape[1])
    gathered = jax.jit(partial(gather, unroll=unroll))(total, index_NxK)
    scattered = jax.jit(partial(scatter_add, unroll=unroll))(total, addend, index_NxK)

    expected = jax.tree.map(lambda t, a: t + a if t.shape == a.shape else t, total, addend)
    for side, rows in (("encoder", index_NxK[:3]), ("decoder", index_NxK[3:])):
        for name, array in total[side]["layers"]["routed"].items():
            taken = np.stack([array[layer, row] for layer, row in enumerate(rows)])
            np.testing.assert_array_equal(gathered[side]["layers"]["routed"][name], taken)
            summed = array.copy()
            for layer, row in enumerate(rows):
                for place, expert in enumerate(row):
                    summed[layer, expert] += addend[side]["layers"]["routed"][name][layer, place]
            expected[side]["layers"]["routed"][name] = summed
    jax.tree.map(np.testing.assert_allclose, scattered, expected)
    for path in (("embedding",), ("encoder", "norm"), ("decoder", "layers", "vanilla", "kernel")):
        ours, theirs = gathered, total
        for key in path:
            ours, theirs = ours[key], theirs[key]
        np.testing.assert_array_equal(ours, theirs)


def test_scatter_add_is_the_transpose_of_gather():
    """What `jax.grad` through `gather` would give is what the training step adds up."""
    rng = np.random.default_rng(1)
    index_NxK = np.array(INDICES[1], np.int32)
    total, cotangent = tree(rng, E), tree(rng, 2)
    (grad,) = jax.jit(lambda t, c: jax.vjp(lambda b: gather(b, index_NxK), t)[1](c))(
        total, cotangent
    )
    zeros = jax.tree.map(np.zeros_like, total)
    jax.tree.map(np.testing.assert_allclose, grad, scatter_add(zeros, cotangent, index_NxK))


X = np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32)


@pytest.mark.parametrize("experts", [1, 3])
def test_mix(experts):
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: p[0], tree(rng, experts)["encoder"]["layers"]["routed"])
    weights = rng.dirichlet(np.ones(experts)).astype(np.float32) * 0.9
    expected = sum(
        weights[e] * (X @ params["kernel"][e] + params["bias"][e]) for e in range(experts)
    )
    y = mix(lambda p: X @ p["kernel"] + p["bias"], params, jnp.asarray(weights))
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_mix_keeps_bfloat16():
    params = {"kernel": jnp.ones((2, 3, 2), jnp.bfloat16), "bias": jnp.zeros((2, 2), jnp.bfloat16)}
    x = jnp.ones((1, 3), jnp.bfloat16)
    y = mix(lambda p: x @ p["kernel"] + p["bias"], params, jnp.array([0.5, 0.5], jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 3.0)


def test_init_experts_adds_noise_to_copies():
    box = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed", "mlp"))

    def init(key):
        return {"kernel": box(key, (40, 50))}

    experts = init_experts(init, jax.random.key(0), layers=2, count=3, noise=0.01)["kernel"]
    assert experts.names == ("layer", "expert", "embed", "mlp")
    value = np.asarray(experts.value)
    assert value.shape == (2, 3, 40, 50)
    single = init_experts(init, jax.random.key(0), layers=2, count=1, noise=0.01)["kernel"].value
    difference = value - single
    np.testing.assert_allclose(difference.std(axis=(2, 3)), 0.01, rtol=0.1)
    assert abs(np.corrcoef(difference.reshape(6, -1)) - np.eye(6)).max() < 0.15
    assert abs(np.corrcoef(value[:, 0].reshape(2, -1))[0, 1]) < 0.15  # layers are independent
