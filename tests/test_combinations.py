"""Every router x selection x execution path (all experts, gathered), on layers of one matrix.

Outputs and route gradients are computed in NumPy; the router is the one of test_router.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_router import KINDS
from toy_run import tiny_model

from moe_jax.model.dispatch import Gather, Mix
from moe_jax.model.task_moe import init_params, routes_of

T, G, E, D = 3, 4, 4, 5
N = 2  # one layer in the encoder, one in the decoder
STEP = 5
KEY = jax.random.key(1)
TASK_ID = np.array([2, 0, 2, 1])
# (selection, experts_per_layer): 0 and E run all experts, the others gather.
OPTIONS = [
    ("softmax", 0),
    ("gumbel_softmax", 0),
    ("gumbel_softmax_st", 0),
    ("gumbel_softmax_st", 1),
    ("gumbel_softmax_st", 2),
    ("argmax", 0),
    ("argmax", 1),
    ("argmax", 2),
    ("top_k", 1),
    ("top_k", 2),
    ("top_k", E),
    ("average", 0),
]
# These selections ignore the router, so one kind is enough.
RANDOM = [
    ("random_task", 1),
    ("random_task", 2),
    ("random_task", E),
    ("random_instance", 1),
    ("random_instance", 2),
    ("random_instance", E),
]
RNG = np.random.default_rng(0)
LAYERS_NxExDxD = RNG.normal(size=(N, E, D, D)).astype(np.float32)
X_GxD, COTANGENT_GxD = RNG.normal(size=(2, G, D)).astype(np.float32)


def options_of(kind):
    return OPTIONS + RANDOM if kind == KINDS[0] else OPTIONS


def model_of(kind, selection, count):
    return tiny_model(
        tasks=T, experts=E, kind=kind, selection=selection, experts_per_layer=count,
        temperature=2.0, temperature_rate=0.1,
    )  # fmt: skip


@functools.cache
def routing_params(kind):
    model = model_of(kind, "softmax", 0)
    params = nn.meta.unbox(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32),
        {part: params[part] for part in ("router", "representations")},
    )


class Layer(nn.Module):
    """tanh(x w)."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x @ self.param("w", nn.initializers.zeros, (D, D)))


LAYER = Layer()


@jax.jit
def run_layers(assignment):
    """Output [G, D] on the execution path of the assignment, and its gradient by the weights."""
    encoder, decoder = (jnp.asarray(w[None]) for w in LAYERS_NxExDxD)
    backbone = {
        "encoder": {"layers": {"routed": {"w": encoder}}},
        "decoder": {"layers": {"routed": {"w": decoder}}},
    }

    def one_group(x, index, weights):
        for n, side in enumerate(("encoder", "decoder")):
            params = jax.tree.map(lambda p: p[0], backbone[side]["layers"]["routed"])
            dispatch = Mix(weights[n]) if index is None else Gather(index[n], weights[n])
            apply = nn.apply(lambda layer, x, d=dispatch: d(layer, x, (), (), None, ""), LAYER)
            x = apply({"params": params}, x)
        return x

    def loss(weights):
        y = jax.vmap(one_group)(X_GxD, assignment.index_GxNxK, weights)
        return jnp.sum(y * COTANGENT_GxD), y

    gradient, y = jax.grad(loss, has_aux=True)(assignment.weights_GxNxK)
    return y, gradient


@functools.cache
def actual(kind):
    """For every option: output, assignment, routes, and gradient by the representations."""

    def one(params, selection, count, by_weights):
        model = model_of(kind, selection, count)

        def assign(representations):
            routes = routes_of(model, {**params, "representations": representations}, STEP, KEY)
            assignment = model.assign(routes, jnp.asarray(TASK_ID), KEY)
            return assignment.weights_GxNxK, (assignment, routes)

        weights, pull_back, aux = jax.vjp(assign, params["representations"], has_aux=True)
        return *aux, pull_back(jnp.zeros_like(weights) if by_weights is None else by_weights)[0]

    params = routing_params(kind)
    options = options_of(kind)

    @jax.jit
    def routes_of_all(by_weights):
        return [one(params, *option, d) for option, d in zip(options, by_weights, strict=True)]

    shapes = jax.eval_shape(routes_of_all, [None] * len(options))
    zeros = [jnp.zeros(a.weights_GxNxK.shape) for a, _, _ in shapes]
    outputs = [run_layers(assignment) for assignment, _, _ in routes_of_all(zeros)]
    results = routes_of_all([by_weights for _, by_weights in outputs])
    return {
        option: (y, *result)
        for option, (y, _), result in zip(options, outputs, results, strict=True)
    }


