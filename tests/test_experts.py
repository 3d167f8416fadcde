"""Trees of experts, and how a layer uses them, against plain NumPy indexing."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import tiny_model

from moe_jax.kernels.dropout import Dropout
from moe_jax.model.dispatch import Gather, Mix, weighted, weighted_sum
from moe_jax.model.experts import gather, merge, scatter_add
from moe_jax.model.task_moe import init_params

E = 4
# Encoder: 3 routed layers; decoder: 2 routed and 1 vanilla.


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


def test_merge():
    """The weighted mean of each layer's experts; one-hot weights take one expert."""
    rng = np.random.default_rng(0)
    backbone = tree(rng, E)
    weights_NxE = rng.dirichlet(np.ones(E), size=5).astype(np.float32)
    merged = jax.jit(merge)(backbone, weights_NxE)
    for side, weights in (("encoder", weights_NxE[:3]), ("decoder", weights_NxE[3:])):
        for name, array in backbone[side]["layers"]["routed"].items():
            means = [np.tensordot(w, layer, 1) for w, layer in zip(weights, array, strict=True)]
            found = merged[side]["layers"]["routed"][name]
            np.testing.assert_allclose(found, np.stack(means)[:, None], rtol=1e-5, atol=1e-6)
    vanilla = merged["decoder"]["layers"]["vanilla"]
    jax.tree.map(np.testing.assert_array_equal, vanilla, backbone["decoder"]["layers"]["vanilla"])
    index_NxK = np.array(INDICES[0], np.int32)
    one_hot_NxE = np.eye(E, dtype=np.float32)[index_NxK[:, 0]]
    jax.tree.map(
        np.testing.assert_array_equal,
        merge(backbone, one_hot_NxE),
        jax.jit(gather)(backbone, index_NxK),
    )


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


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_scatter_add_is_the_transpose_of_gather(platform, monkeypatch):
    """`scatter_add` gives the same gradients as `jax.grad` through `gather`, in the form for CPUs
    and in that for other platforms."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, **forms: forms[platform](*xs))
    rng = np.random.default_rng(1)
    index_NxK = np.array(INDICES[1], np.int32)
    total, cotangent = tree(rng, E), tree(rng, 2)
    (grad,) = jax.jit(lambda t, c: jax.vjp(lambda b: gather(b, index_NxK), t)[1](c))(
        total, cotangent
    )
    zeros = jax.tree.map(np.zeros_like, total)
    jax.tree.map(np.testing.assert_allclose, grad, scatter_add(zeros, cotangent, index_NxK))


def test_matrices_are_taken_in_another_dtype():
    """Their gradients are added in the dtype of the whole backbone."""
    backbone = jax.tree.map(jnp.asarray, tree(np.random.default_rng(0), E))
    index_NxK = np.array(INDICES[1], np.int32)
    exact, taken = (gather(backbone, index_NxK, dtype=dtype) for dtype in (None, "bfloat16"))
    layers, exact_layers = taken["decoder"]["layers"], exact["decoder"]["layers"]
    found, wanted = layers["routed"], exact_layers["routed"]
    np.testing.assert_array_equal(found["kernel"], wanted["kernel"].astype("bfloat16"))
    np.testing.assert_array_equal(found["bias"], wanted["bias"], strict=True)
    np.testing.assert_array_equal(
        layers["vanilla"]["kernel"], exact_layers["vanilla"]["kernel"], strict=True
    )
    jax.tree.map(
        partial(np.testing.assert_array_equal, strict=True),
        scatter_add(backbone, taken, index_NxK),
        scatter_add(backbone, jax.tree.map(lambda a: a.astype("float32"), taken), index_NxK),
    )


# ----------------------------------------------------------------------------- dispatch

X = np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32)


class Affine(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.zeros, (3, 2))
        return x @ kernel.astype(self.dtype) + self.param("bias", nn.initializers.zeros, (2,))


def dispatched(dispatch, params, x, dtype="float32"):
    """The layer's output under a dispatch."""
    use = nn.apply(lambda layer, x: dispatch(layer, x, (), (), None, ""), Affine(dtype))
    return use({"params": params}, x)


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("by_row", [False, True])
def test_mix(experts, by_row):
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: p[0], tree(rng, experts)["encoder"]["layers"]["routed"])
    size = (experts, len(X)) if by_row else (experts,)
    weights = rng.uniform(size=size).astype(np.float32)
    expected = sum(
        np.reshape(weights[e], (-1, 1)) * (X @ params["kernel"][e] + params["bias"][e])
        for e in range(experts)
    )
    y = dispatched(Mix(jnp.asarray(weights)), params, X)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_mix_of_one_expert():
    """One expert: parameters have no axis of experts."""
    params = {"kernel": np.eye(3, 2, dtype=np.float32), "bias": np.ones(2, np.float32)}
    y = dispatched(Mix(jnp.array([0.9])), params, X)
    np.testing.assert_allclose(y, 0.9 * (X[:, :2] + 1.0), atol=1e-6)


