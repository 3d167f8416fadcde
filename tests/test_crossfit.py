"""CrossFit's files, partitions and names; the SeqIO side in one subprocess per directory."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import gin
import pytest

from moe_jax.builtin_tasks import crossfit_data as data
from moe_jax.core.errors import UserError
from moe_jax.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent


def _write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def layout(tmp_path) -> Path:
    """A data directory with one complete task, two seeds, and unrelated files."""
    for seed, name in ((13, "one"), (100, "two")):
        for part in ("train", "dev", "test"):
            lines = f"{part} {name}\tyes\n" + "shared\tno\tnope\n" * (part != "test")
            _write(tmp_path / f"few/glue-rte/glue-rte_16_{seed}_{part}.tsv", lines)
    _write(tmp_path / "few/glue-rte/glue-rte_16_13_train.tsv.bak", "x")
    _write(tmp_path / "few/README.md", "x")
    _write(tmp_path / "few/not-a-task/x.tsv", "x")
    (tmp_path / "few/anli").mkdir()
    lines = [f"premise {i}\t{'entailment' if i % 2 else 'neutral'}\n" for i in range(100)]
    _write(tmp_path / "full/anli/train.tsv", "".join(lines) + lines[7] * 3)
    _write(tmp_path / "full/anli/test.tsv", 2 * "a\tb\n")
    return tmp_path


def test_facts():
    assert len(data.TASKS) == 160
    assert {facts["metric"] for facts in data.TASKS.values()} == set(METRICS)
    # Registered names are distinct, also between few-shot, full-size and mixtures.
    tasks = [f"{kind}{t.replace('-', '_')}" for kind in ("", "full_") for t in data.TASKS]
    mixtures = [
        f"{kind}{'' if name == 'random' else name + '_'}{part}"
        for kind in ("", "full_")
        for name, lists in data.partitions().items()
        for part in lists
    ]
    assert len(set(tasks + mixtures)) == 2 * 160 + 2 * 8 * 3


def test_every_task_is_described_in_a_sentence_of_its_own():
    sentences = [facts["description"] for facts in data.TASKS.values()]
    assert len(set(sentences)) == 160
    for sentence in sentences:
        assert re.fullmatch(r"[A-Z][^.]+\.", sentence), sentence
        assert 6 <= len(sentence.split()) <= 20, sentence
        # No published name gives a task away. One is the English word for what is asked.
        named = set(re.findall(r"[\w-]+", sentence)) & data.TASKS.keys()
        assert named <= {"emotion"}, sentence


def test_published_partitions_are_disjoint():
    partitions = data.partitions()
    assert len(partitions) == 8
    for lists in partitions.values():
        names = [task for tasks in lists.values() for task in tasks]
        assert len(names) == len(set(names))
        assert set(names) <= data.TASKS.keys()
    assert [len(tasks) for tasks in partitions["random"].values()] == [120, 20, 20]


def test_facts_are_the_published_ones(gym):
    assert {t: f["metric"] for t, f in data.TASKS.items()} == json.loads(
        (gym / "metrics.json").read_text()
    )
    for category, groups in json.loads((gym / "ontology.json").read_text()).items():
        for subcategory, tasks in groups.items():
            for task in tasks:
                facts = data.TASKS[task]
                assert (facts["category"], facts["subcategory"]) == (category, subcategory)
    for name, lists in data.partitions().items():
        published = json.loads((gym / "partitions" / f"{name}.json").read_text())
        for part, tasks in lists.items():
            dropped = set(published[part]) - set(tasks)
            expected = (name, part) == ("train_non_nli_test_nli", "train")
            assert dropped == ({"sick"} if expected else set())


def test_few_shot_splits(layout):
    splits = data.few_shot_splits(layout / "few", "glue-rte")
    assert {name: [f.name for f in files] for name, files in splits.items()} == {
        "train": ["glue-rte_16_13_train.tsv", "glue-rte_16_100_train.tsv"],
        "fewshot_13_train": ["glue-rte_16_13_train.tsv"],
        "fewshot_100_train": ["glue-rte_16_100_train.tsv"],
        "validation": ["glue-rte_16_13_dev.tsv", "glue-rte_16_100_dev.tsv"],
        "fewshot_13_validation": ["glue-rte_16_13_dev.tsv"],
        "fewshot_100_validation": ["glue-rte_16_100_dev.tsv"],
        "test": ["glue-rte_16_13_test.tsv"],
    }
    shared = ("shared", "no", "nope")
    read = {split: data.read_few_shot(splits, split) for split in splits}
    assert read["train"] == [("train one", "yes"), shared, ("train two", "yes")]
    assert read["validation"] == [("dev one", "yes"), ("dev two", "yes")]  # `shared` is trained on
    assert read["fewshot_100_validation"] == [("dev two", "yes"), shared]
    assert read["test"] == [("test one", "yes")]
    _write(layout / "few/glue-rte/glue-rte_32_13_train.tsv", "a\tb\n")
    with pytest.raises(UserError, match=r"glue-rte: files of several k \(16, 32\)"):
        data.few_shot_splits(layout / "few", "glue-rte")


def test_validation_wholly_in_train(tmp_path):
    for part in ("train", "dev"):
        _write(tmp_path / f"boolq/boolq_16_1_{part}.tsv", "a\tb\n")
    with pytest.raises(UserError, match="boolq: every dev line is also a train line"):
        data.read_few_shot(data.few_shot_splits(tmp_path, "boolq"), "validation")


def test_full_splits_hold_out_by_content(layout):
    splits = data.full_splits(layout / "full", "anli")
    read = {split: data.read_full(splits, split) for split in splits}
    assert [len(read[s]) for s in ("train", "validation", "test")] in ([93, 10, 2], [90, 13, 2])
    assert not set(read["train"]) & set(read["validation"])
    assert len(set(read["train"]) | set(read["validation"])) == 100
    # another order of lines, the same slice
    path = layout / "full/anli/train.tsv"
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))
    assert set(data.read_full(splits, "validation")) == set(read["validation"])
    path.write_text("a\tb\n" * 20)
    with pytest.raises(UserError, match="10 distinct lines"):
        data.read_full(splits, "train")


def test_tsv_is_split_at_tabs_only(tmp_path):
    text = '\ufeff"quoted\tyes"\r\n"a ""b\u2028c\u0085\x0b\x0c d \t x \ty\t\tz\ne\tf'
    assert data.read_tsv(_write(tmp_path / "a.tsv", text)) == [
        ('"quoted', 'yes"'),
        ('"a ""b\u2028c\u0085\x0b\x0c d', "x", "y", "z"),
        ("e", "f"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nno tab here\nc\td\n", r"a\.tsv:2: no tab; a line is input<TAB>output"),
        (b"a\tb\n\n", r"a\.tsv:2: no tab"),
        (b"a\tb\n \tb\n", r"a\.tsv:2: empty input"),
        (b"a\tb\nc\td\ne\t\tf\n", r"a\.tsv:3: empty output"),
        (b"a\tb\n\r\nc\xff\td\n", r"a\.tsv:3: not valid UTF-8"),
        (b"", r"a\.tsv: the file is empty"),
        (b"\xef\xbb\xbf", r"a\.tsv: the file is empty"),
    ],
)
def test_bad_lines(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        data.read_tsv(_write(tmp_path / "a.tsv", content))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*a\.tsv: No such file"):
        data.read_tsv(tmp_path / "a.tsv")


def test_directory(layout, monkeypatch):
    monkeypatch.delenv("CROSSFIT_DIR", raising=False)
    assert data.directory("CROSSFIT_DIR") is None
    monkeypatch.setenv("CROSSFIT_DIR", str(layout / "few"))
    assert data.directory("CROSSFIT_DIR") == layout / "few"
    assert data.present(layout / "few") == ["anli", "glue-rte"]
    monkeypatch.setenv("CROSSFIT_DIR", str(layout / "fw"))
    with pytest.raises(UserError, match=r"CROSSFIT_DIR=.*fw: no such directory"):
        data.directory("CROSSFIT_DIR")
    monkeypatch.setenv("CROSSFIT_DIR", str(layout))
    holds_none = "holds no directory named as a CrossFit task"
    with pytest.raises(UserError, match=f"{holds_none}.*; give {layout / 'few'}$"):
        data.directory("CROSSFIT_DIR")
    monkeypatch.setenv("CROSSFIT_DIR", str(layout / "few" / "anli"))
    with pytest.raises(UserError, match=rf"{holds_none} \(such as ag_news\)$"):
        data.directory("CROSSFIT_DIR")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": ["glue-rte"], "dev": ["glue-rte"], "test": []}, "'glue-rte' is in 'train' and"),
        ({"train": ["glue-rte", "glue-rte"], "dev": [], "test": []}, "in 'train' and again in"),
        ({"train": ["glue-rt"], "dev": [], "test": []}, "unknown task 'glue-rt'; did you mean"),
        ({"train": ["glue-rte"], "dev": []}, 'must be {"train"'),
        (["glue-rte"], 'must be {"train"'),
        ({"train": [["glue-rte"]], "dev": [], "test": []}, "unknown task"),
        ({"train": [{"a": 1}, None], "dev": [], "test": []}, "unknown task"),
    ],
)
def test_bad_partition(tmp_path, monkeypatch, given, message):
    path = _write(tmp_path / "mine.json", json.dumps(given))
    monkeypatch.setenv("CROSSFIT_PARTITION", str(path))
    with pytest.raises(UserError, match=message):
        data.partitions()


def test_own_partition(tmp_path, monkeypatch):
    lists = {"train": ["glue-rte"], "dev": ["anli"], "test": []}
    path = _write(tmp_path / "my-own.json", json.dumps(lists | {"all": ["anli", "glue-rte"]}))
    monkeypatch.setenv("CROSSFIT_PARTITION", str(path))
    assert data.partitions()["my_own"] == lists
    for name in ("random", "full", "prompts", "full_random"):  # mixtures are called so
        monkeypatch.setenv("CROSSFIT_PARTITION", str(_write(tmp_path / f"{name}.json", "{}")))
        with pytest.raises(UserError, match=f"'{name}' is taken"):
            data.partitions()


def test_gin_settings(monkeypatch):
    assert data.settings() == {}
    with gin.unlock_config():
        gin.parse_config("crossfit.data_dir = 'some/where'")
    assert data.settings() == {"CROSSFIT_DIR": os.path.abspath("some/where")}


def test_a_long_file(tmp_path):
    path = _write(tmp_path / "a.tsv", "".join(f"{'word ' * 40}{i}\ta\tb\n" for i in range(20_000)))
    assert len(data.read_tsv(path)) == 20_000


def _python(code: str, **environment: str) -> tuple[dict, str]:
    """Runs `code` in its own process with SeqIO; returns the value of `out` and its stderr."""
    code = f"import json\nout = {{}}\n{textwrap.dedent(code)}\nprint(json.dumps(out))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CROSSFIT_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_registration(layout):
    """Names, texts, references, ontology, descriptions, hints and the error, through SeqIO."""
    partition = {"train": ["glue-rte", "boolq"], "dev": ["anli"], "test": []}
    _write(layout / "own.json", json.dumps(partition))
    bad = _write(layout / "few/boolq/boolq_16_13_train.tsv", "a\tb\nno tab\n")
    out, stderr = _python(
        """
        import seqio
        from moe_jax.builtin_tasks import crossfit
        from moe_jax.core.errors import UserError
        out["tasks"] = sorted(n for n in seqio.TaskRegistry.names() if ":" not in n)
        out["own"] = {n: sorted(t.name for t in seqio.MixtureRegistry.get(n).tasks)
                      for n in seqio.MixtureRegistry.names() if "own" in n and "prompt" not in n}
        out["ontology"] = {
            category: {
                group: [n for n in names if ":" not in n] for group, names in groups.items()
            } for category, groups in crossfit.ONTOLOGY.items()
        }
        out["prompted"] = [n for groups in crossfit.ONTOLOGY.values() for names in groups.values()
                           for n in names if ":" in n]
        out["prompts"] = crossfit.PROMPTS
        out["described"] = crossfit.DESCRIPTIONS
        out["all"] = list(seqio.TaskRegistry.names())
        task = seqio.TaskRegistry.get("crossfit_glue_rte")
        out["splits"] = list(task.splits)
        rows = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
        out["inputs"] = [r["inputs_pretokenized"].decode() for r in rows]
        out["ids"] = [r["inputs"].tolist() for r in rows]
        out["references"] = [task.postprocess_fn(
            r["targets_pretokenized"].decode(), example=r, is_target=True) for r in rows]
        out["metric"] = task.metric_fns[0].__name__
        out["files"] = crossfit.data_files("crossfit_full_anli")
        out["listed"] = [crossfit.LISTED[f"crossfit_{p}train"] for p in
                         ("", "own_", "train_non_nli_test_nli_")]
        out["hints"] = [crossfit.missing_hint(n) for n in
                        ("crossfit_copa", "crossfit_own_test", "crossfit_art", "gym_x")]
        try:
            seqio.get_mixture_or_task("crossfit_own_train").get_dataset(None, "train")
        except UserError as e:
            out["error"] = str(e)
        import contextlib, io
        from moe_jax import tasks
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            tasks.main(["show", "crossfit_full_anli", f"--task_modules={crossfit.__name__}"])
        out["show"] = printed.getvalue()
        """,
        CROSSFIT_DIR=str(layout / "few"),
        CROSSFIT_FULL_DIR=str(layout / "full"),
        CROSSFIT_PARTITION=str(layout / "own.json"),
    )
    assert out["tasks"] == ["crossfit_boolq", "crossfit_full_anli", "crossfit_glue_rte"]
    assert out["own"] == {
        "crossfit_own_train": ["crossfit_boolq", "crossfit_glue_rte"],
        "crossfit_full_own_dev": ["crossfit_full_anli"],
    }
    assert out["ontology"] == {
        "classification": {"nli": ["crossfit_full_anli", "crossfit_glue_rte"]},
        "qa": {"binary": ["crossfit_boolq"]},
    }
    # Prompts are of their task's category; see test_crossfit_prompts.py.
    assert sorted(out["prompted"]) == sorted(n for names in out["prompts"].values() for n in names)
    assert set(out["prompts"]) == set(out["tasks"])
    # All forms of a task ask for the same.
    published = {"boolq": "boolq", "anli": "anli", "glue_rte": "glue-rte"}
    assert set(out["described"]) == set(out["all"])
    for name, sentence in out["described"].items():
        task = name.partition(":")[0].removeprefix("crossfit_").removeprefix("full_")
        assert sentence == data.TASKS[published[task]]["description"]
    assert f"  asks for: {data.TASKS['anli']['description']}\n" in out["show"]
    assert set(out["splits"]) == {
        *("train", "validation", "test", "fewshot_13_train", "fewshot_13_validation"),
        *("fewshot_100_train", "fewshot_100_validation"),
    }
    assert out["inputs"] == [f"[glue-rte] {x}" for x in ("train one", "shared", "train two")]
    assert out["ids"] == [[b + 3 for b in text.encode()] + [1] for text in out["inputs"]]
    assert out["references"] == [["yes"], ["no", "nope"], ["yes"]]
    assert out["metric"] == "accuracy"
    # What is said of the tasks is prepared with them, so they are made anew when it changes.
    files = [layout / f"full/anli/{part}.tsv" for part in ("test", "train")]
    assert out["files"] == [str(path) for path in (*files, data.FACTS)]
    assert out["hints"][0] is None
    assert "none of the 0 tasks that 'crossfit_own_test' lists" in out["hints"][1]
    assert "'crossfit_art' is not present in" in out["hints"][2]
    assert out["hints"][3] is None
    assert out["error"] == f"{bad}:2: no tab; a line is input<TAB>output"
    few = layout / "few"
    assert [line for line in stderr.splitlines() if line.startswith("crossfit_*: ")] == [
        f"crossfit_*: {counts} present in {few}"
        for counts in (
            "2 of 120 train, 0 of 20 dev, 0 of 20 test tasks of partition 'random'",
            "2 of 2 train, 0 of 1 dev, 0 of 0 test tasks of partition 'own'",
        )
    ]
    assert out["listed"] == [120, 2, 57 - 1]


def test_without_a_directory():
    out, stderr = _python(
        """
        import seqio
        from moe_jax.builtin_tasks import crossfit
        out["names"] = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
        out["hints"] = [crossfit.missing_hint(f"crossfit_{x}train") for x in ("", "full_")]
        """
    )
    assert out["names"] == []
    assert out["hints"] == [
        f"'crossfit_{full}train' needs {variable} (in gin: crossfit.{setting}), which is not set"
        for full, variable, setting in (
            ("", "CROSSFIT_DIR", "data_dir"),
            ("full_", "CROSSFIT_FULL_DIR", "full_dir"),
        )
    ]
    assert "crossfit" not in stderr


def test_every_split_of_the_gym_is_readable(gym):
    few, full = gym / "crossfit", gym / "full"
    for task in data.present(few):
        splits = data.few_shot_splits(few, task)
        assert len(splits) == 13, task
        read = {split: data.read_few_shot(splits, split) for split in splits}
        assert all(read.values()), task
        assert len(read["test"]) <= 500
        assert not set(read["train"]) & set(read["validation"]), task
        for seed in (13, 21, 42, 87, 100):
            assert set(read[f"fewshot_{seed}_train"]) <= set(read["train"])
    for task in data.present(full)[::10]:
        splits = data.full_splits(full, task)
        read = {split: data.read_full(splits, split) for split in splits}
        assert read["train"]
        assert len(read["validation"]) >= 1, task
        assert not set(read["train"]) & {*read["validation"], *read["test"]}, task
