"""Whole training runs in processes of their own: exact resume, two processes, no TensorFlow."""

import dataclasses
import json
import random
import re
import shutil
import signal
import time
from datetime import UTC, datetime

import numpy as np
import pytest
from toy_run import TASKS, bindings, finish, flags_of, metrics, start, start_together

from moe_jax import __version__
from moe_jax.core.errors import UserError
from moe_jax.runs import directory
from moe_jax.runs.train_loop import _announce
from moe_jax.training.checkpoints import load_params

# All sources of randomness are on: noise, exploration, dropout, data order.
SETTINGS = {
    "TRAIN_STEPS": 48,
    "EVAL_PERIOD": 16,
    "CHECKPOINT_PERIOD": 8,
    "RouterConfig__selection": "gumbel_softmax_st",
    "RouterConfig__experts_per_layer": 1,
    "RouterConfig__exploration_epsilon": 0.2,
}
# Runs moe_jax.train, then writes the names of all modules that the process has loaded.
WITH_MODULES = """
import runpy, sys
try:
    runpy.run_module("moe_jax.train", run_name="__main__", alter_sys=True)
finally:
    print("\\n".join(sys.modules))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(MODEL_DIR, names of loaded modules, what was said) of an uninterrupted run."""
    model_dir = tmp_path_factory.mktemp("whole") / "run"
    process = start("train", flags_of(bindings(model_dir, **SETTINGS)), code=WITH_MODULES)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return model_dir, set(out.split()), err


def test_scores_are_said_as_they_are_logged(whole):
    model_dir, _, err = whole
    lines = {
        line["step"]: line["mean_score"] for line in metrics(model_dir) if "mean_score" in line
    }
    said = re.findall(r"^step (\d+): mean score (\S+) on validation$", err, re.M)
    assert said == [(str(step), f"{score:.4f}") for step, score in lines.items()] and len(said) == 3


def test_the_last_line_says_where_the_run_is_and_its_loss(whole):
    model_dir, _, err = whole
    loss = [line["loss"] for line in metrics(model_dir) if line["kind"] == "train"][-1]
    end = f"{model_dir} is trained for 48 steps: loss {loss:.3f}, "
    assert err.splitlines()[-1].startswith(end)


def test_a_run_leaves_all_its_files(whole):
    model_dir, *_ = whole
    lines = metrics(model_dir)
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(2, 49, 2))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [16, 32, 48]
    assert train_lines[-1]["loss"] < train_lines[0]["loss"] - 0.5
    assert 0 < train_lines[0]["padding/all"] < train_lines[0]["padding/unpacked"] < 1
    table = json.loads((model_dir / "task_table.json").read_text())
    assert table == {"tasks": ["toy_copy", "toy_sum"]}
    routes = json.loads((model_dir / "routes.json").read_text())
    assert routes["layers"] == ["encoder.0", "decoder.0"] and routes["experts"] == 2
    for task in routes["tasks"].values():
        np.testing.assert_array_equal(np.sort(task["route"], axis=-1), [[0, 1]] * 2)
    for step in (16, 32, 48):  # also at each evaluation
        then = json.loads((model_dir / "routes" / f"{step}.json").read_text())
        assert then["step"] == step and then["tasks"].keys() == routes["tasks"].keys()
    assert then == routes
    origin = json.loads((model_dir / "origin.json").read_text())
    assert datetime.fromisoformat(origin["date"]) <= datetime.now(UTC)
    assert origin["version"] == __version__ and "commit" in origin
    assert list(model_dir.glob("events.out.tfevents.*"))


def test_a_training_process_imports_no_tensorflow(whole):
    modules = whole[1]
    assert "moe_jax.train" in modules or "__main__" in modules
    assert {"jax", "grain", "moe_jax.training.step"} <= modules
    assert not {"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"} & modules


