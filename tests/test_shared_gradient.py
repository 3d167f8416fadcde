"""`OptimizerConfig.shared_gradient`: experts that also learn from the tasks of the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import random_batch, start_state, tiny_model, tiny_params

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.model.experts import gather, replace_routed, routed, share
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig, make_train_step

# Not clipped: the norm counts a gradient that all experts share once for each.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, clip_norm=0.0, epsilon=1e-2)
HARD = {"selection": "argmax", "experts_per_layer": 1}


def trained(model, params, config, batches):
    """The parameters after a step on each batch."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = start_state(model, config, mesh, params)
        step = make_train_step(model, config, StepConfig(), mesh, total_steps=10, seed=0)
        rates = {part: jnp.float32(rate) for part, rate in config.learning_rates.items()}
        for batch in batches:
            state, _ = step(state, batch, rates)
    return jax.device_get(state.params)


def alike(backbone):
    """A backbone whose experts are all copies of the first one."""
    for side, stack in routed(backbone):
        copies = jax.tree.map(lambda p: jnp.broadcast_to(p[:, :1], p.shape), stack)
        backbone = replace_routed(backbone, side, copies)
    return backbone


def spread(params):
    """The largest difference between two experts of a layer."""
    return max(
        np.ptp(leaf, axis=1).max()
        for _, stack in routed(params["backbone"])
        for leaf in jax.tree.leaves(stack)
    )


def test_with_the_whole_gradient_shared_experts_are_one_dense_model():
    model, dense = tiny_model(**HARD), tiny_model(experts=1)
    params = tiny_params(model)
    params["backbone"] = alike(params["backbone"])
    first = np.zeros((2, 1), np.int32)
    squeezed = {"backbone": gather(params["backbone"], first)}
    batches = [random_batch(seed=seed) for seed in range(3)]
    config = dataclasses.replace(OPTIMIZER, shared_gradient=1.0)
    found = trained(model, params, config, batches)
    wanted = trained(dense, squeezed, OPTIMIZER, batches)
    assert spread(found) < 1e-6
    for expert in (0, 3):
        taken = gather(jax.tree.map(jnp.asarray, found["backbone"]), np.full((2, 1), expert))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            taken, jax.device_get(wanted["backbone"]),
        )  # fmt: skip
    # With less of it, they learn to differ; the less, the more.
    half, none = (
        spread(trained(model, params, dataclasses.replace(config, shared_gradient=s), batches))
        for s in (0.9, 0.0)
    )
    assert 1e-4 < half < none


def test_share_in_numpy():
    tree = tiny_params(tiny_model())["backbone"]
    found = dict(routed(share(tree, 0.25)))
    for side, stack in routed(tree):
        for ours, leaf in zip(*map(jax.tree.leaves, (found[side], stack)), strict=True):
            experts = np.moveaxis(np.asarray(leaf), 1, 0)
            mixed = [0.75 * expert + 0.25 * sum(experts) for expert in experts]
            np.testing.assert_allclose(ours, np.stack(mixed, 1), rtol=1e-5, atol=1e-6)


def test_refused_where_unused_experts_must_rest():
    config = dataclasses.replace(OPTIMIZER, lazy=True, shared_gradient=0.5)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=r"OptimizerConfig.shared_gradient moves every expert"):
        make_train_step(tiny_model(**HARD), config, StepConfig(), mesh, 10, 0)
