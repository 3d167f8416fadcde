"""The skills gym: planted skills exist, tasks can be solved, and trivial answers score badly."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from moe_jax import metrics
from moe_jax.builtin_tasks import skills_base
from moe_jax.builtin_tasks.skills_table import ONTOLOGY, SKILLS, TRAIN, UNSEEN, examples

SEEDS = (13, 21, 42)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]

every_task = pytest.mark.parametrize("name", SKILLS)


@cache
def split(name, which):
    return examples(SKILLS[name], which)


def texts(name, which):
    """Inputs without their prefix."""
    return [row.inputs.removeprefix(f"[{name}] ") for row in split(name, which)]


def score(name, predictions):
    metric = getattr(metrics, SKILLS[name].metric)
    (value,) = metric([row.answers for row in split(name, "test")], predictions).values()
    return value


def of(category):
    return [name for names in ONTOLOGY[category].values() for name in names]


def test_there_are_enough_tasks_of_every_category():
    assert len(TRAIN) >= 28 and len(UNSEEN) >= 10
    assert not set(TRAIN) & set(UNSEEN)
    assert Counter(name for category in ONTOLOGY for name in of(category)) == Counter(list(SKILLS))
    for category in ("extractive", "classification", "world_knowledge", "generation"):
        assert len(set(of(category)) & set(TRAIN)) >= 7
        assert len(set(of(category)) & set(UNSEEN)) >= 2
        assert len(ONTOLOGY[category]) >= 2
    assert set(of("combination")) <= set(UNSEEN) and len(of("combination")) >= 2
    assert all(re.fullmatch(r"[\w.:#]+", name) for name in SKILLS)


@every_task
def test_splits_are_whole_and_share_no_input(name):
    base = ("train", "validation", "test")
    for which, size in SKILLS[name].sizes.items():
        inputs = [row.inputs for row in split(name, which)]
        assert len(set(inputs)) == len(inputs) == size
        assert all(re.fullmatch(rf"\[{name}\] \S+( \S+)+", text) for text in inputs)
        assert all(len(text.split()) <= 32 for text in inputs)
        assert all(row.answers and all(row.answers) for row in split(name, which))
    inputs = [row.inputs for which in base for row in split(name, which)]
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("name", UNSEEN)
def test_few_shot_splits(name):
    assert len(SKILLS[name].sizes) == 3 + 2 * len(SEEDS)
    test = {row.inputs for row in split(name, "test")}
    shots = {}
    for seed in SEEDS:
        for part in ("train", "validation"):
            rows = split(name, f"fewshot_{seed}_{part}")
            labels = Counter(row.answers[0] for row in rows)
            if SKILLS[name].labels:
                assert labels == dict.fromkeys(SKILLS[name].labels, 16)
            else:
                assert len(rows) == 16 and len(labels) > 1
            shots[seed, part] = {row.inputs for row in rows}
            assert not shots[seed, part] & test
        assert not shots[seed, "train"] & shots[seed, "validation"]
    assert shots[13, "train"] != shots[21, "train"] != shots[42, "train"]


@pytest.mark.parametrize("name", [name for name in SKILLS if SKILLS[name].labels])
def test_labels_are_balanced(name):
    for which in ("train", "validation", "test"):
        counts = Counter(row.answers[0] for row in split(name, which))
        assert set(counts) == set(SKILLS[name].labels)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert min(counts.values()) >= 0.2 * counts.total()


@every_task
def test_no_answer_for_nothing(name):
    """Neither the best constant answer nor a copy of the input scores well."""
    rows = split(name, "test")
    constants = {row.answers[0] for row in split(name, "train")}
    if SKILLS[name].metric == "rouge_l":  # slow, and all answers are different
        constants = sorted(constants)[:20]
    assert max(score(name, [constant] * len(rows)) for constant in constants) < 0.6
    assert score(name, texts(name, "test")) < 0.6


@pytest.mark.parametrize("name", of("extractive"))
def test_extractive_answers_are_spans(name):
    for text, row in zip(texts(name, "test"), split(name, "test"), strict=True):
        assert re.search(rf"\b{row.answers[0]}\b", text)


@pytest.mark.parametrize(
    "name", [*of("world_knowledge"), "skills_capital_of_visited", "skills_class_of_seen"]
)
def test_knowledge_is_not_in_the_input_but_in_the_training_split(name):
    known = {row.answers for row in split(name, "train")}
    for which in ("train", "validation", "test"):
        for text, row in zip(texts(name, which), split(name, which), strict=True):
            # Nor as the beginning of a word: `drummer` would give away `drum`.
            assert not any(re.search(rf"(?i)\b{a}", text) for a in row.answers)
            assert row.answers in known


@pytest.mark.parametrize(
    ("unseen", "trained", "turned"),
    [
        ("skills_country_of_capital", "skills_capital_of", True),
        ("skills_job_of_tool", "skills_tool_of_job", True),
        ("skills_capital_of_visited", "skills_capital_of", False),
    ],
)
def test_unseen_tasks_ask_for_trained_facts(unseen, trained, turned):
    trained_rows = split(trained, "train")
    for row in split(unseen, "test"):
        answer, text = row.answers[0], row.inputs
        if turned:
            assert any(answer in t.inputs and t.answers[0] in text for t in trained_rows)
        else:
            assert any(
                t.answers[0] == answer
                and set(text.split()) & set(re.findall("[A-Z]\\w+", t.inputs))
                for t in trained_rows
            )


def _items(text):
    return re.search(r": (.*?)\.", text)[1].split(", ")


def _told(text):
    """The sentence that the closing question is about: it names the same person or things."""
    *sentences, question = re.split(r"(?<=\.) ", text)
    thing = question.rstrip("?").split()[-1]
    asked = re.search(r"did (\w+)", question)
    return next(s for s in sentences if re.search(rf"\b{asked[1] if asked else thing}\b", s))


def _one_of(words):
    return lambda text: next(w for w in re.findall(r"\w+", _told(text)) if w in words)


ORACLES = {
    "skills_who": lambda text: re.search(r"(?:^|, )(?!In )([A-Z]\w+) ", _told(text))[1],
    "skills_where": lambda text: re.search(r"\b[Ii]n (\w+)", _told(text))[1],
    "skills_when": _one_of(DAYS),
    "skills_how_many": _one_of(NUMBERS),
    "skills_what_colour": lambda text: re.search(
        rf"(\w+) {re.search(r'is the (.*)[?]', text)[1]}\b", text
    )[1],
    "skills_quoted": lambda text: re.search(r'wrote "(.*?)"', text)[1],
    "skills_first_item": lambda text: _items(text)[0],
    "skills_second_item": lambda text: _items(text)[1],
    "skills_last_item": lambda text: _items(text)[-1],
    "skills_reverse_words": lambda text: " ".join(text.split(": ")[1].split()[::-1]),
    "skills_sort_words": lambda text: " ".join(sorted(text.split(": ")[1].split())),
    "skills_remove_word": lambda text: re.sub(r"Leave out (\w+): (.*)\1 (.*)", r"\2\3", text),
    "skills_join_people": lambda text: re.sub(
        r"(\w+) (\w+) (.*) (\w+) \2 \3", lambda m: f"{m[1]} and {m[4]} {_base(m[2])} {m[3]}", text
    ),
    "skills_entailment": lambda text: _entails(*re.split(" ?(?:Premise|Hypothesis): ", text)[1:]),
    "skills_opinion_of": lambda text: _verdict(text),
}


def _base(verb):
    return re.sub(r"(?<=ash)es$|s$", "", verb.replace("carries", "carry"))


def _entails(premise, hypothesis):
    """Whether the premise states the claim, contradicts it, or says nothing about it."""
    kinds = {
        r"^\w+ was in (\w+)": r"\b[Ii]n (\w+)",
        r"^It was on (\w+)": r"\b[Oo]n (\w+)",
        r"^There were (\w+)": rf"\b({'|'.join(NUMBERS)})\b",
        r"^The \w+ were (\w+)": r"\b(red|blue|green|white|black|brown|yellow|pink)\b",
    }
    for claim, fact in kinds.items():
        if claimed := re.search(claim, hypothesis):
            said = re.search(fact, premise)
            same = said and said[1] == claimed[1]
            return "neutral" if not said else "entailment" if same else "contradiction"
    return "neutral"


def _verdict(text):
    asked = re.search(r"did (\w+) think", text)[1]
    word = re.search(rf"{asked} found the \w+ (\w+)", text)[1]
    good = ["good", "great", "lovely", "wonderful", "excellent", "pleasant", "superb", "charming"]
    return "positive" if word in good else "negative"


@pytest.mark.parametrize("name", ORACLES)
def test_a_simple_rule_recovers_the_answers(name):
    rows = split(name, "test")
    assert [ORACLES[name](text) for text in texts(name, "test")] == [r.answers[0] for r in rows]


def _bag_of_words(name):
    """Test score of logistic regression on word counts."""
    words = CountVectorizer(token_pattern=r"\w+")
    x = words.fit_transform(texts(name, "train"))
    model = LogisticRegression(max_iter=1000).fit(x, [r.answers[0] for r in split(name, "train")])
    return score(name, model.predict(words.transform(texts(name, "test"))).tolist())


@pytest.mark.parametrize("name", ["feedback", "topic", "mentions_animal", "mentions_food"])
def test_words_tell_the_label(name):
    assert _bag_of_words(f"skills_{name}") > 0.7


@pytest.mark.parametrize("name", ["same_opinion", "word_order", "opinion_of", "same_continent"])
def test_words_alone_do_not_tell_the_label(name):
    assert _bag_of_words(f"skills_{name}") < 0.75


def test_errors_name_the_task_and_the_split():
    with pytest.raises(ValueError, match=r"skills_who has no split 'fewshot_13_train', only train"):
        examples(SKILLS["skills_who"], "fewshot_13_train")
    narrow = SKILLS["skills_who"]._replace(draw=lambda rng: (f"number {rng.integers(9)}", "no"))
    with pytest.raises(ValueError, match="skills_who has fewer than 64 inputs for its split"):
        examples(narrow, "test")
    with pytest.raises(ValueError, match="two tasks are called skills_who"):
        skills_base.skill("extractive", "span")(SKILLS["skills_who"].draw)


DIGEST = """
import hashlib, json, sys
from moe_jax.builtin_tasks.skills_table import SKILLS, examples
rows = [(n, s, examples(t, s)) for n, t in SKILLS.items() for s in t.sizes]
assert not {"tensorflow", "seqio"} & set(sys.modules), "the table imports TensorFlow"
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""

