"""Reading the prepared cache, and clear errors for damaged ones."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import gin
import numpy as np
import pytest
from conftest import TABLES
from toy import NAMES, TASKS, VOCABULARY, toy_cache, toy_mixtures

from moe_jax.core.errors import UserError
from moe_jax.data import cache, staleness
from moe_jax.data.example import Example
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import VocabularyConfig


@pytest.fixture
def copied(tmp_path) -> cache.PreparedMixture:
    """`toy_train` in a cache that a test may damage."""
    shutil.copytree(toy_cache(), tmp_path / "cache")
    request = Request.make(NAMES, TASKS, VOCABULARY)
    return cache.find(tmp_path / "cache", request, "toy_train")


def test_what_was_prepared_can_be_read():
    train, unseen = toy_mixtures()
    assert train.names == ("toy_copy", "toy_sum") and unseen.names == ("toy_reverse",)
    assert train.ontology == {
        "extractive": {"copy": ["toy_copy"]},
        "arithmetic": {"sum": ["toy_sum"]},
    }
    task = train.task("toy_sum")
    assert (task.category, task.subcategory, task.rate) == ("arithmetic", "sum", 2.0)
    assert {s: task.examples(s) for s in task.splits} == {"train": 60, "validation": 12, "test": 20}
    assert set(unseen.task("toy_reverse").splits) > {"fewshot_13_train", "fewshot_21_validation"}


def test_records_are_text_tokens_and_all_valid_outputs():
    train, _ = toy_mixtures()
    vocabulary = train.vocabulary
    for task in train.tasks:
        for split in task.splits:
            records = task.records(split)
            lengths = task.lengths(split)
            assert len(records) == task.examples(split) == len(lengths)
            for example, (inputs, targets) in zip(records, lengths, strict=True):
                assert example.inputs.dtype == example.targets.dtype == np.int32
                assert (len(example.inputs), len(example.targets)) == (inputs, targets)
                assert example.inputs.tolist() == [*vocabulary.encode(example.inputs_text), 1]
                first = example.references[0]
                assert example.targets.tolist() == [*vocabulary.encode(first), 1]
    a, b = (int(n) for n in train.task("toy_sum").records("test")[3].inputs_text.split()[1::2])
    assert train.task("toy_sum").records("test")[3].references == [f"{a + b}", f"{a + b}.0"]


def test_metrics_and_postprocessing_are_found_by_name():
    task = toy_mixtures()[0].task("toy_sum")
    postprocess = task.postprocess_fn()
    prediction = postprocess(" 7.0 ", example=None, is_target=False)
    (metric,) = task.metric_fns()
    assert list(metric([["7", "7.0"], ["8"]], [prediction, "7"]).values()) == [0.5]


def test_unknown_names_give_the_nearest():
    train, _ = toy_mixtures()
    with pytest.raises(UserError, match=r"no task 'toy_copi'; did you mean 'toy_copy'"):
        train.task("toy_copi")
    with pytest.raises(UserError, match=r"'toy_copy' has no split 'dev'; it has train, valid"):
        train.task("toy_copy").records("dev")


def test_records_cross_processes_and_refuse_indices_beyond_the_end():
    records = toy_mixtures()[0].task("toy_copy").records("train")
    again = pickle.loads(pickle.dumps(records))
    assert again[7].inputs_text == records[7].inputs_text
    with pytest.raises(IndexError):
        records[60]


def test_example_survives_bytes():
    references = {"answer": ["ja", "ó"], "score": 0.5, "none": None}
    example = Example(np.array([5, 1], np.int32), np.array([1], np.int32), "naïve", references)
    again = Example.from_bytes(example.to_bytes())
    assert again.inputs.tolist() == [5, 1] and again.targets.tolist() == [1]
    assert (again.inputs_text, again.references) == ("naïve", references)


def test_damaged_files_are_named(copied):
    task = copied.task("toy_copy")
    shard = task.directory / task.splits["train"].shards[0][0]
    content = shard.read_bytes()

    flipped = bytearray(content)
    for i in range(len(content) // 2 - 2000, len(content) // 2 + 2000):
        flipped[i] ^= 0xFF
    first = content.find(b"copy: ")
    flipped[first - 40 : first + 40] = bytes(80)
    shard.write_bytes(flipped)
    with pytest.raises(UserError, match=shard.name):
        list(task.records("train"))

    shard.write_bytes(content[:1000])
    with pytest.raises(UserError, match=rf"{shard.name} has 1000 bytes, not {len(content)}"):
        task.records("train")
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing"):
        task.records("train")

    lengths = task.directory / "train.lengths.npy"
    lengths.write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.lengths\.npy"):
        task.lengths("train")
    np.save(lengths, np.zeros((3, 2), np.int32))
    with pytest.raises(UserError, match="holds 3 lengths, not 60"):
        task.lengths("train")


DAMAGES = {
    "bit": lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:],
    "cut": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "zero": lambda b: bytes(len(b)),
}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damage_of_any_file_is_found(every, copied, tmp_path, capsys, request):
    """Each file of a mixture in one of the ways, or in `every` way; also files that are gone."""
    wanted = Request.make(NAMES, TASKS, VOCABULARY)
    directories = [copied.vocabulary_dir, *(task.directory for task in copied.tasks)]
    paths = [path for directory in directories for path in sorted(directory.iterdir())]
    paths.append(wanted.path(tmp_path / "cache", "toy_train"))
    assert len(paths) > 15 and sum(path.name == "checksums.json" for path in paths) == 3
    ways = list(DAMAGES.values())
    for number, path in enumerate(paths):
        content = path.read_bytes()
        for damage in [*(ways if every else [ways[number % len(ways)]]), None]:
            path.unlink() if damage is None else path.write_bytes(damage(content))
            assert cache.find(tmp_path / "cache", wanted, "toy_train", quiet=True) is None
            assert not capsys.readouterr().err
            assert cache.find(tmp_path / "cache", wanted, "toy_train") is None
            said = capsys.readouterr().err
            if damage is None and path.parent.name == "mixtures":
                assert not said  # it was never prepared
            else:
                assert said.startswith("damaged, and prepared again: ") and str(path) in said
                assert said.count("\n") == 1
            path.write_bytes(content)
    found = cache.find(tmp_path / "cache", wanted, "toy_train")
    assert found is not None and found.fingerprint == copied.fingerprint
    if every:
        text = f"each of {len(paths)} files of a cache damaged in {len(ways) + 1} ways"
        request.config.stash[TABLES].append(text)


# What a source is -> (its path, files to change it with).
SOURCES = {
    "file": ("data/train.tsv", ["data/train.tsv"]),
    "directory": ("data", ["data/train.tsv", "data/more/deep.tsv"]),
    "pattern": ("data/t*-*.tsv", ["data/train-0.tsv"]),
    "names": ("data/", []),
}
CHANGES = {
    "edit": lambda path: path.write_bytes(path.read_bytes().swapcase()),  # of the same length
    "add": lambda path: path.with_name("train-9.tsv").write_text("new"),
    "remove": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_is_noticed(kind, change, tmp_path):
    for name in ("train.tsv", "train-0.tsv", "train-1.tsv", "more/deep.tsv", "other.txt"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} a line\n")
    where, names = SOURCES[kind]
    source = f"{tmp_path}/{where}"
    before = staleness.state(source)
    assert not staleness.changed(source, before)
    for name in names:  # a time alone is no change
        os.utime(tmp_path / name, (1, 1))
    assert not staleness.changed(source, before)
    for name in names or ["data/train.tsv"]:
        path = tmp_path / name
        content = path.read_bytes()
        CHANGES[change](path)
        # A file that is gone altogether is none: a cache may travel without its sources.
        expected = {"file": change == "edit", "names": change != "edit"}.get(kind, True)
        assert staleness.changed(source, before) == expected, (name, change)
        path.write_bytes(content)
        path.with_name("train-9.tsv").unlink(missing_ok=True)
        assert not staleness.changed(source, before)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert not staleness.exists(source) and not staleness.changed(source, before)


def test_a_deleted_task_is_not_found(copied, tmp_path):
    shutil.rmtree(copied.task("toy_copy").directory)
    request = Request.make(NAMES, TASKS, VOCABULARY)
    assert cache.find(tmp_path / "cache", request, "toy_train") is None
    assert cache.find(tmp_path / "cache", request, "toy_unseen") is not None


def test_another_request_is_another_mixture(tmp_path):
    base = Request.make(NAMES, TASKS, VOCABULARY)
    others = [
        Request.make(NAMES, TASKS, VocabularyConfig(size=401)),
        Request.make(NAMES, TASKS, VocabularyConfig(kind="bytes")),
        Request.make(NAMES, [TASKS, "more"], VOCABULARY),
        Request.make(NAMES, TASKS, VOCABULARY, splits=["train"]),
        Request.make(NAMES, TASKS, VOCABULARY, environment={"X": "1"}),
        Request.make("toy_unseen", TASKS, VOCABULARY),  # another training text
    ]
    paths = {r.path(tmp_path, "toy_unseen") for r in [base, *others]}
    assert len(paths) == 1 + len(others)
    # Other names in the list, and the spelling of a path, do not matter.
    same = Request.make("toy_train", os.path.relpath(TASKS), VOCABULARY)
    assert same.path(tmp_path, "toy_train") == base.path(tmp_path, "toy_train")
    assert Request.from_json(base.to_json()) == base


def test_fingerprint_is_of_the_content(copied):
    train, unseen = toy_mixtures()
    assert copied.fingerprint == train.fingerprint != unseen.fingerprint


def test_resolve_and_load_module(tmp_path, monkeypatch):
    from moe_jax.data.modules import load_module, resolve

    (tmp_path / "own.py").write_text("class A:\n  def b():\n    return 5\n")
    assert resolve(f"{tmp_path / 'own.py'}:A.b")() == 5
    assert load_module(str(tmp_path / "own.py")) is load_module(str(tmp_path / "own.py"))
    monkeypatch.chdir(tmp_path)
    assert load_module("own.py").A is load_module(str(tmp_path / "own.py")).A
    assert resolve("numpy.linalg:norm") is np.linalg.norm
    with pytest.raises(UserError, match=r"has no 'A\.c'"):
        resolve("own.py:A.c")
    with pytest.raises(UserError, match=r"no such module file: other\.py"):
        load_module("other.py")
    with pytest.raises(UserError, match="cannot import module 'no_such_module'"):
        load_module("no_such_module")
    for name in ("", ".relative", "a..b", 3, 300 * "a"):
        with pytest.raises(UserError, match="is no module's name"):
            load_module(name)
    (tmp_path / "late.py").write_text("import gin\n@gin.configurable\ndef late(): pass\n")
    gin.finalize()  # as in every run
    assert load_module("late.py").late() is None
    (tmp_path / "bad.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"cannot import bad\.py: No module named 'no_such_module'"):
        load_module("bad.py")
    # Any mistake in a user's file is one line, which says where it is.
    (tmp_path / "helper.py").write_text("def broken():\n    return [][1]\n")
    for text, message in {
        "x = 1\ny = X\n": "2: NameError: name 'X' is not defined",
        "x = (1,\n\n": "1: SyntaxError: '(' was never closed",
        "import json\n\njson.loads('{')\n": "3: JSONDecodeError: Expecting property name",
    }.items():
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError) as error:
            load_module("bad.py")
        place = f"cannot import bad.py: {tmp_path / 'bad.py'}:"
        assert str(error.value).startswith(place + message) and "\n" not in str(error.value)
    (tmp_path / "bad.py").write_text("import helper\nhelper.broken()\n")
    with pytest.raises(
        UserError, match=r"cannot import bad\.py: .*/helper\.py:2: IndexError: list"
    ):
        load_module("bad.py")


def test_tensorflow_is_imported_without_its_lines(tmp_path):
    """And what the module itself says is heard."""
    (tmp_path / "own.py").write_text("import sys\nimport seqio\nprint('mine', file=sys.stderr)\n")
    code = "import sys; from moe_jax.data.modules import load_module; load_module(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "own.py")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "mine\n")


@pytest.mark.parametrize("names", [["base", "more"], ["more", "base"]])
def test_a_file_that_another_one_imports_is_executed_once(names, tmp_path, monkeypatch):
    from moe_jax.data.modules import load_module, name_of

    (tmp_path / "base.py").write_text("with open('log', 'a') as f: f.write('x')\ndef f(): pass\n")
    (tmp_path / "more.py").write_text("import base\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.modules", dict(sys.modules))
    modules = {name: load_module(f"{name}.py") for name in names}
    assert (tmp_path / "log").read_text() == "x"
    assert modules["more"].base is modules["base"]
    # By its path it is found again in any directory.
    assert name_of(sys.modules[modules["base"].f.__module__]) == str(tmp_path / "base.py")
    # A module of the same name elsewhere is another one.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "base.py").write_text("x = 5\n")
    assert load_module("other/base.py").x == 5 and load_module("base.py") is modules["base"]
    with pytest.raises(UserError, match=r"No module named 'aside'; to find other/aside\.py, give"):
        (tmp_path / "other" / "aside.py").write_text("")
        (tmp_path / "other" / "needs.py").write_text("import aside\n")
        load_module("other/needs.py")


def test_source_files_are_the_users_own(tmp_path, monkeypatch):
    from moe_jax.data.modules import load_module
    from moe_jax.data.sources import source_files

    package = tmp_path / "userpack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(
        "import numpy, elsewhere, moe_jax.core.errors\nfrom . import b\nfrom userpack.c import f\n"
    )
    # Installed for the user or the system, while the interpreter is that of an environment.
    installed = tmp_path / "python3" / "dist-packages"
    installed.mkdir(parents=True)
    (installed / "elsewhere.py").write_text("")
    monkeypatch.syspath_prepend(str(installed))
    (package / "b.py").write_text("def late():\n  import userpack.d\n")
    (package / "c.py").write_text("def f(): pass\n")
    (package / "unused.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = load_module("userpack.a")
    names = [Path(path).name for path in source_files(module)]
    assert names == ["__init__.py", "a.py", "b.py", "c.py"]


def test_a_source_has_a_file_whose_name_is_no_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).touch()
    before = staleness.state(str(tmp_path))
    (tmp_path / "cafe.txt").touch()
    assert staleness.changed(str(tmp_path), before)
