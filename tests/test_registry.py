"""Reading SeqIO tasks: equal to SeqIO's own reading, and every mistake gives a one-line error."""

import functools
import os
from types import ModuleType

import numpy as np
import pytest
import seqio
import tensorflow as tf

from moe_jax.core.errors import UserError
from moe_jax.data import declared, registry, task_functions
from moe_jax.data.modules import resolve
from moe_jax.metrics import exact_match

SIZES = {"train": 300, "test": 7}


def _source(split, shuffle_files=False, seed=None, *, size=None):
    n = SIZES[split] if size is None else size
    texts = [f"{split} {'word ' * (i % 5)}{i}" for i in range(n)]
    answers = tf.ragged.constant([["x"] * (i % 3) for i in range(n)], dtype=tf.string)
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": texts, "targets": [t[::-1] for t in texts], "answers": answers}
    )


@seqio.map_over_dataset
def _branching(ex):
    # A Python `if` on a tensor works only where autograph converts this function.
    if tf.strings.length(ex["inputs"]) > 12:
        ex["inputs"] = tf.strings.join(["long: ", ex["inputs"]])
    return ex


@seqio.map_over_dataset(num_seeds=1)
def _random(ex, seed):
    number = tf.random.stateless_uniform([], seed, 0, 1000, tf.int32)
    return {**ex, "inputs": tf.strings.join([ex["inputs"], tf.strings.as_string(number)])}


def _eager(dataset):
    return tf.data.Dataset.from_tensor_slices(
        {k: [row[k] for row in dataset.as_numpy_iterator()] for k in ("inputs", "targets")}
    )


def _long_only(dataset):
    return dataset.filter(lambda ex: tf.strings.length(ex["inputs"]) > 15)


FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
TAIL = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def _task(name="t", preprocessors=(), source=_source, **kwargs):
    settings = {
        "source": seqio.FunctionDataSource(source, splits=list(SIZES)),
        "preprocessors": [*preprocessors, *TAIL],
        "output_features": {"inputs": FEATURE, "targets": FEATURE},
        "metric_fns": [exact_match],
    }
    return seqio.Task(name, **(settings | kwargs))


def _read(task, splits):
    rows = {split: [] for split in splits}
    for split, part in registry.read(task, splits):
        rows[split] += part
    return rows


@pytest.mark.parametrize(
    "preprocessors", [[], [_branching], [_random], [_eager], [_long_only], [_random, _branching]]
)
def test_reading_equals_seqio(preprocessors):
    task = _task(preprocessors=preprocessors)
    got = _read(task, list(SIZES))
    for split in SIZES:
        dataset = task.get_dataset(split=split, sequence_length=None, shuffle=False, seed=0)
        want = list(dataset.as_numpy_iterator())
        assert len(got[split]) == len(want) > 0
        for mine, theirs in zip(got[split], want, strict=True):
            assert mine.keys() == theirs.keys()
            for key in theirs:
                np.testing.assert_array_equal(mine[key], theirs[key])


@pytest.mark.parametrize(
    "preprocessors, eager", [([_random, _long_only], 0), ([_eager], 2), ([_branching], 2)]
)
def test_only_what_must_runs_eagerly(preprocessors, eager, monkeypatch):
    contexts = []
    preprocess = registry._preprocess

    def recorded(*args):
        contexts.append(tf.executing_eagerly())
        return preprocess(*args)

    monkeypatch.setattr(registry, "_preprocess", recorded)
    _read(_task(preprocessors=preprocessors), list(SIZES))
    assert sum(contexts) == eager


def test_tasks_with_the_same_preprocessing_are_traced_once():
    before = len(registry._traces)
    for name in ("a", "b", "c"):
        _read(_task(name), ["test"])
    assert len(registry._traces) <= before + 1


