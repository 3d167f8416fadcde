"""Few-shot adaptation: the start of a new task, trained parts, scores and files."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import bindings, finish, flags_of, random_batch, start, tiny_model, tiny_params

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.task_moe import routes_of
from moe_jax.runs import directory, flags
from moe_jax.runs.config import Config, DataConfig, FewShotConfig, FinetuneConfig, RunConfig
from moe_jax.runs.configurables import build
from moe_jax.runs.load import Run
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.unseen import adaptation as program
from moe_jax.unseen.adaptation import FROZEN, Adapter, Start, search

MODEL = tiny_model(temperature=2.0, temperature_rate=0.1, exploration_epsilon=0.5)
RUN = Run(MODEL, tiny_params(MODEL), {"a": 0, "b": 1, "c": 2}, step=7)
BATCH = random_batch(groups=1, rows=3, tasks=1)


def start_of(run=RUN, **settings):
    return Start("moe", run, FinetuneConfig(**settings), seed=3)


# ------------------------------------------------------------------------------ where it starts


def test_representations(tmp_path):
    table_TxK = np.asarray(RUN.params["representations"])
    rows = {
        kind: np.asarray(start_of(representation=kind).params("new", BATCH)["representations"])
        for kind in ("mean", "random")
    }
    np.testing.assert_allclose(rows["mean"][0], table_TxK.mean(0), rtol=1e-6)
    assert rows["random"].shape == (1, 8) and rows["random"].std() > 0.3
    path = str(tmp_path / "rows.json")
    files.write_json(path, {"other": [0.0] * 8, "new": list(range(8))})
    of_file = start_of(representation="file", representations_path=path)
    np.testing.assert_array_equal(of_file.params("new", BATCH)["representations"], [range(8)])
    with pytest.raises(UserError, match="neww"):
        of_file.params("neww", BATCH)
    with pytest.raises(UserError, match="'file' and a path go together"):
        FinetuneConfig(representation="file")


def test_nearest_has_the_lowest_loss():
    """Each training task's loss on the few examples, written out."""
    routes_TxNxE = np.asarray(routes_of(MODEL, RUN.params, RUN.step))
    group = {name: array[0] for name, array in BATCH.items() if name != "task_id"}
    logits = jax.jit(
        lambda route: EncoderDecoder(MODEL.config).apply(
            {"params": RUN.params["backbone"]}, group, route
        )
    )
    losses = []
    for route in routes_TxNxE:
        x = np.asarray(logits(route), np.float64)
        log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
        chosen = np.take_along_axis(log_p, group["targets"][..., None], -1)[..., 0]
        losses.append(-chosen[group["target_segments"] > 0].sum())
    new = start_of(representation="nearest")
    tasks, routes = new._choices
    assert tasks.tolist() == list(range(len(losses)))
    found = new._losses(RUN.params["backbone"], routes, BATCH)
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    row = new.params("new", BATCH)["representations"][0]
    np.testing.assert_array_equal(row, RUN.params["representations"][int(np.argmin(losses))])


def test_tasks_of_one_route_are_tried_once():
    table_TxK = np.asarray(RUN.params["representations"])
    alike = np.concatenate([table_TxK[:2] + 1e-6, table_TxK, table_TxK])
    params = {**RUN.params, "representations": jnp.asarray(alike)}
    model = dataclasses.replace(MODEL, tasks=len(alike))
    run = dataclasses.replace(RUN, model=model, params=params)
    tasks, routes = Start("moe", run, FinetuneConfig(), 0)._choices
    assert tasks.tolist() == [0, 1, *range(4, 2 + len(table_TxK))]
    np.testing.assert_allclose(routes, routes_of(MODEL, RUN.params, RUN.step), atol=1e-5)


