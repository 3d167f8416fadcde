"""Starting points of few-shot adaptation: where a new task starts, and what is trained."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import EOS, PAD, START, random_batch, tiny_model, tiny_params

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.data.batch import of_rows
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.task_moe import routes_of
from moe_jax.runs.config import DataConfig, FewShotConfig, FinetuneConfig, RunConfig
from moe_jax.runs.load import Run
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.unseen.adaptation import new_learner
from moe_jax.unseen.side_by_side import starting_params
from moe_jax.unseen.starts import FROZEN, MIN_ROUTE_WEIGHT, Start

MODEL = tiny_model(temperature=2.0, temperature_rate=0.1, exploration_epsilon=0.5)
RUN = Run(MODEL, tiny_params(MODEL), {"a": 0, "b": 1, "c": 2}, step=7)
MESH = make_mesh(MeshConfig(data=2), jax.devices()[:2])
GROUPS = [
    {name: array[0] for name, array in of_rows(random_batch(groups=1, rows=3, seed=seed)).items()}
    for seed in range(3)
]


def start_of(run=RUN, **settings):
    return Start("moe", run, FinetuneConfig(**settings), seed=3, mesh=MESH)


def own(new):
    """The representation [K] of one new task."""
    return np.asarray(new.own(["new"], GROUPS[:1])["representations"])[0, 0]


# ------------------------------------------------------------------------------ where it starts


def test_representations(tmp_path):
    table_TxK = np.asarray(RUN.params["representations"])
    rows = {kind: own(start_of(representation=kind)) for kind in ("mean", "random")}
    drawn = start_of(representation="random").own(["b", "new", "b"], GROUPS)["representations"]
    np.testing.assert_array_equal(drawn[1, 0], rows["random"])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.any(drawn[0] != drawn[1])
    np.testing.assert_allclose(rows["mean"], table_TxK.mean(0), rtol=1e-6)
    assert rows["random"].shape == (8,) and rows["random"].std() > 0.3
    path = str(tmp_path / "rows.json")
    files.write_json(path, {"other": [0.0] * 8, "new": list(range(8))})
    of_file = start_of(representation="file", representations_path=path)
    found = of_file.own(["new", "other", "new"], GROUPS)["representations"]
    np.testing.assert_array_equal(found[:, 0], [range(8), [0.0] * 8, range(8)])
    with pytest.raises(UserError, match="neww"):
        of_file.own(["neww"], GROUPS[:1])
    with pytest.raises(UserError, match="'file' and a path go together"):
        FinetuneConfig(representation="file")


@pytest.mark.parametrize("settings", [{}, {"selection": "argmax", "experts_per_layer": 1}])
def test_nearest_has_the_lowest_loss(settings):
    """Each training task's loss on the few examples, written out: of soft routes and of hard."""
    model = tiny_model(temperature=2.0, **settings)
    run = dataclasses.replace(RUN, model=model)
    routes_TxNxE = np.asarray(routes_of(model, RUN.params, RUN.step))
    logits = jax.jit(
        lambda group, route: EncoderDecoder(model.config).apply(
            {"params": RUN.params["backbone"]}, group, route
        )
    )
    losses = np.empty((len(GROUPS), len(routes_TxNxE)))
    for i, group in enumerate(GROUPS):
        for t, route in enumerate(routes_TxNxE):
            x = np.asarray(logits(group, route), np.float64)
            log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
            chosen = np.take_along_axis(log_p, group["targets"][..., None], -1)[..., 0]
            losses[i, t] = -chosen[group["target_segments"] > 0].sum()
    new = start_of(run, representation="nearest")
    tasks, _ = new.choices
    found = new.losses(GROUPS)  # three on two devices
    np.testing.assert_allclose(found, losses[:, tasks], rtol=1e-4)
    rows = new.own(["a", "b", "c"], GROUPS)["representations"][:, 0]
    nearest = tasks[losses[:, tasks].argmin(-1)]
    np.testing.assert_array_equal(rows, np.asarray(RUN.params["representations"])[nearest])


