"""T5X's own train.py, eval.py and infer.py drive the model; losses, scores and texts equal ours.

MOE_JAX_T5X names a checkout of T5X. Its requirements are those of its `setup.py`; stand-ins replace
`airio` and `jestimator`, which are not on PyPI and which T5X only imports.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.runs import directory
from moe_jax.runs.load import read_run
from moe_jax.runs.mixtures import prepare_mixtures

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = {
    "airio/__init__.py": "",
    "airio/core.py": "class DatasetProviderBase: ...\nclass AirIODatasetIterator: ...\n"
    "class Task: ...\nclass Mixture: ...\n",
    "jestimator/__init__.py": "",
    "jestimator/amos.py": "class ScaleByAmosState: ...\namos = None\n",
    "jestimator/amos_helper.py": "state_partition_rule = None\n",
}
# The task has scores above zero after so few steps.
TASK, STEPS, LENGTH = "skills_introduce", 20, 8
# Whole paths: where there is a directory `runs`, gin takes it for a package, and fails.
GIN = ROOT / "gin_configs"
FILES = [
    f"--gin_file={GIN}/models/tiny.gin", f"--gin_file={GIN}/runs/skills_gym_stage1.gin",
    "--gin.skills_gym.descriptions=True", "--gin.RouterConfig.selection='gumbel_softmax_st'",
    "--gin.RouterConfig.temperature=2.0", "--gin.RouterConfig.temperature_rate=0.01",
]  # fmt: skip
DECODING = [f"--gin.DecodingConfig.min_length={LENGTH}"]


class Commands:
    """T5X's commands and ours, which share a cache."""

    def __init__(self, directory: Path, environment: dict[str, str]):
        self.directory, self.environment = directory, environment

    def t5x(self, command: str, devices: int = 1, **settings: object) -> None:
        settings["CACHE_DIR"] = str(self.directory / "cache")
        self._run(f"t5x.{command}", [
            f"--gin_search_paths={GIN}", f"--gin_file={GIN}/t5x/{command}.gin", *FILES,
            *(f"--gin.{name}={value!r}" for name, value in settings.items()), *DECODING,
        ], devices)  # fmt: skip

    def ours(self, command: str, *arguments: str) -> None:
        self._run(f"moe_jax.{command}", [*arguments])

    def _run(self, module: str, arguments: list[str], devices: int = 1) -> None:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=self.directory,
            env=self.environment | flags, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    directory = tmp_path_factory.mktemp("t5x")
    for name, text in STAND_INS.items():
        path = directory / "stand_ins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    places = [str(ROOT), os.environ.get("MOE_JAX_T5X", ""), str(directory / "stand_ins")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    found = subprocess.run(
        [sys.executable, "-c", "import t5x.models"], env=environment, capture_output=True, text=True
    )
    if found.returncode:
        reason = found.stderr.strip().rpartition("\n")[2]
        pytest.skip(f"T5X cannot be imported ({reason}): set MOE_JAX_T5X to a checkout of it")
    return Commands(directory, environment)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(directory: Path, name: str) -> list[float]:
    events = EventAccumulator(str(directory / "train"), size_guidance={"tensors": 0})
    events.Reload()
    return [make_ndarray(event.tensor_proto).item() for event in events.Tensors(name)]


def log_likelihoods(model_dir: Path) -> list[float]:
    """Those of the task's targets, by our evaluator."""
    config = directory.read_config(model_dir)
    mixture = prepare_mixtures(config.data)[config.data.mixture_or_task_name]
    run, mesh = read_run(str(model_dir), mixture.vocabulary.size), make_mesh(MeshConfig())
    evaluator = Evaluator(run.model, mixture.vocabulary, config.data.lengths, 32, mesh)
    routes = evaluator.routes(run.params, run.step)
    arguments = (run.params, routes, mixture, TASK, run.task_ids[TASK], "test")
    rows = evaluator.task(*arguments, likelihoods=True).predictions
    return [row["log_likelihood"] for row in rows]


