"""Paths: URLs of other kinds than gs:// are refused in one line, wherever one is given."""

import dataclasses
import os
import re
import subprocess
import sys
import types
import typing

import pytest
from toy_run import ROOT

import moe_jax.eval
import moe_jax.infer
import moe_jax.represent  # noqa: F401 (registers its settings)
from moe_jax import convert, tasks
from moe_jax.core import configuration, files, paths
from moe_jax.core.configuration import Place
from moe_jax.core.errors import UserError
from moe_jax.core.processes import lock
from moe_jax.report.__main__ import main as report
from moe_jax.runs import configurables, gin_files
from moe_jax.training.checkpoints import Checkpoints, load_params
from tasks.data_directory import absolute

URL, BUCKET = "s3://bucket/run", "gs://bucket/run"
NAMED = re.compile(r"(.*_)?(dir|path|input|output|representations|pca_from)")


def is_path(hint, here: bool = False) -> bool:
    """Whether a field's type, `X` or `X | None`, declares that it is a path (of this machine)."""
    either = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if either else [hint]
    rules = (rule for kind in kinds for rule in getattr(kind, "__metadata__", ()))
    return any(isinstance(rule, Place) and rule.here >= here for rule in rules)


def path_fields() -> list[tuple[type, str]]:
    return [
        (cls, name)
        for cls in configurables.CLASSES.values()
        for name, hint in configuration.hints(cls).items()
        if is_path(hint)
    ]


def test_every_setting_that_names_a_path_says_so():
    found = {f"{cls.called}.{name}" for cls, name in path_fields()}
    for cls in configurables.CLASSES.values():
        for name, hint in configuration.hints(cls).items():
            if NAMED.fullmatch(name) and not dataclasses.is_dataclass(hint):
                assert f"{cls.called}.{name}" in found, name
    assert len(found) >= 14


@pytest.mark.parametrize(
    ("cls", "name"), path_fields(), ids=lambda v: v if isinstance(v, str) else v.called
)
def test_a_setting(cls, name):
    needed = {"lengths": {"inputs": 8, "targets": 8}} if cls.called == "DataConfig" else {}
    here = is_path(configuration.hints(cls)[name], here=True)
    for url in (URL, "s3:/bucket/run", "hf://model", "file:///run", "gs://", "gs:/bucket/run") + (
        ("gs://bucket/run",) if here else ()
    ):
        with pytest.raises(UserError, match=rf"{cls.called}\.{name} is '{url}'; it is .*a path of"):
            cls(**needed | {name: url})


FLAGS = {
    "--gin_file": lambda: gin_files.parse([URL], [], ["."]),
    "--gin_search_paths": lambda: gin_files.parse(["a.gin"], [], [URL]),
    "MODEL_DIR of a command that reads one": lambda: gin_files.parse(
        [], [f"MODEL_DIR = {URL!r}"], ["."], from_model_dir=True
    ),
    "directories of data": lambda: absolute(CROSSFIT_DIR=URL),
    "read": lambda: files.read_json(URL),
    "read lines": lambda: list(files.read_jsonl(URL)),
    "write": lambda: files.write_text(URL, ""),
    "append": lambda: files.append_jsonl(URL, []),
    "new directory": lambda: files.new_directory(URL).__enter__(),
    "lock": lambda: lock(URL).__enter__(),
    "checkpoints": lambda: Checkpoints(URL),
    "parameters": lambda: load_params(URL),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_function(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{URL}.* a path of this machine") as error:
        FLAGS[name]()
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize(("main", "arguments"), [
    (report, ["--run", f"dense={URL}", "--output", "out"]),
    (report, ["--run", "dense=.", "--finetune", URL, "--output", "out"]),
    (report, ["--run", "dense=.", "--single", URL, "--output", "out"]),
    (report, ["--run", "dense=.", "--output", URL]),
    (convert.main, ["from-hf", URL, "out"]),
    (convert.main, ["from-hf", ".", URL]),
    (convert.main, ["from-t5x", URL, "out"]),
    (convert.main, ["from-t5x", ".", URL]),
    (convert.main, ["from-t5x", ".", "out", "--sentencepiece", URL]),
    (convert.main, ["to-hf", URL, "out"]),
    (convert.main, ["to-hf", ".", URL]),
    (convert.main, ["from-hf", BUCKET, "out"]),
    (convert.main, ["from-hf", ".", BUCKET]),
    (convert.main, ["from-t5x", BUCKET, "out"]),
    (convert.main, ["from-t5x", ".", BUCKET]),
    (convert.main, ["from-t5x", ".", "out", "--sentencepiece", BUCKET]),
    (convert.main, ["to-hf", ".", BUCKET]),
    (tasks.main, ["show", "skills_capital_of", "--vocabulary", URL]),
    (tasks.main, ["list", "--task_modules", f"{URL}.py"]),
])  # fmt: skip
def test_an_argument(main, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routes.json").write_text(
        '{"step": 1, "experts": 1, "layers": ["encoder.0"], "tasks": {"a": {"route": [[1.0]]}}}'
    )
    url = URL if URL in " ".join(arguments) else BUCKET
    with pytest.raises(UserError, match=url) as error:
        main(arguments)
    assert "\n" not in str(error.value) and not capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["routes.json"]


def test_a_command_makes_no_folder(tmp_path):
    command = [sys.executable, "-m", "moe_jax.train", f"--gin.MODEL_DIR={URL}"]
    command.append("--gin_bindings=TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}")
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "RunConfig.model_dir is 's3://bucket/run'" in done.stderr
    assert not any(tmp_path.iterdir())


def test_paths_of_this_machine_stay_as_they_are():
    for text in ("a", "/a/b", "./a:b", "a b", "~/x", "-", "C:/x"):
        assert str(paths.parse(text)) == text.removeprefix("./")


def test_buckets_need_their_client(monkeypatch):
    monkeypatch.setattr(paths, "_HAS_CLIENT", False)
    with pytest.raises(UserError, match=r"^gs://bucket/run: buckets need gcsfs: pip install 'moe"):
        paths.parse(BUCKET)
    with pytest.raises(UserError, match="need gcsfs"):
        lock(BUCKET).__enter__()
