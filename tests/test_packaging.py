"""The contents of an installation and the imports of a command, in separate processes."""

import operator
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_docs import NOT_HERE, run_document

from moe_jax import __main__ as console
from moe_jax.data.modules import DEFAULT_TASK_MODULES

ROOT = Path(__file__).resolve().parent.parent


PIP = [sys.executable, "-m", "pip", "--quiet"]


def run(*command, path=ROOT, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, **kwargs)


# ------------------------------------------------------------------------------ imports


def test_importing_the_commands_imports_no_other_framework(tmp_path):
    for name in ("tensorflow", "tensorflow_text", "seqio", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('imported {name}')")
    code = "import " + ", ".join(f"moe_jax.{command}" for command in console.COMMANDS)
    done = run(sys.executable, "-c", code, path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", ["moe_jax.{}", "moe_jax {}"])
def test_a_signal_while_a_command_imports_ends_it_without_a_word(words, number, tmp_path):
    (tmp_path / "numpy.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *words.format(command).split()], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command in console.COMMANDS
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "imports\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == -number


# ------------------------------------------------------------------------------ moe_jax COMMAND


def moe_jax(*arguments, **kwargs) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "moe_jax", *arguments, **kwargs)


def test_help_lists_the_commands_and_imports_none(tmp_path):
    (tmp_path / "jax.py").write_text("raise RuntimeError('imported jax')")
    done = moe_jax("--help", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:2] == "  "]
    # Commands are what can be run with `python -m`.
    modules = [*ROOT.glob("moe_jax/*.py"), *ROOT.glob("moe_jax/*/__main__.py")]
    known = {
        path.parent.name if path.stem == "__main__" else path.stem
        for path in modules
        if "__main__" in path.read_text() and path.parent.name + path.stem != "moe_jax__main__"
    }
    assert {name for name, _ in lines} == known
    assert all(len(summary) > 20 for _, summary in lines)


@pytest.mark.parametrize(("arguments", "message"), [
    (["trian"], "error: there is no command 'trian'; did you mean 'train'"),
    ([], "usage: moe_jax COMMAND"),
])  # fmt: skip
def test_what_is_no_command(arguments, message):
    done = moe_jax(*arguments)
    assert done.returncode == 1 and done.stderr.startswith(message)


def test_arguments_reach_the_command():
    done = moe_jax("report", "--help")
    assert done.returncode == 0 and "--model NAME" in done.stdout
    done = moe_jax("eval", "--gin.MODEL_DIR=nowhere")
    assert done.returncode == 1 and "nowhere holds no run: there is no such dir" in done.stderr


# ------------------------------------------------------------------------------ built-in tasks


def test_commands_beside_a_module_called_tasks(tmp_path):
    """T5X users often have their own `tasks.py` in the working directory."""
    (tmp_path / "tasks.py").write_text("raise RuntimeError('imported the wrong tasks')")
    modules = ("tasks.skills_gym", *DEFAULT_TASK_MODULES)  # by its former name, and all
    arguments = ["--gin.MIXTURE_OR_TASK_NAME=skills_capital_of", "--gin.CACHE_DIR=cache"]
    done = moe_jax("prepare", *arguments, f"--gin.TASK_MODULES={modules}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skills_capital_of: 1 tasks" in done.stdout


def test_modules_of_a_package_called_tasks(tmp_path):
    """The user's `tasks.mine` beside the built-in `tasks.skills_gym`."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").touch()
    (tmp_path / "tasks" / "mine.py").write_text(
        "import seqio\nseqio.MixtureRegistry.add('mine', [('skills_capital_of', 1)])\n"
    )
    modules = "--task_modules=tasks.skills_gym,tasks.mine"
    done = moe_jax("tasks", "list", modules, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["mine", "1", "tasks"] in lines and any("skills_capital_of" in line for line in lines)


# ------------------------------------------------------------------------------ versions


def test_both_sets_of_versions_are_whole_and_within_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"], *extras["gcs"]]
    pinned = []
    for name in ("constraints.txt", "constraints-newest.txt"):
        lines = (ROOT / name).read_text().splitlines()
        pairs = [line.split("==") for line in lines if not line.startswith("#")]
        versions = {canonicalize_name(package): version for package, version in pairs}
        for requirement in map(Requirement, needed):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), (name, requirement)
        pinned.append(versions)
    assert pinned[0].keys() == pinned[1].keys()
    assert all(map(operator.le, *([Version(v[n]) for n in pinned[0]] for v in pinned)))


# ------------------------------------------------------------------------------ a wheel


@pytest.mark.slow
def test_a_wheel_runs_the_readme_from_an_empty_directory(tmp_path):
    source, target = tmp_path / "source", tmp_path / "venv"
    for name in ("moe_jax", "tasks", "gin_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(*PIP, "wheel", "--no-deps", "-w", tmp_path, source, path="", check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(target)
    python = target / "bin" / "python"
    run(*PIP, "--python", python, "install", "--no-deps", wheel, path="", check=True)
    (site,) = target.glob("lib/python*/site-packages")
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"moe_jax"}
    # Its dependencies come from this environment.
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others))

    empty = tmp_path / "empty"
    empty.mkdir()
    without = {*NOT_HERE, "examples", "quickstart", "from-hf", "to-hf"}
    ran = run_document(ROOT / "README.md", empty, tmp_path, python.parent, without)
    assert len(ran) >= 3
    done = run(
        target / "bin" / "moe_jax", "tasks", "check", "skills_capital_of", cwd=empty, path=""
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith("ok")