def plain_output(weights_NxE, x):
    """A group's output [D], all experts computed."""
    for weights_E, layer in zip(weights_NxE, LAYERS_NxExDxD.astype(np.float64), strict=True):
        x = sum(w * np.tanh(x @ m) for w, m in zip(weights_E, layer, strict=True))
    return x


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@functools.cache
def router_of(kind):
    """(logits [T, N, E], function from their gradient to that of the representations)."""
    params = routing_params(kind)
    apply = jax.jit(
        lambda r: model_of(kind, "softmax", 0).new_router().apply({"params": params["router"]}, r)
    )
    logits, pull_back = jax.vjp(apply, params["representations"])
    return np.asarray(logits, np.float64), lambda d: pull_back(jnp.asarray(d, jnp.float32))[0]


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        pytest.param(kind, option, id=f"{kind}-{option[0]}-{option[1]}")
        for kind in KINDS
        for option in options_of(kind)
    ],
)
def test_combination(kind, option):
    selection, count = option
    y_GxD, (index, weights), routes, grads = actual(kind)[option]
    assert (index is None) == (count in (0, E))
    logits, pull_back = router_of(kind)

    # ---- routes, by definition; random routes are taken from the model.
    temperature = 2.0 * np.exp(-0.1 * STEP)
    if selection.startswith("gumbel"):
        logits = logits + np.asarray(jax.random.gumbel(jax.random.split(KEY)[0], logits.shape))
    soft = softmax(logits / temperature)
    if selection == "top_k":
        kept = logits >= np.sort(logits, -1)[..., -count, None]
        soft = softmax(np.where(kept, logits / temperature, -np.inf))
    hard = (soft == soft.max(-1, keepdims=True)).astype(float)
    wanted_TxNxE = {
        "gumbel_softmax_st": hard, "argmax": hard, "average": np.full_like(soft, 1 / E),
        "random_task": np.asarray(routes, np.float64),
    }.get(selection, soft)  # fmt: skip
    full_GxNxE = wanted_TxNxE[TASK_ID]
    if selection == "random_instance":
        full_GxNxE = np.asarray(weights, np.float64)
        if index is not None:
            full_GxNxE = np.zeros((G, N, E))
            np.put_along_axis(full_GxNxE, np.asarray(index), np.asarray(weights), -1)
    else:
        np.testing.assert_allclose(routes, wanted_TxNxE, atol=1e-5)
    if selection.startswith("random"):
        assert np.all(np.sum(full_GxNxE > 0, -1) == count)
        np.testing.assert_allclose(full_GxNxE.sum(-1), 1, atol=1e-6)

    # ---- outputs: gathered experts give the same as all experts.
    for g in range(G):
        np.testing.assert_allclose(y_GxD[g], plain_output(full_GxNxE[g], X_GxD[g]), atol=1e-5)

    # ---- gradients: by central differences of the weights, the softmax, and the router.
    if selection in ("average", "random_task", "random_instance"):
        assert not np.any(grads)
        return
    by_routes_TxNxE = np.zeros((T, N, E))
    for g, task in enumerate(TASK_ID):
        for n, e in np.ndindex(N, E):
            if index is None or e in np.asarray(index)[g, n]:  # other experts were not computed
                step = np.zeros((N, E))
                step[n, e] = 1e-5
                up, down = (plain_output(full_GxNxE[g] + s * step, X_GxD[g]) for s in (1, -1))
                by_routes_TxNxE[task, n, e] += (up - down) @ COTANGENT_GxD[g] / 2e-5
    inner = (soft * by_routes_TxNxE).sum(-1, keepdims=True)
    wanted = pull_back(soft * (by_routes_TxNxE - inner) / temperature)
    np.testing.assert_allclose(grads, wanted, atol=1e-4 * max(1.0, float(np.abs(wanted).max())))
