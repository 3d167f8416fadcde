"""Preparing: once, completely or not at all, again after changes, with clear errors."""

import functools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from toy import NAMES, TASKS, prepare

from moe_jax import prepare as program
from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data import cache, prepared, vocabulary
from moe_jax.data.prepared import ensure_prepared
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.runs.config import DataConfig

BYTES = VocabularyConfig(kind="bytes")
MODULE = """
import functools, os, pathlib, signal
import seqio
import tensorflow as tf
from moe_jax.metrics import exact_match

HERE = pathlib.Path(__file__).parent
ENVIRONMENT = ("OWN_PREFIX",)

def read(split, shuffle_files, seed=None, *, path):
    if path.name == "b.tsv" and (HERE / "kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    rows = [line.split("\\t") for line in path.read_text().splitlines()]
    prefix = os.environ.get("OWN_PREFIX", "")
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": [prefix + a for a, _ in rows], "targets": [b for _, b in rows]}
    )

feature = seqio.Feature(seqio.ByteVocabulary())
for name in "ab":
    seqio.TaskRegistry.add(
        f"own_{name}",
        source=seqio.FunctionDataSource(
            functools.partial(read, path=HERE / f"{name}.tsv"), splits=["train"]
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        metric_fns=[exact_match],
        output_features={"inputs": feature, "targets": feature},
    )
seqio.MixtureRegistry.add("own", [("own_a", 1), ("own_b", 3)])
"""


@pytest.fixture
def children(monkeypatch) -> list[Request]:
    """The requests for which a child process was started."""
    started = []
    run = prepared._run_child
    monkeypatch.setattr(
        prepared, "_run_child", lambda *args: (started.append(args[1]), run(*args))[1]
    )
    return started


@pytest.fixture
def here(monkeypatch) -> list[Request]:
    """The requests that this process prepared, in place of a child."""
    from moe_jax.data.materialise import materialise

    done = []
    monkeypatch.setattr(
        prepared, "_run_child",
        lambda place, request, _: (done.append(request), materialise(Path(place), request)),
    )  # fmt: skip
    return done


def test_kill_resume_and_staleness(tmp_path, children, monkeypatch):
    monkeypatch.delenv("OWN_PREFIX", raising=False)
    module = tmp_path / "own_tasks.py"
    module.write_text(MODULE)
    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text(f"1{name}\tone\n2{name}\ttwo\n")
    cache_dir = tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    request = Request.make("own", "own_tasks.py", BYTES)
    get = functools.partial(ensure_prepared, cache_dir, request)

    # Killed in the second task: the first is complete, the second absent.
    (tmp_path / "kill").touch()
    with pytest.raises(UserError, match="preparing own was killed by SIGKILL"):
        get()
    (first,) = cache_dir.glob("tasks/*/*/spec.json")
    assert first.parent.parent.name == "own_a"
    assert not list(cache_dir.glob("mixtures/*"))

    # Started again, it continues there and leaves no temporary files.
    (tmp_path / "kill").unlink()
    written = first.stat().st_mtime_ns
    mixture = get()["own"]
    assert first.stat().st_mtime_ns == written
    assert not list(cache_dir.glob("tasks/*/.*.new"))
    assert [(t.name, t.rate, t.examples("train")) for t in mixture.tasks] == [
        ("own_a", 1.0, 2),
        ("own_b", 3.0, 2),
    ]
    assert mixture.task("own_b").records("train")[1].references == "two"
    assert len(children) == 2

    # Nothing changed but a time stamp: no child.
    os.utime(tmp_path / "b.tsv", (1, 1))
    assert get()["own"].fingerprint == mixture.fingerprint
    assert len(children) == 2

    # A data file changed: its task is made again, the other is not.
    (tmp_path / "b.tsv").write_text("3b\tthree\n")
    changed = get()["own"]
    assert len(children) == 3
    assert changed.fingerprint != mixture.fingerprint
    assert changed.task("own_a").directory == mixture.task("own_a").directory
    assert [e.inputs_text for e in changed.task("own_b").records("train")] == ["3b"]

    # Code or a declared variable changed: stale. Deleted sources do not matter, because a cache may
    # be copied without them.
    assert cache.find(cache_dir, request, "own") is not None
    monkeypatch.setenv("OWN_PREFIX", "x")
    assert cache.find(cache_dir, request, "own") is None
    monkeypatch.delenv("OWN_PREFIX")
    module.write_text(MODULE + "# edited\n")
    assert cache.find(cache_dir, request, "own") is None
    for path in (module, tmp_path / "a.tsv", tmp_path / "b.tsv"):
        path.unlink()
    assert cache.find(cache_dir, request, "own") is not None


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path, here):
    module = tmp_path / "own_tasks.py"
    edit = 'if (HERE / "edit").exists():\n        path.write_text("new\\tnew\\n")\n    prefix'
    module.write_text(MODULE.replace("prefix", edit, 1).replace("own", "edited"))
    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text("old\told\n")
    get = functools.partial(
        ensure_prepared, tmp_path / "cache", Request.make("edited_a", str(module), BYTES)
    )
    (tmp_path / "edit").touch()
    with pytest.raises(UserError, match="the sources of 'edited_a' changed while they were being"):
        get()
    (tmp_path / "edit").unlink()
    assert get()["edited_a"].task("edited_a").records("train")[0].inputs_text == "new"


