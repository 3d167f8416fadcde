"""The example task modules register, read and score, offline, from a shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def _check(name: str, module: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", "moe_jax.tasks", "check", name]
    return subprocess.run(
        [*command, "--task_modules", str(module)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "module", "examples"),
    [("my_plurals", "my_tsv_task.py", 54), ("my_roman_numerals", "my_tfds_task.py", 300)],
)
def test_example(tmp_path, name, module, examples):
    done = _check(name, EXAMPLES / module, TFDS_DATA_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"train: {examples} examples" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "ok"
    assert "targets of test as predictions: EM 1" in done.stdout


def test_example_with_a_broken_line(tmp_path):
    for file in (*EXAMPLES.glob("*.tsv"), EXAMPLES / "my_tsv_task.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "plurals_validation.tsv"
    path.write_text("book\tbooks\nflower flowers\n")
    done = _check("my_plurals", tmp_path / "my_tsv_task.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: not usable: my_plurals: {path}:2: no tab; a line is input<TAB>output"
    )


def test_examples_are_short_and_explained():
    readme = (EXAMPLES / "README.md").read_text()
    for module in EXAMPLES.glob("*.py"):
        assert len(module.read_text().splitlines()) < 80
        assert module.name in readme
