"""Selections, temperature and exploration: values, gradients, and what is drawn when."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core.errors import UserError
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.selection import explore, random_route, select, temperature_at
from moe_jax.model.task_moe import TaskMoE, routes_of

T, N, E = 40, 6, 4
LOGITS = np.random.default_rng(0).normal(size=(T, N, E)).astype(np.float32)
OPTIONS = {
    "softmax": {},
    "gumbel_softmax": {},
    "gumbel_softmax_st": {},
    "argmax": {},
    "top_k": {"experts_per_layer": 2},
    "average": {},
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def one_hot(x):
    return (x == x.max(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("noise", [False, True])
def test_select(noise):
    gumbel = np.random.default_rng(1).gumbel(size=LOGITS.shape).astype(np.float32)
    noisy = LOGITS + gumbel * noise
    second = np.sort(LOGITS, -1)[..., -2:-1]
    expected = {
        "softmax": softmax(LOGITS / 0.5),
        "gumbel_softmax": softmax(noisy / 0.5),
        "gumbel_softmax_st": one_hot(noisy),
        "argmax": one_hot(LOGITS),
        "top_k": softmax(np.where(second <= LOGITS, LOGITS, -np.inf) / 0.5),
        "average": np.full_like(LOGITS, 0.25),
    }
    for selection, options in OPTIONS.items():
        config = RouterConfig(selection=selection, **options)
        routes = select(
            jnp.asarray(LOGITS), config, temperature=0.5, gumbel_TxNxE=gumbel if noise else None
        )
        np.testing.assert_allclose(routes, expected[selection], atol=1e-6)
        if selection in ("gumbel_softmax_st", "argmax"):  # exactly: weights multiply outputs
            np.testing.assert_array_equal(routes, expected[selection])


@pytest.mark.parametrize("selection", ["argmax", "gumbel_softmax_st"])
def test_straight_through_gradient_is_the_softmax_gradient(selection):
    config = RouterConfig(selection=selection)
    cotangent = np.random.default_rng(2).normal(size=LOGITS.shape).astype(np.float32)
    grad = jax.vjp(lambda x: select(x, config, temperature=0.7), LOGITS)[1](cotangent)[0]
    p = softmax(LOGITS / 0.7)
    expected = p * (cotangent - (p * cotangent).sum(-1, keepdims=True)) / 0.7
    np.testing.assert_allclose(grad, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rate", "expected"),
    [
        ("exponential", 3e-4, [2.0, 2.0 * np.exp(-0.3), 2.0 * np.exp(-2.7), 0.1]),
        ("linear", 2e-4, [2.0, 1.8, 0.2, 0.1]),
        ("constant", 3e-4, [2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_temperature(schedule, rate, expected):
    config = RouterConfig(temperature=2.0, temperature_rate=rate, temperature_schedule=schedule)
    at = jax.jit(lambda step: temperature_at(config, step))
    ours = [at(jnp.int32(step)) for step in (0, 1000, 9000, 30000)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["one_hot", "uniform"])
def test_exploration(kind):
    config = RouterConfig(exploration_epsilon=0.3, exploration_route=kind)
    routes = jnp.asarray(np.tile(softmax(LOGITS), (50, 1, 1)))  # 2,000 tasks
    explored, pull_back = jax.vjp(lambda r: explore(r, config, jax.random.key(0)), routes)
    replaced = np.any(explored != routes, axis=-1)
    # Each layer, of the encoder or the decoder, is replaced equally often (5 standard deviations).
    np.testing.assert_allclose(replaced.mean(0), 0.3, atol=5 * np.sqrt(0.3 * 0.7 / 2000))
    if kind == "uniform":
        np.testing.assert_array_equal(explored[replaced], 1 / E)
    else:
        new = np.asarray(explored[replaced])
        np.testing.assert_array_equal(np.sort(new, -1), np.tile([0, 0, 0, 1], (len(new), 1)))
        deviation = np.sqrt(0.25 * 0.75 / len(new))
        np.testing.assert_allclose(new.mean(0), 0.25, atol=5 * deviation)
    (grad,) = pull_back(jnp.ones_like(routes))
    np.testing.assert_array_equal(grad, np.broadcast_to(~replaced[..., None], routes.shape))


def moe(**options):
    router = RouterConfig(hidden_dim=8, representation_dim=8, **options)
    config = ModelConfig(
        vocabulary_size=8, d_model=8, heads=2, encoder_layers=3, decoder_layers=3, experts=E
    )
    return TaskMoE(config, router, T)


def routing_params(model):
    representations = jax.random.normal(jax.random.key(1), (T, 8))
    router = jax.jit(model.new_router().init)(jax.random.key(0), representations)["params"]
    return {"router": nn.meta.unbox(router), "representations": representations}


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "gumbel_softmax"},
        {"selection": "gumbel_softmax_st"},
        {"selection": "softmax", "exploration_epsilon": 0.5},
        {"selection": "softmax", "exploration_epsilon": 0.5, "exploration_route": "uniform"},
        {"selection": "gumbel_softmax_st", "exploration_epsilon": 0.5, "experts_per_layer": 1},
    ],
)
def test_noise_is_drawn_in_training_only(options):
    model = moe(**options)
    params = routing_params(model)
    first, second = (routes_of(model, params, 0, jax.random.key(k)) for k in (0, 1))
    assert np.mean(np.any(first != second, axis=-1)) > 0.2
    np.testing.assert_array_equal(first, routes_of(model, params, 0, jax.random.key(0)))
    evaluation = routes_of(model, params, 0)
    logits = model.new_router().apply({"params": params["router"]}, params["representations"])
    expected = softmax(np.asarray(logits))
    if options["selection"] == "gumbel_softmax_st":
        expected = one_hot(expected)
    np.testing.assert_allclose(evaluation, expected, atol=1e-6)


@pytest.mark.parametrize("count", [0, 2])
def test_random_baselines(count):
    """Random experts per task are fixed by the seed; per instance they are drawn in every step."""
    model = moe(selection="random_task", experts_per_layer=count)
    routes = routes_of(model, {}, 0)
    np.testing.assert_array_equal(routes, routes_of(model, {}, 5, jax.random.key(3)))
    chosen = count or 1
    np.testing.assert_allclose(np.sort(routes, -1)[..., -chosen:], 1 / chosen)
    np.testing.assert_allclose(np.sum(routes, -1), 1.0)
    assert np.any(
        routes != routes_of(moe(selection="random_task", seed=1, experts_per_layer=count), {}, 0)
    )
    index, weights = model.assign(routes, jnp.array([3, 3]))
    assert index.shape == (2, N, chosen)
    np.testing.assert_allclose(weights, 1 / chosen)
    model = moe(selection="random_instance", experts_per_layer=count)
    index, _ = model.assign(routes_of(model, {}, 0), jnp.array([3, 3]), jax.random.key(0))
    assert np.any(index[0] != index[1])


def test_random_route_is_uniform():
    keys = jax.random.split(jax.random.key(0), 4000)
    routes = jax.vmap(lambda k: random_route(k, 2, E, 2))(keys)
    np.testing.assert_allclose(np.mean(routes > 0, axis=0), 0.5, atol=5 * 0.5 / np.sqrt(4000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "softmax", "experts_per_layer": 1}, "uses every expert"),
        ({"selection": "top_k"}, "needs experts_per_layer"),
        ({"selection": "arg_max"}, "did you mean 'argmax'"),
        ({"temperature_schedule": "cosine"}, "is one of exponential, linear, constant"),
        ({"temperature": 0.05}, "temperature 0.05 is below temperature_floor 0.1"),
        ({"exploration_epsilon": 1.5}, "from 0 to 1"),
        ({"exploration_epsilon": 0.1, "selection": "average"}, "routes that the router chooses"),
        (
            {"exploration_epsilon": 0.1, "exploration_route": "uniform", "selection": "argmax",
             "experts_per_layer": 1},
            "'uniform' uses every expert",
        ),
    ],
)  # fmt: skip
def test_refused_settings(options, message):
    with pytest.raises(UserError, match=message):
        RouterConfig(**options)
