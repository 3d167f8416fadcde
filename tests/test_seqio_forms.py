"""Own tasks as T5X's users write them (`seqio_forms.py`): trained, evaluated and answered.

The scores of every form equal those that SeqIO's own Evaluator computes for the registered task
from the same answers.
"""

import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds
from toy import prepare, toy_mixtures
from toy_run import bindings, flags_of, start

from moe_jax import eval as eval_program
from moe_jax import infer as infer_program
from moe_jax import tasks
from moe_jax.data.example import Example
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.data.vocabulary_training import train_sentencepiece
from moe_jax.runs import gin_files
from moe_jax.runs.config import Config, DataConfig
from moe_jax.runs.configurables import build
from moe_jax.runs.mixtures import prepare_mixtures, say_cut, say_ignored
from moe_jax.runs.train_loop import train

LENGTHS = {"inputs": 16, "targets": 12}
SIZES = {"train": 30, "validation": 7, "test": 7}
# Form -> the task that has it, beside a plain postprocess function and a metric of predictions.
FORMS = {
    "vocabularies of the features, CacheDatasetPlaceholder, append_eos_after_trim": "standard",
    "metric_fns of scores": "scores",
    "metrics that are closures, a postprocess_fn that is a lambda": "closures",
    "SeqIO's Scalar, Text and Histogram": "metric_values",
    "metric_fns of aux_values": "aux_values",
    "metric_objs": "metric_objects",
    "further features, read by the postprocess_fn": "example",
    "a postprocess_fn with arguments": "partial",
    "a preprocessor that reads sequence_length": "lengths",
    "TfdsDataSource from a local directory": "tfds",
    "no train split": "test_only",
    "no train split, in the training mixture": "no_train",
    "two vocabularies": "two_vocabularies",
    "further output features": "extra_feature",
}
WITHOUT_METRICS = "without_metrics"  # nor a validation split
PAIR = ("two_vocabularies", "extra_feature")
EVALUATED = [*FORMS.values()]


@dataclasses.dataclass
class Trained:
    """A run: its directory, what it said, and the JSON lines of `infer` by (task, mode)."""

    model_dir: Path
    said: str
    answers: dict


class Plurals(tfds.core.GeneratorBasedBuilder):
    """Writes the data set; it is read without this class."""

    VERSION = tfds.core.Version("1.0.0")
    rows: dict = {}  # noqa: RUF012

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"word": text, "plural": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.rows}

    def _generate_examples(self, split):
        for number, row in enumerate(self.rows[split]):
            yield number, {"word": row[0], "plural": row[1]}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A user's directory: the task module, TSV files, a vocabulary, a TensorFlow dataset."""
    path = tmp_path_factory.mktemp("project")
    shutil.copy(Path(__file__).with_name("seqio_forms.py"), path / "forms.py")
    rng = np.random.default_rng(0)
    rows = {}
    for split, size in SIZES.items():
        words = rng.choice(["cat", "dog", "house", "tree", "river"], size)
        rows[split] = [(w, f"{w}s", rng.choice(["animal", "thing"]), f"0.{i}") for i, w in
                       enumerate(words)]  # fmt: skip
        (path / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows[split]))
    texts = [text for row in rows["train"] for text in (f"plural: {row[0]}", row[1])]
    (path / "sp.model").write_bytes(train_sentencepiece(texts, 300))
    Plurals.rows = rows
    Plurals(data_dir=path / "tfds").download_and_prepare()
    return path


def settings(project: Path, mixture: str, **more) -> list[str]:
    common = {
        "MIXTURE_OR_TASK_NAME": mixture, "TASK_MODULES": ("forms.py",), "CACHE_DIR": "cache",
        "TASK_FEATURE_LENGTHS": LENGTHS, "TRAIN_STEPS": 4, "CHECKPOINT_PERIOD": 2, "BATCH_SIZE": 16,
        "EVAL_PERIOD": 4, "VocabularyConfig__kind": "task", "DataConfig__mixing": "seqio",
        "RunConfig__eval_batch_rows": 8,
    }  # fmt: skip
    return bindings(project / "runs" / mixture, **common | more)


