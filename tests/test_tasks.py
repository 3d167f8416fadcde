"""The `moe_jax.tasks` command, on tasks that are mostly broken in one way each."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

MODULE = """
import functools
import seqio
import tensorflow as tf
from moe_jax.core.errors import UserError
from moe_jax.metrics import accuracy, answers_or_target, exact_match
from seqio.preprocessors import append_eos, tokenize

LISTED = {"t_mix": 5}
DESCRIPTIONS = {"t_good": "Say no."}
ONTOLOGY = {"qa": {"binary": ["t_good"]}, "other": {"x": ["t_no_eos"]}}

def source(split, shuffle_files, *, pairs):
    pairs = pairs.get(split, [])
    if "bad file" in pairs:
        raise UserError("a.tsv:3: no tab")
    return tf.data.Dataset.from_tensor_slices({
        "inputs": tf.constant([p[0] for p in pairs], tf.string),
        "targets": tf.constant([p[1] for p in pairs], tf.string)})

def fails(dataset):
    raise TypeError("no such thing\\nsecond line")

def nan(targets, predictions):
    return {"x": float("nan")}

def raises(targets, predictions):
    raise KeyError("gone")

def mean_score(targets, scores, scale):
    return {"mean": scale * sum(scores) / len(scores)}

@seqio.map_over_dataset
def choose(example):
    return {**example, "answer_choices": tf.constant(["yes", "maybe"])}

feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
PAIRS = {"train": [("is it?", "yes")] * 3, "validation": [("hm", "no")], "test": [("é", "no")]}

class Object(seqio.metrics.Metric):
    pass

def add(name, preprocessors=(tokenize, append_eos), metric_fns=(accuracy,), **pairs):
    pairs = PAIRS | pairs
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(source, pairs=pairs), splits=[*pairs]),
        preprocessors=list(preprocessors),
        postprocess_fn=answers_or_target,
        metric_fns=list(metric_fns),
        output_features={"inputs": feature, "targets": feature})

add("t_good", fewshot_7_train=[("a", "b")], fewshot_8_train=[("a", "b")])
add("t_the", metric_fns=(exact_match, accuracy), test=[("a", "the")])
add("t_qa_the", metric_fns=(__import__("moe_jax.metrics").metrics.qa_f1,), test=[("a", "the")])
add("t_no_eos", preprocessors=(tokenize,))
add("t_empty_split", validation=[])
add("t_empty_target", train=[("a", "b"), ("a", "")])
add("t_bad_file", train=["bad file"])
add("t_fails", preprocessors=(fails, tokenize, append_eos))
add("t_no_metric", metric_fns=())
add("t_lambda", metric_fns=(lambda targets, predictions: {"x": 1.0},))
add("t_nan", metric_fns=(nan,))
add("t_raises", metric_fns=(raises,))
add("t_ranked", preprocessors=(choose, tokenize, append_eos),
    metric_fns=(accuracy, functools.partial(mean_score, scale=2.0)))
seqio.TaskRegistry.add_provider("t_object", seqio.TaskRegistry.get("t_good").replace(
    name="t_object", metric_fns=[], metric_objs=[Object]))