@pytest.mark.parametrize("count", [1, 2])
def test_a_new_task_takes_a_route_that_was_drawn(count):
    """Of a model with random routes: that of the training task with the lowest loss; it stays."""
    model = tiny_model(selection="random_task", experts_per_layer=count, seed=4)
    run = dataclasses.replace(RUN, model=model)
    drawn_TxNxE = np.asarray(routes_of(model, RUN.params, RUN.step))
    new = start_of(run, representation="nearest")
    tasks = new.choices[0][new.losses(GROUPS).argmin(-1)]
    rows = new.own(["a", "b", "c"], GROUPS)["representations"]
    for row, task in zip(rows, tasks, strict=True):
        params = {**new.shared, "representations": jnp.asarray(row)}
        np.testing.assert_allclose(routes_of(new.model, params, 0)[0], drawn_TxNxE[task])
    assert set(tasks) != {0}  # as a draw by the row of a table of one task would be
    assert set(new.frozen) == {"representations"}
    assert set(start_of(run, tune="route_only").frozen) == {"backbone", "router"}
    merged = start_of(run, representation="nearest", tune="merged")
    found = merged.own(["a", "b", "c"], GROUPS)["route"]
    np.testing.assert_allclose(found, drawn_TxNxE[tasks], rtol=1e-6)


def test_tasks_of_one_route_are_tried_once():
    table_TxK = np.asarray(RUN.params["representations"])
    alike = np.concatenate([table_TxK[:2] + 1e-6, table_TxK, table_TxK])
    params = {**RUN.params, "representations": jnp.asarray(alike)}
    model = dataclasses.replace(MODEL, tasks=len(alike))
    run = dataclasses.replace(RUN, model=model, params=params)
    tasks, routes = Start("moe", run, FinetuneConfig(), 0, MESH).choices
    assert tasks.tolist() == [0, 1, *range(4, 2 + len(table_TxK))]
    np.testing.assert_allclose(routes, routes_of(MODEL, RUN.params, RUN.step), atol=1e-5)


@pytest.mark.parametrize("tune", sorted(set(FROZEN) - {"merged"}))
def test_a_new_task_is_routed_as_the_training_tasks_were(tune):
    """At the last temperature, without noise, whether by the router or by logits of its own."""
    new = start_of(representation="mean", tune=tune)
    row_K = own(new)
    params = {**new.shared, "representations": jnp.asarray(row_K[None])}
    found = routes_of(new.model, params, 0)
    mean = RUN.params["representations"].mean(0, keepdims=True)
    wanted = routes_of(MODEL, {**RUN.params, "representations": mean}, RUN.step)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    if tune == "free_route":
        assert params["representations"].shape == (1, MODEL.layers * 4) and params["router"] == {}


PLAIN = jax.jit(EncoderDecoder(dataclasses.replace(MODEL.config, experts=1)).apply)


def mean_loss(group, logits_NxE):
    """Loss per target token of the experts merged by softmax(logits), written out."""
    weights_NxE = np.exp(logits_NxE) / np.exp(logits_NxE).sum(-1, keepdims=True)
    backbone = jax.tree.map(np.asarray, RUN.params["backbone"])
    for side, weights_E in zip(("encoder", "decoder"), weights_NxE, strict=True):
        stack = backbone[side]["layers"]["routed"]
        mean = jax.tree.map(lambda p, w=weights_E: np.tensordot(w, p[0], 1)[None, None], stack)
        backbone = {**backbone, side: {**backbone[side], "layers": {"routed": mean}}}
    x = np.asarray(PLAIN({"params": jax.tree.map(np.float32, backbone)}, group), np.float64)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, group["targets"][..., None], -1)[..., 0]
    return -chosen[group["target_segments"] > 0].mean()


def test_a_merged_route_starts_between_the_training_tasks():
    routes_TxNxE = np.asarray(routes_of(MODEL, RUN.params, RUN.step))
    found = start_of(representation="mean", tune="merged").own(["a", "b"], GROUPS[:2])
    assert set(found) == {"route"}
    np.testing.assert_allclose(found["route"], [routes_TxNxE.mean(0)] * 2, rtol=1e-5)
    near = start_of(representation="nearest", tune="merged")
    tasks = near.choices[0][near.losses(GROUPS).argmin(-1)]
    route = near.own(["a", "b", "c"], GROUPS)["route"]
    np.testing.assert_allclose(route, routes_TxNxE[tasks], rtol=1e-5)


