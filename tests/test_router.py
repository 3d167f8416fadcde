"""Every router against a loop in NumPy, after PyTorch's documented formulas."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from toy_run import tiny_model, tiny_params

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh, shardings
from moe_jax.model.config import RouterConfig
from moe_jax.model.router import CentroidRouter, PublishedRouter
from moe_jax.model.task_moe import routes_of

T, K, N, E, H = 3, 8, 5, 4, 12
KINDS = [
    f"{family}{form}"
    for family in ("linear", "rnn", "lstm", "gru", "transformer")
    for form in ("", "_layer_specific")
]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def affine(p, x, unit=...):
    return x @ p["kernel"][unit] + p["bias"][unit]


def layer_norm(p, x):
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return x * p["scale"] + p["bias"]


def recurrent(p, family, direction, x_NxI):
    """States of one direction over one task's layers, in the order they are computed."""
    W, U = p["input_kernel"][direction], p["hidden_kernel"][direction]
    a, b = p["input_bias"][direction], p["hidden_bias"][direction]
    h = c = np.zeros(H)
    states = []
    for x in x_NxI:
        i = [x @ W[:, gate] + a[gate] for gate in range(W.shape[1])]
        r = [h @ U[:, gate] + b[gate] for gate in range(W.shape[1])]
        if family == "rnn":
            h = np.tanh(i[0] + r[0])
        elif family == "gru":
            z = sigmoid(i[1] + r[1])
            h = (1 - z) * np.tanh(i[2] + sigmoid(i[0] + r[0]) * r[2]) + z * h
        else:
            c = sigmoid(i[1] + r[1]) * c + sigmoid(i[0] + r[0]) * np.tanh(i[2] + r[2])
            h = sigmoid(i[3] + r[3]) * np.tanh(c)
        states.append(h)
    return states


def transformer(p, x_NxD):
    D, heads = x_NxD.shape[1], 4
    q, k, v = np.split(affine(p["qkv"], x_NxD), 3, axis=1)
    y = np.zeros_like(x_NxD)
    for head in range(heads):
        at = slice(head * D // heads, (head + 1) * D // heads)
        scores = np.exp(q[:, at] @ k[:, at].T / np.sqrt(D // heads))
        y[:, at] = scores / scores.sum(1, keepdims=True) @ v[:, at]
    x = [layer_norm(p["attention_norm"], row) for row in x_NxD + affine(p["out"], y)]
    y = [affine(p["mlp_out"], np.maximum(affine(p["mlp_in"], row), 0)) for row in x]
    return [layer_norm(p["mlp_norm"], a + b) for a, b in zip(x, y, strict=True)]


def reference(p, kind, x_K):
    """Route logits [N, E] of one task."""
    family = kind.removesuffix("_layer_specific")
    if kind == "linear":
        return affine(p["output"], gelu(affine(p["hidden"], x_K))).reshape(N, E)
    if family == "linear":
        hidden = [gelu(affine(p["hidden"], x_K, n)) for n in range(N)]
        return np.stack([affine(p["output"], hidden[n], n) for n in range(N)])
    if kind == family:
        x = x_K + p["position"]
    else:
        x = np.stack([affine(p["hidden"], x_K, n) for n in range(N)])
    if family == "transformer":
        y = transformer(p["transformer"], x)
    else:
        forward = recurrent(p["recurrent"], family, 0, x)
        backward = recurrent(p["recurrent"], family, 1, x[::-1])[::-1]
        y = [np.concatenate(pair) for pair in zip(forward, backward, strict=True)]
    return np.stack([affine(p["output"], row) for row in y])


@pytest.mark.parametrize("kind", KINDS)
def test_router(kind):
    config = RouterConfig(kind=kind, hidden_dim=H, representation_dim=K)
    router = PublishedRouter(config, N, E)
    x_TxK = np.random.default_rng(0).normal(size=(T, K)).astype(np.float32)
    boxed = jax.jit(router.init)(jax.random.key(0), x_TxK)["params"]
    shardings(boxed, make_mesh(MeshConfig(), jax.devices()))  # refuses unknown logical axes
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim

    # Biases start at zero: move every parameter, so that each shows.
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), nn.meta.unbox(boxed)
    )
    ours = jax.jit(router.apply)({"params": params}, x_TxK)
    assert ours.shape == (T, N, E)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    theirs = np.stack([reference(params, kind, x_K) for x_K in x_TxK.astype(np.float64)])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_transformer_heads_must_divide():
    with pytest.raises(UserError, match="representation_dim 10 is not a multiple of the 4 heads"):
        RouterConfig(kind="transformer", representation_dim=10)
    with pytest.raises(UserError, match="hidden_dim 10 is not a multiple"):
        RouterConfig(kind="transformer_layer_specific", hidden_dim=10)


def test_unknown_kind():
    with pytest.raises(UserError, match=r"kind is 'gruu'.*did you mean 'gru'"):
        RouterConfig(kind="gruu")


def test_free_logits():
    """No network: the representation is the logits, and must be as long."""
    model = tiny_model(kind="free", representation_dim=8, tasks=T)
    params = tiny_params(model)
    assert params["router"] == {}
    routes = routes_of(model, params, 0)
    logits = np.asarray(params["representations"]).reshape(T, 2, 4)
    np.testing.assert_allclose(
        routes, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), atol=1e-6
    )
    with pytest.raises(UserError, match="2 layers x 3 experts = 6 numbers"):
        tiny_model(kind="free", representation_dim=8, experts=3)