def test_what_is_damaged_is_prepared_again(tmp_path, here, capsys):
    get = functools.partial(ensure_prepared, tmp_path, Request.make("toy_unseen", TASKS, BYTES))
    whole = get()["toy_unseen"]
    task = whole.tasks[0]
    for path in (task.directory / "train.lengths.npy", whole.vocabulary_dir / "vocabulary.json"):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        capsys.readouterr()
        again = get()["toy_unseen"]
        assert capsys.readouterr().err.startswith(f"damaged, and prepared again: {path} is not")
        assert again.fingerprint == whole.fingerprint and path.read_bytes() == content
        np.testing.assert_array_equal(again.tasks[0].lengths("train"), task.lengths("train"))
    assert len(here) == 3


def test_processes_that_want_the_same_wait_for_one(tmp_path, here):
    actual, request = [], Request.make("toy_unseen", TASKS, BYTES)

    def get():
        actual.append(ensure_prepared(tmp_path, request)["toy_unseen"])

    threads = [threading.Thread(target=get) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(actual) == 3 and len(here) == 1


def test_a_mistake_in_the_child_is_one_line_here(tmp_path, capfd):
    with pytest.raises(UserError, match=r"'toy_trian'.*did you mean 'toy_train'"):
        ensure_prepared(tmp_path, Request.make("toy_trian", TASKS, BYTES))
    assert "Traceback" not in capfd.readouterr().err


# ---- in this process, which imports SeqIO for it ----


def test_splits_and_names(tmp_path, capsys):
    mixtures = prepare(tmp_path, NAMES, TASKS, BYTES, splits=["train", "fewshot_13_train"])
    found = [tuple(t.splits) for m in mixtures.values() for t in m.tasks]
    assert found == [("train",), ("train",), ("train", "fewshot_13_train")]
    assert "prepared 3 tasks, 188 examples" in capsys.readouterr().err
    prepare(tmp_path, NAMES, TASKS, BYTES, splits=["train", "fewshot_13_train"])
    assert "prepared" not in capsys.readouterr().err
    with pytest.raises(UserError, match="'toy_copy' has none of the splits dev; it has train"):
        prepare(tmp_path, NAMES, TASKS, BYTES, splits=["dev"])


def test_modules_of_other_tasks_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER", "1")
    other = tmp_path / "other.py"
    other.write_text(
        "import seqio\nENVIRONMENT = ('OTHER',)\n"
        "seqio.MixtureRegistry.add('other_mix', [('toy_train', 1), ('toy_reverse', 1)])\n"
    )
    modules = [TASKS, str(other)]
    prepare(tmp_path, ["toy_unseen", "other_mix"], modules, BYTES)
    stored = {
        name: files.read_json(path)
        for name in ("toy_unseen", "other_mix")
        for path in tmp_path.glob(f"mixtures/{name}-*.json")
    }
    assert list(stored["toy_unseen"]["inputs"]) == [TASKS]
    assert stored["toy_unseen"]["environment"] == {}
    assert set(stored["other_mix"]["inputs"]) == {TASKS, str(other)}
    assert stored["other_mix"]["environment"] == {"OTHER": "1"}


def test_main_prints_what_it_prepared(tmp_path, here, capsys):
    settings = {
        "mixture_or_task_name": "toy_unseen",
        "task_modules": [TASKS],
        "cache_dir": str(tmp_path),
        "vocabulary": BYTES,
        "lengths": {"inputs": 8, "targets": 8},
    }
    program.main(DataConfig(**settings), program.PrepareConfig())
    assert "toy_unseen: 1 tasks, 124 examples, 259 tokens" in capsys.readouterr().out


def test_vocabularies(tmp_path):
    import seqio

    def prepared(**config):
        config = VocabularyConfig(**config)
        return prepare(tmp_path / "cache", "toy_train", TASKS, config)["toy_train"]

    trained = prepared(size=300)
    assert 259 < trained.vocabulary.size <= 300
    model = trained.vocabulary_dir / vocabulary.MODEL
    given = prepared(path=str(model), extra_ids=3)
    theirs = seqio.SentencePieceVocabulary(str(model), extra_ids=3)
    assert given.vocabulary.size == theirs.vocab_size == trained.vocabulary.size + 3
    assert given.vocabulary.encode("red <extra_id_0>") == theirs.encode("red <extra_id_0>")
    assert given.vocabulary.encode("red <extra_id_0>")[-1] == given.vocabulary.size - 1

    # Byte vocabularies of different origin share one directory, which is read without SeqIO.
    factory = tmp_path / "factory.py"
    factory.write_text("import seqio\ndef make(): return seqio.ByteVocabulary(extra_ids=0)\n")
    same = [
        prepared(kind="bytes"),
        prepared(kind="task"),
        prepared(kind="seqio", factory=f"{factory}:make"),
    ]
    assert len({m.vocabulary_dir for m in same}) == 1
    assert files.read_json(same[0].vocabulary_dir / vocabulary.FILE)["kind"] == "bytes"
    first = same[0].task("toy_copy").records("train")[0]
    assert bytes(first.inputs[:-1].astype(np.uint8) - 3).decode() == first.inputs_text

    factory.with_name("own.py").write_text(
        "import seqio\ndef make(): return seqio.FullCodepointVocabulary()\n"
    )
    other = prepared(kind="seqio", factory=f"{factory.with_name('own.py')}:make")
    assert files.read_json(other.vocabulary_dir / vocabulary.FILE)["kind"] == "seqio"
    example = other.task("toy_copy").records("train")[0]
    assert other.vocabulary.decode(example.targets) == example.references[0]


def _register(name, *, splits=("train",), texts=("a", "b"), metric=None, append_eos=True):
    import seqio
    import tensorflow as tf

    from moe_jax.metrics import exact_match

    def source(split, shuffle_files):
        kept = [] if split == "empty" else list(texts)
        return tf.data.Dataset.from_tensor_slices(
            {f: tf.constant(kept, tf.string, [len(kept)]) for f in ("inputs", "targets")}
        )

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    tail = [seqio.preprocessors.append_eos] if append_eos else []
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=splits),
        preprocessors=[seqio.preprocessors.tokenize, *tail],
        metric_fns=[metric or exact_match],
        output_features={"inputs": feature, "targets": feature},
    )


