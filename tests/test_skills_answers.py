"""The skills gym's answers: they can be found by those who know how, and not without."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from skills_splits import every_task, every_world, of, split, texts
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from moe_jax import metrics
from moe_jax.builtin_tasks.skills_table import SKILLS, SURFACES
from moe_jax.builtin_tasks.skills_world import world


def score(seed, name, predictions):
    metric = getattr(metrics, SKILLS[name].metric)
    (value,) = metric([row.answers for row in split(seed, name, "test")], predictions).values()
    return value


@every_world
@every_task
def test_no_answer_for_nothing(seed, name):
    """Neither the best constant answer nor a copy of the input scores well."""
    rows = split(seed, name, "test")
    common = Counter(row.answers[0] for row in split(seed, name, "train")).most_common(8)
    assert max(score(seed, name, [constant] * len(rows)) for constant, _ in common) < 0.6
    assert score(seed, name, texts(seed, name, "test")) < 0.6


@every_world
@pytest.mark.parametrize("surface", SURFACES)
def test_tasks_of_one_surface_share_inputs_and_differ_in_answers(seed, surface):
    answers = {
        name: dict(zip(texts(seed, name, "train"), split(seed, name, "train"), strict=True))
        for name in SURFACES[surface]
    }
    assert len(answers) >= 2
    for one, other in itertools.combinations(answers, 2):
        shared = answers[one].keys() & answers[other].keys()
        if "skills_review_person" in (one, other):  # draws one random number more
            assert len(shared) > 100
        else:
            assert len(shared) == 2000
        differ = [answers[one][x].answers != answers[other][x].answers for x in shared]
        assert np.mean(differ) > 0.75, (one, other)


@every_world
@pytest.mark.parametrize("name", of("extractive"))
def test_extractive_answers_are_spans(seed, name):
    for text, row in zip(texts(seed, name, "test"), split(seed, name, "test"), strict=True):
        assert re.search(rf"\b{row.answers[0]}\b", text)


KNOWLEDGE = [
    *of("world_knowledge"),
    "skills_capital_of_visited",
    "skills_class_of_seen",
    "skills_opposite_of_last",
]


@every_world
@pytest.mark.parametrize("name", KNOWLEDGE)
def test_knowledge_is_not_in_the_input_but_in_the_training_split(seed, name):
    known = {row.answers for row in split(seed, name, "train")}
    for which in ("train", "validation", "test"):
        rows = split(seed, name, which)[:300]
        for text, row in zip(texts(seed, name, which), rows, strict=False):
            # Nor as the beginning of a word: `drummer` would give away `drum`.
            assert not any(re.search(rf"(?i)\b{a}", text) for a in row.answers), text
            assert row.answers in known


@every_world
@pytest.mark.parametrize(
    ("unseen", "trained"),
    [
        ("skills_country_of_capital", "skills_trip_capital"),
        ("skills_job_of_tool", "skills_lost_at_work"),
        ("skills_parent_of_baby", "skills_baby_animal"),
    ],
)
def test_unseen_tasks_turn_trained_facts_around(seed, unseen, trained):
    told = [(row.answers[0], set(re.findall(r"\w+", row.inputs)))
            for row in split(seed, trained, "train")]  # fmt: skip
    for row in split(seed, unseen, "test"):
        asked = set(re.findall(r"\w+", row.inputs))
        assert any(row.answers[0] in words and fact in asked for fact, words in told)


# Rules that answer, given the text and the world.


def _items(text):
    return re.search(r": (.*?)\.", text)[1].split(", ")


def _queue(text):
    return re.search(r"There came (.*?)\.", text)[1].split(", then ")


def _told(text):
    """The sentence that the closing question is about: it names the same person or things."""
    *sentences, question = re.split(r"(?<=\.) ", text)
    thing = question.rstrip("?").split()[-1]
    asked = re.search(r"did (\w+)", question)
    return next(s for s in sentences if re.search(rf"\b{asked[1] if asked else thing}\b", s))


def _first_of(words, text):
    return next(word for word in re.findall(r"\w+", text) if word in words)


def _described(text):
    asked = re.search(r"is the (\w+)", text)[1]
    return re.search(rf"(\w+) {asked}\b", text)[1]


def _join(text, here):
    first, second = re.split(r"(?<=\.) ", text)
    subject, present, *things = first.split()
    (base,) = (verb.base for verb in here.actions if verb.present == present)
    return f"{subject} and {second.split()[0]} {base} {' '.join(things)}"


def _entailment(text, here):
    """Whether the premise states the claim, contradicts it, or says nothing about it."""
    premise, hypothesis = re.split(" ?(?:Premise|Hypothesis): ", text)[1:]
    for claim, words in {
        r"^\w+ was in (\w+)": here.places,
        r"^It was on (\w+)": here.days,
        r"^There were (\w+)": here.numbers,
        r"^The \w+ were (\w+)": here.colours,
    }.items():
        if claimed := re.search(claim, hypothesis):
            said = [word for word in re.findall(r"\w+", premise) if word in words]
            kind = "neutral" if not said else "entailment"
            return here.labels[kind if not said or claimed[1] in said else "contradiction"]
    return here.labels["neutral"]


def _opinion(text, here):
    asked = re.search(r"did (\w+) think", text)[1]
    word = re.search(rf"{asked} found the \w+ (\w+)", text)[1]
    return here.labels["positive" if word in here.positive else "negative"]


def _verdict(text, here):
    """The last opinion that is not denied, else the contrary of the one that is."""
    words = re.findall(r"\w+", text)
    opinions = [(w in here.positive, words[i - 1] == "not")
                for i, w in enumerate(words) if w in (*here.positive, *here.negative)]  # fmt: skip
    positive, denied = opinions[-1]
    return positive != denied


RULES = {
    "who": lambda t, w: _first_of(w.people, _told(t)),
    "where": lambda t, w: _first_of(w.places, _told(t)),
    "when": lambda t, w: _first_of(w.days, _told(t)),
    "how_many": lambda t, w: _first_of(w.numbers, _told(t)),
    "story_person": lambda t, w: _first_of(w.people, t),
    "story_place": lambda t, w: _first_of(w.places, t),
    "story_day": lambda t, w: _first_of(w.days, t),
    "story_number": lambda t, w: _first_of(w.numbers, t),
    "story_things": lambda t, w: _first_of(w.plurals.values(), t),
    "review_person": lambda t, w: _first_of(w.people, t),
    "feedback_person": lambda t, w: _first_of(w.people, t),
    "packed": lambda t, w: re.search(r"packed (\w+)", t)[1],
    "what_colour": lambda t, w: _described(t),
    "what_like": lambda t, w: _described(t),
    "quoted": lambda t, w: re.search(r'wrote "(.*?)"', t)[1],
    "titled": lambda t, w: re.search(r'(?:called|the \w+) "(.*?)"', t)[1],
    "first_item": lambda t, w: _items(t)[0],
    "second_item": lambda t, w: _items(t)[1],
    "last_item": lambda t, w: _items(t)[-1],
    "list_first": lambda t, w: _items(t)[0],
    "list_second": lambda t, w: _items(t)[1],
    "list_last": lambda t, w: _items(t)[-1],
    "queue_first": lambda t, w: _queue(t)[0],
    "queue_last": lambda t, w: _queue(t)[-1],
    "reverse_words": lambda t, w: " ".join(t.split(": ")[1].split()[::-1]),
    "sort_words": lambda t, w: " ".join(sorted(t.split(": ")[1].split())),
    "words_reversed": lambda t, w: " ".join(t.split()[::-1]),
    "words_sorted": lambda t, w: " ".join(sorted(t.split())),
    "remove_word": lambda t, w: re.sub(r"Leave out (\w+): (.*)\1 (.*)", r"\2\3", t),
    "join_people": _join,
    "entailment": _entailment,
    "opinion_of": _opinion,
    "review": lambda t, w: w.labels["positive" if _verdict(t, w) else "negative"],
    "review_contrary": lambda t, w: w.labels["negative" if _verdict(t, w) else "positive"],
    "visit_contrary": lambda t, w: w.labels["disliked" if _verdict(t, w) else "liked"],
    "plural_of_first": lambda t, w: (
        f"{_first_of(w.numbers, t.split('Of the first')[1])} {w.plurals[_items(t)[0]]}"
    ),
    "trip_language": lambda t, w: (
        w.countries[re.search(r"(?i)\b(?:to|for|in) (\w+)", t)[1]].language
    ),
    "opposite_of_last": lambda t, w: w.opposites[re.search(r"(\w+)\. What is", t)[1]][0],
}


@every_world
@pytest.mark.parametrize("rule", RULES)
def test_a_simple_rule_recovers_the_answers(seed, rule):
    name = f"skills_{rule}"
    found = [RULES[rule](text, world(seed)) for text in texts(seed, name, "test")]
    assert found == [row.answers[0] for row in split(seed, name, "test")]


def _bag_of_words(seed, name):
    """Test score of logistic regression on word counts."""
    words = CountVectorizer(token_pattern=r"\w+")
    x = words.fit_transform(texts(seed, name, "train")[:500])
    answers = [row.answers[0] for row in split(seed, name, "train")[:500]]
    model = LogisticRegression(max_iter=1000).fit(x, answers)
    return score(seed, name, model.predict(words.transform(texts(seed, name, "test"))).tolist())


@every_world
@pytest.mark.parametrize("name", ["feedback", "topic", "mentions_animal", "mentions_food"])
def test_words_tell_the_label(seed, name):
    assert _bag_of_words(seed, f"skills_{name}") > 0.7


@every_world
@pytest.mark.parametrize(
    "name", ["same_opinion", "same_feeling", "word_order", "article", "opinion_of"]
)
def test_words_alone_do_not_tell_the_label(seed, name):
    assert _bag_of_words(seed, f"skills_{name}") < 0.75