def test_centroids():
    """Logits are cosines; similar representations share experts from the start."""
    rng = np.random.default_rng(0)
    # Four kinds of tasks, three of each; the length of a representation says nothing.
    kinds_KxK = 5 * np.eye(K)[:4] + 0.1 * rng.normal(size=(4, K))
    table_TxK = np.repeat(kinds_KxK, 3, axis=0) + 0.2 * rng.normal(size=(12, K))
    table_TxK = (table_TxK * rng.uniform(0.1, 9, (12, 1))).astype(np.float32)
    router = CentroidRouter(RouterConfig(kind="centroid", representation_dim=K), N, E)
    fresh = nn.meta.unbox(router.init(jax.random.key(0), table_TxK)["params"])
    fitted = router.fitted(fresh, table_TxK, seed=3)
    logits_TxNxE = router.apply({"params": fitted}, table_TxK)
    for layer, centroid_ExK in enumerate(fitted["centroid"]):
        for task, row_K in enumerate(table_TxK):
            cosines = centroid_ExK @ row_K
            cosines /= np.linalg.norm(centroid_ExK, axis=1) * np.linalg.norm(row_K)
            np.testing.assert_allclose(logits_TxNxE[task, layer], cosines, atol=1e-5)
    expert_KxTxN = np.argmax(logits_TxNxE, -1).reshape(4, 3, N)
    assert np.all(expert_KxTxN == expert_KxTxN[:, :1])
    for layer in range(N):
        assert sorted(expert_KxTxN[:, 0, layer]) == [0, 1, 2, 3]
    again = router.fitted(fresh, table_TxK, seed=3)
    np.testing.assert_array_equal(fitted["centroid"], again["centroid"])
    # A representation of zeros has no direction, and breaks nothing.
    zeros = np.zeros((1, K), np.float32)
    slope = jax.grad(lambda x: router.apply({"params": fitted}, x).sum())(zeros)
    assert np.all(np.isfinite(slope)) and not np.any(router.apply({"params": fitted}, zeros))
    # Fewer different tasks than experts: the others keep the centroid they had.
    few = router.fitted(fresh, table_TxK[[0, 3, 3]], seed=3)["centroid"]
    np.testing.assert_array_equal(few[:, 2:], fresh["centroid"][:, 2:])
    assert not np.any(few[:, :2] == fresh["centroid"][:, :2])