def of_run(model_dir: Path) -> list[str]:
    """The run, and its task module, which its files do not import."""
    (module,) = (path / "forms.py" for path in model_dir.parents if (path / "forms.py").exists())
    return [f"MODEL_DIR = {str(model_dir)!r}", f"TASK_MODULES = {str(module)!r}"]


def answer(model_dir: Path, mode: str, out: Path, *lines: str) -> dict:
    given = [*of_run(model_dir), "infer.split = 'test'", f"infer.mode = {mode!r}",
             f"infer.output = {str(out)!r}", *lines]  # fmt: skip
    gin_files.parse([], given, [], from_model_dir=True)
    infer_program.infer(build(Config), build(infer_program.InferConfig))
    end = f"-{mode}.jsonl-00000-of-00001"
    return {
        (path.name.removesuffix(end), mode): [json.loads(s) for s in path.read_text().splitlines()]
        for path in out.iterdir()
    }


def evaluate(model_dir: Path, *lines: str) -> None:
    given = [*of_run(model_dir), *lines]
    gin_files.parse([], given, [], from_model_dir=True)
    eval_program.evaluate(build(Config), build(eval_program.EvalConfig))


def scores(place: Path) -> dict[str, dict[str, float]]:
    """Task -> metric -> score."""
    found: dict[str, dict[str, float]] = {}
    for line in (place / "scores.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["task"], {})[row["metric"]] = row["score"]
    return found


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory) -> Trained:
    """Trained from the project's directory, scored and answered from another one."""
    code = f"import os; os.chdir({str(project)!r}); from moe_jax import __main__ as m; m.main()"
    lines = settings(project, "forms", EVAL_MIXTURES=("forms", "held_out"))
    process = start("train", ["train", *flags_of(lines)], code=code)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]
    run, elsewhere = project / "runs" / "forms", tmp_path_factory.mktemp("elsewhere")
    with contextlib.chdir(elsewhere):
        evaluate(run, f"CACHE_DIR = {str(project / 'cache')!r}")
        answers = answer(run, "predict_with_aux", elsewhere / "aux")
        answers |= answer(run, "score", elsewhere / "score")
        held_out = "MIXTURE_OR_TASK_NAME = 'test_only'"
        answers |= answer(run, "predict", elsewhere / "held_out", held_out)
    return Trained(run, said, answers)


@pytest.fixture(scope="module")
def pair(project) -> Trained:
    """The tasks with two vocabularies, in this process."""
    with contextlib.chdir(project), contextlib.redirect_stderr(io.StringIO()) as said:
        gin_files.parse([], settings(project, "pair", TRAIN_STEPS=2), [])
        train(build(Config))
        run = project / "runs" / "pair"
        evaluate(run)
        answers = answer(run, "predict", project / "answers")
    return Trained(run, said.getvalue(), answers)


@pytest.fixture
def of_form(form, request) -> Trained:
    return request.getfixturevalue("pair" if FORMS[form] in PAIR else "trained")


def predictions(task: str, answers: dict) -> list[dict]:
    """The lines of `infer` that hold answers."""
    return answers.get((task, "predict_with_aux")) or answers[task, "predict"]