@pytest.mark.slow
def test_t5x_trains_evaluates_and_infers_as_we_do(commands):
    """20 steps of `tiny` on the skills gym, hard routes with noise; checkpoints both ways."""
    root = commands.directory
    same = {"TRAIN_STEPS": STEPS, "EVAL_PERIOD": 0}
    commands.t5x("train", MODEL_DIR=str(root / "t5x"), **{**same, "train.stats_period": 1})
    commands.ours(
        "train", *FILES, *(f"--gin.{name}={value}" for name, value in same.items()),
        "--gin.MODEL_DIR=ours", "--gin.CACHE_DIR=cache", "--gin.RunConfig.log_period=1",
    )  # fmt: skip
    rows = lines(root / "ours" / "metrics.jsonl")
    for name in ("loss", "temperature", "learning_rate"):
        theirs, ours = logged(root / "t5x", name), [row[name] for row in rows]
        assert len(theirs) == STEPS
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5, err_msg=name)

    # T5X's checkpoint here, and ours in T5X.
    commands.ours("convert", "from-t5x", f"t5x/checkpoint_{STEPS}", "from_t5x")
    commands.ours("convert", "to-t5x", "ours", "to_t5x")
    commands.ours("eval", "--gin.MODEL_DIR=from_t5x", "--gin.CACHE_DIR=cache", *DECODING)
    place = root / "from_t5x" / "eval" / "skills_gym_train_test"
    expected = [row for row in lines(place / "predictions.jsonl") if row["task"] == TASK]
    (score,) = [row for row in lines(place / "scores.jsonl") if row["task"] == TASK]
    assert score["score"] > 0

    data = {"utils.DatasetConfig.mixture_or_task_name": TASK}
    for source in ("t5x", "to_t5x"):
        at = {"CHECKPOINT_PATH": str(root / source / f"checkpoint_{STEPS}"), **data}
        commands.t5x("eval", EVAL_OUTPUT_DIR=str(root / f"{source}_eval"), **at)
        (found,) = lines(root / f"{source}_eval" / "inference_eval" / f"{TASK}-metrics.jsonl")
        assert found["step"] == STEPS
        np.testing.assert_allclose(found[score["metric"]], score["score"], rtol=1e-6)
    for mode in ("predict_with_aux", "score"):
        output = str(root / mode)
        commands.t5x("infer", INFER_OUTPUT_DIR=output, **at, **{"infer.mode": mode})
    name = "{}-{}.jsonl-00000-of-00001"
    answers = lines(root / "predict_with_aux" / name.format(TASK, "predict_with_aux"))
    assert [row["prediction"] for row in answers] == [row["prediction"] for row in expected]
    scores = lines(root / "score" / name.format(TASK, "score"))
    own = log_likelihoods(root / "from_t5x")
    np.testing.assert_allclose([row["score"] for row in scores], own, rtol=1e-5)


PARTS = "partitioning.PjitPartitioner.num_partitions"


@pytest.mark.slow
def test_several_devices_train_and_answer_as_one(commands):
    """T5X's partitioner over 8 virtual devices: data alone, and widths of layers over two."""
    root = commands.directory
    same = {
        "TRAIN_STEPS": STEPS, "EVAL_PERIOD": 0, "train.stats_period": 1,
        # Adam's usual one would blow up gradients that are zero but for rounding.
        "OptimizerConfig.epsilon": 1e-2,
    }  # fmt: skip
    data = {"utils.DatasetConfig.mixture_or_task_name": TASK, "infer.mode": "predict_with_aux"}
    losses, answers = {}, {}
    for devices, parts in ((1, 1), (8, 1), (8, 2)):
        run = root / f"t5x_{devices}_{parts}"
        commands.t5x("train", devices, MODEL_DIR=str(run), **{**same, PARTS: parts})
        losses[devices, parts] = logged(run, "loss")
        at = {"CHECKPOINT_PATH": str(root / "t5x_1_1" / f"checkpoint_{STEPS}"), PARTS: parts}
        commands.t5x("infer", devices, INFER_OUTPUT_DIR=str(run / "infer"), **{**at, **data})
        (file,) = (run / "infer").glob(f"{TASK}-predict_with_aux.jsonl-*-of-*[0-9]")
        answers[devices, parts] = lines(file)
    expected = losses[1, 1]
    assert len(expected) == STEPS and expected[-1] < expected[0]
    for where, found in losses.items():
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(where))
    for where, rows in answers.items():
        for row, wanted in zip(rows, answers[1, 1], strict=True):
            assert row["prediction"] == wanted["prediction"], where
            scores = (r["aux"]["scores"] for r in (row, wanted))
            np.testing.assert_allclose(*scores, rtol=1e-5, err_msg=str(where))
