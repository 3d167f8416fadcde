"""AdamW by parts against NumPy; freezing, weight decay and clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core.errors import UserError
from moe_jax.training.optimizer import OptimizerConfig, apply, clip_scale, make_optimizer, schedule

CONFIG = OptimizerConfig(
    learning_rate=0.03, router_learning_rate=0.2, representation_learning_rate=0.5,
    clip_norm=0.7, weight_decay=0.1, b1=0.8, b2=0.95, epsilon=1e-3,
)  # fmt: skip
SHAPES = {
    "backbone": {
        "layers": {"kernel": (3, 2), "bias": (2,), "q_bias": (4,)},
        "norm": {"scale": (2,)},
        "embedding": (5, 2),
        "position": (4, 2),
    },
    "router": {"hidden": {"kernel": (2, 2), "bias": (2,)}},
    "representations": (3, 2),
}
DECAYED = {"['backbone']['layers']['kernel']", "['backbone']['embedding']",
           "['backbone']['position']"}  # fmt: skip


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(0, scale, shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def clipped(config, grads, step):
    scale, _ = clip_scale(config, grads, step)
    return jax.tree.map(lambda g: g * scale, grads)


def run(config, gradients, frozen=()):
    """Parameters after one update per gradient, as the train step makes them."""
    optimizer = make_optimizer(config)
    params = tree(0)
    state = optimizer.init(params)
    for step, grads in enumerate(gradients):
        grads = {k: jax.tree.map(jnp.zeros_like, g) if k in frozen else g for k, g in grads.items()}
        grads = clipped(config, grads, jnp.int32(step))
        with jax.numpy_dtype_promotion("standard"):
            directions, state = optimizer.update(grads, state, params)
        share = schedule(config, jnp.int32(step), len(gradients))
        params = apply(params, directions, {k: share * v for k, v in config.learning_rates.items()})
    return params, state


def numpy_adamw(config, gradients, constant=False):
    """Loshchilov & Hutter 2019 with clipping and one learning rate per part, in float64."""
    rates = {
        "backbone": config.learning_rate,
        "router": config.router_learning_rate,
        "representations": config.representation_learning_rate,
    }
    rows = jax.tree_util.tree_leaves_with_path(tree(0))
    params = {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in rows}
    part = {jax.tree_util.keystr(path): path[0].key for path, _ in rows}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    warmup = max(1, round(config.warmup_fraction * len(gradients)))
    for t, grads in enumerate(gradients, 1):
        grads = {jax.tree_util.keystr(path): np.asarray(g, np.float64)
                 for path, g in jax.tree_util.tree_leaves_with_path(grads)}  # fmt: skip
        used = {name: g for name, g in grads.items() if part[name] not in config.frozen}
        norm = np.sqrt(sum((g**2).sum() for g in used.values()))
        share = min(t / warmup, (len(gradients) - t + 1) / (len(gradients) - warmup))
        share = 1.0 if constant else share
        for name, g in used.items():
            g = g * min(1.0, config.clip_norm / norm)
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
            direction = (m[name] / (1 - config.b1**t)) / (
                np.sqrt(v[name] / (1 - config.b2**t)) + config.epsilon
            )
            if name in DECAYED:
                direction = direction + config.weight_decay * params[name]
            params[name] = params[name] - rates[part[name]] * share * direction
    return params


@pytest.mark.parametrize("frozen", [(), ("backbone",), ("router", "representations")])
def test_updates_are_adamw(frozen):
    config = dataclasses.replace(CONFIG, frozen=frozen, warmup_fraction=0.4)
    # Norms above and below the clipping norm; huge frozen gradients must not count.
    gradients = [tree(i, scale) for i, scale in enumerate([3.0, 0.02, 1.0, 0.05, 2.0], 1)]
    params, _ = run(config, gradients, frozen)
    wanted = numpy_adamw(config, gradients)
    for path, actual in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(actual, wanted[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_first_moment_of_two_bytes():
    config = dataclasses.replace(CONFIG, warmup_fraction=0.4, first_moment_dtype="bfloat16")
    gradients = [tree(i, scale) for i, scale in enumerate([3.0, 0.02, 1.0, 0.05, 2.0], 1)]
    params, state = run(config, gradients)
    wanted = numpy_adamw(config, gradients)
    start = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree(0))}
    for path, actual in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        moved, should = actual - start[name], wanted[name] - start[name]
        np.testing.assert_allclose(moved, should, atol=0.01 * np.abs(should).max(), err_msg=name)
    sizes = {"bfloat16": 0, "float32": 0}
    for moment in jax.tree.leaves(state):
        if moment.ndim:
            sizes[moment.dtype.name] += moment.size
    assert sizes["bfloat16"] == sizes["float32"] == sum(x.size for x in jax.tree.leaves(params))


def test_frozen_parts_stay_bit_identical_and_have_no_state():
    config = dataclasses.replace(CONFIG, frozen=("router", "representations"))
    params, state = run(config, [tree(1), tree(2)], config.frozen)
    for part in config.frozen:
        for old, new in zip(
            jax.tree.leaves(tree(0)[part]), jax.tree.leaves(params[part]), strict=True
        ):
            np.testing.assert_array_equal(old, new)
    kept = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    backbone = sum(x.size for x in jax.tree.leaves(params["backbone"]))
    assert kept == 2 * backbone  # two moments


def test_without_gradient_only_matrices_of_the_backbone_shrink():
    config = dataclasses.replace(CONFIG, warmup_fraction=0.0, decay="constant")
    params, _ = run(config, [jax.tree.map(jnp.zeros_like, tree(0))] * 3)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(tree(0)), jax.tree.leaves(params), strict=True
    ):
        name = jax.tree_util.keystr(path)
        factor = (1 - 0.03 * 0.1) ** 3 if name in DECAYED else 1.0
        np.testing.assert_allclose(new, factor * old, rtol=1e-6, err_msg=name)


def test_no_clipping():
    gradients = [tree(1, 10.0), tree(2, 0.1)]
    config = dataclasses.replace(CONFIG, clip_norm=0.0)
    params, _ = run(config, gradients)
    wanted = numpy_adamw(dataclasses.replace(config, clip_norm=1e6), gradients)
    found = params["backbone"]["embedding"]
    np.testing.assert_allclose(found, wanted["['backbone']['embedding']"], rtol=2e-5, atol=1e-6)


def test_schedule():
    def values(steps, **settings):
        config = OptimizerConfig(**settings)
        return [float(schedule(config, jnp.int32(i), steps)) for i in range(steps)]

    rising = [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(
        values(10, warmup_fraction=0.4), [*rising, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    np.testing.assert_allclose(
        values(10, warmup_fraction=0.4, decay="constant"), [*rising, *[1.0] * 6]
    )
    # Every step moves: none has rate 0, whatever the lengths.
    for steps in (1, 2, 3, 7):
        for fraction in (0.0, 0.06, 0.5, 1.0):
            assert all(0 < v <= 1 for v in values(steps, warmup_fraction=fraction))


def test_alternation():
    """Each part follows AdamW on the gradients of its own turns; waiting parts do not change."""
    config = dataclasses.replace(
        CONFIG, alternate_every=2, frozen=("representations",), decay="constant",
        warmup_fraction=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(config)
    params = tree(0)
    state = optimizer.init(params)
    gradients = [tree(i, scale) for i, scale in enumerate([3.0, 0.02, 1.0, 0.05, 2.0, 0.1, 4.0], 1)]

    @jax.jit
    def step(params, state, grads, i):
        grads = clipped(config, grads, i)
        with jax.numpy_dtype_promotion("standard"):
            directions, state = optimizer.update(grads, state, params)
        return apply(params, directions, config.learning_rates), state

    def own(state, side):
        return jax.tree.leaves(state.inner_states[side].inner_state.inner_state)

    for i, grads in enumerate(gradients):
        zero = jax.tree.map(jnp.zeros_like, grads["representations"])
        before = (params, state)
        params, state = step(params, state, grads | {"representations": zero}, jnp.int32(i))
        resting = "backbone" if i // 2 % 2 else "router"
        for old, new in (
            (before[0][resting], params[resting]),
            (before[0]["representations"], params["representations"]),
            (own(before[1], resting), own(state, resting)),
        ):
            jax.tree.map(np.testing.assert_array_equal, old, new)
    assert step._cache_size() == 1

    for part, turns in (("backbone", (0, 1, 4, 5)), ("router", (2, 3, 6))):
        # Waiting parts do not count in the gradient norm either.
        alone = dataclasses.replace(config, frozen=tuple({*SHAPES} - {part}), alternate_every=0)
        wanted = numpy_adamw(alone, [gradients[i] for i in turns], constant=True)
        for path, actual in jax.tree_util.tree_leaves_with_path({part: params[part]}):
            name = jax.tree_util.keystr(path)
            np.testing.assert_allclose(actual, wanted[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("frozen", [("backbone",), ("router", "representations")])
def test_alternation_needs_two_sides(frozen):
    with pytest.raises(UserError, match="nothing left to alternate with"):
        OptimizerConfig(alternate_every=5, frozen=frozen)


def test_an_unknown_part_is_named():
    with pytest.raises(UserError, match="'routes'"):
        OptimizerConfig(frozen=("routes",))
