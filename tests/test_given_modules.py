"""Modules are imported, and functions called, only where the user gave them; whatever files say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import NAMES, TASKS, VOCABULARY, toy_mixtures

from moe_jax import convert
from moe_jax.core import checksums, files
from moe_jax.core.errors import UserError
from moe_jax.data import modules, registry, vocabulary
from moe_jax.data.modules import give, load_module, may_call, named_in, resolve
from moe_jax.data.prepared import ensure_prepared
from moe_jax.data.request import Request
from moe_jax.data.sources import mentioned

# A module of tasks, and what it imports, as they lie in a user's directory.
PROJECT = {
    "user_task.py": "import os\nimport numpy as np\nfrom user_base import add\n"
    "import user_pack.parts\nscore = user_pack.parts.deep_score\n"
    "def own(targets, predictions): return {'own': 1.0}\n"
    "def keyed(targets, predictions, key): return {key: 1.0}\nborrowed = np.load\n",
    "user_base.py": "from user_metric import helped\nfrom user_pack import exported\n"
    "def add(): pass\n",
    "user_metric.py": "def helped(targets, predictions): return {'helped': 1.0}\n"
    "def other(targets, predictions): return {'other': 1.0}\n",
    "user_pack/__init__.py": "from user_pack.impl import exported\n",
    "user_pack/impl.py": "def exported(targets, predictions): return {'exported': 1.0}\n",
    "user_pack/parts.py": "from .impl import exported\n"
    "def deep_score(targets, predictions): return {'deep': 1.0}\n",
    "stranger.py": "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n"
    "def own(targets, predictions): return {}\ndef make(): pass\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    assert not (tmp_path / "executed").exists()
    for name in set(sys.modules) - before:
        if name.startswith(("user_", "stranger")):
            del sys.modules[name]


def test_a_command_imports_its_own_package_and_what_it_was_given(project):
    give(["user_task.py", "user_metric"])
    for name in (str(project / "user_task.py"), "./user_task.py", "user_metric"):
        assert load_module(name)
    assert load_module("tasks.skills_base").__name__ == "moe_jax.builtin_tasks.skills_base"
    for name in ("stranger.py", "stranger", f"{project}/stranger.py", "user_pack", "os",
                 "moe_jax.py", "moe_jax_evil", "moe_jax.builtin_tasks./stranger", "moe_jax.train",
                 "moe_jax.builtin_tasks.skills_base.py", "tasks.\0"):  # fmt: skip
        with pytest.raises(UserError, match=r"if you trust its code, give --gin\.EXTENSIONS="):
            load_module(name)
    give(["stranger"])  # of another gin file: what was given before stays
    modules.check_module("stranger")
    modules.check_module("user_metric")


@pytest.mark.parametrize(("reference", "allowed"), [
    ("user_task.py:own", True),
    ("user_task.py:keyed(key='a')", True),
    ("user_metric:helped", True),  # which user_base names
    ("user_pack.impl:exported", True),  # which the package passes on
    ("user_pack.parts:deep_score", True),
    ("moe_jax.metrics:exact_match", True),
    ("tasks.skills_base:inputs_and_answers", None),
    ("user_metric:other", False),  # no given module mentions it
    ("stranger:own", False),  # mentioned, but its package is not
    ("stranger.py:own", False),
    ("numpy:savetxt", False),
    ("moe_jax.core.files:write_text", False),  # of this package, but of no task
    ("moe_jax.metrics_evil:own", False),
])  # fmt: skip
def test_functions_that_may_be_called(project, reference, allowed):
    give(["user_task.py"])
    if allowed is None:
        assert may_call(reference)
    elif allowed:
        assert callable(resolve(reference)), reference
    else:
        with pytest.raises(UserError, match="if you trust its code, give"):
            resolve(reference)


@pytest.mark.parametrize("reference", [
    "user_task.py:os.system(command='touch executed')",  # what a module imports is not its own
    "user_task.py:borrowed", "user_task.py:np.load", "user_task.py:add",
    "moe_jax.metrics:Counter", "moe_jax.builtin_tasks.skills_base:seqio.Task",
    "user_task.py:own(", "user_task.py:own(**{'a': 1})", "user_task.py:own(a=b)",
    "user_task.py:own(key=1)+g(2)", "user_task.py", "", ":", "user_task.py:", "user_task.py:none",
])  # fmt: skip
def test_a_reference_is_one_function_of_its_module(project, reference):
    give(["user_task.py"])
    with pytest.raises(UserError):
        resolve(reference)


def test_sources_are_read_and_not_imported(project):
    before = set(sys.modules)
    packages, names = mentioned(frozenset([str(project / "user_task.py")]))
    assert packages == {"os", "numpy", "user_base", "user_pack", "user_metric"}
    assert {"helped", "exported", "deep_score", "load"} <= names and "other" not in names
    (project / "broken.py").write_text("import user_metric, )")
    assert mentioned(frozenset([str(project / "broken.py"), "nowhere", "a..b"])) == (set(), set())
    assert not {name for name in set(sys.modules) - before if name.startswith("user_")}


@pytest.mark.parametrize(("name", "check", "how"), [
    ("/run/a.py", modules.check_module, "--gin.TASK_MODULES=\"('/run/a.py', 'b')\""),
    ("b", modules.check_module, "--gin.TASK_MODULES=\"('/run/a.py', 'b')\""),
    ("c.py", modules.check_module, "--gin.EXTENSIONS=c.py"),
    ("d", modules.check_module, "--gin.EXTENSIONS=\"('c.py', 'd')\""),
    ("v.py:make", modules.check_function, "--gin.VocabularyConfig.factory=v.py:make"),
    ("e:f", modules.check_function, "--gin.EXTENSIONS=\"('c.py', 'e')\""),
    ("my files/v.py:g", modules.check_function, '--gin.VocabularyConfig.x="my files/v.py:g"'),
    ("$v.py:g", modules.check_function, "--gin.VocabularyConfig.y='$v.py:g'"),
])  # fmt: skip
def test_the_error_names_the_run_the_file_and_the_flag(name, check, how):
    give(["mine"])
    named_in("/run", {"TASK_MODULES": ("/run/a.py", "b"), "EXTENSIONS": ("c.py",),
                      "VocabularyConfig.factory": ("v.py:make",),
                      "VocabularyConfig.x": ("my files/v.py:g",),
                      "VocabularyConfig.y": ("$v.py:g",)})  # fmt: skip
    with pytest.raises(UserError) as error:
        check(name)
    kind = "function" if ":" in name else "module"
    assert str(error.value) == (f"/run names the {kind} {name}: if you trust its code, give {how}")
    with pytest.raises(UserError, match=r"^/cache/spec\.json, read for /run, names the "):
        check(name, "/cache/spec.json")


def test_the_flag_for_a_metric_is_that_of_the_tasks_which_import_it(project):
    give([])
    named_in("run", {"EXTENSIONS": (), "TASK_MODULES": (str(project / "user_task.py"),)})
    with pytest.raises(UserError, match=rf"give --gin\.TASK_MODULES={project}/user_task\.py$"):
        resolve("user_metric:helped", "spec.json")


def test_a_cache_names_no_functions_of_its_own(project):
    """Nor a vocabulary, nor tasks that SeqIO scores."""
    task = toy_mixtures()[0].task("toy_copy")
    give([])
    assert task.metric_fns() and task.postprocess_fn()  # of this package: nothing has to be given
    changed = dict.fromkeys(("metrics", "score_metrics"), ("stranger.py:own",))
    for field, use in (("metrics", "metric_fns"), ("score_metrics", "score_metric_fns"),
                       ("postprocess", "postprocess_fn")):  # fmt: skip
        bad = type(task)(**{**vars(task), field: changed.get(field, "stranger.py:own")})
        with pytest.raises(UserError, match=r"spec\.json names the function stranger\.py:own"):
            getattr(bad, use)()
    for settings in ({"factory": "stranger.py:make"},
                     {"task": "toy_copy", "task_modules": ["stranger.py"]}):  # fmt: skip
        for place in (project / "cached", project / "run" / vocabulary.DIRECTORY):
            vocabulary.write_vocabulary(place, {"kind": "seqio", **settings}, {})
            with pytest.raises(UserError, match=r"vocabulary\.json names the .* stranger\.py"):
                vocabulary.load_vocabulary(place)


@pytest.mark.parametrize("change", [
    {"task_modules": ["stranger.py"]},
    {"vocabulary": vocabulary.VocabularyConfig(kind="seqio", factory="stranger.py:make")},
])  # fmt: skip
def test_nothing_is_prepared_by_modules_that_were_not_given(project, change):
    give([TASKS])
    settings = {"task_modules": [TASKS], "vocabulary": VOCABULARY} | change
    with pytest.raises(UserError, match=r"names the \w+ .*stranger\.py.*: if you trust"):
        ensure_prepared(project / "cache", Request.make(NAMES[0], **settings))
    assert not (project / "cache" / "tasks").exists()


def test_commands_without_gin_are_given_modules_by_flags(project):
    run = project / "run"
    files.write_json(run / "config.json", {"RunConfig.seed": 0})
    settings = {"kind": "seqio", "factory": "stranger.py:make"}
    vocabulary.write_vocabulary(run / vocabulary.DIRECTORY, settings, {})
    checksums.seal(run / vocabulary.DIRECTORY)
    with pytest.raises(UserError) as error:
        convert.main(["to-hf", "run", "out", "--modules=user_metric"])
    assert str(error.value).endswith(
        "vocabulary.json names the function stranger.py:make: if you trust its code, give"
        " --modules=user_metric,stranger.py"
    )


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "PATH"])
def test_variables_that_execute_a_file_are_not_of_tasks(name, monkeypatch):
    monkeypatch.setenv(name, "before")
    with pytest.raises(UserError, match=f"the environment variable {name} is not one of tasks"):
        registry.set_environment({"MY_DATA": None, name: "after"})
    assert os.environ[name] == "before"


def test_what_is_no_name_of_a_variable_is_refused():
    with pytest.raises(UserError, match="the environment variable A=B is not one of tasks"):
        registry.set_environment({"A=B": "x"})


@pytest.mark.slow
def test_the_child_that_prepares_is_given_the_same(project):
    """Not all that a program may name, if a command started it."""
    request = {"names": ["a"], "task_modules": ["stranger.py"], "vocabulary": {}}
    job = {"cache_dir": str(project / "cache"), "error": str(project / "error"), "given": []}
    (project / "job.json").write_text(json.dumps(job | {"request": request}))
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax.data.materialise", "job.json"], check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"names the module {project}/stranger.py" in (project / "error").read_text()


def test_a_program_answers_for_what_it_names(project):
    """The package used as a library: no command has begun."""
    assert load_module("user_metric").other
    assert resolve("user_metric:other")
    assert registry.load_task_modules(["user_metric.py"])