def test_killed_runs_go_on_exactly(whole, tmp_path):
    """Signals at seeded moments: between steps, while evaluating, while saving.

    After SIGTERM and SIGINT nothing is lost; every start says so in one line and exits with 75.
    """
    model_dir = tmp_path / "killed"
    arguments = flags_of(bindings(model_dir, **SETTINGS))
    rng = random.Random(4)
    log = model_dir / "metrics.jsonl"
    ends = []
    # Lines after which a start gets a signal.
    for first, number in ((1, signal.SIGKILL), (7, signal.SIGTERM), (13, signal.SIGINT),
                          (20, signal.SIGKILL)):  # fmt: skip
        process = start("train", arguments)
        lines, wait = first + rng.randrange(6), rng.random() * 0.1
        while process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                time.sleep(wait)
                process.send_signal(number)
                break
            time.sleep(0.002)
        _, err = process.communicate()
        ends.append(process.returncode)
        if process.returncode == 75:
            (said,) = re.findall(rf"^stopped by {number.name}.*$", err, re.M)
            assert err.rstrip().endswith(said) and "Traceback" not in err
            step = re.search(r"after step (\d+); the same command goes on from there", said)
            if step:  # not while it evaluated
                assert (model_dir / "checkpoints" / step[1]).is_dir()
    assert ends[:2] == [-signal.SIGKILL, 75] and ends[2] in (75, 0)  # a fast machine is done
    with log.open("a") as f:
        f.write('{"step": 999, "kind": "tr')  # a line cut short
    finish(start("train", arguments))
    assert metrics(model_dir) == metrics(whole[0])
    assert [p.name for p in (model_dir / "checkpoints").iterdir() if not p.name.isdigit()] == []
    for name in ("routes.json", "task_table.json"):
        assert (model_dir / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_finished_run_started_again_changes_nothing(whole):
    model_dir, *_ = whole
    before = metrics(model_dir)
    process = start("train", flags_of(bindings(model_dir, **SETTINGS)))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and metrics(model_dir) == before
    assert f"{model_dir} has taken all its 48 steps; with more TRAIN_STEPS it goes on\n" in err


def test_a_finished_run_goes_on_for_longer_with_other_batches_on_another_mesh(whole, tmp_path):
    model_dir = tmp_path / "longer"
    shutil.copytree(whole[0], model_dir)
    changes = {"TRAIN_STEPS": 52, "BATCH_SIZE": 16, "MeshConfig__fsdp": 2, "EVAL_PERIOD": 0,
               "CHECKPOINT_PERIOD": 3, "StepConfig__groups_at_once": 1,
               # A run that goes on does not read its start again.
               "INITIAL_CHECKPOINT_PATH": str(tmp_path / "gone")}  # fmt: skip
    process = start("train", flags_of(bindings(model_dir, **SETTINGS | changes)), devices=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    # Of 52 steps, 3 are warm-up; the rest fall to zero.
    peak, rate = 3e-3, (52 - 48) / (52 - 3)
    assert f"from step 49 on, the learning rate is that of 52 steps, {rate:.1%} of its peak" in err
    assert "BATCH_SIZE was 8, now is 16: the data goes on where it was" in err
    lines = [line for line in metrics(model_dir) if line["kind"] == "train"]
    assert lines[:24] == [line for line in metrics(whole[0]) if line["kind"] == "train"]
    assert [line["step"] for line in lines[24:]] == [50, 51, 52]
    np.testing.assert_allclose(lines[-1]["learning_rate"], peak * 1 / (52 - 3), rtol=1e-5)
    meta = json.loads((model_dir / "checkpoints" / "52" / "meta" / "metadata").read_text())
    assert meta["parts"] == [[48, 4], [4, 8]]  # groups of 2 rows
    config = directory.read_config(model_dir)
    shorter = dataclasses.replace(config, run=dataclasses.replace(config.run, train_steps=48))
    with pytest.raises(UserError, match=f"^{model_dir} is at step 52, beyond TRAIN_STEPS 48"):
        _announce(shorter, directory.config_lines(config), 52)


def start_two(model_dir):
    return start_together(2, flags_of(bindings(model_dir, **SETTINGS)))


def test_two_processes_give_the_metrics_of_one(whole, tmp_path):
    """Over loopback. A signal to one of them stops both after the same step; they go on there."""
    model_dir = tmp_path / "two"
    log = model_dir / "metrics.jsonl"
    first, second = start_two(model_dir)
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        assert first.poll() is None and second.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [75, 75], ends
    steps = [re.findall(r"^stopped by .* after step (\d+); the same", end, re.M) for end in ends]
    assert len(steps[0]) == 1 and steps[0] == steps[1]
    assert (model_dir / "checkpoints" / steps[0][0]).is_dir()
    for process in start_two(model_dir):
        finish(process)
    ours, wanted = metrics(model_dir), metrics(whole[0])
    assert [(line["step"], line["kind"]) for line in ours] == [
        (line["step"], line["kind"]) for line in wanted
    ]
    for line, other in zip(ours, wanted, strict=True):
        assert line.keys() == other.keys()
        for name in line:
            if name != "kind":
                np.testing.assert_allclose(line[name], other[name], rtol=1e-3, err_msg=str(line))
    steps = {int(p.name) for p in (model_dir / "checkpoints").iterdir() if p.name.isdigit()}
    assert 48 in steps


def test_one_of_two_processes_writes_answers(whole, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("red blue\n9 2 4\n")
    arguments = [
        f"--gin.MODEL_DIR={whole[0]}", f"--gin.TASK_MODULES={TASKS!r}",
        "--gin.infer.task=toy_copy", f"--gin.infer.input={lines}",
    ]  # fmt: skip
    alone = finish(start("infer", arguments))
    assert alone.count("prediction") == 2
    first, second = map(finish, start_together(2, arguments, "infer"))
    assert first == alone and not second


@pytest.mark.slow
def test_two_processes_start_from_the_same_centroids(tmp_path):
    """Of k-means, which each process could round in its own way."""
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"toy_copy": [1.0, 0.1, 0.0], "toy_sum": [0.0, 0.3, 2.0]}))
    settings = SETTINGS | {
        "TRAIN_STEPS": 2, "EVAL_PERIOD": 0, "CHECKPOINT_PERIOD": 2,
        "RouterConfig.kind": "centroid", "RouterConfig.representation_dim": 3,
        "RunConfig.representations_path": str(table), "OptimizerConfig.router_learning_rate": 1e-9,
    }  # fmt: skip
    found = []
    for count in (1, 2):
        arguments = flags_of(bindings(tmp_path / str(count), **settings))
        for process in start_together(count, arguments):
            finish(process)
        found.append(load_params(tmp_path / str(count))[0]["router"]["centroid"])
    np.testing.assert_allclose(*found, atol=1e-7)
    unit = {"toy_copy": np.array([1, 0.1, 0]), "toy_sum": np.array([0, 0.3, 2])}
    rows = np.stack([row / np.linalg.norm(row) for row in unit.values()])
    for layer_ExK in found[0]:  # two tasks, so each has a centroid
        np.testing.assert_allclose(layer_ExK[np.argsort(layer_ExK[:, 2])], rows, atol=1e-5)
