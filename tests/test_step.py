"""Gradients and steps against a plain gradient of all experts, and on meshes of 8 devices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from toy_run import (
    pack_rows,
    random_batch,
    random_examples,
    stack_groups,
    start_state,
    tiny_model,
    tiny_params,
)

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.training import loss as losses
from moe_jax.training.grouped_loss import most_at_once
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig, gradients, make_train_step

SMOOTHING = 0.1
STEP = 7
KEY = jax.random.key(5)
PARAMS = tiny_params(tiny_model())
SELECTIONS = {
    "softmax": {"selection": "softmax", "temperature": 0.7},
    "gumbel_softmax": {"selection": "gumbel_softmax", "temperature_rate": 0.05},
    "gumbel_softmax_st, all": {"selection": "gumbel_softmax_st", "temperature": 2.0},
    "gumbel_softmax_st, 1": {
        "selection": "gumbel_softmax_st", "temperature": 2.0, "experts_per_layer": 1
    },
    "top_k, 2": {"selection": "top_k", "experts_per_layer": 2},
    "average": {"selection": "average"},
}  # fmt: skip


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


# Every selection with one of the ways to run its groups.
AT_ONCE = {"gumbel_softmax": 2, "gumbel_softmax_st, all": 8, "top_k, 2": 4}


@functools.cache
def jitted(name, at_once, frozen=(), terms=(), **changes):
    config = StepConfig(label_smoothing=SMOOTHING, groups_at_once=at_once, **dict(terms))
    model = tiny_model(**SELECTIONS[name], **changes)
    settings = {"config": config, "mesh": one_device(), "frozen": frozen}
    return jax.jit(lambda *args, **named: gradients(model, *args, **named, **settings)[:2])


def ours(name, batch, at_once=None, frozen=(), terms=(), **changes):
    """The step's gradients and metrics."""
    with jax.set_mesh(one_device()):
        at_once = AT_ONCE.get(name, 1) if at_once is None else at_once
        function = jitted(name, at_once, frozen, terms, **changes)
        return function(PARAMS, batch, step=jnp.int32(STEP), key=KEY)


# ------------------------------------------------------------------------------ the reference


def plain_routes(routing_params, model):
    """Routes [T, N, E], written out for each selection."""
    c = model.router_config
    logits = model.new_router().apply({"params": routing_params["router"]},
                                routing_params["representations"])  # fmt: skip
    temperature = max(c.temperature_floor, c.temperature * np.exp(-c.temperature_rate * STEP))
    if c.selection == "average":
        return jnp.full_like(logits, 0.25)
    if c.selection == "top_k":
        threshold = jnp.sort(logits)[..., -c.experts_per_layer, None]
        weights = jnp.where(logits >= threshold, jnp.exp(logits), 0.0)
        return weights / weights.sum(-1, keepdims=True)
    if c.selection.startswith("gumbel"):
        noise_key = jax.random.split(jax.random.split(KEY)[0])[0]
        logits = logits + jax.random.gumbel(noise_key, logits.shape)
    soft = jnp.exp(logits / temperature)
    soft = soft / soft.sum(-1, keepdims=True)
    if not c.selection.endswith("_st"):
        return soft
    hard = (soft == soft.max(-1, keepdims=True)).astype(soft.dtype)
    st = hard + soft - jax.lax.stop_gradient(soft)
    # With one expert per layer, only its own weight has a gradient.
    return st if c.experts_per_layer == 0 else st * hard


@functools.cache
def plain_gradient():
    """Jitted (backbone, weights_GxNxE, batch) -> loss and gradients, all experts, all groups."""
    module = EncoderDecoder(tiny_model().config)

    def loss(backbone, weights_GxNxE, batch):
        logits = jax.vmap(lambda group, w: module.apply({"params": backbone}, group, w))(
            batch, weights_GxNxE
        )
        log_p = jnp.log(jax.nn.softmax(logits))
        wanted = (1 - SMOOTHING) * jax.nn.one_hot(batch["targets"], 24) + SMOOTHING / 24
        real = (batch["target_segments"] > 0).astype(jnp.float32)
        return -jnp.sum(jnp.sum(wanted * log_p, -1) * real) / jnp.sum(real)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def reference(model, batch):
    """(loss, gradients) of the mean loss with every expert computed."""
    routing = {k: v for k, v in PARAMS.items() if k != "backbone"}
    weights, pull_back = jax.vjp(
        lambda r: plain_routes(r, model)[jnp.asarray(batch["task_id"])], routing
    )
    loss, (by_backbone, by_weights) = plain_gradient()(PARAMS["backbone"], weights, batch)
    return loss, {"backbone": by_backbone, **pull_back(by_weights)[0]}


