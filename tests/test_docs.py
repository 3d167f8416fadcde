"""Every command in the docs names things that exist; slow tests run the commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.experiments.config import ExperimentConfig
from moe_jax.runs import configurables, gin_files
from moe_jax.runs.directory import config_lines

ROOT = Path(__file__).resolve().parent.parent


def commands(path: Path) -> list[str]:
    """The shell lines of a Markdown file, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


# docs/extending.md, whose commands need files of its own, is run by test_extensions.
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "docs/experiment.md",
        "docs/method.md",
        "docs/report.md",
        "docs/tasks.md",
        "docs/skills_gym.md",
        "examples/README.md",
        "tpu/README.md",
    )
]
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
    arguments = gin_files.rewrite_flags(words[words.index("-m") + 2 :])
    files = [f.partition("=")[2] for f in arguments if f.startswith("--gin_file=")]
    # A command's own parameters (`eval.split`) are known once its module is imported.
    __import__(module if module not in ("moe_jax.report", "moe_jax.tasks") else "moe_jax.train")
    bindings = [f.partition("=")[2] for f in arguments if f.startswith("--gin_bindings=")]
    if files or bindings:
        gin_files.parse(files, bindings, [str(gin_files.GIN_CONFIGS)])


@pytest.mark.parametrize(
    # Those in t5x/ are read by T5X's commands (test_t5x_commands).
    "path",
    sorted(gin_files.GIN_CONFIGS.glob("[!t]*/*.gin")),
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_gin_file_parses(path):
    """Each file alone, with lengths that the smallest model has, gives a configuration."""
    import moe_jax.experiment
    from moe_jax.runs.config import Config
    from moe_jax.runs.configurables import build

    assert moe_jax.experiment
    lengths = "TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 16}"
    gin_files.parse([str(path)], [lengths], [str(gin_files.GIN_CONFIGS)])
    assert config_lines(build(Config))


# Fewer steps and examples than the documents say.
SHORT = {
    "train": "--gin.TRAIN_STEPS=2 --gin.EVAL_PERIOD=0",
    "represent": "--gin.represent.examples=4 --gin.represent.steps=1",
    "eval": "--gin.eval.examples=2",
    "finetune": "--gin.FinetuneConfig.steps=1 --gin.FinetuneConfig.test_examples=2",
}
# What needs CrossFit's data, T5X's files or a TPU compiler is run by the tests of its command.
NOT_HERE = {"crossfit", "from-t5x", "plan"}


def run_document(
    document: Path, directory: Path, work: Path, binaries: Path, without: set[str]
) -> list[str]:
    """Runs a document's commands in `directory`; returns those that ran.

    Args:
        work: where runs and the cache go.
        binaries: directory of the interpreter.
        without: leaves out commands with one of these words.
    """
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    ran = []
    for command in commands(document):
        if without & set(re.split(r"[ =/.]", command)) or "python -m moe_jax." not in command:
            continue
        module = re.search(r"moe_jax\.(\w+)", command)[1]
        command = command.replace("runs/mine", f"{work}/runs/mine")
        command = command.replace("runs/quickstart", f"{work}/runs/quickstart")
        command = command.replace("from-hf DIR runs/bart", f"from-hf {BART} {work}/runs/bart")
        command = command.replace(" OUT ", f" {work}/out ")
        command += f" {SHORT.get(module, '')}"
        if module in ("train", "finetune"):
            command += f" --gin.CACHE_DIR={work}/cache"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=directory, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran.append(command)
    return ran


BART = ROOT / "tests" / "data" / "hf" / "bart"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A directory with the dense run of the quickstart, of two steps."""
    work = tmp_path_factory.mktemp("docs")
    page = work / "dense.md"
    page.write_text(
        "```sh\npython -m moe_jax.train --gin_file=models/tiny.gin"
        " --gin_file=runs/skills_gym_dense.gin --gin.MODEL_DIR=runs/quickstart/seed_0/dense\n```\n"
    )
    run_document(page, ROOT, work, Path(sys.executable).parent, set())
    return work


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [
    ("README.md", 7), ("docs/method.md", 3), ("examples/README.md", 11),
])  # fmt: skip
def test_document_runs(name, least, quickstart):
    ran = run_document(ROOT / name, ROOT, quickstart, Path(sys.executable).parent, NOT_HERE)
    assert len(ran) >= least


def test_the_experiment_of_your_own_names_every_stage(tmp_path):
    """Without one of its lines, or with a wrong one, the command would not begin."""
    (text,) = re.findall(r"```gin\n(.*?)```", (ROOT / "docs" / "experiment.md").read_text(), re.S)
    (tmp_path / "mine.gin").write_text(text)
    configurables.register(ExperimentConfig)
    gin_files.parse(["mine.gin"], [], [str(tmp_path)])
    made = configurables.build(ExperimentConfig)
    needed = {
        name: getattr(made, name) for name in ("model", "dense", "stage1", "finetune", "unseen")
    }
    assert all(needed.values()) and len(text.splitlines()) == 1 + len(needed)