def test_a_merged_route_is_fitted_to_the_few_examples():
    """Adam's first step moves every logit by its rate, against the gradient's sign (here from
    differences); more steps lower the loss."""
    settings = {"representation": "mean", "tune": "merged", "route_learning_rate": 0.1}
    route = {
        steps: start_of(**settings, route_steps=steps).own(["a", "b", "c"], GROUPS)["route"]
        for steps in (0, 1, 20)
    }
    route[0] = route[0] + MIN_ROUTE_WEIGHT
    logits = {steps: np.log(np.float64(found)) for steps, found in route.items()}
    for i, group in enumerate(GROUPS):
        before, once, after = (logits[steps][i] for steps in (0, 1, 20))
        slope = np.empty_like(before)
        for at in np.ndindex(before.shape):
            step = np.zeros_like(before)
            step[at] = 1e-2
            slope[at] = mean_loss(group, before + step) - mean_loss(group, before - step)
        moved, wanted = once - before, -0.1 * np.sign(slope)
        for layer, clear in enumerate(np.abs(slope) > 1e-3):  # not lost in rounding
            # Up to a constant of each layer, which a softmax does not see.
            difference = (moved - wanted)[layer, clear]
            assert clear.sum() > 1
            np.testing.assert_allclose(difference - difference[0], 0, atol=1e-4)
        assert mean_loss(group, after) < mean_loss(group, before) - 0.01


# ------------------------------------------------------------------------------ what is trained


SLOW = ("frozen_router", "route_only")


@pytest.mark.parametrize(
    "tune", [pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW)) for t in FROZEN]
)
def test_what_is_tuned(tune):
    new = start_of(representation="mean", tune=tune)
    data = DataConfig(lengths={"inputs": 12, "targets": 12})
    optimizer_config = OptimizerConfig(router_learning_rate=1e-2, learning_rate=1.0)
    config = FewShotConfig(
        RunConfig(), data, FinetuneConfig(steps=2, learning_rates=(1e-3, 0.0)), optimizer_config
    )
    vocabulary = types.SimpleNamespace(decoder_start_id=START, eos_id=EOS, pad_id=PAD)
    mixture = types.SimpleNamespace(vocabulary=vocabulary)
    few = types.SimpleNamespace(mixture=mixture, widths={"a": (12, 12)})
    learner = new_learner(new, FROZEN[new.tune], config, MESH, few, samples=1)
    before = starting_params(new.shared, jax.tree.map(lambda a: a[0], new.own(["new"], GROUPS[:1])))
    order = np.zeros((2, 2, 3), np.int32) + np.arange(3, dtype=np.int32)
    examples = {name: np.stack([array] * 2) for name, array in GROUPS[0].items()}
    apart = {part: np.stack([tree[0]] * 2) for part, tree in new.own(["n"], GROUPS[:1]).items()}
    with jax.set_mesh(MESH):
        rates = learner.rates([1e-3, 0.0])
        (trained,) = learner.runner.train(new.shared, apart, examples, order, rates)
    after, still = (jax.tree.map(lambda a, run=run: a[run], trained) for run in (0, 1))
    moved = {
        part
        for part in after
        if any(
            np.any(x != y)
            for x, y in zip(
                jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True
            )
        )
    }
    parts = {"backbone"} if tune == "merged" else {"backbone", "router", "representations"}
    assert moved == parts - set(FROZEN[tune])
    # The learning rate that is searched belongs to the backbone, or else to the representation.
    searched = "backbone" if "backbone" in moved else "representations"
    jax.tree.map(np.testing.assert_array_equal, before[searched], still[searched])


def test_dense_starts_are_trained_whole():
    new = start_of(Run(tiny_model(experts=1), {"backbone": {}}, {}, 0), tune="route_only")
    assert new.tune == "all" and new.own(["new"], GROUPS[:1]) == {}
