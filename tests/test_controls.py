"""Controls of an experiment: averaged experts, exchanged routes, dense models of equal size."""

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import random_backbone, tiny_model, tiny_params

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data import vocabulary
from moe_jax.experiments import controls
from moe_jax.experiments.sizes import Sizes
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.model.task_moe import init_params, parameter_shapes, routes_of
from moe_jax.runs import directory
from moe_jax.runs.config import Config, DataConfig, RunConfig
from moe_jax.runs.load import read_run

TASKS = ["a", "b", "c", "d", "e"]
LENGTHS = {"inputs": 16, "targets": 8}


def config_of(model, place="", steps=10):
    data = DataConfig(lengths=LENGTHS, batch_size=4, rows_per_group=2)
    run = RunConfig(model_dir=str(place) or None, train_steps=steps)
    return Config(run, data, model.config, model.router_config)


@pytest.fixture
def source(tmp_path):
    """A run with 4 experts in 2 routed layers, as `train` leaves it."""
    model = tiny_model(len(TASKS), selection="argmax", experts_per_layer=1, vocabulary_size=259)
    place = tmp_path / "routed"
    params = jax.tree.map(np.asarray, tiny_params(model))
    params["backbone"] = random_backbone(model)
    meta = {"tasks": TASKS, "step": 7, "shapes": parameter_shapes(params)}
    save_params(place, 7, jax.tree.map(lambda a: Promise(a.shape, lambda: a), params), meta)
    directory.write_config(place, config_of(model, place))
    directory.write_task_table(place, TASKS)
    own = {"kind": "bytes", "extra_ids": 0}
    vocabulary.write_vocabulary(place / vocabulary.DIRECTORY, own, {})
    return SimpleNamespace(place=place, params=params, model=model)


def test_the_average_is_the_mean_of_the_experts(source, tmp_path):
    out = tmp_path / "average"
    for _ in range(2):  # an attempt that was interrupted does not matter
        controls.write_average(source.place, out)
    run = read_run(str(out), 259)
    assert not run.model.routed and run.step == 7 and list(run.task_ids) == TASKS
    for side in ("encoder", "decoder"):
        experts = source.params["backbone"][side]["layers"]["routed"]
        plain = run.params["backbone"][side]["layers"]["routed"]
        for one, four in zip(jax.tree.leaves(plain), jax.tree.leaves(experts), strict=True):
            np.testing.assert_allclose(one[:, 0], four.sum(1) / 4, rtol=1e-5, atol=1e-6)
    embedding = source.params["backbone"]["embedding"]
    np.testing.assert_array_equal(run.params["backbone"]["embedding"], embedding)


def test_shuffled_tasks_take_each_others_routes(source, tmp_path):
    out = tmp_path / "shuffled"
    unseen = SimpleNamespace(names=("new", "other", "a"))
    controls.write_shuffled(source.place, out, unseen, seed=1)
    run = read_run(str(out), 259)
    before, after = (
        np.asarray(routes_of(source.model, jax.tree.map(jnp.asarray, params), 7))
        for params in (source.params, run.params)
    )
    substitute = [
        next(i for i, route in enumerate(table) if np.array_equal(route, row))
        for table in [source.params["representations"]]
        for row in run.params["representations"]
    ]
    assert sorted(substitute) == list(range(5)) and all(i != j for i, j in enumerate(substitute))
    np.testing.assert_array_equal(after, before[substitute])
    given = files.read_json(out / controls.GIVEN)
    assert set(given) == {"new", "other"}  # `a` is known
    for row in given.values():
        assert any(np.allclose(row, known) for known in source.params["representations"])
    for a, b in zip(*(jax.tree.leaves(p["backbone"]) for p in (run.params, source.params)),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tasks", [1, 2, 7, 50])
def test_no_task_keeps_its_route(tasks):
    for seed in range(20):
        substitute_T, new = controls.exchanged(tasks, 3, seed)
        assert sorted(substitute_T) == list(range(tasks))
        assert tasks == 1 or np.all(substitute_T != np.arange(tasks))
        assert new.shape == (3,) and np.all((new >= 0) & (new < tasks))


def test_drawn_routes_take_one_expert_a_layer():
    trained = SimpleNamespace(names=tuple(f"t{i}" for i in range(500)))
    rows = controls.drawn_routes(trained, 3, 4, seed=0)
    routes_TxNxE = np.array([rows[name] for name in trained.names]).reshape(500, 3, 4)
    assert np.all(np.sort(routes_TxNxE, -1) == [0, 0, 0, 1])
    assert np.abs(routes_TxNxE.mean(0) - 0.25).max() < 0.1
    assert rows != controls.drawn_routes(trained, 3, 4, seed=1)


# ------------------------------------------------------------------------------ sizes

SIZES = Sizes(vocabulary=24, tasks=5)


def size_of(model):
    """The number of its parameters."""
    shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    return sum(p.size for p in jax.tree.leaves(nn.meta.unbox(shapes)))


def test_the_width_of_equal_parameters():
    routed, dense = (config_of(tiny_model(5, experts)) for experts in (4, 1))
    routed_size = size_of(tiny_model(5, 4))
    assert SIZES.parameters(routed) == routed_size
    width = SIZES.width_of_equal_parameters(dense, routed)
    # One hidden unit has 16 weights in, 16 out and a bias, in an encoder and a decoder layer.
    difference = size_of(tiny_model(5, 1, d_ff=width)) - routed_size
    assert width % 8 == 0 and abs(difference) <= 4 * 2 * (16 + 16 + 1)
    with pytest.raises(UserError, match="no dense model has as few parameters"):
        SIZES.width_of_equal_parameters(dense, config_of(tiny_model(5, 1, d_model=8)))


def test_the_steps_of_equal_compute():
    dense, soft = config_of(tiny_model(5, 1)), config_of(tiny_model(5, 4))
    hard = config_of(tiny_model(5, 4, selection="argmax", experts_per_layer=1))
    plain, one, four = (SIZES.step_flops(config) for config in (dense, hard, soft))
    # One expert costs the dense layers and the router, four experts four times the layers.
    router = 3 * 2 * 5 * (8 * 8 + 8 * 2 * 4)  # forward and twice back: hidden, then output
    assert plain < one <= plain + 2 * router
    logits = 3 * 2 * 4 * 8 * 16 * 24  # of 4 rows of 8 targets, width 16, 24 tokens
    assert (four - logits) / (plain - logits) == pytest.approx(4, rel=0.1)
    # 10 steps of either, after 40 of the dense model.
    steps = SIZES.steps_of_equal_compute(dense, 40, [hard, soft])
    assert steps == 40 + round(10 * (one + four) / plain)