@pytest.mark.parametrize("index", [[2], [3, 0], [1, 1]])
def test_gather_in_a_layer(index):
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda p: p[0], tree(rng, E)["encoder"]["layers"]["routed"])
    weights = rng.uniform(size=len(index)).astype(np.float32)
    expected = sum(
        w * (X @ params["kernel"][e] + params["bias"][e])
        for e, w in zip(index, weights, strict=True)
    )
    y = dispatched(Gather(jnp.array(index), jnp.asarray(weights)), params, X)
    np.testing.assert_allclose(y, expected, atol=1e-5)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Dropout(0.5)(x * self.param("scale", nn.initializers.ones, ()), deterministic=False)


@pytest.mark.parametrize("experts", [2, 5])
def test_every_expert_drops_values_of_its_own(experts):
    """As many as they are: a few are written out, more are mapped over."""
    x = jnp.ones((8, 8))

    def of_expert(e):
        mix = Mix(jax.nn.one_hot(e, experts))
        use = nn.apply(lambda layer, x: mix(layer, x, (), (), None, ""), Noisy())
        params = {"scale": jnp.ones(experts)}
        return np.asarray(use({"params": params}, x, rngs={"dropout": jax.random.key(0)}))

    kept = [of_expert(e) > 0 for e in range(experts)]
    for a, b in itertools.combinations(kept, 2):
        assert 0.2 < np.mean(a == b) < 0.8


def test_mix_keeps_bfloat16():
    params = {"kernel": jnp.ones((2, 3, 2), jnp.bfloat16), "bias": jnp.zeros((2, 2), jnp.bfloat16)}
    x = jnp.ones((1, 3), jnp.bfloat16)
    y = dispatched(Mix(jnp.array([0.5, 0.5], jnp.float32)), params, x, "bfloat16")
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 3.0)


def test_fresh_experts_are_copies_with_noise():
    model = tiny_model(
        experts=3, d_model=40, d_ff=50, encoder_layers=2, expert_noise=0.01, init_std=1.0
    )
    layers = jax.jit(lambda key: init_params(model, key)["backbone"]["encoder"]["layers"]["routed"])
    kernel = layers(jax.random.key(0))["feed_forward"]["in_kernel"]
    assert kernel.names == ("layer", "expert", "embed", "gate", "mlp")
    value = np.asarray(kernel.value)[:, :, :, 0]
    assert value.shape == (2, 3, 40, 50)
    # The noise of two copies is independent, so their difference has twice its variance.
    difference = value - value[:, [1, 2, 0]]
    np.testing.assert_allclose(difference.std(axis=(2, 3)), 0.01 * 2**0.5, rtol=0.1)
    np.testing.assert_allclose(value.std(), 1.0, rtol=0.1)
    assert abs(np.corrcoef(difference[0, 0].ravel(), difference[1, 0].ravel())[0, 1]) < 0.15
    assert abs(np.corrcoef(value[:, 0].reshape(2, -1))[0, 1]) < 0.15  # layers are independent


@pytest.mark.parametrize("shape", [(), (4,)])
def test_gradient_of_a_weight_is_summed_in_float32(shape):
    """Also where activations are bfloat16, in which a long sum stops growing."""
    rng = np.random.default_rng(0)
    y, dy = (jnp.asarray(rng.uniform(size=(4, 64, 64)), jnp.bfloat16) for _ in range(2))
    weight = np.asarray(rng.uniform(size=shape), np.float32)
    out, pull_back = jax.vjp(weighted, y, weight)
    d_y, d_weight = jax.jit(pull_back)(dy)
    assert (out.dtype, d_y.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    axes = tuple(range(len(shape), 3))
    expected = (np.float64(y) * np.float64(dy)).sum(axes)
    np.testing.assert_allclose(d_weight, expected, rtol=1e-5)
    each = weight.reshape(-1, 1, 1)
    np.testing.assert_allclose(np.float64(out), each * np.float64(y), rtol=1e-2)
    np.testing.assert_allclose(np.float64(d_y), each * np.float64(dy), rtol=1e-2)


@pytest.mark.parametrize("shape", [(5,), (5, 4)])
def test_gradients_of_the_weights_of_all_experts_are_float32(shape):
    """A router learns from their differences, which bfloat16 would round away."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.uniform(size=(5, 4, 32, 16)), jnp.bfloat16)
    dy = jnp.asarray(rng.uniform(size=(4, 32, 16)), jnp.bfloat16)
    weights = np.asarray(rng.uniform(size=shape), np.float32)
    out, pull_back = jax.vjp(weighted_sum, y, weights)
    d_y, d_weights = jax.jit(pull_back)(dy)
    assert (out.dtype, d_y.dtype, d_weights.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = (np.float64(y) * np.float64(dy)).sum(tuple(range(len(shape), 4)))
    np.testing.assert_allclose(d_weights, expected, rtol=1e-5)
    each = weights.reshape(*shape, *[1] * (4 - len(shape)))
    np.testing.assert_allclose(np.float64(out), (each * np.float64(y)).sum(0), rtol=2e-2)
    np.testing.assert_allclose(np.float64(d_y), each * np.float64(dy), rtol=1e-2)
