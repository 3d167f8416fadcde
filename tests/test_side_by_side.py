"""Runs side by side give what each gives alone, by the plain loop of one step after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_mixtures
from toy_run import IDS, decoder, random_batch, tiny_model, tiny_params

from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.data.batch import INPUTS, of_rows
from moe_jax.data.pipeline import example_order, task_batches
from moe_jax.decoding.rows import experts_per_row, row_routes
from moe_jax.decoding.search import DecodingConfig
from moe_jax.model.task_moe import routes_of
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig
from moe_jax.training.tuning import Tuner
from moe_jax.unseen import side_by_side
from moe_jax.unseen.samples import few_widths
from moe_jax.unseen.side_by_side import SideBySide, runs_per_device, starting_params

STEPS, ROWS, LENGTH, RUNS = 3, 4, 6, 5  # one of six places is idle
RATES = np.array([1e-3, 3e-3, 1e-2, 1e-3, 2e-3, 0.0], np.float32)
FORMS = {
    "dense": (tiny_model(tasks=1, experts=1), ()),
    "all experts": (tiny_model(tasks=1, selection="softmax"), ()),
    "one expert": (tiny_model(tasks=1, selection="argmax", experts_per_layer=1), ()),
    "representation": (tiny_model(tasks=1, selection="softmax"), ("backbone", "router")),
    "merged": (tiny_model(tasks=1, experts=1), ()),
}


PERIODS = {"dense": 2, "one expert": 2}  # steps of a part: of 3 steps, 2 and 1


def runner_of(model, frozen, devices):
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    # AdamW would make a whole step of what rounding leaves in keys' biases, which have no gradient.
    config = OptimizerConfig(clip_norm=1.0, epsilon=1e-3, frozen=frozen)
    runner = SideBySide(
        model, config, StepConfig(), mesh, steps=STEPS, runs=6, rows=3, length=LENGTH,
        decoding=DecodingConfig(), ids=IDS,
    )  # fmt: skip
    return runner, config, mesh


@pytest.mark.parametrize(
    "form, devices, at_once",
    [
        pytest.param("dense", 1, True, marks=pytest.mark.slow),
        pytest.param("all experts", 1, True, marks=pytest.mark.slow),
        ("one expert", 2, False),
        ("representation", 2, False),
        ("merged", 2, False),
    ],
)
def test_side_by_side_is_one_by_one(form, devices, at_once):
    model, frozen = FORMS[form]
    params = tiny_params(model)
    rng = np.random.default_rng(0)
    few = [of_rows(random_batch(groups=1, rows=8, seed=run)) for run in range(RUNS)]
    few = [{name: array[0] for name, array in examples.items()} for examples in few]
    order = rng.integers(0, 8, (6, STEPS, ROWS)).astype(np.int32)
    order[RUNS:] = -1
    own = {}
    if model.routed:
        own["representations"] = rng.standard_normal((6, 1, 8)).astype(np.float32)
    shared = {part: tree for part, tree in params.items() if part not in own}
    if form == "merged":  # the layers start as means of the experts of a mixture
        shared = tiny_params(tiny_model(tasks=1))
        own["route"] = rng.dirichlet(np.ones(4), (6, model.layers)).astype(np.float32)
    runner, config, mesh = runner_of(model, frozen, devices)
    if at_once:
        runner._map = side_by_side._at_once
    rates = {part: np.full(6, rate, np.float32) for part, rate in config.learning_rates.items()}
    searched = "representations" if frozen else "backbone"
    rates[searched] = RATES
    examples = {name: np.stack([few[min(r, 4)][name] for r in range(6)]) for name in few[0]}
    with jax.set_mesh(mesh):
        shared = jax.device_put(shared, jax.sharding.NamedSharding(mesh, jax.P()))
        *parts, trained = runner.train(shared, own, examples, order, rates, PERIODS.get(form, 0))
        # Two blocks of answers for each run but the first, which has one.
        blocks = {
            run: [
                {name: few[run][name][at : at + 3] for name in INPUTS} | {"row": np.arange(3)}
                for at in ((0,) if run == 0 else (0, 3))
            ]
            for run in range(RUNS)
        }
        answers = runner.decode(shared, trained, blocks)
    parts, trained, shared = jax.device_get((parts, trained, shared))
    assert len(parts) == (1 if form in PERIODS else 0)
    assert set(trained) == (set(params) - set(frozen)) | (set(own) - {"route"})

    alone = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tokens = decoder(model, DecodingConfig(), LENGTH)
    with jax.set_mesh(alone):
        tune = Tuner(model, config, StepConfig(), alone, STEPS, seed=0)
        for run in range(RUNS):
            batches = [
                {name: array[rows][None] for name, array in few[run].items()}
                | {"task_id": np.zeros(1, np.int32)}
                for rows in order[run]
            ]
            apart = {part: jnp.asarray(tree[run]) for part, tree in own.items()}
            begin = starting_params(shared, apart)
            wanted = tune(begin, batches, {part: rate[run] for part, rate in rates.items()})
            moved = {part: wanted[part] for part in trained}
            found = jax.tree.map(lambda a, run=run: a[run], trained)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), moved, found)
            for part in parts:  # under the same schedule, only not as far
                peaks = {name: rate[run] for name, rate in rates.items()}
                wanted_then = tune(begin, batches[: PERIODS[form]], peaks)
                for name, tree in part.items():
                    jax.tree.map(
                        lambda x, y, run=run: np.testing.assert_allclose(x, y[run], atol=1e-5),
                        wanted_then[name], tree,
                    )  # fmt: skip
            changed = jax.tree.map(lambda x, y: np.abs(x - y).max(), begin, wanted)[searched]
            assert max(jax.tree.leaves(changed)) > 1e-4
            routes = None
            if model.routed:
                routes_TxNxE = np.asarray(routes_of(model, wanted, 0))
                routes = row_routes(routes_TxNxE, np.zeros(3, int), experts_per_row(model))
            assert len(answers[run]) == len(blocks[run])
            for block, answer in zip(blocks[run], answers[run], strict=True):
                np.testing.assert_array_equal(answer, tokens(wanted["backbone"], routes, block))


def test_the_order_is_that_of_the_batches():
    """Examples in that order are the batches of the pipeline, over several epochs."""
    mixture = toy_mixtures()[1]
    task, split = mixture.names[0], "fewshot_13_train"
    order = example_order(mixture, task, split, rows=3, steps=9, seed=13)
    lengths = {"inputs": 30, "targets": 20}
    batches = task_batches(mixture, task, split, lengths=lengths, rows=3, seed=13)
    records = mixture.task(task).records(split)
    for rows, batch in zip(order, batches, strict=False):
        for row, (tokens, segments) in zip(
            rows, zip(batch["inputs"][0], batch["input_segments"][0], strict=True), strict=True
        ):
            np.testing.assert_array_equal(tokens[segments > 0], records[int(row)].inputs)
    assert order.shape == (9, 3) and sorted(set(order.ravel().tolist())) == list(range(8))


def test_widths_are_few_and_wide_enough():
    rng = np.random.default_rng(0)
    needed = {str(i): tuple(np.exp(rng.uniform(1, 6, 2)).astype(int).tolist()) for i in range(60)}
    widths = few_widths(needed)
    assert sorted(widths) == sorted(needed)
    for task, need in needed.items():
        assert np.all(np.array(widths[task]) >= need) and sum(widths[task]) <= 2 * sum(need)
    assert len(set(widths.values())) <= 20
    assert few_widths({"a": (37, 5), "b": (24, 9), "c": (200, 2)}) == {
        "a": (37, 9), "b": (37, 9), "c": (200, 2),
    }  # fmt: skip


class Accelerator:
    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 10_000}


def test_as_many_runs_as_memory_allows():
    params = {"backbone": np.zeros(25, np.float32)}  # 100 bytes
    assert runs_per_device(params, 10, 5, 2, Accelerator()) == int(0.6 * 9900) // (800 + 200)
    assert runs_per_device(params, 1000, 500, 2, Accelerator()) == 1