@pytest.mark.parametrize("tune", FROZEN)
def test_a_new_task_is_routed_as_the_training_tasks_were(tune):
    """At the last temperature, without noise, by the router or by free logits."""
    new = start_of(representation="mean", tune=tune)
    params = new.params("new", BATCH)
    found = routes_of(new.model, params, 0)
    mean = RUN.params["representations"].mean(0, keepdims=True)
    wanted = routes_of(MODEL, {**RUN.params, "representations": mean}, RUN.step)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    if tune == "free_route":
        assert params["representations"].shape == (1, MODEL.layers * 4) and params["router"] == {}


# ------------------------------------------------------------------------------ what is trained


class NoText:
    decoder_start_id, eos_id, pad_id = 0, 1, 0


def adapter(new):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    mixture = types.SimpleNamespace(vocabulary=NoText())
    data = DataConfig(lengths={"inputs": 12, "targets": 12})
    optimizer_config = OptimizerConfig(router_learning_rate=1e-2, learning_rate=1.0)
    config = FewShotConfig(RunConfig(), data, FinetuneConfig(steps=2), optimizer_config)
    return Adapter(new.model, FROZEN[new.tune], mixture, config, mesh)


@pytest.mark.parametrize("tune", FROZEN)
def test_what_is_tuned(tune):
    new = start_of(representation="mean", tune=tune)
    params = new.params("new", BATCH)
    before = jax.device_get(params)
    adapt = adapter(new)
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        after = jax.device_get(adapt.train(params, [BATCH, BATCH], 1e-3))
        still = jax.device_get(adapt.train(params, [BATCH, BATCH], 0.0))
    moved = {
        part
        for part in before
        if any(
            np.any(x != y)
            for x, y in zip(
                jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True
            )
        )
    }
    parts = {"backbone", "router", "representations"}
    assert moved == parts - set(FROZEN[tune])
    # The learning rate that is searched belongs to the backbone, or else to the representation.
    searched = "backbone" if "backbone" in moved else "representations"
    jax.tree.map(np.testing.assert_array_equal, before[searched], still[searched])


def test_dense_starts_are_trained_whole():
    model = tiny_model(experts=1)
    new = start_of(Run(model, {"backbone": {}}, {}, 0), tune="route_only")
    assert new.tune == "all" and new.params("new", BATCH) == {"backbone": {}}


# ------------------------------------------------------------------------------ what is scored

POINTS = list(itertools.product((0.1, 0.2), (2, 4)))
DEV = dict(zip(POINTS, (0.3, 0.7, 0.7, 0.5), strict=True))


class FakeAdapter:
    """Parameters are the grid point; counts what is scored on test."""

    def __init__(self):
        self.tested = []

    def train(self, params, batches, learning_rate):
        return learning_rate, batches

    def score(self, point, task, split, limit=None):
        if split == "test":
            self.tested.append(point)
            return types.SimpleNamespace(score=10 * DEV[point], metric="EM")
        assert split == "fewshot_13_validation"
        return types.SimpleNamespace(score=DEV[point], metric="EM")


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_only_the_best_on_dev_is_scored_on_test(done, monkeypatch):
    """Also for a run that was stopped after `done` lines and then resumed."""
    monkeypatch.setattr(program, "few_shot_batches", lambda mixture, task, seed, rows, *_: rows)

    def lines(points):
        fake = FakeAdapter()
        rows = list(search(fake, None, "task", 13, points, None, None, FinetuneConfig()))
        assert fake.tested == [(0.1, 4)]  # the first of equals
        return rows

    first = lines(POINTS)[:done]
    written = {(row["learning_rate"], row["batch_size"]) for row in first}
    rows = first + lines([point for point in POINTS if point not in written])
    found = {(row["learning_rate"], row["batch_size"]): row for row in rows}
    assert len(rows) == 4 and {p: row["dev_score"] for p, row in found.items()} == DEV
    tests = {p: row["test_score"] for p, row in found.items() if row["test_score"] is not None}
    assert tests == {(0.1, 4): 7.0}


# ------------------------------------------------------------------------------ the program


