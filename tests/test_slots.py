"""Gradients in slots, with plain AdamW and with lazy experts, where unused experts stay
unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import random_batch, start_state, tiny_model, tiny_params

from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.training import step as step_module
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.slots import find_slots
from moe_jax.training.step import StepConfig, make_train_step

E = 4
MODEL = tiny_model(experts=E, selection="gumbel_softmax_st", experts_per_layer=1)
PARAMS = tiny_params(MODEL)
BATCHES = [random_batch(groups=2, seed=seed) for seed in range(2)]
MESHES = {
    "1 device": (1, MeshConfig()),
    "2 data": (2, MeshConfig(data=2)),
    "2 expert, 2 model": (4, MeshConfig(expert=2, model=2)),
}


@functools.cache
def two_steps(mesh, lazy):
    """[state after 0, 1, 2 steps], as NumPy."""
    count, config = MESHES[mesh]
    mesh = make_mesh(config, jax.devices()[:count])
    # Without decay: an expert that was never used does not move in AdamW either. The epsilon: a
    # key's bias has no true gradient, and its rounding errors must not become steps.
    optimizer_config = OptimizerConfig(
        learning_rate=1e-2, weight_decay=0.0, epsilon=1e-4, lazy=lazy
    )
    with jax.set_mesh(mesh):
        state = start_state(MODEL, optimizer_config, mesh, PARAMS)
        step = make_train_step(MODEL, optimizer_config, StepConfig(), mesh, 10, seed=0)
        rates = {k: jnp.float32(v) for k, v in optimizer_config.learning_rates.items()}
        states = [jax.device_get(state)]
        for batch in BATCHES:
            state, _ = step(state, batch, rates)
            states.append(jax.device_get(state))
        assert step._cache_size() == 1
    return states


def changed(before, after):
    """For every side, [L, E]: which experts' parameters or moments differ."""
    actual = {}
    for a, b in zip(_backbones(before), _backbones(after), strict=True):
        for side in ("encoder", "decoder"):
            for x, y in zip(*(jax.tree.leaves(t[side]["layers"]["routed"]) for t in (a, b)),
                            strict=True):  # fmt: skip
                differs = np.any(x != y, axis=tuple(range(2, x.ndim)))
                actual[side] = actual.get(side, False) | differs
    return actual


def _backbones(state):
    """That of the parameters and of both moments."""
    is_params = lambda t: isinstance(t, dict) and isinstance(t.get("backbone"), dict)  # noqa: E731
    trees = jax.tree.leaves((state.params, state.opt_state), is_leaf=is_params)
    actual = [t["backbone"] for t in trees if is_params(t) and jax.tree.leaves(t["backbone"])]
    assert len(actual) == 3
    return actual


@pytest.mark.parametrize("mesh", MESHES)
def test_first_step_is_that_of_adamw(mesh):
    for ours, theirs in zip(
        jax.tree.leaves(two_steps(mesh, True)[1]),
        jax.tree.leaves(two_steps("1 device", False)[1]),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_experts_not_in_use_stay_exactly(mesh):
    _, first, second = two_steps(mesh, True)
    moved = changed(first, second)
    # AdamW also moves experts that got momentum from the first batch.
    zero, first, second = two_steps("1 device", False)
    started, all_moved = changed(zero, first), changed(first, second)
    for side in moved:
        assert moved[side].sum() == 2 or moved[side].sum() == 1  # two groups
        np.testing.assert_array_equal(all_moved[side], moved[side] | started[side])
    assert any(np.any(all_moved[side] != moved[side]) for side in moved)


def test_slots():
    index_GxNxK = jnp.array([[[3], [0]], [[1], [0]], [[3], [2]]])
    slots = find_slots(index_GxNxK, 5)
    assert slots.experts_NxS.shape == (2, 3)
    for layer, experts in enumerate(slots.experts_NxS):
        assert len(set(experts.tolist())) == 3
        used = {int(e) for e, u in zip(experts, slots.used_NxS[layer], strict=True) if u}
        assert used == set(index_GxNxK[:, layer].ravel().tolist())
        for group in range(3):
            slot = int(slots.slots_GxNxK[group, layer, 0])
            assert int(experts[slot]) == int(index_GxNxK[group, layer, 0])


@pytest.mark.parametrize("mesh", MESHES)
def test_two_groups_of_four_experts_are_trained_as_ever(mesh, monkeypatch):
    """Fewer slots than experts, not lazy: equal to a gradient of all experts."""
    states = two_steps(mesh, False)
    monkeypatch.setattr(step_module, "slot_count", lambda model, groups: E)  # never in slots
    plain = two_steps.__wrapped__("1 device", False)
    for ours, theirs in zip(jax.tree.leaves(states[2]), jax.tree.leaves(plain[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_forms_for_other_platforms_change_nothing(monkeypatch):
    """A CPU adds the gradients of groups one after the other, others all at once."""
    states = two_steps("1 device", False)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, default, **_: default(*xs))
    others = two_steps.__wrapped__("1 device", False)
    for ours, theirs in zip(jax.tree.leaves(states[2]), jax.tree.leaves(others[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
