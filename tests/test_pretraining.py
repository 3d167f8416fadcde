"""Pre-training tasks: which text they read, how it is cut, and a model that starts from them."""

import json
from pathlib import Path

import gin
import numpy as np
import pytest
from toy_run import ROOT, finish, flags_of, start

from moe_jax.builtin_tasks import pretraining_data as data
from moe_jax.core.errors import UserError
from moe_jax.data.prepared import ensure_prepared
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import VocabularyConfig

MODULE = "moe_jax.builtin_tasks.pretraining"
ANIMALS = ("cat", "dog", "hen", "owl")


def sentence(i: int) -> str:
    return f"The {ANIMALS[i % 4]} has {i % 7} red hats."


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Text files of 60 lines of three sentences, and a table with two."""
    path = tmp_path_factory.mktemp("text")
    lines = [" ".join(sentence(i * k) for k in (1, 2, 3)) for i in range(60)]
    (path / "a").mkdir()
    (path / "a" / "lines.txt").write_text("\n".join(lines) + "\n\n" + lines[0])
    (path / "table.tsv").write_text("A question?\tits label\nAnother one!\tno\tyes\n")
    (path / "notes.md").write_text("not read")
    return path


def test_documents_are_distinct_lines_without_labels(root, monkeypatch):
    found = data.documents(data.files(root))
    assert len(found) == len(set(found)) <= 62
    assert found[0] == " ".join([sentence(0)] * 3)
    assert found[-2:] == ["A question?", "Another one!"]
    monkeypatch.setenv(data.CHARACTERS, "600")
    fewer = data.documents(data.files(root))
    assert fewer[-2:] == found[-2:] and 600 / 2 < sum(map(len, fewer[:-2])) <= 600
    assert set(fewer) < set(found)


def test_of_crossfit_only_training_tasks_are_read(tmp_path, monkeypatch):
    for task in ("glue-sst2", "ag_news", "boolq"):
        (tmp_path / task).mkdir()
        for part in ("train", "test"):
            (tmp_path / task / f"{part}.tsv").write_text(f"{task} {part}\tlabel\n")
    partition = {"train": ["glue-sst2"], "dev": ["ag_news"], "test": ["boolq"]}
    (tmp_path / "mine.json").write_text(json.dumps(partition))
    monkeypatch.setenv("CROSSFIT_PARTITION", str(tmp_path / "mine.json"))
    monkeypatch.setenv(data.PARTITION, "mine")
    assert data.documents(data.files(tmp_path)) == ["glue-sst2 train"]
    monkeypatch.setenv(data.PARTITION, "mini")
    with pytest.raises(UserError, match="PRETRAINING_PARTITION=mini: no such partition; did you"):
        data.files(tmp_path)


def test_bad_text_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no text to train on"):
        data.files(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"good\nb\xffd\n")
    with pytest.raises(UserError, match=r"x\.txt:2: not valid UTF-8"):
        data.documents(data.files(tmp_path))
    monkeypatch.setenv(data.CHARACTERS, "-3")
    with pytest.raises(UserError, match="PRETRAINING_CHARACTERS=-3: must be a number of at least"):
        data.documents(data.files(tmp_path))


def test_gin_settings_become_environment_variables(tmp_path):
    gin.clear_config()
    gin.parse_config(["pretraining.copies = 3", f"pretraining.data_dir = {str(tmp_path)!r}"])
    assert data.settings() == {data.COPIES: "3", data.DATA_DIR: str(tmp_path)}
    gin.clear_config()


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    """Both tasks with bytes, two copies; and the same tasks in words of a trained vocabulary."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {data.DATA_DIR: str(root), data.COPIES: "2"}
    more = {"environment": environment, "lengths": {"inputs": 64, "targets": 40}}
    names = ["pretraining_infilling", "pretraining_spans"]
    request = Request.make(names, MODULE, VocabularyConfig("bytes", extra_ids=9), **more)
    return ensure_prepared(cache, request)