@pytest.mark.parametrize(
    "options, config, message",
    [
        ({"splits": ("train", "empty")}, BYTES, "'{}': split 'empty' is empty"),
        ({"append_eos": False}, BYTES, "'{}', split 'train', example 0: targets do not end in EOS"),
        ({"texts": ("a", ""), "append_eos": False}, BYTES, "targets do not end|no tokens"),
        ({"splits": ("test",)}, VocabularyConfig(), "'{}' has no 'train' split"),
        ({}, VocabularyConfig(size=10), "cannot train a vocabulary of size 10"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_task(tmp_path, request, options, config, message):
    name = "bad_" + "".join(c if c.isalnum() else "_" for c in request.node.callspec.id)[:36]
    _register(name, **options)
    with pytest.raises(UserError, match=message.format(name)) as caught:
        prepare(tmp_path, name, [], config)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.glob("tasks/**/*") if p.is_file()]
    assert not list(tmp_path.glob("mixtures/*"))


def test_targets_that_no_answer_can_be_are_said(tmp_path, capsys):
    (tmp_path / "choices.py").write_text("""
import seqio
import tensorflow as tf
from moe_jax.metrics import accuracy

def read(split, shuffle_files, seed=None):
    targets = {"train": ["yes", "no", "maybe", "Yes"], "test": ["no", "yes"]}[split]
    n = len(targets)
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": ["x"] * n, "targets": targets, "answer_choices": [["yes", "no"]] * n}
    )

feature = seqio.Feature(seqio.ByteVocabulary())
seqio.TaskRegistry.add(
    "own_choices", source=seqio.FunctionDataSource(read, splits=["train", "test"]),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    metric_fns=[accuracy], output_features={"inputs": feature, "targets": feature},
)
""")
    prepare(tmp_path / "cache", "own_choices", str(tmp_path / "choices.py"), BYTES)
    lines = [line for line in capsys.readouterr().err.splitlines() if "choices" in line]
    said = "task 'own_choices': 2 targets of train are not among their choices"
    assert [line for line in lines if "among" in line] == [said]


def test_large_numbers(tmp_path):
    """A target beyond 64 bits is refused; the number of a question may be any."""
    module = """
import seqio
import tensorflow as tf

def read(split, shuffle_files, seed=None):
    index = tf.constant([[2**40, 0], [2**40, 1], [7, 0]], tf.int64)
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": ["x"] * 3, "targets": [str(2**70)] * 3, "idx": index}
    )

def number(text, example=None, is_target=False):
    return int(text)

feature = seqio.Feature(seqio.ByteVocabulary())
for name, postprocess in (("large_target", number), ("large_question", None)):
    seqio.TaskRegistry.add(
        name, source=seqio.FunctionDataSource(read, splits=["train"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        postprocess_fn=postprocess, output_features={"inputs": feature, "targets": feature},
    )
"""
    (tmp_path / "large.py").write_text(module)
    get = functools.partial(prepare, tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"'large_target', split 'train', example 0: 118059.* 64 bi"
    ):
        get("large_target", str(tmp_path / "large.py"), BYTES)
    found = get("large_question", str(tmp_path / "large.py"), BYTES)["large_question"]
    assert found.tasks[0].questions("train").tolist() == [1, 1, 0]


def test_large_splits_are_several_shards(tmp_path, monkeypatch):
    from moe_jax.data import materialise

    monkeypatch.setattr(materialise, "SHARD_BYTES", 200)
    _register("many_shards", texts=[f"text {i}" for i in range(40)])
    task = prepare(tmp_path, "many_shards", [], BYTES)["many_shards"].tasks[0]
    shards = task.splits["train"].shards
    assert len(shards) > 3
    assert shards[1][0] == f"train-00001-of-{len(shards):05d}.array_record"
    records = task.records("train")
    assert [e.inputs_text for e in records] == [f"text {i}" for i in range(40)]
    (task.directory / shards[2][0]).unlink()
    with pytest.raises(UserError, match=r"train-00002-of-.* is missing"):
        task.records("train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        prepare(tmp_path / "cache", "toy_train", TASKS, BYTES)


def test_a_file_in_place_of_the_cache_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="is a file, not a directory"):
        prepare(tmp_path / "cache", "toy_train", TASKS, BYTES)