def test_text_and_vocabulary():
    task = registry.with_vocabulary(_task(), seqio.ByteVocabulary(extra_ids=5))
    assert [v.vocab_size for v in registry.own_vocabularies(task)] == [264, 264]
    row = _read(task, ["test"])["test"][3]
    assert registry.text(row, "inputs", FEATURE.vocabulary) == "test word word word 3"
    del row["targets_pretokenized"]
    assert registry.text(row, "targets", FEATURE.vocabulary) == "3 drow drow drow tset"
    other = seqio.Feature(seqio.ByteVocabulary(extra_ids=1), add_eos=True)
    mixed = _task(output_features={"inputs": FEATURE, "targets": other})
    assert [v.vocab_size for v in registry.own_vocabularies(mixed)] == [259, 260]
    with pytest.raises(UserError, match="'t' has no output feature targets"):
        registry.with_vocabulary(_task(output_features={"inputs": FEATURE}), FEATURE.vocabulary)


def test_errors_of_a_source_are_one_line():
    def raises(split, shuffle_files):
        raise UserError("data.tsv:7: no tab")

    def generates(split, shuffle_files):
        def rows():
            yield {"inputs": "a", "targets": "b"}
            raise UserError("data.tsv:8: no tab")

        spec = tf.TensorSpec([], tf.string)
        return tf.data.Dataset.from_generator(
            rows, output_signature={"inputs": spec, "targets": spec}
        )

    def missing(split, shuffle_files):
        return tf.data.TextLineDataset("/no/such/file.txt").map(
            lambda line: {"inputs": line, "targets": line}
        )

    for source, message in (
        (raises, r"^data\.tsv:7: no tab$"),
        (generates, r"^data\.tsv:8: no tab$"),
        (missing, r"task 't'.*/no/such/file\.txt"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            _read(_task(source=source), ["train"])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'t' has no split 'dev'; it has train, test"):
        _read(_task(), ["dev"])


def test_rates_flatten_mixtures_and_see_the_counts():
    for name in ("reg_a", "reg_b", "reg_c"):
        task = _task(name)
        seqio.TaskRegistry.add_provider(name, task)
    seqio.MixtureRegistry.add(
        "reg_inner", ["reg_a", "reg_b"], default_rate=seqio.mixing_rate_num_examples
    )
    seqio.MixtureRegistry.add("reg_outer", [("reg_inner", 6), ("reg_c", 4), ("reg_a", 1)])
    counts = {"reg_a": {"train": 200}, "reg_b": {"train": 100}, "reg_c": {}}
    assert registry.rates("reg_inner", counts) == {"reg_a": 200, "reg_b": 100}
    assert registry.rates("reg_outer", counts) == {"reg_a": 5, "reg_b": 2, "reg_c": 4}
    assert registry.rates("reg_c", counts) == {"reg_c": 1}
    # A task without training examples is not drawn.
    without = {**counts, "reg_b": {"test": 3}}
    assert registry.rates("reg_inner", without) == {"reg_a": 200, "reg_b": 0}
    seqio.MixtureRegistry.add("reg_worse", ["reg_a"], default_rate=lambda task: None)
    with pytest.raises(UserError, match="'reg_worse': a rate cannot be computed"):
        registry.rates("reg_worse", counts)
    for number, rate in enumerate((float("nan"), float("inf"), -1)):
        seqio.MixtureRegistry.add(f"reg_wrong_{number}", ["reg_a"], default_rate=rate)
        with pytest.raises(UserError, match=f"'reg_wrong_{number}': the rate of 'reg_a' is "):
            registry.rates(f"reg_wrong_{number}", counts)
    assert [t.name for t in registry.find_tasks("reg_outer", [])] == ["reg_a", "reg_b", "reg_c"]
    with pytest.raises(UserError, match=r"no task or mixture 'reg_oter'.*did you mean 'reg_outer'"):
        registry.find_tasks("reg_oter", [])
    # The method that was shadowed while rates were computed is restored.
    assert seqio.TaskRegistry.get("reg_a").num_input_examples("train") is None


def test_functions_must_be_found_by_name(tmp_path):
    task = _task()
    assert task_functions.reference(exact_match, task, "metric") == "moe_jax.metrics:exact_match"
    for bad in (lambda targets, predictions: {}, functools.partial(exact_match, lambda: 1)):
        with pytest.raises(UserError, match=r"task .t.: the metric .* cannot be found by name"):
            task_functions.reference(bad, task, "the metric")

    def closure(targets, predictions):
        return {}

    with pytest.raises(UserError, match="closure"):
        task_functions.metric_references(_task(metric_fns=[closure]))

    def aux(targets, predictions, aux_values):
        return {}

    with pytest.raises(UserError, match=r"metrics of aux_values have no name"):
        task_functions.metric_references(_task(metric_fns=[aux]))


def best_share(targets, scores, at_least=0.0, names=()):
    """A metric of scores."""
    return {"share": float(np.mean(np.asarray(scores) >= at_least))}


def test_metrics_of_scores_and_with_arguments():
    bound = functools.partial(best_share, at_least=-1.5, names=["a:(b", "c)"])
    predictions, scores = task_functions.metric_references(
        _task(metric_fns=[bound, exact_match, best_share])
    )
    assert predictions == ["moe_jax.metrics:exact_match"]
    name = f"{__name__}:best_share"
    assert scores == [f"{name}(at_least=-1.5, names=['a:(b', 'c)'])", name]
    found = resolve(scores[0])
    assert (found.func, found.keywords) == (best_share, bound.keywords)
    assert found([0, 0], [-1.0, -2.0]) == {"share": 0.5}
    with pytest.raises(UserError, match="cannot be found by name"):
        bad = functools.partial(best_share, at_least=object())
        task_functions.metric_references(_task(metric_fns=[bad]))


def test_choices_and_questions_of_a_row():
    row = {"answer_choices": np.array([b"ja", "né".encode()], object)}
    assert registry.choices(row) == ("ja", "né")
    assert registry.choices({}) == ()
    assert registry.question({"idx": np.array([7, 1], np.int32)}) == 7
    for other in ({}, {"idx": np.int32(7)}, {"idx": np.array([1.0, 2.0])}):
        assert registry.question(other) is None


def test_descriptions_are_sentences_by_name():
    module = ModuleType("mine")
    assert declared.descriptions([module, module]) == {}
    other = ModuleType("other")
    module.DESCRIPTIONS, other.DESCRIPTIONS = {"a": "Add.", "b": "Copy."}, {"b": "Reverse."}
    assert declared.descriptions([module, other]) == {"a": "Add.", "b": "Reverse."}
    for wrong, message in ((["a"], "must be {task name: sentence}"), ({"a": 1}, r"\['a'\] is 1")):
        other.DESCRIPTIONS = wrong
        with pytest.raises(UserError, match=f"other: DESCRIPTIONS ?{message}"):
            declared.descriptions([module, other])


def test_ontology_and_prompts_by_task():
    module, other = ModuleType("mine"), ModuleType("other")
    assert declared.ontology([module]) == declared.prompts([module]) == {}
    module.ONTOLOGY = {"qa": {"yes": ["a", "b"], "": ("c",)}, "none": {}}
    other.ONTOLOGY = {"other": {"x": ["b"]}}
    module.PROMPTS, other.PROMPTS = {"imdb": ["a", "b"]}, {"rte": ["c"]}
    modules = [module, other]
    of = declared.ontology(modules)
    assert of == {"a": ("qa", "yes"), "b": ("other", "x"), "c": ("qa", "")}
    assert declared.prompts(modules) == {"a": "imdb", "b": "imdb", "c": "rte"}


@pytest.mark.parametrize(("name", "wrong", "message"), [
    ("ONTOLOGY", ["a"], r"ONTOLOGY is \['a'\]; ONTOLOGY must be {category: {subcategory: "),
    ("ONTOLOGY", {"qa": ["a"]}, r"ONTOLOGY\['qa'\] is \['a'\]; ONTOLOGY must be {category: "),
    ("ONTOLOGY", {"qa": {"x": "a"}}, r"ONTOLOGY\['qa'\]\['x'\] is 'a'; ONTOLOGY must be "),
    ("ONTOLOGY", {"qa": {"x": [1]}}, r"ONTOLOGY\['qa'\]\['x'\] is \[1\]; ONTOLOGY must be "),
    ("ONTOLOGY", {1: {}}, r"ONTOLOGY is {1: {}}; ONTOLOGY must be "),
    ("PROMPTS", {"imdb": "a"}, r"PROMPTS\['imdb'\] is 'a'; PROMPTS must be {dataset: "),
    ("PROMPTS", None, r"PROMPTS is None; PROMPTS must be {dataset: "),
    ("ENVIRONMENT", "DIR", r"ENVIRONMENT is 'DIR'; it must be \(\"VARIABLE\", ...\)"),
    ("ENVIRONMENT", {"DIR": "a"}, r"ENVIRONMENT is {'DIR': 'a'}; it must be"),
    ("ENVIRONMENT", 3, "ENVIRONMENT is 3; it must be"),
])  # fmt: skip
def test_what_a_module_declares_is_checked(name, wrong, message):
    module = ModuleType("mine")
    setattr(module, name, wrong)
    read = {"ONTOLOGY": declared.ontology, "PROMPTS": declared.prompts,
            "ENVIRONMENT": lambda modules: registry.environment(["a"], modules)}  # fmt: skip
    with pytest.raises(UserError, match=f"^mine: {message}"):
        read[name]([module])


def test_modules_own_their_tasks_and_files(tmp_path):
    data = tmp_path / "data.tsv"
    data.write_text("a\tb\n")
    (tmp_path / "mine.py").write_text(f"""
import functools, seqio
def read(split, shuffle_files, path): raise NotImplementedError
def metric(targets, predictions): return {{}}
feature = seqio.Feature(seqio.ByteVocabulary())
features = {{"inputs": feature, "targets": feature}}
source = seqio.FunctionDataSource(functools.partial(read, path={str(data)!r}), ["train"])
seqio.TaskRegistry.add("owned_a", source=source, output_features=features, metric_fns=[metric])
source = seqio.TextLineDataSource({{"train": {str(tmp_path / "*.tsv")!r}}})
seqio.TaskRegistry.add("owned_b", source=source, output_features=features)
def missing_hint(name):
    return "because of the moon" if name == "owned_c" else None
""")
    path = str(tmp_path / "mine.py")
    modules = registry.load_task_modules([path, "moe_jax.metrics"])
    for name in ("owned_a", "owned_b"):
        task = seqio.TaskRegistry.get(name)
        assert registry.owners(name, modules) == modules[:1]
        pattern = [str(tmp_path / "*.tsv")] if name == "owned_b" else []  # which more files may fit
        assert registry.data_files(task, modules) == [*pattern, str(data)]
    reference = task_functions.metric_references(seqio.TaskRegistry.get("owned_a"))
    assert reference == ([f"{path}:metric"], [])
    with pytest.raises(UserError, match="because of the moon"):
        registry.find_tasks("owned_c", modules)
    os.link(path, tmp_path / "again.py")
    with pytest.raises(UserError, match=r"again\.py.*owned_a"):
        registry.load_task_modules([str(tmp_path / "again.py")])


def _gone(split, shuffle_files=False, seed=None):
    raise KeyError("no such column")


def _takes_a_missing_field(dataset):
    return dataset.map(lambda example: {**example, "inputs": example["text"]})


def _numbers(split, shuffle_files=False, seed=None):
    return tf.data.Dataset.from_tensor_slices({"inputs": ["a"], "targets": [3]})


def _other_fields(split, shuffle_files=False, seed=None):
    return tf.data.Dataset.from_tensor_slices({"question": ["a"], "answer": ["b"]})


@pytest.mark.parametrize(("task", "message"), [
    ({"source": _gone}, r"test_registry\.py:\d+: KeyError: 'no such column'"),
    ({"preprocessors": [_takes_a_missing_field]}, r"test_registry\.py:\d+: KeyError: 'text'"),
    ({"source": _numbers}, "TypeError: .*int32"),
    ({"source": _other_fields}, "ValueError: .*missing expected output feature.*: inputs"),
])  # fmt: skip
def test_a_mistake_in_the_users_code_is_one_line_with_its_place(task, message):
    with pytest.raises(UserError, match=f"^task 't', split 'train': .*{message}") as error:
        list(registry.read(_task(**task), ["train"]))
    assert "\n" not in str(error.value)


def test_to_json():
    value = {"a": (b"x", np.float32(0.5)), 3: np.array([[1, 2]]), "s": np.array([b"q"], object)}
    assert registry.to_json(value) == {"a": ["x", 0.5], "3": [[1, 2]], "s": ["q"]}
