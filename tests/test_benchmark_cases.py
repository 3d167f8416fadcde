"""`benchmarks.cases`: whatever a case does, the others run."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import gpu
from benchmarks.cases import supervise
from benchmarks.common import Report, Training, build, random_batch
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.runs import gin_files
from moe_jax.runs.configurables import build as configured
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import argparse, os, signal, sys, time
import jax
from benchmarks.cases import run_cases
from benchmarks.common import Report

def full(report):
    report.fact("before")
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\\nmore")

def absent(report):
    import no_such_module

def nan(report):
    report.ratio("nan", float("nan"))

CASES = {
    "first": lambda report: report.ratio("first", 1.0),
    "full": full,
    "absent": absent,
    "nan": nan,
    "hangs": lambda report: time.sleep(1000),
    "dies": lambda report: os.kill(os.getpid(), signal.SIGSEGV),
    "last": lambda report: report.ratio("last", 2.0),
    "late": lambda report: time.sleep(1000),
}
path, case_limit_s, *names = sys.argv[1:]
args = argparse.Namespace(json=path, scale="tiny")
run_cases({n: CASES[n] for n in names}, Report("child", args, again=True), float(case_limit_s))
"""


def supervised(tmp_path, names: list[str], case_limit_s: float, limit_s: float) -> dict:
    script, result = tmp_path / "child.py", tmp_path / "result.json"
    script.write_text(CHILD)
    program = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.cases import supervise\n"
        f"supervise([sys.executable, {str(script)!r}, {str(result)!r}, '{case_limit_s}'],"
        f" {names}, Path({str(result)!r}), {limit_s})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert all(name in done.stdout for name in found.get("ratios", {}))
    return found


def test_a_case_that_fails_loses_no_other(tmp_path):
    names = ["first", "full", "absent", "nan", "hangs", "dies", "last"]
    found = supervised(tmp_path, names, case_limit_s=1, limit_s=1000)
    assert found["cases"] == {
        "first": "done",
        "full": "failed: JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
        "absent": "left out: No module named 'no_such_module'",
        "nan": "failed: FloatingPointError: nan is nan",
        "hangs": "ended its process with exit code 1",
        "dies": "ended its process with exit code -11",
        "last": "done",
    }
    assert found["ratios"] == {"first": 1.0, "last": 2.0}
    assert found["rows"] == [{"what": "before"}]


def test_all_ends_at_the_limit(tmp_path):
    found = supervised(tmp_path, ["first", "late", "last"], case_limit_s=1000, limit_s=15)
    late = "15 s are over"
    assert found["cases"] == {"first": "done", "late": late, "last": late}


def test_a_limit_before_anything_began(tmp_path):
    found = supervised(tmp_path, ["first"], case_limit_s=1000, limit_s=0.01)
    assert found == {"cases": {"first": "0 s are over"}}


def test_no_process_is_left_when_it_is_ended(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    program = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.cases import supervise\n"
        f"supervise([sys.executable, '-c', {child!r}], ['a'], Path({str(tmp_path / 'r')!r}), 1000)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
        assert parent.poll() is None
    parent.terminate()
    assert parent.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_nothing_that_can_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as e:
        supervise([sys.executable, "-c", "exit(3)"], ["a", "b"], tmp_path / "result.json", 100)
    assert e.value.code == 3


def test_a_loss_that_is_not_a_number():
    training = Training(build("tiny", 1))
    batch = training.put(random_batch(training.model, 1, 1, (8, 4)))
    facts = training.compile(batch)
    assert facts["compile_s"] > 0 and facts["program_gib"] > 0
    training.run(batch, 2)
    assert int(training.state.step) == 2
    params = jax.tree.map(lambda x: x * float("nan"), training.state.params)
    training.state = training.state.replace(params=params)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        training.run(batch)


def test_figures_are_of_single_steps(tmp_path):
    report = Report("x", argparse.Namespace(json=None, scale="tiny"))
    clock = iter(range(1000)).__next__
    seconds = report.times({"a": lambda: None}, 3, clock=clock, steps=4, tokens_per_run=8)
    assert seconds == {"a": 0.25}
    assert report._result["rows"][0]["tokens_per_s"] == 8


def test_flops_are_six_for_each_parameter_and_token():
    """And 12 L D for the scores of a token that sees L others, or half if only those before it."""
    config = ModelConfig(vocabulary_size=1000)
    rows, inputs, targets, D, F = 3, 512, 64, 768, 3072
    attention, block = 4 * D * D, 2 * D * F
    of_inputs = 6 * (attention + block) + 6 * 2 * D * D  # and keys and values of the decoder
    of_targets = 6 * (attention + block + 2 * D * D) + 1000 * D
    scores = 6 * 12 * D * (inputs * inputs + targets * targets / 2 + targets * inputs)
    wanted = 6 * (inputs * of_inputs + targets * of_targets) + scores
    assert gpu.flops(config, rows, (inputs, targets)) == rows * wanted


def test_the_small_model_is_the_one_of_the_gin_files():
    names = ["models/tiny.gin", "runs/skills_gym_stage1.gin", "devices/gpu.gin"]
    gin_files.parse(names, [], [str(gin_files.GIN_CONFIGS)])
    keeps = {name: gpu.GYM[name] for name in ("kept_activations", "unroll_layers")}
    config = configured(ModelConfig)
    own = {**vars(config), **keeps, "vocabulary_size": 1024}
    assert ModelConfig(**gpu.GYM, experts=4) == ModelConfig(**own)
    assert configured(RouterConfig) == gpu.GYM_ROUTER
    assert configured(StepConfig).label_smoothing == 0.0
    assert configured(OptimizerConfig).shared_gradient == 0.5
