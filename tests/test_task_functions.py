"""Functions that a task brings, good and bad, through check, prepare, train and evaluation.

Every mistake is one line that names task and function, before the first step.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from toy_run import SETTINGS, flags_of, start

from moe_jax.core.errors import UserError
from moe_jax.core.files import to_json
from moe_jax.data.calls import add_metric
from moe_jax.data.prepared import ensure_prepared
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.evaluation.functions import try_functions

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = textwrap.dedent("""
    import numpy as np

    # Postprocess functions.
    def text(value, example=None, is_target=False): return value
    def number(value, example=None, is_target=False): return np.float32(value)
    def array(value, example=None, is_target=False): return np.array([float(value), 1.0])
    def needs_example(value, example, is_target): return value
    def breaks(value, example=None, is_target=False): raise LookupError("no such label")
    def a_set(value, example=None, is_target=False): return {value}
    def nan(value, example=None, is_target=False):
        return value if is_target else float("nan")

    # Metrics.
    def same(targets, predictions):
        return {"same": np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}
    def also_same(targets, predictions): return {"same": 0.0}
    def close(targets, predictions):
        return {"error": np.float64(np.abs(np.subtract(targets, predictions)).mean())}
    def of_nothing(targets, predictions): return {"x": float("nan")}
    def of_text(targets, predictions): return {"x": "good"}
    def of_none(targets, predictions): return None
    def of_scores(targets, scores): return {"likelihood": sum(scores) / len(scores)}
    def raises(targets, predictions): return {"x": {}["gone"]}
    def partly(targets, predictions, scale): return {"scaled": scale * 1.0}
""")
MODULE = textwrap.dedent("""
    import functools
    import seqio
    import tensorflow as tf
    from functions_of_forms import *

    def source(split, shuffle_files, seed=None, endless=False):
        data = tf.data.Dataset.from_tensor_slices({"inputs": ["2", "3", "5"] * 4,
                                                   "targets": ["4", "9", "25"] * 4})
        return data.repeat() if endless else data

    FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    def add(name, postprocess, *metrics, **of_source):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(functools.partial(source, **of_source),
                                            splits=["train", "validation", "test"]),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            postprocess_fn=postprocess, metric_fns=list(metrics),
            output_features={"inputs": FEATURE, "targets": FEATURE})

    add("f_plain", None, same)
    add("f_text", text, same, of_scores)
    add("f_number", number, close)
    add("f_array", array, close)
    add("f_partial", text, functools.partial(partly, scale=2))
    add("f_twice", text, same, also_same)
    add("f_nan", text, of_nothing)
    add("f_words", text, of_text)
    add("f_none", text, of_none)
    add("f_raises", text, same, raises)
    add("f_nan_prediction", nan, same)
    add("f_breaks", breaks, same)
    add("f_a_set", a_set, same)
    add("f_endless", text, same, endless=True)

    # Which SeqIO alone can run.
    def closure(key):
        def inner(targets, predictions):
            return {"length": {"good": float(len(predictions))}[key]}
        return inner
    add("s_good", None, closure("good"))
    add("s_raises", text, closure("gone"))
""")
# Task -> its scores with the targets as predictions.
GOOD = {
    "f_plain": {"same": 1.0},
    "f_text": {"same": 1.0, "likelihood": -7 / 3},  # with EOS 2, 2 and 3 tokens
    "f_number": {"error": 0.0},
    "f_array": {"error": 0.0},
    "f_partial": {"scaled": 2.0},
}
# Task -> what is said of it, once it is prepared.
BAD = {
    "f_twice": "task 'f_twice': two metrics are called 'same'; also_same gives the second",
    "f_nan": "task 'f_nan': metric of_nothing: 'x' must be a finite number, is nan",
    "f_words": "task 'f_words': metric of_text: 'x' must be a number, is 'good'",
    "f_none": "task 'f_none': metric of_none must return {name: number}, returned None",
    "f_raises": "task 'f_raises': metric raises fails: PLACE: KeyError: 'gone'",
    "s_raises": "task 's_raises': metric inner fails: PLACE: KeyError: 'gone'",
}
BAD_LATER = {  # only as predictions
    "f_nan_prediction": "task 'f_nan_prediction': postprocess_fn nan returned nan: nan is no"
    " finite number",
}
# Task -> what `prepare` says of it.
UNPREPARED = {
    "f_breaks": "task 'f_breaks': postprocess_fn breaks fails: PLACE: LookupError: no such label",
    "f_a_set": "task 'f_a_set': postprocess_fn a_set returned {'4'}: a set is no value of JSON",
    "f_endless": "task 'f_endless', split 'train': the source never ends",
}
# Checks tasks, then prepares those that cannot be; in one process, as importing SeqIO takes long.
CHECK = """
import contextlib, io, json, sys
from moe_jax import tasks
from moe_jax.core.errors import UserError
from moe_jax.data.vocabulary import VocabularyConfig
from toy import prepare
module, names, unprepared = json.loads(sys.argv[1])
found = {}
for name in names:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tasks.main(["check", name, "--task_modules", module])
        found[name] = None
    except UserError as e:
        found[name] = f"error: {e}"
