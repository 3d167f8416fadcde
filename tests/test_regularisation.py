"""The terms against plain formulas over pairs of experts, in NumPy and differentiated by JAX."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import tiny_model

from moe_jax.core.errors import UserError
from moe_jax.model.task_moe import shapes_of
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.penalties import expert_distance, penalty, route_entropy, route_load
from moe_jax.training.step import StepConfig, check_step

# Joined matrices: (axis after layer and expert, number of matrices), separate in PyTorch.
SIDE_BY_SIDE = {"qkv_kernel": (1, 3), "qkv_bias": (0, 3), "kv_kernel": (1, 2), "kv_bias": (0, 2)}


def backbone(experts, architecture="bart", seed=0):
    """Random parameters of a tiny model."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in shapes_of(tiny_model(experts=experts, architecture=architecture)).items():
        *path, last = name.split("/")
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[last] = rng.normal(size=shape).astype(np.float32)
    return tree["backbone"]


def pairs(tree, architecture, norm):
    """Mean over pairs of experts of the sum of `norm` over their arrays, summed over layers."""
    total = 0.0
    for side in ("encoder", "decoder"):
        leaves = jax.tree_util.tree_leaves_with_path(tree[side]["layers"]["routed"])
        for path, array in leaves:
            axis, parts = SIDE_BY_SIDE.get(path[-1].key, (0, 1))
            if architecture == "t5" and path[-1].key == "in_kernel":
                axis, parts = 1, 2  # gate and value
            layers, experts = array.shape[:2]
            for layer in range(layers):
                each = [
                    norm(x - y)
                    for a, b in itertools.combinations(array[layer], 2)
                    for x, y in zip(
                        jnp.split(a, parts, axis) if parts > 1 else [a],
                        jnp.split(b, parts, axis) if parts > 1 else [b],
                        strict=True,
                    )
                ]
                total += sum(each) / (experts * (experts - 1) / 2)
    return total


@pytest.mark.parametrize(("experts", "architecture"), [(2, "bart"), (3, "t5"), (4, "bart")])
def test_expert_distance(experts, architecture):
    tree = backbone(experts, architecture)
    value, grads = jax.jit(jax.value_and_grad(expert_distance))(tree)
    in_numpy = pairs(tree, architecture, lambda x: np.sqrt(np.sum(np.float64(x) ** 2)))
    np.testing.assert_allclose(value, in_numpy, rtol=1e-5)
    routed = {side: {"layers": tree[side]["layers"]} for side in ("encoder", "decoder")}
    plain = jax.jit(jax.grad(lambda t: pairs(t, architecture, lambda x: jnp.sqrt(jnp.sum(x**2)))))
    for side, wanted in plain(routed).items():
        for x, y in zip(
            jax.tree.leaves(grads[side]["layers"]), jax.tree.leaves(wanted["layers"]), strict=True
        ):
            np.testing.assert_allclose(x, y, atol=1e-6)
    assert not np.any(grads["embedding"])


def test_equal_experts_and_one_expert():
    """Everything is 0 where the published code divides by zero or the norm has no gradient."""
    for tree in (
        backbone(1),
        jax.tree.map(lambda x: np.ones_like(x), backbone(3)),
    ):
        value, grads = jax.jit(jax.value_and_grad(expert_distance))(tree)
        assert value == 0
        assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


G, N, E = 5, 3, 4


def test_terms_of_routes():
    logits = np.random.default_rng(0).normal(size=(G, N, E))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = np.mean([-sum(x * np.log(x) for x in row) for row in p.reshape(-1, E)])
    np.testing.assert_allclose(route_entropy(jnp.float32(p)), entropy, rtol=1e-5)
    load = p.mean(0)
    variation = np.mean([(np.std(row) / np.mean(row)) ** 2 for row in load])
    np.testing.assert_allclose(route_load(jnp.float32(p)), variation, rtol=1e-5)


def test_terms_at_their_ends():
    same = jnp.zeros((G, N, E)).at[..., 1].set(1.0)
    assert route_entropy(same) == 0
    np.testing.assert_allclose(route_load(same), E - 1)  # all on one expert
    even = jnp.eye(E)[jnp.arange(8) % E][:, None]
    np.testing.assert_allclose(route_load(even), 0, atol=1e-12)
    np.testing.assert_allclose(route_entropy(jnp.full((G, N, E), 1 / E)), np.log(E), rtol=1e-6)


def test_decided_routes_have_a_finite_gradient():
    """At a low temperature, the softmax of an expert that is far behind is exactly 0."""
    model = tiny_model(
        tasks=2, experts=E, kind="free", representation_dim=2 * E, selection="argmax",
        temperature=0.1, temperature_schedule="constant",
    )  # fmt: skip
    logits = jnp.float32([[20.0, 0, 0, 19.9, 0, 1, 2, 30]] * 2)
    params = {"backbone": {}, "router": {}}

    def total(logits):
        config = StepConfig(route_entropy=1.0)
        return penalty(model, {**params, "representations": logits}, np.arange(2), 0, config)[0]

    p = 1 / (1 + np.exp(-1.0))  # of two experts whose logits differ by 0.1, over 0.1
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    value, grads = jax.value_and_grad(total)(logits)
    np.testing.assert_allclose(value, entropy / 2, rtol=1e-4)  # the other layer is decided
    # By the logit ahead: -p (1 - p) log(p / (1 - p)) over the temperature; 4 layers of tasks.
    wanted = np.zeros((2, 2 * E))
    wanted[:, [0, 3]] = np.array([-1, 1]) * p * (1 - p) * 1.0 / 0.1 / 4
    np.testing.assert_allclose(grads, wanted, atol=1e-4)


def test_penalty_reads_the_routes_of_the_batch_at_their_temperature():
    """A router without a network, so that logits are known."""
    model = tiny_model(
        tasks=3, experts=E, kind="free", representation_dim=2 * E, selection="gumbel_softmax_st",
        temperature=2.0, temperature_rate=0.1,
    )  # fmt: skip
    logits = np.random.default_rng(1).normal(size=(3, 2, E)).astype(np.float32)
    params = {"backbone": {}, "router": {}, "representations": jnp.asarray(logits.reshape(3, -1))}
    config = StepConfig(route_entropy=0.5, route_load=-2.0)
    task_id = np.array([2, 0, 2])
    x = np.exp(logits[task_id] / (2.0 * np.exp(-0.1 * 3)))
    p = jnp.asarray(x / x.sum(-1, keepdims=True))
    actual = jax.value_and_grad(
        lambda r: penalty(model, {**params, "representations": r}, task_id, jnp.int32(3), config),
        has_aux=True,
    )
    (total, terms), grads = actual(params["representations"])
    wanted = {"route_entropy": route_entropy(p), "route_load": route_load(p)}
    for name, value in wanted.items():
        np.testing.assert_allclose(terms[f"regularisation/{name}"], value, rtol=1e-5)
    np.testing.assert_allclose(
        total, 0.5 * wanted["route_entropy"] - 2.0 * wanted["route_load"], rtol=1e-5
    )
    moved_T = np.abs(grads).max(1) > 1e-4
    assert moved_T.tolist() == [True, False, True]  # task 1 is not in the batch


def test_routes_that_nobody_chooses_are_refused():
    with pytest.raises(UserError, match=r"route_load is for routes .* selection 'average'"):
        check_step(tiny_model(selection="average"), OptimizerConfig(), StepConfig(route_load=1.0))
