"""The files of docs/extending.md: a router, a selection, a family, a metric and a task."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, commands

PAGE = ROOT / "docs" / "extending.md"
SHORT = " --gin.TRAIN_STEPS=2 --gin.EVAL_PERIOD=2 --gin.RunConfig.eval_examples=4"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(working directory, outputs) of the page's commands, with fewer steps."""
    directory = tmp_path_factory.mktemp("mine")
    blocks = re.findall(
        r"```(?:python|gin)\n# (my_\w+\.\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    for name, text in blocks:
        (directory / name).write_text(text)
    outputs = []
    for command in commands(PAGE):
        done = run(directory, command + SHORT * ("moe_jax.train" in command))
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        outputs.append(done.stdout)
    return directory, outputs


def run(directory, command):
    return subprocess.run(
        ["bash", "-c", command],
        cwd=directory, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        },
    )  # fmt: skip


def test_a_run_trains_with_all_of_them(ran):
    run = ran[0] / "runs" / "mine"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("score/my_copy" in line for line in lines)
    config = json.loads((run / "config.json").read_text())
    assert config["RouterConfig.kind"] == "affine"
    assert config["RouterConfig.selection"] == "sharp"
    assert config["ModelConfig.architecture"] == "bart_silu"


def test_eval_uses_the_tasks_metric(ran):
    assert "first_letter" in ran[1][1]


def test_eval_says_what_to_give(ran):
    """Flag by flag, each in one line, until it has all that it imports."""
    directory, (_, expected) = ran
    command = "python -m moe_jax.eval --gin.MODEL_DIR=runs/mine --gin.eval.split=validation"
    given = []
    while (done := run(directory, command)).returncode:
        run_dir, message, flag = re.fullmatch(
            r"error: (.*)names (.*): if you trust its code, give (\S+=.*)\n", done.stderr
        ).groups()
        assert "runs/mine" in run_dir
        given.append((message, flag.partition("=")[0]))
        command += f" {flag}"
    assert given == [
        ("the module my_router.py", "--gin.EXTENSIONS"),
        ("the function my_metric:first_letter", "--gin.TASK_MODULES"),
    ]
    assert done.stdout == expected
