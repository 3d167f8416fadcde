"""Learning and decoding end to end: a tiny model memorises and reproduces a few examples."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_mixtures
from toy_run import EOS, PAD, START, pack_rows, stack_groups, tiny_model

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.decoding.search import DecodingConfig
from moe_jax.evaluation.evaluator import Evaluator, tasks_with_split
from moe_jax.evaluation.scores import (
    TaskScore,
    mean_score,
    over_prompts,
    route_json,
    write_routes,
    write_scores,
)
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.task_moe import init_params, parameter_shardings
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import StepConfig, init_state, make_train_step, state_shardings

# The same input has another answer in each task, so only the route can tell them apart.
INPUTS = [[5, 6, EOS], [7, EOS], [8, 9, 10, EOS], [6, 5, 11, 7, EOS]]
TARGETS = [
    [[12, 13, 14, EOS], [15, EOS], [12, 12, EOS], [16, 15, 14, 13, EOS]],
    [[17, EOS], [18, 19, 20, EOS], [19, EOS], [17, 18, EOS]],
]
STEPS = 150


class Tokens:
    """A vocabulary whose texts are the ids themselves."""

    decoder_start_id, eos_id, pad_id = START, EOS, PAD

    def decode(self, ids):
        return list(ids)


@pytest.fixture(scope="module")
def learned():
    """(model, parameters, losses, mesh) after training on TARGETS, packed."""
    model = tiny_model(
        tasks=2, experts=2, d_model=32, max_positions=48, temperature=2.0, temperature_rate=0.02,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = OptimizerConfig(
        learning_rate=1e-2, router_learning_rate=1e-2, representation_learning_rate=3e-2,
        clip_norm=1.0, warmup_fraction=0.1,
    )  # fmt: skip
    groups = []
    for targets in TARGETS:
        examples = list(zip(INPUTS, targets, strict=True))
        groups.append(pack_rows([examples[:2], examples[2:]], 10, 10))
    batch = stack_groups(groups, [0, 1])
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state = jax.jit(
            lambda key: init_state(nn.meta.unbox(init_params(model, key)), optimizer),
            out_shardings=state_shardings(model, optimizer, mesh),
        )(jax.random.key(0, impl="rbg"))
        step = make_train_step(model, config, StepConfig(label_smoothing=0.0), mesh, STEPS, seed=0)
        rates = {name: jnp.float32(rate) for name, rate in config.learning_rates.items()}
        losses = []
        for _ in range(STEPS):
            state, metrics = step(state, batch, rates)
            losses.append(float(metrics["loss"]))
    return model, state.params, losses, mesh


@pytest.fixture(scope="module")
def evaluator(learned):
    model, _, _, mesh = learned
    return Evaluator(model, Tokens(), {"inputs": 6, "targets": 6}, 5, mesh)


@pytest.mark.parametrize("name", ["forced_bos_id", "forced_eos_id"])
def test_a_forced_token_is_in_the_vocabulary(name, learned):
    model, _, _, mesh = learned
    lengths, size = {"inputs": 6, "targets": 6}, model.config.vocabulary_size
    Evaluator(model, Tokens(), lengths, 5, mesh, DecodingConfig(**{name: size - 1}))
    with pytest.raises(UserError, match=f"{name} is {size}, but the vocabulary has {size} tokens"):
        Evaluator(model, Tokens(), lengths, 5, mesh, DecodingConfig(**{name: size}))


def test_the_loss_falls_from_chance_to_nothing(learned):
    losses = learned[2]
    assert losses[0] > np.log(24) - 1
    assert losses[-1] < 0.02


@pytest.mark.parametrize("task", [0, 1])
def test_what_was_learned_is_decoded_exactly(task, learned, evaluator):
    model, params, _, mesh = learned
    # One row is left empty.
    rows = pack_rows([[(source, [EOS])] for source in INPUTS] + [[]], 6, 6)
    with jax.set_mesh(mesh):
        routes = evaluator.routes(params, jnp.int32(STEPS))
        found = evaluator.predict(params, routes, task, rows)
    wanted = [target + [PAD] * (6 - len(target)) for target in TARGETS[task]]
    assert found == [*wanted, [PAD] * 6]
    # Without a cache: the model reads the whole target so far for every next token.
    module, route = EncoderDecoder(model.config), np.asarray(routes)[task]
    forward = jax.jit(lambda batch: module.apply({"params": params["backbone"]}, batch, route))
    tokens = np.full((4, 7), PAD, np.int32)
    tokens[:, 0] = START
    batch = {name: array[:4] for name, array in rows.items()}
    batch["target_segments"] = np.ones((4, 6), np.int32)
    batch["target_positions"] = np.tile(np.arange(6, dtype=np.int32), (4, 1))
    for i in range(6):
        logits = forward(batch | {"decoder_inputs": tokens[:, :6]})
        ended = (tokens[:, 1 : i + 1] == EOS).any(1)
        tokens[:, i + 1] = np.where(ended, PAD, np.argmax(np.asarray(logits)[:, i], -1))
    assert tokens[:, 1:].tolist() == wanted


@pytest.mark.parametrize("tasks", [[0] * 8, [1, 0] * 4])
def test_cut_parameters_answer_as_whole_ones(tasks, learned):
    """Rows of one task, where only its expert per layer is gathered, and rows of both tasks."""
    model, params, _, _ = learned
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    rows = pack_rows([[(source, [EOS])] for source in [*INPUTS, *INPUTS]], 6, 6)
    with jax.set_mesh(mesh):
        placed = jax.device_put(jax.device_get(params), parameter_shardings(model, mesh))
        kernel = placed["backbone"]["encoder"]["layers"]["routed"]["feed_forward"]["in_kernel"]
        assert not kernel.sharding.is_fully_replicated
        evaluator = Evaluator(model, Tokens(), {"inputs": 6, "targets": 6}, 8, mesh)
        routes = evaluator.routes(placed, jnp.int32(STEPS))
        found = evaluator.predict(placed, routes, np.array(tasks), rows)
    targets = [TARGETS[task][i % len(INPUTS)] for i, task in enumerate(tasks)]
    assert found == [target + [PAD] * (6 - len(target)) for target in targets]


def test_routes_at_evaluation_have_no_noise(learned):
    model, params, _, mesh = learned
    router = dataclasses.replace(
        model.router_config, selection="gumbel_softmax_st", exploration_epsilon=0.5
    )
    model = dataclasses.replace(model, router_config=router)
    logits = model.new_router().apply({"params": params["router"]}, params["representations"])
    with jax.set_mesh(mesh):
        evaluator = Evaluator(model, Tokens(), {"inputs": 6, "targets": 6}, 5, mesh)
        routes = np.asarray(evaluator.routes(params, jnp.int32(9)))
    np.testing.assert_array_equal(routes, np.eye(2)[np.argmax(logits, -1)])


# ------------------------------------------------------------------------------ on tasks


@pytest.fixture(scope="module")
def scores(learned):
    """Scores of a decoder that copies (`toy_copy` right, `toy_sum` wrong)."""
    mixture, _ = toy_mixtures()

    class Copies(Evaluator):
        def tokens(self, params, routes, task_id, arrays, *_, **__):
            texts = (self.vocabulary.decode(row) for row in arrays["inputs"].tolist())
            answers = (text.removeprefix("copy: ").removeprefix("sum: ") for text in texts)
            return [np.array(self.vocabulary.encode(answer)) for answer in answers]

    model, params, _, mesh = learned
    with jax.set_mesh(mesh):
        evaluator = Copies(model, mixture.vocabulary, {"inputs": 48, "targets": 16}, 8, mesh)
        return evaluator.tasks(params, STEPS, mixture, {"toy_copy": 0, "toy_sum": 1}, "test", None,
                               show=False)  # fmt: skip


def test_scores_are_the_tasks_own_metric(scores):
    assert [(s.task.name, s.metric, s.score) for s in scores] == [
        ("toy_copy", "EM", 1.0),
        ("toy_sum", "EM", 0.0),
    ]
    assert mean_score(scores) == 0.5
    mixture, _ = toy_mixtures()
    records = mixture.task("toy_copy").records("test")
    rows = scores[0].predictions
    assert [row["index"] for row in rows] == list(range(len(records)))
    assert [row["input"] for row in rows] == [r.inputs_text for r in records]


def test_scores_and_predictions_are_written(scores, tmp_path):
    write_scores(tmp_path, scores)
    lines = [json.loads(x) for x in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["toy_copy", "toy_sum"]
    assert lines[0]["score"] == 1.0 and lines[0]["examples"] == 20 and lines[0]["split"] == "test"
    assert (lines[0]["category"], lines[0]["subcategory"]) == ("extractive", "copy")
    assert lines[0]["experts"] == np.argmax(scores[0].predictions[0]["route"], -1).tolist()
    lines = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert lines[0]["prediction"] in lines[0]["references"]


def test_scores_of_an_evaluation_before_are_gone_while_it_is_written(scores, tmp_path):
    write_scores(tmp_path, scores)
    no_json = dataclasses.replace(scores[0], predictions=[{"prediction": object()}])
    with pytest.raises(TypeError):
        write_scores(tmp_path, [no_json])
    assert not (tmp_path / "scores.jsonl").exists()


def test_prompts_of_a_dataset_are_summed_up(scores, tmp_path):
    def of(dataset, score, metric="ACC"):
        task = types.SimpleNamespace(name="t", dataset=dataset, category="", subcategory="")
        return TaskScore(task, "test", metric, score, {metric: score}, [])

    found = [of("nli", 0.2), of("", 0.9), of("nli", 0.6), of("nli", 0.25), of("nli", 1.0, "EM")]
    rows = over_prompts(found)
    assert rows == [
        {"dataset": "nli", "split": "test", "metric": "ACC", "prompts": 3, "median": 0.25,
         "mean": pytest.approx(0.35), "min": 0.2, "max": 0.6},
        {"dataset": "nli", "split": "test", "metric": "EM", "prompts": 1, "median": 1.0,
         "mean": 1.0, "min": 1.0, "max": 1.0},
    ]  # fmt: skip
    write_scores(tmp_path, found)
    assert [*files.read_jsonl(tmp_path / "prompts.jsonl")] == rows
    assert over_prompts(scores) == []  # the toy tasks are no prompts


def test_a_split_that_no_task_has_is_named():
    mixture, _ = toy_mixtures()
    assert tasks_with_split(mixture, "validation") == ["toy_copy", "toy_sum"]
    with pytest.raises(UserError, match="no task of toy_train has a split 'validatoin'; did you "
                                        "mean 'validation'"):  # fmt: skip
        tasks_with_split(mixture, "validatoin")


def test_routes_are_written_by_task(tmp_path):
    mixture, _ = toy_mixtures()
    config = types.SimpleNamespace(experts=2, routed_layers=("encoder.0", "decoder.0"))
    routes = np.array([[[1, 0], [0, 1]], [[0.5, 0.5], [0.25, 0.75]]], np.float32)
    write_routes(tmp_path / "routes.json", types.SimpleNamespace(config=config), routes, 3,
                 mixture, {"toy_copy": 1, "toy_sum": 0})  # fmt: skip
    written = json.loads((tmp_path / "routes.json").read_text())
    assert written["layers"] == ["encoder.0", "decoder.0"] and written["step"] == 3
    assert written["tasks"]["toy_copy"]["route"] == routes[1].tolist()
    assert written["tasks"]["toy_sum"]["category"] == "arithmetic"


def test_a_route_for_json():
    assert route_json(np.array([[0, 1.0], [1.0, 0]])) == [1, 0]
    assert route_json(np.array([[0.25, 0.75], [1.0, 0]])) == [[0.25, 0.75], [1.0, 0.0]]