def by_seqio(task: str, answers: dict) -> dict[str, float]:
    """The scores by SeqIO's own Evaluator, for these answers."""
    registered = seqio.TaskRegistry.get(task)
    evaluator = seqio.Evaluator(
        task, seqio.EncDecFeatureConverter(pack=False), "test", sequence_length=LENGTHS,
        async_compute_metrics=False,
    )  # fmt: skip
    vocabulary = registered.output_features["targets"].vocabulary
    lines = predictions(task, answers)
    texts = [line["prediction"] for line in lines]
    tokens = [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]
    longest = max(map(len, tokens))
    tokens = [np.pad(np.array(row, np.int32), (0, longest - len(row))) for row in tokens]
    found = [line["score"] for line in answers.get((task, "score"), [])]
    aux = [line["aux"]["scores"] for line in lines if "aux" in line]
    results, _ = evaluator.evaluate(
        compute_metrics=True,
        predict_fn=lambda dataset: list(enumerate(tokens)),
        score_fn=lambda dataset: list(enumerate(found)),
        predict_with_aux_fn=lambda dataset: (list(enumerate(tokens)), {"scores": aux}),
    )
    results = results.result()[task]
    return {
        name: float(getattr(value, "value", value))
        for name, value in results.items()
        if not isinstance(value, seqio.metrics.Text | seqio.metrics.Histogram)
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_form(form, of_form, project):
    task = FORMS[form]
    trained_on = json.loads((of_form.model_dir / "task_table.json").read_text())["tasks"]
    assert (task in trained_on) == (task not in ("test_only", "no_train"))
    # Answered: a line per example, with its texts.
    lines = predictions(task, of_form.answers)
    dataset = seqio.TaskRegistry.get(task).get_dataset(LENGTHS, "test", shuffle=False)
    for line, example in zip(lines, dataset.as_numpy_iterator(), strict=True):
        assert list(line) in (["inputs", "prediction"], ["inputs", "prediction", "aux"])
        assert line["inputs"] == {
            name: example[name].decode() for name in ("inputs_pretokenized", "targets_pretokenized")
        }
    assert any(line["prediction"] for line in lines)
    # Evaluated: SeqIO finds the same.
    found = scores(of_form.model_dir / "eval" / f"{mixture_of(task)}_test")[task]
    if task in PAIR:  # by hand, since that Evaluator refuses further output features
        texts = [(s["inputs"]["targets_pretokenized"], s["prediction"]) for s in lines]
        want = {"accuracy": 100 * np.mean([target == answer for target, answer in texts])}
    else:
        want = by_seqio(task, of_form.answers)
    assert found == pytest.approx(want, rel=1e-5) and want


def mixture_of(task: str) -> str:
    return "pair" if task in PAIR else "held_out" if task == "test_only" else "forms"


@pytest.mark.slow
def test_what_is_said_and_logged(trained):
    assert "not trained on, without a split 'train': no_train\n" in trained.said
    lines = (trained.model_dir / "metrics.jsonl").read_text().splitlines()
    (row,) = [row for row in map(json.loads, lines) if row["kind"] == "eval"]
    of_tasks = {name[6:]: value for name, value in row.items() if name.startswith("score/")}
    unscored = {WITHOUT_METRICS, "test_only"}  # no metrics; no validation split
    assert of_tasks.keys() == {*FORMS.values()} - {*PAIR} - unscored
    assert row["mean_score"] == pytest.approx(np.mean([*of_tasks.values()]))
    held_out = [of_tasks["no_train"], of_tasks["standard"]]
    assert row["mean_score/held_out"] == pytest.approx(np.mean(held_out))
    assert row["mean_score/forms"] == pytest.approx(row["mean_score"])


@pytest.mark.slow
def test_task_modules_are_stored_from_the_root(trained, project):
    stored = json.loads((trained.model_dir / "config.json").read_text())
    assert stored["DataConfig.task_modules"] == [str(project / "forms.py")]


@pytest.mark.slow
def test_rates_of_mixtures_in_mixtures(trained, project):
    with contextlib.chdir(project):
        gin_files.parse([], of_run(trained.model_dir), [], from_model_dir=True)
        mixture = prepare_mixtures(build(Config).data, run=trained.model_dir)["forms"]
    # A fourth of 2 each in `inner`, where all have more than the maximum; 3 and 1.5 share 1.
    want = dict.fromkeys(("standard", "scores", "closures", "lengths"), 0.5)
    want |= {"metric_values": 3 / 4.5, "tfds": 1.5 / 4.5, "example": 0, "no_train": 0}
    want |= dict.fromkeys(("aux_values", "metric_objects", "partial", WITHOUT_METRICS), 0.5)
    want["standard"] += 1
    assert {task.name: task.rate for task in mixture.tasks} == pytest.approx(want)


@pytest.mark.slow
def test_a_checkpoint_other_than_the_newest(trained, project):
    """Its scores are those of a run that ended there, and do not replace those of the newest."""
    place = trained.model_dir / "eval" / "held_out_test" / "predictions.jsonl"
    newest = place.read_text()
    given = ["EVAL_MIXTURES = ()", "MIXTURE_OR_TASK_NAME = 'no_train'",
             f"CACHE_DIR = {str(project / 'cache')!r}"]  # fmt: skip
    evaluate(trained.model_dir / "checkpoints" / "2", *given)
    short = project / "runs" / "short"
    ignored = shutil.ignore_patterns("4", "eval")
    shutil.copytree(trained.model_dir, short, ignore=ignored)
    evaluate(short, *given)
    found = (trained.model_dir / "eval/step_2/no_train_test/predictions.jsonl").read_text()
    assert found == (short / "eval/no_train_test/predictions.jsonl").read_text()
    assert place.read_text() == newest


def test_check_scores_every_form_as_training_does(project, capsys):
    """What SeqIO scores as well; the scores of SeqIO's own Evaluator are in `test_form`."""
    with contextlib.chdir(project):
        for name in ("forms", "held_out", "pair"):
            tasks.main(["check", name, "--task_modules", "forms.py"])
    said = re.split(r"^(\w+)\n", capsys.readouterr().out, flags=re.M)
    of_task = dict(zip(said[1::2], said[2::2], strict=True))
    assert of_task.keys() == {*FORMS.values(), WITHOUT_METRICS}
    assert all(text.endswith("  ok\n") for text in of_task.values())
    by_seqio = {name for name, text in of_task.items() if "scored by SeqIO" in text}
    assert by_seqio >= {"closures", "aux_values", "metric_objects", "example"}
    assert by_seqio.isdisjoint({"standard", "scores", "partial", "lengths", "tfds"})
    for name in EVALUATED:
        assert re.search(r"targets of test as predictions.*: \S+ [-\d.]+", of_task[name]), name


def test_what_a_run_ignores_is_said(project, capsys):
    data = DataConfig(lengths=LENGTHS, vocabulary=VocabularyConfig(kind="bytes"))
    forms = str(project / "forms.py")
    found = prepare(project / "said", "other", forms, data.vocabulary, lengths=LENGTHS)["other"]
    capsys.readouterr()
    say_ignored(data, found)
    vocabulary, rates = capsys.readouterr().err.splitlines()
    assert vocabulary == (
        "VocabularyConfig.kind 'bytes' replaces the vocabulary that these were registered with,"
        " 'task' keeps it: metric_values, tfds"
    )
    assert rates == (
        "DataConfig.mixing 'examples' draws tasks by their number of examples, 'seqio' by the rates"
        " of other: metric_values 3, tfds 1.5"
    )
    say_ignored(dataclasses.replace(data, mixing="seqio"), dataclasses.replace(found, replaced=()))
    assert not capsys.readouterr().err


def test_tasks_with_examples_that_are_cut_are_said(capsys):
    """Counted from the examples themselves."""
    mixture, _ = toy_mixtures()
    counts = {}
    for name in mixture.names:
        records = mixture.task(name).records("train")
        counts[name] = [len(records[i].inputs) for i in range(len(records))]
    of_all = sorted(n for of_task in counts.values() for n in of_task)
    say_cut(mixture, "train", {"inputs": of_all[-1], "targets": 1000})
    assert not capsys.readouterr().err  # as long as a row is not cut
    limit = of_all[len(of_all) // 2]
    say_cut(mixture, "train", {"inputs": limit, "targets": 1000})
    (line,) = capsys.readouterr().err.splitlines()
    head, _, tasks = line.partition(": ")
    assert head == f"TASK_FEATURE_LENGTHS cuts inputs of train after {limit} tokens"
    found = re.findall(r"(\w+) \((\S+) of (\S+), up to (\S+) tokens\)", tasks)
    expected = [
        (name, sum(n > limit for n in of_task), len(of_task), max(of_task))
        for name, of_task in counts.items() if max(of_task) > limit
    ]  # fmt: skip
    expected.sort(key=lambda row: row[1] / row[2], reverse=True)  # the worst first
    assert found == [(name, *map("{:,}".format, numbers)) for name, *numbers in expected] and found


def test_features_of_an_example_come_back():
    features = {
        "kind": b"a", "weight": np.float32(0.5), "flags": np.array([[True], [False]]),
        "texts": np.array([b"x", "é".encode()], object), "none": np.zeros((0, 2), np.int64),
    }  # fmt: skip
    ids = np.array([3, 1], np.int32)
    found = Example.from_bytes(Example(ids, ids, "", [], features=features).to_bytes()).features
    assert found.keys() == features.keys()
    for name, value in features.items():
        np.testing.assert_array_equal(found[name], value)
        assert np.asarray(found[name]).dtype == np.asarray(value).dtype