def test_pieces_fit_into_rows_and_restore_the_text(root, prepared):
    text = "".join(sorted(data.documents(data.files(root)), key=len))
    sentinels = list(range(267, 258, -1))
    for name, mixture in prepared.items():
        records = list(mixture.task(name).records("train"))
        half = len(records) // 2
        assert len(records) == 2 * half
        copies = []
        for part in (records[:half], records[half:]):
            pieces = []
            for example in part:
                inputs, targets = example.inputs.tolist(), example.targets.tolist()
                assert inputs.pop() == targets.pop() == 1  # EOS
                assert len(targets) < 40
                assert len(inputs) < 64 or name == "pretraining_infilling"
                spans = {}
                for token in targets:
                    if token in sentinels:
                        current = spans.setdefault(token, [])
                    elif spans:
                        current.append(token)
                if name == "pretraining_infilling":
                    pieces.append(targets)
                    assert set(inputs) - {267} <= set(targets) and 267 in inputs
                else:
                    pieces.append([t for i in inputs for t in spans.get(i, [i])])
            copies.append(mixture.vocabulary.decode([t for piece in pieces for t in piece]))
        # Both copies hold the same text, corrupted in other ways.
        assert copies[0] == copies[1] and sorted(copies[0]) == sorted(text)
        same = [
            np.array_equal(a.inputs, b.inputs)
            for a, b in zip(records[:half], records[half:], strict=True)
            if len(a.inputs) > 25  # what is left of a text has few ways to be corrupted
        ]
        assert len(same) > 20 and np.mean(same) < 0.1


def test_a_vocabulary_without_sentinels_is_named():
    import seqio

    from moe_jax.builtin_tasks import pretraining

    features = {"inputs": seqio.Feature(seqio.ByteVocabulary())}
    with pytest.raises(UserError, match=r"a vocabulary with 1 sentinels: --gin.*extra_ids=1"):
        pretraining._infilling(None, {"inputs": 64, "targets": 40}, features)


def test_an_unset_directory_is_named(monkeypatch):
    from moe_jax.data import registry

    monkeypatch.delenv(data.DATA_DIR, raising=False)
    modules = registry.load_task_modules([MODULE])
    message = r"'pretraining_spans' needs PRETRAINING_DIR \(in gin: pretraining.data_dir\)"
    with pytest.raises(UserError, match=message):
        registry.find_tasks("pretraining_spans", modules)


SMALL = {
    "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 32}, "BATCH_SIZE": 8,
    "DataConfig.rows_per_group": 4, "RunConfig.log_period": 10, "ModelConfig.d_model": 32,
    "ModelConfig.d_ff": 64, "ModelConfig.encoder_layers": 1, "ModelConfig.decoder_layers": 1,
}  # fmt: skip


def test_a_pretrained_model_starts_a_mixture_in_its_vocabulary(root, tmp_path):
    def train(name, *files, **settings):
        lines = {**SMALL, "MODEL_DIR": str(tmp_path / name), "CACHE_DIR": str(tmp_path / "cache")}
        lines |= {key.replace("__", "."): value for key, value in settings.items()}
        named = [f"--gin_file={file}" for file in ("models/tiny.gin", *files)]
        finish(start("train", named + flags_of([f"{k} = {v!r}" for k, v in lines.items()])))
        log = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in log if "loss" in line]

    losses = train(
        "start", "runs/pretrain.gin", PRETRAINING_DIR=str(root), TRAIN_STEPS=60,
        VocabularyConfig__size=400,
    )  # fmt: skip
    assert losses[-1] < 0.7 * losses[0]
    toys = {
        "MIXTURE_OR_TASK_NAME": "toy_train", "TASK_MODULES": str(ROOT / "tests/toy_tasks.py"),
        "EVAL_PERIOD": 0, "TRAIN_STEPS": 2, "ModelConfig__experts": 2,
        "VocabularyConfig__path": str(tmp_path / "start/vocabulary/sentencepiece.model"),
        "INITIAL_CHECKPOINT_PATH": str(tmp_path / "start"),
    }  # fmt: skip
    train("mixture", **toys)
    first, second = (
        json.loads((tmp_path / name / "vocabulary/vocabulary.json").read_text())["fingerprint"]
        for name in ("start", "mixture")
    )
    assert first == second
