"""Every command of docs/tasks.md, with few steps, on small data in the published layouts."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, commands

LAYOUTS = """
from pathlib import Path
import ni_layout, p3_layout
p3_layout.write(Path("data/p3"))
ni_layout.write(Path("data/ni"))
"""
CROSSFIT = {
    "glue-rte": "sentence 1: It rains. [SEP] sentence 2: It is wet.\tentailment\n",
    "web_questions": "who wrote it?\tshe\tShe did\n",
    "glue-cola": "He goes.\tacceptable\nHe go.\tunacceptable\n",
}


def write_crossfit(path: Path) -> None:
    """Two training tasks and an unseen one of the random partition."""
    for task, lines in CROSSFIT.items():
        for part in ("train", "dev", "test"):
            file = path / task / f"{task}_16_13_{part}.tsv"
            file.parent.mkdir(parents=True, exist_ok=True)
            text = lines if part == "test" else lines.replace(".", f", {part}.")
            file.write_text(text.replace("?", f" in {part}?"))


@pytest.mark.slow
def test_commands_run(tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": "",  # one device
    }
    write_crossfit(tmp_path / "data" / "crossfit")
    text = tmp_path / "data" / "text" / "plain.txt"
    text.parent.mkdir()
    text.write_text("".join(f"A line of {n} words, one after the other.\n" for n in range(200)))
    found = [f"python -c {shlex.quote(LAYOUTS)}", *commands(ROOT / "docs" / "tasks.md")]
    assert len(found) > 4
    for command in found:
        if "moe_jax.train" in command:
            period = 0 if "pretrain.gin" in command else 2  # text has no dev split
            command += f" --gin.TRAIN_STEPS=2 --gin.EVAL_PERIOD={period}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    rows = (tmp_path / "runs/prompts/eval/crossfit_prompts_test_test/prompts.jsonl").read_text()
    assert '"dataset": "crossfit_glue_cola"' in rows and '"prompts": 2' in rows
    ni = (tmp_path / "runs/ni/eval/natural_instructions_test_test/scores.jsonl").read_text()
    assert '"metric": "ROUGE-L"' in ni and '"metric": "match"' in ni
    (prompts,) = tmp_path.glob("runs/p3/eval/p3_held_out_*/prompts.jsonl")
    assert '"dataset": "super_glue_cb"' in prompts.read_text()
