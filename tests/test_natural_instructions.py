"""Super-NaturalInstructions: layout, splits, inputs, its two metrics, and the SeqIO side."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import gin
import ni_layout
import pytest

from moe_jax.builtin_tasks import natural_instructions_data as data
from moe_jax.core.errors import UserError
from moe_jax.metrics import match, stemmed_rouge_l

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path) -> Path:
    ni_layout.write(tmp_path)
    return tmp_path


def file(root: Path, name: str = "task001_quoref_words") -> Path:
    return root / "tasks" / f"{name}.json"


def test_lists_and_categories(root):
    assert data.lists(root) == {
        "train": ["task001_quoref_words", "task003_words", "task004_absent"],
        "test": ["task002_unseen_words", "task005_absent"],
    }
    assert data.category(file(root)) == "Question Generation"
    assert data.definition(file(root)) == "Given a number, write it in words."
    # A text that mentions the key is none; a value beyond the first block is found.
    path = root / "late.json"
    path.write_text(json.dumps({"Source": ['"Categories": ["no"]' * 2000], "Categories": ["yes"]}))
    assert data.category(path) == "yes"
    path.write_text(json.dumps({"Source": []}))
    with pytest.raises(UserError, match=r'late\.json: no "Categories"'):
        data.category(path)


def test_inputs_have_definition_and_positive_examples(root):
    texts = {k: data.read(file(root), "train", "train", k)[0] for k in (0, 1, 9)}
    instance, output = texts[0][0].splitlines()[-2].removeprefix("Input: "), texts[0][1]
    number = int(instance.removeprefix("number "))
    assert output == f"Word {number}."
    start = "Definition: Given a number, write it in words.\n\n"
    shown = [f"Positive Example {i + 1} -\nInput: {i}\nOutput: word {i}\n\n" for i in range(3)]
    end = f"Now complete the following example -\nInput: number {number}\nOutput:"
    assert texts[0][0] == start + end
    assert texts[1][0] == start + shown[0] + end
    assert texts[9][0] == start + "".join(shown) + end  # all that there are


def test_splits_share_the_instances(root):
    every = [f"Word {i}." for i in range(40)]
    read = {
        s: [e[1] for e in data.read(file(root), "train", s, 0)] for s in ("train", "validation")
    }
    assert len(read["validation"]) == 4
    assert sorted(read["train"] + read["validation"]) == sorted(every)
    # Another order of instances, the same slice.
    content = json.loads(file(root).read_text())
    content["Instances"].reverse()
    file(root).write_text(json.dumps(content))
    again = data.read(file(root), "train", "validation", 0)
    assert sorted(e[1] for e in again) == sorted(read["validation"])
    # Of a test task the first 100 instances are the test, with all their valid outputs.
    unseen = {s: data.read(file(root, "task002_unseen_words"), "test", s, 0) for s in
              ("test", "train")}  # fmt: skip
    assert [e[1:] for e in unseen["test"]] == [
        (f"Word {i}.", f"the word {i}", str(i)) for i in range(100)
    ]
    assert len(unseen["train"]) == 7


def test_a_task_has_the_splits_that_it_has_instances_for(tmp_path):
    """Of the published test tasks some have 100 instances or fewer."""
    path = tmp_path / "task.json"
    for part, count, found in (
        ("test", 101, ("train", "test")), ("test", 100, ("test",)),
        ("train", 10, ("train", "validation")), ("train", 9, ("train",)),
    ):  # fmt: skip
        content = ni_layout.task(count, "x", positive=20)
        content["Instances"][0]["input"] = '"output": "output": ' * 99
        for indent in (None, 4):
            path.write_text(json.dumps(content, indent=indent))
            assert data.splits(path, part) == found
        read = [data.read(path, part, split, 0) for split in found]
        assert sum(map(len, read)) == count and all(read)
    path.write_bytes(b'{"Instances": [\xff]}')
    with pytest.raises(UserError, match=r"task\.json: its instances cannot be read: 'utf-8' codec"):
        data.splits(path, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Instances": 3}, "'Instances' is no list"),
        ({"Instances": []}, "too few instances for a split 'train'"),
        ({"Instances": [{"input": "a", "output": []}]}, r"Instances\[0\]\.output is no text, nor"),
        ({"Instances": [{"output": ["b"]}]}, r"Instances\[0\]\.input is no text"),
        ({"Instances": ["a"]}, r"Instances\[0\]\.input is no text"),
        ({"Definition": None}, "Definition is no text"),
        ({"Positive Examples": [{"input": "a"}]}, r"Positive Examples\[0\]\.output is no text"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(root, change, message):
    file(root).write_text(json.dumps(ni_layout.task(10, "x") | change))
    with pytest.raises(UserError, match=rf"task001_quoref_words\.json: {message}"):
        data.read(file(root), "train", "train", 2)


def test_files_that_are_no_text(root):
    path = data.list_file(root, "train")
    path.write_bytes(b"task001\xff")
    with pytest.raises(UserError, match=r"train_tasks\.txt is not UTF-8.*must be a copy of"):
        data.lists(root)
    for content in (b'{"Categories": ["\xff"]}', b'{"Categories": ["\\ud800"]}',
                    b'{"Categories": ' + b"[" * 10**5):  # fmt: skip
        file(root).write_bytes(content)
        with pytest.raises(UserError, match=r'quoref_words\.json: no "Categories" can be read: '):
            data.category(file(root))
    # Wherever blocks end.
    for blanks in range((1 << 14) - 30, (1 << 14) + 5):
        file(root).write_text("{" + " " * blanks + '"Categories"  :  ["Here"]}')
        assert data.category(file(root)) == "Here"


def test_settings(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"train_tasks\.txt: No such file.*must be a copy of"):
        data.lists(tmp_path)
    assert data.settings() == {}
    gin.bind_parameter("natural_instructions.data_dir", "some/where")
    gin.bind_parameter("natural_instructions.positive_examples", 0)
    assert data.settings() == {
        "NATURAL_INSTRUCTIONS_DIR": os.path.abspath("some/where"),
        "NATURAL_INSTRUCTIONS_POSITIVE_EXAMPLES": "0",
    }
    monkeypatch.delenv(data.POSITIVE_EXAMPLES, raising=False)
    assert data.positive_examples() == 2
    monkeypatch.setenv(data.POSITIVE_EXAMPLES, "0")
    assert data.positive_examples() == 0
    monkeypatch.setenv(data.POSITIVE_EXAMPLES, "-1")
    with pytest.raises(UserError, match="POSITIVE_EXAMPLES=-1: must be a number of at least 0"):
        data.positive_examples()


def test_metrics_by_hand():
    """Stems: 'runs running' and 'run run' are equal; 'cat' is one word of three, twice in order."""
    assert stemmed_rouge_l([["Runs, running!"]], ["run run"]) == {"ROUGE-L": 1.0}
    found = stemmed_rouge_l([["x", "the big cat sat"], ["a"]], ["the cat", "b"])
    assert found == {"ROUGE-L": pytest.approx((2 * 1.0 * 0.5 / 1.5) / 2)}
    targets = [["The  cat."], ["no", "Yes!"], ["the cat"], ["a"]]
    assert match(targets, ["the cat", "yes", "cat", "b"]) == {"match": 0.5}


def test_tasks_through_seqio(root):
    code = """
        import json, seqio
        from moe_jax.data import declared, registry, task_functions
        modules = registry.load_task_modules(["moe_jax.builtin_tasks.natural_instructions"])
        from moe_jax.builtin_tasks import natural_instructions as ni
        out = {"mixtures": {n: [t.name for t in registry.find_tasks(n, modules)]
                            for n in seqio.MixtureRegistry.names()},
               "ontology": ni.ONTOLOGY, "listed": ni.LISTED,
               "described": declared.descriptions(modules)}
        task = seqio.TaskRegistry.get("ni_task002_unseen_words")
        rows = [row for _, part in registry.read(task, ["test"]) for row in part]
        out["count"], row = len(rows), rows[3]
        out["input"] = row["inputs_pretokenized"].decode()
        out["references"] = task.postprocess_fn("Word 3.", example=row, is_target=True)
        out["metrics"] = task_functions.metric_references(task)
        out["splits"] = list(task.splits)
        out["files"] = registry.data_files(task, modules)
        try:
            registry.find_tasks("ni_task003_word", modules)
        except Exception as e:
            out["error"] = str(e)
        print(json.dumps(out))
    """
    environment = {"NATURAL_INSTRUCTIONS_DIR": str(root), "CUDA_VISIBLE_DEVICES": "",
                   "NATURAL_INSTRUCTIONS_POSITIVE_EXAMPLES": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    train = ["ni_task001_quoref_words", "ni_task003_words"]
    assert out["mixtures"] == {
        "natural_instructions_train": train,
        "natural_instructions_test": ["ni_task002_unseen_words"],
    }
    assert out["listed"] == {"natural_instructions_train": 3, "natural_instructions_test": 2}
    assert out["ontology"] == {
        "Question Generation": {"": train},
        "Textual Entailment": {"": ["ni_task002_unseen_words"]},
    }
    said = "Given a number, write it in words."
    assert out["described"] == dict.fromkeys([*train, "ni_task002_unseen_words"], said)
    assert out["splits"] == ["train", "test"] and out["count"] == 100
    assert out["input"].count("Positive Example") == 1
    assert out["input"].endswith("Input: number 3\nOutput:")
    assert out["references"] == ["Word 3.", "the word 3", "3"]
    assert out["metrics"] == [["moe_jax.metrics:stemmed_rouge_l", "moe_jax.metrics:match"], []]
    assert [Path(f).name for f in out["files"]] == [
        "test_tasks.txt", "train_tasks.txt", "task002_unseen_words.json",
    ]  # fmt: skip
    assert "did you mean 'ni_task003_words'" in out["error"]