def assert_close(a, b, relative=2e-5):
    """Equal trees, relative to the largest entry of each array's part of the model."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for part in a:
        size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(b[part]))
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(a[part]), jax.tree.leaves(b[part]), strict=True
        ):
            np.testing.assert_allclose(
                np.asarray(x), np.asarray(y), rtol=relative, atol=relative * size,
                err_msg=part + jax.tree_util.keystr(path),
            )  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    return random_batch()


# ------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", SELECTIONS)
def test_gradients_are_those_of_the_plain_mixture(name, batch):
    loss, grads = reference(tiny_model(**SELECTIONS[name]), batch)
    actual, metrics = ours(name, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert int(metrics["target_tokens"]) == (batch["target_segments"] > 0).sum()
    assert_close(actual, grads)
    router_moves = float(jnp.max(jnp.abs(actual["representations"]))) > 1e-4
    assert router_moves == (name != "average")


def test_groups_of_one_task_use_one_expert_per_layer(batch):
    one_task = batch | {"task_id": np.full_like(batch["task_id"], 2)}
    actual, _ = ours("gumbel_softmax_st, 1", one_task)
    for side in ("encoder", "decoder"):
        grad = actual["backbone"][side]["layers"]["routed"]["feed_forward"]["in_kernel"]
        assert (np.abs(np.asarray(grad)).max((0, 2, 3, 4)) > 0).sum() == 1
    moved_T = np.abs(np.asarray(actual["representations"])).max(1) > 0
    assert moved_T.tolist() == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [2, 4, 8])
@pytest.mark.parametrize("name", ["gumbel_softmax_st, 1", "softmax"])
def test_groups_at_once_changes_nothing(name, at_once, batch):
    loss, grads = reference(tiny_model(**SELECTIONS[name]), batch)
    actual, metrics = ours(name, batch, at_once)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(actual, grads)


@pytest.mark.parametrize("name", ["gumbel_softmax_st, 1", "top_k, 2"])
def test_the_forms_for_other_platforms_change_nothing(name, batch, monkeypatch):
    """A CPU adds the gradients of groups one after the other, others all at once."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *xs, default, **_: default(*xs))
    loss, grads = reference(tiny_model(**SELECTIONS[name]), batch)
    monkeypatch.setattr(f"{__name__}.jitted", jitted.__wrapped__)
    actual, metrics = ours(name, batch, at_once=8)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(actual, grads)


@pytest.mark.parametrize("name", ["gumbel_softmax_st, 1", "top_k, 2"])
def test_unrolled_layers_and_logits_in_chunks_change_nothing(name, batch, monkeypatch):
    monkeypatch.setattr(losses, "MOST_LOGITS", 24 * 5)
    loss, grads = reference(tiny_model(**SELECTIONS[name]), batch)
    actual, metrics = ours(name, batch, unroll_layers=2)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(actual, grads)


def test_small_groups_run_side_by_side_by_default(batch):
    name, arrays = "gumbel_softmax_st, 1", {k: jnp.asarray(v) for k, v in batch.items()}

    def largest(at_once):
        """The most numbers of any array in the step."""
        step = functools.partial(jitted(name, at_once), step=jnp.int32(STEP), key=KEY)
        with jax.set_mesh(one_device()):
            return max(v.aval.size for v in variables(jax.make_jaxpr(step)(PARAMS, arrays).jaxpr))

    def variables(jaxpr):
        for equation in jaxpr.eqns:
            yield from equation.outvars
            for inner in jaxprs_in_params(equation.params):
                yield from variables(inner)

    assert largest(0) == largest(8) > largest(1)
    by_rule, one_by_one = ours(name, batch, at_once=0), ours(name, batch, at_once=1)
    np.testing.assert_allclose(by_rule[1]["loss"], one_by_one[1]["loss"], rtol=1e-6)
    assert_close(by_rule[0], one_by_one[0])


@pytest.mark.parametrize("width, rows, groups, merge, sharded, wanted", [
    (64, 2, 8, False, False, 8),  # 176 * 64 ** 2 fit into 2 ** 26 93 times
    (384, 2, 8, False, False, 2),  # 2.6 times
    (192, 2, 15, False, False, 5),  # 10.3 times, and 5 divides 15
    (384, 2, 8, False, True, 1),
    (768, 2, 8, False, False, 1),
    (768, 2, 16, True, False, 8),  # 11 times 176 tokens are 2,048
    (768, 32, 8, True, False, 1),
])  # fmt: skip
def test_how_many_groups_run_side_by_side(width, rows, groups, merge, sharded, wanted):
    tokens = {"inputs": np.zeros((groups, rows, 64)), "targets": np.zeros((groups, rows, 24))}
    assert most_at_once(tokens, width, merge, sharded, one_device()) == wanted


def test_groups_at_once_must_divide(batch):
    with pytest.raises(UserError, match="groups_at_once 3 does not divide the 8 groups"):
        ours("softmax", batch, at_once=3)


def test_frozen_parts_have_no_gradient(batch):
    _, grads = reference(tiny_model(**SELECTIONS["softmax"]), batch)
    actual, _ = ours("softmax", batch, frozen=("router", "representations"))
    assert_close({"backbone": actual["backbone"]}, {"backbone": grads["backbone"]})
    assert all(
        (x == 0).all() for x in jax.tree.leaves((actual["router"], actual["representations"]))
    )


