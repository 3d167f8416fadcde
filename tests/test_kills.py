"""Every command killed at random moments, ten times each: started again it ends as if it had not.

Nothing is lost beyond the last save, and after SIGTERM and SIGINT nothing beyond the step at hand;
no process and no temporary file is left. KILLS in the environment is another number of times.
"""

import dataclasses
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TABLES
from test_experiment_runs import write_experiment
from toy_run import bindings, finish, flags_of, metrics, start

from moe_jax.core import files
from moe_jax.data import cache
from moe_jax.training.checkpoint_files import steps

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "10"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TRAIN = {"TRAIN_STEPS": 60, "CHECKPOINT_PERIOD": 4, "EVAL_PERIOD": 20}
# Names of what is temporary.
LEFT = re.compile(r"\..*\.new|.*\.orbax-checkpoint-tmp.*|\d+\.old")
# In the environment of a command and of its children; other tests may run beside these.
MARK = f"MOE_JAX_TEST_OF_KILLS_{os.getpid()}"


@dataclasses.dataclass
class Job:
    """A command in a directory of its own.

    Attributes:
        made: what it makes, to be removed before it begins anew.
        saved: how much is saved, a number that never falls.
        result: what it comes to.
    """

    program: str
    arguments: list[str]
    made: Path
    saved: Callable[[], int]
    result: Callable[[], Any]


def prepare(root: Path) -> Job:
    def fingerprint():
        (path,) = root.glob("cache/mixtures/*.json")
        return cache.read_mixture(root / "cache", path).fingerprint

    lines = bindings(root / "run", CACHE_DIR=str(root / "cache"))
    return Job(
        "prepare", flags_of(lines), root / "cache",
        lambda: len(list(root.glob("cache/tasks/*/*/spec.json"))), fingerprint,
    )  # fmt: skip


def train(root: Path, **settings) -> Job:
    run = root / "run"
    return Job(
        "train", flags_of(bindings(run, **TRAIN | settings)), run,
        lambda: max(steps(run / "checkpoints"), default=0), lambda: metrics(run),
    )  # fmt: skip


def evaluate(root: Path) -> Job:
    job, run = train(root, TRAIN_STEPS=2, EVAL_PERIOD=0), root / "run"
    finish(start(job.program, job.arguments))

    def lines():
        return {path.name: path.read_bytes() for path in run.glob("eval/*/*")}

    return Job("eval", [f"--gin.MODEL_DIR={run}"], run / "eval", lambda: len(lines()), lines)


def finetune(root: Path) -> Job:
    for name, experts in (("dense", 1), ("moe", 2)):
        settings = {"TRAIN_STEPS": 2, "EVAL_PERIOD": 0, "ModelConfig__experts": experts}
        finish(start("train", flags_of(bindings(root / name, **settings))))
    lines = bindings(
        root / "few_shot",
        MIXTURE_OR_TASK_NAME="toy_unseen", VocabularyConfig__trained_on="toy_train",
        DENSE_DIR=str(root / "dense"), MOE_DIR=str(root / "moe"),
        FinetuneConfig__learning_rates=(1e-3, 1e-2), FinetuneConfig__batch_sizes=(2, 4),
        FinetuneConfig__seeds=(13, 21), FinetuneConfig__steps=4, FinetuneConfig__runs_at_once=1,
    )  # fmt: skip
    lines = [line for line in lines if not line.startswith(("TRAIN", "Model"))]
    path = root / "few_shot" / "runs.jsonl"

    def rows():
        return list(files.read_jsonl(path))

    def saved():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    return Job("finetune", flags_of(lines), path.parent, saved, rows)


def experiment(root: Path) -> Job:
    arguments = write_experiment(root, ("direct", "dense", "routed"))
    run = root / "run"

    def done():
        return sum(files.read_json(path)["done"] for path in run.glob("**/stage.json"))

    def scores():
        return files.read_json(run / "results.json")["scores"]

    return Job("experiment", arguments, run, done, scores)


def living() -> list[str]:
    """The commands of the processes that have the mark, and are no corpses."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and MARK.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:  # has ended
            continue
    return found


def kill(job: Job, number: signal.Signals, delay: float) -> int:
    """Starts the command, and sends the signal after so many seconds; the exit code."""
    before = job.saved()
    process = start(job.program, job.arguments)
    end = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    until = time.monotonic() + 10
    while living() and time.monotonic() < until:
        time.sleep(0.1)
    assert not living(), (number, delay)
    assert job.saved() >= before, (number, delay)
    if process.returncode == 75:
        # A stage of an experiment says so before it.
        said = re.findall(rf"^stopped by {number.name}.*$", err, re.M)[-1]
        assert err.rstrip().endswith(said) and "Traceback" not in err
        if step := re.search(r"after step (\d+); ", said):
            assert job.saved() == int(step[1])
    else:  # or it had ended, or had not begun to listen
        assert process.returncode in (-number, 0), err[-2000:]
    return process.returncode


@pytest.mark.parametrize("make", [prepare, train, evaluate, finetune, experiment])
def test_kills(make, tmp_path, monkeypatch, request):
    monkeypatch.setenv(MARK, "1")
    # This process has the mark too, if only now: its environment was written when it began.
    job, rng = make(tmp_path), random.Random(make.__name__)
    begin = time.monotonic()
    finish(start(job.program, job.arguments), timeout=3600)
    seconds = time.monotonic() - begin
    expected, ends = job.result(), []
    shutil.rmtree(job.made)
    while len(ends) < KILLS:
        code = kill(job, SIGNALS[len(ends) % 3], rng.uniform(0, seconds))
        if code:
            ends.append(code)
        else:  # done before the signal: anew, for signals in the first half as well
            assert job.result() == expected
            shutil.rmtree(job.made)
    finish(start(job.program, job.arguments), timeout=3600)
    assert job.result() == expected
    left = [path for path in tmp_path.rglob("*") if LEFT.fullmatch(path.name)]
    assert not left
    request.config.stash[TABLES].append(
        f"{job.program}: killed {len(ends)} times, of which {ends.count(75)} stopped by themselves"
    )
