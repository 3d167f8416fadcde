"""Few-shot adaptation: where a new task starts, what is trained, what is scored and written."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import (
    EOS,
    PAD,
    START,
    bindings,
    finish,
    flags_of,
    random_batch,
    start,
    tiny_model,
    tiny_params,
)

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.data.batch import of_rows
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import RouterConfig
from moe_jax.model.task_moe import routes_of
from moe_jax.runs import directory, gin_files
from moe_jax.runs.config import Config, DataConfig, FewShotConfig, FinetuneConfig, RunConfig
from moe_jax.runs.configurables import build
from moe_jax.runs.load import Run
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.unseen import adaptation as program
from moe_jax.unseen.adaptation import Grid, search
from moe_jax.unseen.samples import Sample
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
    learner = program.new_learner(new, FROZEN[new.tune], config, MESH, few, samples=1)
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


# ------------------------------------------------------------------------------ what is scored

POINTS = [Grid(*point) for point in itertools.product((0.1, 0.2), (2, 4))]
SAMPLES = [Sample("x", 13), Sample("y", 13)]
DEV = {
    SAMPLES[0]: dict(zip(POINTS, (0.3, 0.7, 0.7, 0.5), strict=True)),
    SAMPLES[1]: dict(zip(POINTS, (0.3, 0.1, 0.2, 0.3), strict=True)),
}


class FakeRunner:
    """Parameters are runs; an answer is the run itself."""

    runs, rows = 3, 1

    def train(self, shared, own, examples, order, rates, period):
        assert own["representations"].tolist() == examples and period == 0
        yield list(zip(examples, order[:, 0, 0], rates["backbone"].tolist(), strict=True))

    def decode(self, shared, trained, jobs):
        return {run: [np.array([trained[run]])] * len(blocks) for run, blocks in jobs.items()}


class FakeData:
    """A sample's examples are its number."""

    def __init__(self):
        self.tested = []

    def order(self, sample, rows):
        return np.full((1, 1), rows)

    def training(self, samples):
        return [SAMPLES.index(sample) for sample in samples]

    def all_decoded(self, task, split, limit):
        return True

    def blocks(self, task, split, limit, rows):
        return ["a block"]

    def score(self, task, split, limit, tokens):
        ((number, size, rate),) = tokens
        sample, point = SAMPLES[int(number)], Grid(round(float(rate), 3), int(size))
        assert task == sample.task
        if split == "test":
            self.tested.append((sample, point))
            return "EM", 10 * DEV[sample][point]
        assert split == "fewshot_13_validation" and limit is None
        return "EM", DEV[sample][point]


@pytest.mark.parametrize("done", range(8))
def test_only_the_best_on_dev_is_scored_on_test(done):
    """Also where a run was stopped after `done` lines and goes on."""
    learner = types.SimpleNamespace(
        runner=FakeRunner(),
        rates=lambda peaks: {"backbone": np.array([*peaks] + [0.0] * (3 - len(peaks)))},
    )
    best = [(SAMPLES[0], POINTS[1]), (SAMPLES[1], POINTS[0])]  # the first of equals

    def lines(todo):
        todo = {sample: points for sample, points in todo.items() if points}
        own = {"representations": np.array([SAMPLES.index(sample) for sample in todo])}
        data, start = FakeData(), types.SimpleNamespace(name="moe", shared=None)
        rows = search(learner, start, own, todo, data, 5)
        assert sorted(data.tested) == [run for run in sorted(best) if run[0] in todo]
        return rows

    def key(row):
        return Sample(row["task"], row["seed"]), Grid(row["learning_rate"], row["batch_size"])

    first = lines(dict.fromkeys(SAMPLES, POINTS))[:done]
    written = set(map(key, first))
    left = {s: [p for p in POINTS if (s, p) not in written] for s in SAMPLES}
    rows = first + lines(left)
    found = {key(row): row for row in rows}
    assert len(rows) == len(found) == 8
    assert all(row["dev_score"] == DEV[s][p] for (s, p), row in found.items())
    tests = {run: row["test_score"] for run, row in found.items() if row["test_score"] is not None}
    assert tests == {best[0]: 7.0, best[1]: 3.0}