def test_regularisation_is_exact_where_groups_gather(batch):
    """The terms are added in full, though a group computes only one expert per layer."""
    name, terms = "gumbel_softmax_st, 1", {"expert_distance": 0.01, "route_entropy": 0.3}
    actual, metrics = ours(name, batch, terms=tuple(terms.items()))
    without, plain_metrics = ours(name, batch)

    def penalties(params):
        distance = 0.0
        for side in ("encoder", "decoder"):
            for path, x in jax.tree_util.tree_leaves_with_path(params["backbone"][side]["layers"]):
                # Queries, keys and values lie side by side in one array; biases have no D axis.
                parts = {"q_": 1, "kv": 2, "qk": 3}.get(path[-1].key[:2], 1)
                x = jnp.split(x[0], parts, -2) if parts > 1 else [x[0]]
                for a, b in itertools.combinations(range(4), 2):
                    distance += sum(jnp.linalg.norm((y[a] - y[b]).ravel()) for y in x) / 6
        logits = (
            tiny_model().new_router().apply({"params": params["router"]}, params["representations"])
        )
        p = jax.nn.softmax(logits / 2.0)[jnp.asarray(batch["task_id"])]
        entropy = -jnp.sum(p * jnp.log(p), -1).mean()
        return terms["expert_distance"] * distance + terms["route_entropy"] * entropy

    wanted = jax.tree.map(jnp.add, without, jax.jit(jax.grad(penalties))(PARAMS))
    assert_close(actual, wanted)
    assert metrics["loss"] == plain_metrics["loss"]  # of the data alone
    assert {k for k in metrics if k.startswith("regularisation/")} == {
        f"regularisation/{term}" for term in terms
    }


def test_packing_changes_nothing():
    """The same examples, two in a row or one: same loss, same gradients."""
    rng = np.random.default_rng(1)
    examples = [random_examples(rng, 2) for _ in range(8)]
    tasks = [0, 1, 2, 0, 1, 2, 0, 1]
    packed = stack_groups([pack_rows([pair, []], 12, 12) for pair in examples], tasks)
    alone = stack_groups([pack_rows([[x] for x in pair], 12, 12) for pair in examples], tasks)
    (grads, metrics), (grads_alone, metrics_alone) = (ours("softmax", b) for b in (packed, alone))
    assert metrics["target_tokens"] == metrics_alone["target_tokens"]
    np.testing.assert_allclose(metrics["loss"], metrics_alone["loss"], rtol=1e-5)
    assert_close(grads, grads_alone, 1e-5)


# ------------------------------------------------------------------------------ steps

# Adam's usual epsilon would blow up gradients that are zero but for rounding (key biases).
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.5, clip_norm=0.5, epsilon=1e-2)


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_frozen_or_rests_does_not_move(lazy, batch):
    """Alternating every step, with frozen representations, in one compiled program."""
    config = dataclasses.replace(
        OPTIMIZER, alternate_every=1, frozen=("representations",), lazy=lazy
    )
    model = tiny_model(**SELECTIONS["gumbel_softmax_st, 1"])
    mesh = one_device()
    with jax.set_mesh(mesh):
        state = start_state(model, config, mesh, PARAMS)
        step = make_train_step(model, config, StepConfig(), mesh, total_steps=10, seed=0)
        rates = {k: jnp.float32(v) for k, v in config.learning_rates.items()}
        before = jax.device_get(state)
        for moving, resting in [("backbone", "router"), ("router", "backbone")] * 2:
            state, _ = step(state, batch, rates)
            after = jax.device_get(state)
            for part in (resting, "representations"):
                jax.tree.map(np.testing.assert_array_equal, before.params[part], after.params[part])
            assert any(
                np.any(x != y)
                for x, y in zip(
                    jax.tree.leaves(before.params[moving]),
                    jax.tree.leaves(after.params[moving]),
                    strict=True,
                )
            )
            before = after
    assert step._cache_size() == 1


def test_alternation_needs_a_router():
    config = dataclasses.replace(OPTIMIZER, alternate_every=1)
    with pytest.raises(UserError, match="the model has no router"):
        make_train_step(tiny_model(experts=1), config, StepConfig(), one_device(), 1, 0)


def test_one_step_compiles_once(batch):
    model, mesh = tiny_model(**SELECTIONS["gumbel_softmax_st, 1"], dropout_rate=0.1), one_device()
    with jax.set_mesh(mesh):
        state = start_state(model, OPTIMIZER, mesh, PARAMS)
        step = make_train_step(model, OPTIMIZER, StepConfig(), mesh, total_steps=10, seed=0)
        rates = {k: jnp.float32(v) for k, v in OPTIMIZER.learning_rates.items()}
        for one in (batch, random_batch(seed=1)):
            state, _ = step(state, one, rates)
    assert step._cache_size() == 1