said = {}
for name in unprepared:
    try:
        prepare(module + ".cache", name, module, VocabularyConfig(kind="bytes"))
    except UserError as e:
        said[name] = str(e)
print(json.dumps([found, said]))
"""


def without_place(text):
    """The text with PLACE for what tells where in the tasks' files an error was raised."""
    return re.sub(r"/[^ ]+/(functions_of_)?forms\.py:\d+(?=: )", "PLACE", text)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The tasks' file; processes find the functions' beside it."""
    path = tmp_path_factory.mktemp("forms") / "forms.py"
    path.write_text(MODULE)
    path.with_name("functions_of_forms.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        yield path


@pytest.fixture(scope="module")
def prepared(module):
    names = [*GOOD, *BAD, *BAD_LATER, "s_good"]
    request = Request.make(names, str(module), VocabularyConfig(kind="bytes"))
    return ensure_prepared(module.parent / "cache", request)


@pytest.mark.parametrize("name", GOOD)
def test_good_functions_are_called_as_in_evaluation(name, prepared):
    mixture = prepared[name]
    try_functions(mixture, [name], "validation")
    # And with all examples, against numbers written by hand.
    task, records = mixture.task(name), mixture.task(name).records("validation")
    examples = [records[i] for i in range(12)]
    references = [example.references for example in examples]
    found = {}
    for function in task.metric_fns():
        add_metric(found, name, function, partial(function, references, references))
    for function in task.score_metric_fns():
        scores = [-float(len(example.targets)) for example in examples]
        add_metric(found, name, function, partial(function, references, scores))
    assert found == pytest.approx(GOOD[name]) and all(type(v) is float for v in found.values())


def test_functions_that_seqio_runs_are_tried_as_well(prepared):
    try_functions(prepared["s_good"], ["s_good"], "validation")


@pytest.mark.parametrize("name", [*BAD, *BAD_LATER])
def test_bad_functions_are_named_before_anything_runs(name, prepared):
    with pytest.raises(UserError) as error:
        try_functions(prepared[name], [name], "validation")
    assert without_place(str(error.value)) == (BAD | BAD_LATER)[name]


def test_check_and_prepare_say_the_same(module):
    good = [*GOOD, "s_good"]
    names = [*good, *(BAD | BAD_LATER), "f_endless", "f_breaks"]
    arguments = json.dumps([str(module), names, list(UNPREPARED)])
    done = subprocess.run(
        [sys.executable, "-c", CHECK, arguments], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": f"{module.parent}:{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    found, said = json.loads(without_place(done.stdout.splitlines()[-1]))
    assert said == UNPREPARED
    for name in names:
        problem = (BAD | BAD_LATER | UNPREPARED).get(name)
        expected = None if name in good else f"error: not usable: {name}: {problem}"
        assert found[name] == expected


@pytest.mark.parametrize("program", ["train", pytest.param("eval", marks=pytest.mark.slow)])
def test_a_run_does_not_begin_with_a_bad_function(program, prepared, module, tmp_path):
    """`eval` of a run that never evaluated while it trained."""
    settings = SETTINGS | {
        "MODEL_DIR": str(tmp_path / "run"), "CACHE_DIR": str(module.parent / "cache"),
        "MIXTURE_OR_TASK_NAME": "f_raises", "TASK_MODULES": str(module),
        "VocabularyConfig.kind": "bytes", "TRAIN_STEPS": 2, "EVAL_PERIOD": int(program == "train"),
    }  # fmt: skip
    del settings["VocabularyConfig.size"]  # so that the cache is that of `prepared`
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    process = start("train", flags_of(lines), path=module.parent)
    if program == "eval":
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        given = [f"MODEL_DIR = '{tmp_path}/run'", f"TASK_MODULES = '{module}'"]
        process = start("eval", flags_of(given), path=module.parent)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert without_place(err).endswith(f"error: {BAD['f_raises']}\n"), err
    assert program == "eval" or not (tmp_path / "run" / "metrics.jsonl").exists()


def test_values_for_json():
    assert to_json({1: (np.float32(0.5), b"\xc3\xa9", None, True), "a": np.arange(2)}) == {
        "1": [0.5, "é", None, True], "a": [0, 1],
    }  # fmt: skip
    for bad, error in ((float("inf"), ValueError), (np.array([np.nan]), ValueError),
                       ({1}, TypeError), (object(), TypeError), (1j, TypeError)):  # fmt: skip
        with pytest.raises(error):
            to_json(bad)


def test_a_number_that_no_float_holds_is_named():
    def huge():
        return {"x": 10**400}

    with pytest.raises(UserError, match="task 't': metric huge: 'x' must be a number, is 1000"):
        add_metric({}, "t", huge, huge)