def test_a_run_counts_as_it_was_when_dev_was_highest():
    """Three parts of 100 steps; the first of equals."""
    after = {100: [0.2, 0.5, 0.1], 200: [0.6, 0.4, 0.1], 250: [0.6, 0.3, 0.3]}
    grid = [Grid(rate, 2) for rate in (1, 2, 3)]
    sample, tested = Sample("x", 13), []

    def train(shared, own, examples, order, rates, period):
        assert order.shape == (4, 250, 1) and period == 100  # one place of four is idle
        for step in after:
            weights = np.full((4, 1), step, np.float32) + np.arange(4)[:, None] / 8
            yield {"backbone": {"w": jnp.asarray(weights)}, "representations": weights[:, 0]}

    def decode(shared, trained, jobs):
        trained = jax.device_get(trained)
        for tree in (trained["representations"], trained["backbone"]["w"][:, 0]):
            assert np.all(tree % 1 == np.arange(4) / 8)  # each run is its own
        return {run: [trained["representations"][run : run + 1]] for run in jobs}

    def score(task, split, limit, tokens):
        step, run = divmod(float(tokens[0]), 1)
        if split == "test":
            tested.append((step, run * 8))
        return "EM", after[step][int(run * 8)]

    learner = types.SimpleNamespace(
        runner=types.SimpleNamespace(runs=4, rows=1, train=train, decode=decode),
        rates=lambda peaks: {"backbone": np.array(peaks)},
    )
    data = types.SimpleNamespace(
        order=lambda sample, size: np.zeros((250, 1), np.int32), training=len, score=score,
        all_decoded=lambda *_: True, blocks=lambda *_: [{}],
    )  # fmt: skip
    start = types.SimpleNamespace(name="moe", shared={})
    rows = search(learner, start, {}, {sample: grid}, data, None, period=100)
    found = {row["learning_rate"]: (row["step"], row["dev_score"]) for row in rows}
    assert found == {1: (200, 0.6), 2: (100, 0.5), 3: (250, 0.3)}
    assert tested == [(200, 0)] and rows[-1]["test_score"] == 0.6


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
    dense = dataclasses.replace(moe, model=dataclasses.replace(moe.model, experts=1))
    directory.write_config(tmp_path / "dense", dense)
    files.write_json(tmp_path / "rows.json", rows)
    settings = {
        "MODEL_DIR": str(tmp_path / "few_shot"),
        "MIXTURE_OR_TASK_NAME": "a_mixture",
        "DENSE_DIR": str(tmp_path / "dense"),
        "MOE_DIR": str(tmp_path / "moe"),
        "FinetuneConfig.representation": "file",
        "FinetuneConfig.representations_path": str(tmp_path / "rows.json"),
    }
    gin_files.parse([], [f"{name} = {value!r}" for name, value in settings.items()], [])
    with pytest.raises(UserError, match=r"no task 'b'; did you mean 'bx'|representation_dim is 8"):
        program.adapt_all(build(FewShotConfig))
    assert [path.name for path in (tmp_path / "few_shot").iterdir()] == [".lock"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"DENSE_DIR": "moe", "MOE_DIR": "dense"}, "DENSE_DIR .*moe holds a mixture of 3 experts"),
    ({"DENSE_DIR": "none"}, "none holds no run"),
    ({"FinetuneConfig.seeds": (99,)}, r"no split 'fewshot_99_train'; it has .*; did you mean"),
])  # fmt: skip
def test_what_cannot_be_adapted_leaves_nothing(changes, message, tmp_path):
    """So that the command can be given again, with other settings."""
    lengths = {"inputs": 40, "targets": 20}
    model = dataclasses.replace(MODEL.config, experts=3, max_positions=48)
    moe = Config(RunConfig(), DataConfig(lengths=lengths), model, RouterConfig())
    dense = dataclasses.replace(moe, model=dataclasses.replace(model, experts=1))
    for name, config in {"moe": moe, "dense": dense}.items():
        directory.write_config(tmp_path / name, config)
    places = {"DENSE_DIR": "dense", "MOE_DIR": "moe"}
    places |= {name: changes.pop(name) for name in list(changes) if name in places}
    settings = changes | {name: str(tmp_path / place) for name, place in places.items()}
    lines = bindings(tmp_path / "few_shot", MIXTURE_OR_TASK_NAME="toy_unseen",
                     VocabularyConfig__trained_on="toy_train")  # fmt: skip
    gin_files.parse([], [*lines, *(f"{name} = {value!r}" for name, value in settings.items())], [])
    with pytest.raises(UserError, match=message):
        program.adapt_all(build(FewShotConfig))
    assert [path.name for path in (tmp_path / "few_shot").iterdir()] == [".lock"]


@pytest.mark.slow
def test_runs_resumes_and_reports(tmp_path):
    """Dense and routed toy runs, adapted to toy_reverse; stopped half-way and gone on with."""
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
        FinetuneConfig__eval_period=2,
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
    # A start alone has the same scores; there are no gains without the other starts.
    alone = [line for line in lines if not line.startswith(("MODEL_DIR", "DENSE_DIR"))]
    alone += [f"MODEL_DIR = {str(tmp_path / 'alone')!r}", "FinetuneConfig.starts = ('moe',)"]
    finish(start("finetune", flags_of(alone)))
    assert list(files.read_jsonl(tmp_path / "alone" / "runs.jsonl")) == rows[4:]
    assert not (tmp_path / "alone" / "arg.json").exists()


def test_what_is_adapted():
    """All starts whose directories are given, or those that are named."""
    both = {"dense_dir": "d", "moe_dir": "m"}
    assert FinetuneConfig(**both).adapted == {"untrained": "d", "dense": "d", "moe": "m"}
    assert FinetuneConfig(dense_dir="d").adapted == {"untrained": "d", "dense": "d"}
    assert FinetuneConfig(**both, starts=("moe", "untrained")).adapted == {
        "untrained": "d", "moe": "m",
    }  # fmt: skip
    assert FinetuneConfig(moe_dir="m", starts=("moe",)).adapted == {"moe": "m"}
    for settings, macro in (({}, "DENSE_DIR"), ({"dense_dir": "d", "starts": ("moe",)}, "MOE_DIR")):
        with pytest.raises(UserError, match=f"is not set: give --gin.{macro}="):
            assert FinetuneConfig(**settings).adapted


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="did you mean 'route_only'"):
        FinetuneConfig(tune="route-only")
