"""What an installation brings and what a command imports, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "prepare", "train", "eval", "infer", "finetune", "represent", "report", "experiment", "convert",
    "tasks", "plan",
)  # fmt: skip


def test_importing_the_commands_imports_no_other_framework(tmp_path):
    for name in ("tensorflow", "tensorflow_text", "seqio", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('imported {name}')")
    code = "import " + ", ".join(f"moe_jax.{command}" for command in COMMANDS)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
