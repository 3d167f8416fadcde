"""Every command of docs/tasks.md, with few steps, on small data in the published layouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, commands

LAYOUTS = "from pathlib import Path; import p3_layout; p3_layout.write(Path('data/p3'))"


@pytest.mark.slow
def test_commands_run(tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    found = [f'python -c "{LAYOUTS}"', *commands(ROOT / "docs" / "tasks.md")]
    assert len(found) > 4
    for command in found:
        if "moe_jax.train" in command:
            command += " --gin.TRAIN_STEPS=2 --gin.EVAL_PERIOD=2"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    (prompts,) = tmp_path.glob("runs/p3/eval/p3_held_out_*/prompts.jsonl")
    assert '"dataset": "super_glue_cb"' in prompts.read_text()
