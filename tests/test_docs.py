"""Every command in the README names things that exist; the slow test runs them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.runs import flags
from moe_jax.runs.directory import config_lines

ROOT = Path(__file__).resolve().parent.parent


def commands(path: Path) -> list[str]:
    """The shell lines of a Markdown file, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md"]
COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
BINARIES = [c for c in COMMANDS if "python -m moe_jax." in c]


def test_the_readme_shows_commands():
    assert "make quickstart" in COMMANDS
    assert "make test" in COMMANDS
    assert len(BINARIES) >= 6


@pytest.mark.parametrize("command", BINARIES)
def test_command_resolves(command):
    words = shlex.split(command.rpartition("|")[2])
    module = words[words.index("-m") + 1]
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file() or (
        ROOT / module.replace(".", "/") / "__main__.py"
    ).is_file()
    arguments = flags.rewrite_gin_flags(words[words.index("-m") + 2 :])
    files = [f.partition("=")[2] for f in arguments if f.startswith("--gin_file=")]
    # A command's own parameters (`eval.split`) are known once its module is imported.
    __import__(module if module not in ("moe_jax.report", "moe_jax.tasks") else "moe_jax.train")
    bindings = [f.partition("=")[2] for f in arguments if f.startswith("--gin_bindings=")]
    if files or bindings:
        flags.parse_gin(files, bindings, [str(flags.GIN_CONFIGS)])


@pytest.mark.parametrize(
    "path", sorted(flags.GIN_CONFIGS.glob("**/*.gin")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_gin_file_parses(path):
    """Each file alone, with lengths that the smallest model has, gives a configuration."""
    import moe_jax.experiment
    from moe_jax.runs.config import Config
    from moe_jax.runs.configurables import build

    assert moe_jax.experiment
    lengths = "TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 16}"
    flags.parse_gin([str(path)], [lengths], [str(flags.GIN_CONFIGS)])
    assert config_lines(build(Config))


def run_readme(directory: Path, work: Path, binaries: Path, without: set[str]) -> list[str]:
    """Runs the README's commands in `directory`, with few steps; returns those that ran.

    Args:
        work: where runs and the cache go.
        binaries: directory of the interpreter.
        without: commands with one of these words are left out.
    """
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    ran = []
    for command in commands(ROOT / "README.md"):
        # What needs others' files, or the quickstart's, is run by the tests of its command.
        if without & set(re.split(r"[ =/]", command)) or "python -m moe_jax." not in command:
            continue
        command = command.replace("runs/mine", f"{work}/runs/mine")
        if "moe_jax.train" in command:
            command += f" --gin.TRAIN_STEPS=2 --gin.EVAL_PERIOD=0 --gin.CACHE_DIR={work}/cache"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=directory, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran.append(command)
    return ran


NOT_HERE = {"DIR", "OUT", "quickstart"}


@pytest.mark.slow
def test_readme_runs(tmp_path):
    run_readme(ROOT, tmp_path, Path(sys.executable).parent, NOT_HERE)