@pytest.mark.parametrize("rows", [{"a": [0.0] * 8, "bx": [0.0] * 8}, {"a": [0.0], "b": [0.0]}])
def test_a_row_that_is_not_there_is_reported_before_any_training(rows, tmp_path, monkeypatch):
    """The error comes before MODEL_DIR is written, which would later refuse another file."""
    mixture = types.SimpleNamespace(names=("a", "b"), vocabulary=types.SimpleNamespace(size=24))
    monkeypatch.setattr(program, "prepare_mixtures", lambda data, run: {"a_mixture": mixture})
    monkeypatch.setattr(
        program, "read_starts", lambda *_: pytest.fail("training is about to start")
    )
    moe = Config(RunConfig(), DataConfig(lengths={"inputs": 4, "targets": 4}), MODEL.config,
                 MODEL.router_config)  # fmt: skip
    directory.write_config(tmp_path / "moe", moe)
    files.write_json(tmp_path / "rows.json", rows)
    settings = {
        "MODEL_DIR": str(tmp_path / "few_shot"),
        "MIXTURE_OR_TASK_NAME": "a_mixture",
        "DENSE_DIR": str(tmp_path / "dense"),
        "MOE_DIR": str(tmp_path / "moe"),
        "FinetuneConfig.representation": "file",
        "FinetuneConfig.representations_path": str(tmp_path / "rows.json"),
    }
    flags.parse_gin([], [f"{name} = {value!r}" for name, value in settings.items()], [])
    with pytest.raises(UserError, match=r"no task 'b'; did you mean 'bx'|representation_dim is 8"):
        program.adapt_all(build(FewShotConfig))
    assert [path.name for path in (tmp_path / "few_shot").iterdir()] == [".lock"]


@pytest.mark.slow
def test_runs_resumes_and_reports(tmp_path):
    """Adapts dense and routed toy runs to toy_reverse, with an interruption half-way."""
    runs = {"dense": {"ModelConfig__experts": 1}, "moe": {}}
    for name, settings in runs.items():
        lines = bindings(tmp_path / name, TRAIN_STEPS=4, CHECKPOINT_PERIOD=4, **settings)
        finish(start("train", flags_of(lines)))
    lines = bindings(
        tmp_path / "few_shot",
        MIXTURE_OR_TASK_NAME="toy_unseen", VocabularyConfig__trained_on="toy_train",
        DENSE_DIR=str(tmp_path / "dense"), MOE_DIR=str(tmp_path / "moe"),
        FinetuneConfig__learning_rates=(1e-3, 1e-2), FinetuneConfig__batch_sizes=(4,),
        FinetuneConfig__seeds=(13,), FinetuneConfig__steps=3, FinetuneConfig__tune="free_route",
    )  # fmt: skip
    lines = [line for line in lines if not line.startswith(("TRAIN", "Model"))]
    out = finish(start("finetune", flags_of(lines)))
    assert "toy_reverse" in out  # the score is 0 after so few steps: no relative gain
    assert set(files.read_json(tmp_path / "few_shot" / "arg.json")["starts"]) == {"dense", "moe"}
    assert {"date", "commit"} <= files.read_json(tmp_path / "few_shot" / "origin.json").keys()
    over_dense = files.read_json(tmp_path / "few_shot" / "gains.json")
    assert over_dense["baseline"] == "dense" and set(over_dense["arms"]) == {"untrained", "moe"}
    assert "minus dense" in out
    path = tmp_path / "few_shot" / "runs.jsonl"
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["start"] for row in rows] == ["untrained"] * 2 + ["dense"] * 2 + ["moe"] * 2
    assert [row["test_score"] is None for row in rows] == [True, False] * 3
    whole = text.splitlines(keepends=True)
    path.write_text("".join(whole[:3]) + whole[3][:20])
    finish(start("finetune", flags_of(lines)))
    assert path.read_text() == text


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="did you mean 'route_only'"):
        FinetuneConfig(tune="route-only")
