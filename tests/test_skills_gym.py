"""The skills gym's tasks: what is planted, their splits, and how SeqIO reads them."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from skills_splits import WORLDS, every_task, every_world, of, split

from moe_jax.builtin_tasks import skills_base
from moe_jax.builtin_tasks.skills_table import (
    ONTOLOGY,
    PLANTED,
    SKILLS,
    SURFACES,
    TRAIN,
    UNSEEN,
    examples,
)
from moe_jax.builtin_tasks.skills_world import world
from moe_jax.runs import configurables, gin_files
from moe_jax.runs.config import DataConfig
from moe_jax.runs.mixtures import prepare_mixtures

SAMPLES = (13, 21, 42)


def test_there_are_enough_tasks_of_every_category():
    assert len(TRAIN) >= 48 and len(UNSEEN) >= 16
    assert not set(TRAIN) & set(UNSEEN)
    assert Counter(name for category in ONTOLOGY for name in of(category)) == Counter(list(SKILLS))
    for category in ("extractive", "classification", "world_knowledge", "generation"):
        assert len(set(of(category)) & set(TRAIN)) >= 10
        assert len(set(of(category)) & set(UNSEEN)) >= 3
        assert len(ONTOLOGY[category]) >= 4
    assert set(of("combination")) <= set(UNSEEN) and len(of("combination")) >= 5
    assert len({name for names in SURFACES.values() for name in names} & set(TRAIN)) >= 10
    assert all(re.fullmatch(r"[\w.:#]+", name) for name in SKILLS)


def test_training_tasks_teach_the_skills_of_every_unseen_task_at_least_twice():
    taught = Counter(skill for name in TRAIN for skill in PLANTED[name])
    for name, skills in PLANTED.items():
        assert len(skills) == (2 if name in of("combination") else 1)
        assert name in TRAIN or all(taught[skill] >= 2 for skill in skills), name
    for category in set(ONTOLOGY) - {"combination"}:
        for names in ONTOLOGY[category].values():
            assert len({PLANTED[name] for name in names}) == 1
    assert PLANTED["skills_capital_of_visited"] == (
        *PLANTED["skills_where"],
        *PLANTED["skills_capital_of"],
    )
    assert set().union(*PLANTED.values()) == set(range(len(taught)))


@every_world
@every_task
def test_splits_are_whole_and_share_no_input(seed, name):
    base = ("train", "validation", "test")
    assert SKILLS[name].sizes["train"] >= 2000
    for which, size in SKILLS[name].sizes.items():
        inputs = [row.inputs for row in split(seed, name, which)]
        assert len(set(inputs)) == len(inputs) == size
        assert all(re.fullmatch(r"[^\s\[]\S*( \S+)+", text) for text in inputs)
        assert all(len(text.split()) <= 32 for text in inputs)
        assert all(row.answers and all(row.answers) for row in split(seed, name, which))
    inputs = [row.inputs for which in base for row in split(seed, name, which)]
    assert len(set(inputs)) == len(inputs)


@every_world
@pytest.mark.parametrize("name", UNSEEN)
def test_few_shot_splits(seed, name):
    assert len(SKILLS[name].sizes) == 3 + 2 * len(SAMPLES)
    test = {row.inputs for row in split(seed, name, "test")}
    shots = {}
    for sample in SAMPLES:
        for part in ("train", "validation"):
            rows = split(seed, name, f"fewshot_{sample}_{part}")
            answers = Counter(row.answers[0] for row in rows)
            if SKILLS[name].labels:
                assert sorted(answers.values()) == [16] * len(SKILLS[name].labels)
            else:
                assert len(rows) == 16 and len(answers) > 1
            shots[sample, part] = {row.inputs for row in rows}
            assert not shots[sample, part] & test
        assert not shots[sample, "train"] & shots[sample, "validation"]
    assert shots[13, "train"] != shots[21, "train"] != shots[42, "train"]


@every_world
@pytest.mark.parametrize("name", [name for name in SKILLS if SKILLS[name].labels])
def test_labels_are_balanced(seed, name):
    words = {world(seed).labels[label] for label in SKILLS[name].labels}
    assert len(words) == len(SKILLS[name].labels)
    for which in ("train", "validation", "test"):
        counts = Counter(row.answers[0] for row in split(seed, name, which))
        assert set(counts) == words
        assert max(counts.values()) - min(counts.values()) <= 1


def test_draws_are_spread():
    """Answers of a task with many answers are not dominated by a few."""
    for seed, name in itertools.product(WORLDS, TRAIN):
        if not SKILLS[name].labels:
            counts = Counter(row.answers[0] for row in split(seed, name, "train"))
            assert counts.most_common(1)[0][1] <= 0.4 * counts.total(), name
            assert np.log2(len(counts)) >= 2, name


def test_errors_name_the_task_and_the_split():
    with pytest.raises(ValueError, match=r"skills_who has no split 'fewshot_13_train', only train"):
        examples(SKILLS["skills_who"], "fewshot_13_train")
    narrow = SKILLS["skills_who"]._replace(draw=lambda rng, _: (f"number {rng.randrange(9)}", "no"))
    with pytest.raises(ValueError, match="skills_who has fewer than 128 inputs for its split"):
        examples(narrow, "test")
    with pytest.raises(ValueError, match="two tasks are called skills_who"):
        skills_base.skill("extractive", "span")(SKILLS["skills_who"].draw)


# ---- other processes ----

DIGEST = """
import hashlib, json, sys
from moe_jax.builtin_tasks.skills_table import SKILLS, examples
rows = [(n, w, s, examples(t, s, w)) for n, t in SKILLS.items() for w in (0, 5)
        for s in t.sizes if s != "train"]
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

