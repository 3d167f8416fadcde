"""Few-shot adaptation: what is scored and written."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_starts import MODEL
from toy_run import bindings, finish, flags_of, start

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.model.config import RouterConfig
from moe_jax.runs import directory, gin_files
from moe_jax.runs.config import Config, DataConfig, FewShotConfig, FinetuneConfig, RunConfig
from moe_jax.runs.configurables import build
from moe_jax.unseen import adaptation as program
from moe_jax.unseen.adaptation import Grid, search
from moe_jax.unseen.samples import Sample

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
    # A start alone has the same scores; there are gains only over starts that are there.
    alone = [line for line in lines if not line.startswith(("MODEL_DIR", "DENSE_DIR"))]
    alone += [f"MODEL_DIR = {str(tmp_path / 'alone')!r}", "FinetuneConfig.starts = ('moe',)"]
    finish(start("finetune", flags_of(alone)))
    assert list(files.read_jsonl(tmp_path / "alone" / "runs.jsonl")) == rows[4:]
    assert not (tmp_path / "alone" / "arg.json").exists()
    two = [line for line in lines if not line.startswith("MODEL_DIR")]
    two += [
        f"MODEL_DIR = {str(tmp_path / 'two')!r}",
        "FinetuneConfig.starts = ('untrained', 'moe')",
    ]
    finish(start("finetune", flags_of(two)))
    assert files.read_json(tmp_path / "two" / "arg.json")["starts"].keys() == {"moe"}
    assert not (tmp_path / "two" / "gains.json").exists()


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