seqio.MixtureRegistry.add("t_mix", ["t_good", "t_no_metric", "t_nan"], default_rate=1.0)
"""

RUN = """
import contextlib, io, json, sys
from moe_jax import tasks
from moe_jax.core.errors import UserError
out = []
for arguments in json.loads(sys.argv[1]):
    stdout, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(stdout):
            tasks.main(arguments)
    except UserError as e:
        code = f"error: {e}"
    out.append((stdout.getvalue(), code))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Results (stdout, exit status or message) of many commands in one process with SeqIO."""
    directory = tmp_path_factory.mktemp("tasks")
    module = directory / "module.py"
    module.write_text(MODULE)
    (directory / "not.model").write_text("not a model")
    _train_sentencepiece(directory)
    checked = "good the qa_the no_eos empty_split empty_target bad_file fails no_metric lambda nan"
    commands = {
        "list": ["list"],
        "list qa": ["list", "--category", "qa"],
        "list qx": ["list", "--category", "qx"],
        "show": ["show", "t_good", "--examples", "1", "--split", "test"],
        "show mix": ["show", "t_mix", "--examples", "1"],
        "show pieces": ["show", "t_good", "--vocabulary", str(directory / "pieces.model")],
        "show split": ["show", "t_good", "--split", "tset"],
        "no model": ["show", "t_good", "--vocabulary", str(directory / "no.model")],
        "not model": ["show", "t_good", "--vocabulary", str(directory / "not.model")],
        "unknown": ["check", "t_godo"],
        "mix": ["check", "t_mix"],
        "short": ["check", "t_good", "--inputs_length", "6", "--targets_length", "3"],
        "ranked": ["check", "t_ranked"],
        "show ranked": ["show", "t_ranked", "--examples", "1"],
        "zero": ["check", "t_good", "--examples", "0"],
    }
    commands |= {name: ["check", f"t_{name}"] for name in [*checked.split(), "raises"]}
    arguments = [[*command, "--task_modules", str(module)] for command in commands.values()]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, json.dumps(arguments)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _train_sentencepiece(directory: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["is it? yes no hm"] * 20),
        model_prefix=str(directory / "pieces"),
        vocab_size=24,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def test_list(run):
    text, code = run["list"]
    assert code == 0
    lines = text.splitlines()
    assert "qa / binary" in lines
    good = next(line for line in lines if line.startswith("  t_good "))
    assert " ".join(good.split()) == "t_good accuracy train validation test few-shot(2 seeds)"
    assert next(line for line in lines if "t_mix" in line).split()[1:] == ["3", "of", "5", "tasks"]
    assert lines.index("no category") < lines.index("other / x") < lines.index("qa / binary")
    ranked = next(line for line in lines if line.startswith("  t_ranked "))
    assert ranked.split()[1:3] == ["accuracy,", "mean_score"]
    object_ = next(line for line in lines if line.startswith("  t_object "))
    assert object_.split()[1] == "Object"
    assert lines[-1] == "14 tasks"
    text, _ = run["list qa"]
    assert [line.split()[0] for line in text.splitlines()] == ["qa", "t_good", "1"]
    assert run["list qx"][1] == "error: no category 'qx'; there are: no category, other, qa"


def test_show(run):
    text, code = run["show"]
    assert code == 0
    assert text.splitlines() == [
        "t_good",
        "  category: qa / binary",
        "  asks for: Say no.",
        "  splits:   train, validation, test, fewshot_7_train, fewshot_8_train",
        "  metrics:  moe_jax.metrics:accuracy",
        "example 1 of test",
        "  inputs: é",
        "    3 tokens: 198:'' 172:'' 1:''",  # two bytes of UTF-8, each 3 up, and EOS
        "  targets: no",
        "    3 tokens: 113:'n' 114:'o' 1:''",
        "  references: ['no']",
    ]
    text, _ = run["show mix"]
    assert text.startswith("t_mix: a mixture of 3 tasks")
    assert [name in text for name in ("t_good\n", "t_nan\n", "t_no_metric\n")] == [True] * 3
    text, _ = run["show pieces"]
    assert text.count("inputs: is it?") == 3
    assert "100:" not in text  # no byte ids
    assert run["show split"][1].startswith(
        "error: task 't_good' has no split 'tset'; it has train,"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no model", r"no.model: no such file"),
        ("not model", r"not.model is not a SentencePiece model"),
        ("unknown", "did you mean 't_good'"),
        ("zero", "--examples, --inputs_length and --targets_length must be at least 1"),
        ("no_eos", "train: inputs of example 0 has no EOS: add append_eos"),
        ("empty_split", "validation: the split is empty"),
        ("empty_target", "train: targets of example 1 is empty"),
        ("bad_file", "a.tsv:3: no tab"),
        ("fails", ": TypeError: no such thing"),
        ("nan", "task 't_nan': metric nan: 'x' must be a finite number, is nan"),
        ("raises", "task 't_raises': metric raises fails: "),
        ("mix", "t_nan: task 't_nan': metric nan: 'x' must be a finite number, is nan"),
    ],
)
def test_one_line_errors(run, name, message):
    code = run[name][1]
    assert isinstance(code, str)
    assert code.startswith("error: ")
    assert message in code
    assert "\n" not in code


@pytest.mark.parametrize(
    ("name", "note"),
    [("no_metric", "no metrics: the task can be trained on"), ("lambda", "scored by SeqIO, from")],
)
def test_usable_with_a_note(run, name, note):
    text, code = run[name]
    assert code == 0 and f"note: {note}" in text and text.endswith("  ok\n")


def test_check_says_all_there_is_to_say(run):
    text, code = run["short"]
    assert code == 0
    # "is it?" is 6 bytes and EOS: one over 6
    assert text.splitlines() == [
        "t_good",
        "  train: 3 examples",
        "    inputs   tokens: median 7, 90% 7, 99% 7, longest 7; 100.0% truncated at 6",
        "    targets  tokens: median 4, 90% 4, 99% 4, longest 4; 100.0% truncated at 3",
        "  validation: 1 examples",
        "    inputs   tokens: median 3, 90% 3, 99% 3, longest 3; 0.0% truncated at 6",
        "    targets  tokens: median 3, 90% 3, 99% 3, longest 3; 0.0% truncated at 3",
        "  test: 1 examples",
        "    inputs   tokens: median 3, 90% 3, 99% 3, longest 3; 0.0% truncated at 6",
        "    targets  tokens: median 3, 90% 3, 99% 3, longest 3; 0.0% truncated at 3",
        "  fewshot_7_train: 1 examples",
        "  fewshot_8_train: 1 examples",
        "  targets of test as predictions: ACC 1",
        "  ok",
    ]
    assert run["the"][0].count("as predictions: EM 1") == 1
    assert "note" not in run["the"][0]
    assert "note: a perfect model scores less than 1" in run["qa_the"][0]
    # a broken task of a mixture does not keep the others from being checked
    assert [line for line in run["mix"][0].splitlines() if line.startswith("t_")] == [
        *("t_good", "t_nan", "t_no_metric"),
    ]


def test_choices_and_metrics_of_scores(run):
    """The targets of test are `no`, with EOS 3 tokens, which no choice is."""
    text, code = run["ranked"]
    assert code == 0
    assert text.splitlines()[-3:] == [
        "  targets of test as predictions, -1 for every token: ACC 1, mean -6",
        "  note: 1 targets of test are not among their answer choices",
        "  ok",
    ]
    text, code = run["show ranked"]
    assert code == 0
    assert "  metrics:  moe_jax.metrics:accuracy, " in text
    assert "module.py:mean_score(scale=2.0)" in text
    assert text.splitlines()[-1] == "  choices: 'yes', 'maybe'"


def test_length_summary():
    from moe_jax.evaluation.checking import length_summary  # imports TensorFlow

    lengths = np.random.default_rng(0).permutation(np.arange(1, 102))
    assert length_summary(lengths, 91) == (
        "tokens: median 51, 90% 91, 99% 100, longest 101; 9.9% truncated at 91"
    )


def test_help_needs_no_tensorflow():
    code = textwrap.dedent(
        """
        import sys
        from moe_jax import tasks
        try:
            tasks.main(["check", "--help"])
        except SystemExit as e:
            assert e.code == 0
        assert not {"tensorflow", "seqio"} & set(sys.modules)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--inputs_length" in done.stdout


def test_list_says_why_there_are_no_tasks():
    command = [sys.executable, "-m", "moe_jax.tasks", "list", "--task_modules=tasks.crossfit"]
    without = {name: value for name, value in os.environ.items() if "CROSSFIT" not in name}
    done = subprocess.run(
        command, env=without, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 tasks\n"
    assert "not set: CROSSFIT_DIR, CROSSFIT_FULL_DIR," in done.stderr