task = seqio.TaskRegistry.get("skills_colour_of_thing")
print(json.dumps({
    "colours": list(texts("skills_colour_of_thing", "test")),
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


def _python(code, **variables):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_same_examples_in_every_process_without_tensorflow():
    rows = [(n, w, s, split(w, n, s)) for n, task in SKILLS.items() for w in WORLDS
            for s in task.sizes if s != "train"]  # fmt: skip
    here = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert {here} == {_python(DIGEST, PYTHONHASHSEED=seed) for seed in ("1", "2")}


def test_seqio_registers_lazily_and_reads_the_same_examples():
    seed = 5
    read = json.loads(_python(SEQIO, SKILLS_GYM_SEED=str(seed), SKILLS_GYM_DESCRIPTIONS="1"))
    rows = split(seed, "skills_colour_of_thing", "test")
    assert any(len(row.answers) > 1 for row in rows)
    said = "Give the natural colour of the thing."
    described = [f"{said} {row.inputs}" for row in rows]
    assert read["colours"] == [
        [text, row.answers[0], [*row.answers]] for text, row in zip(described, rows, strict=True)
    ]
    rows = split(seed, "skills_opinion_of", "fewshot_13_train")
    said = "Find the person, and judge the sentiment."
    assert read["fewshot"] == [[f"{said} {r.inputs}", r.answers[0], []] for r in rows]
    assert read["mixtures"]["skills_gym_train"] == dict.fromkeys(TRAIN, 1.0)
    assert read["mixtures"]["skills_gym_unseen"] == dict.fromkeys(UNSEEN, 1.0)
    assert read["splits"] == {name: sorted(task.sizes) for name, task in SKILLS.items()}
    assert read["metrics"] == {name: [task.metric] for name, task in SKILLS.items()}
    assert read["postprocess"] == ["a", "b"]


@pytest.mark.slow
def test_worlds_lie_side_by_side_in_the_cache(tmp_path):
    for seed in (*WORLDS, *WORLDS):
        bindings = [
            "VocabularyConfig.kind = 'bytes'",
            f"CACHE_DIR = '{tmp_path}'",
            "MIXTURE_OR_TASK_NAME = 'skills_who'",
            f"skills_gym.seed = {seed}",
        ]
        gin_files.parse(["runs/skills_gym_dense.gin"], bindings, [str(gin_files.GIN_CONFIGS)])
        (mixture,) = prepare_mixtures(configurables.build(DataConfig)).values()
        read = mixture.task("skills_who").records("test")
        rows = split(seed, "skills_who", "test")
        assert [e.inputs_text for e in read] == [row.inputs for row in rows]
    assert len(list(tmp_path.glob("tasks/skills_who/*"))) == 2