SEQIO = """
import json
from moe_jax.builtin_tasks import skills_table
draw = skills_table.examples
def refuse(*_): raise AssertionError("importing the module drew examples")
skills_table.examples = refuse
import seqio
from moe_jax.builtin_tasks import skills_gym
skills_gym.examples = draw

def texts(name, split):
    task = seqio.get_mixture_or_task(name)
    for example in task.get_dataset(None, split, shuffle=False).as_numpy_iterator():
        inputs, targets = (example[k].tolist() for k in ("inputs", "targets"))
        assert inputs[-1] == targets[-1] == 1, "no EOS"
        decode = task.output_features["inputs"].vocabulary.decode
        answers = [a.decode() for a in example.get("answers", [])]
        yield decode(inputs[:-1]), decode(targets[:-1]), answers

task = seqio.TaskRegistry.get("skills_opposite")
print(json.dumps({
    "opposite": list(texts("skills_opposite", "test")),
    "fewshot": list(texts("skills_opinion_of", "fewshot_13_train")),
    "mixtures": {
        m: {t.name: seqio.MixtureRegistry.get(m).get_rate(t)
            for t in seqio.MixtureRegistry.get(m).tasks}
        for m in ("skills_gym_train", "skills_gym_unseen")
    },
    "splits": {t: sorted(seqio.TaskRegistry.get(t).splits) for t in skills_table.SKILLS},
    "postprocess": task.postprocess_fn("short", example={"answers": ["a", "b"]}, is_target=True),
    "metrics": {t: [f.__name__ for f in seqio.TaskRegistry.get(t).metric_fns]
                for t in skills_table.SKILLS},
}))
"""


def _python(code, hash_seed="0"):
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_same_examples_in_every_process_without_tensorflow():
    rows = [(n, s, split(n, s)) for n, task in SKILLS.items() for s in task.sizes]
    here = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert {here} == {_python(DIGEST, hash_seed) for hash_seed in ("1", "2")}


def test_seqio_registers_lazily_and_reads_the_same_examples():
    read = json.loads(_python(SEQIO))
    rows = split("skills_opposite", "test")
    assert any(len(row.answers) > 1 for row in rows)
    assert read["opposite"] == [[r.inputs, r.answers[0], list(r.answers)] for r in rows]
    rows = split("skills_opinion_of", "fewshot_13_train")
    assert read["fewshot"] == [[r.inputs, r.answers[0], []] for r in rows]
    assert read["mixtures"]["skills_gym_train"] == dict.fromkeys(TRAIN, 1.0)
    assert read["mixtures"]["skills_gym_unseen"] == dict.fromkeys(UNSEEN, 1.0)
    assert read["splits"] == {name: sorted(task.sizes) for name, task in SKILLS.items()}
    assert read["metrics"] == {name: [task.metric] for name, task in SKILLS.items()}
    assert read["postprocess"] == ["a", "b"]


def test_draws_are_spread():
    """Answers of a task with many answers are not dominated by a few."""
    for name in TRAIN:
        if not SKILLS[name].labels:
            counts = Counter(row.answers[0] for row in split(name, "train"))
            assert counts.most_common(1)[0][1] <= 0.4 * counts.total(), name
            assert np.log2(len(counts)) >= 2, name
