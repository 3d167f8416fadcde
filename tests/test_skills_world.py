"""The skills gym's worlds: other seeds have other words and facts, in the same templates."""

import dataclasses
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from skills_splits import split

from moe_jax.builtin_tasks import skills_world
from moe_jax.builtin_tasks.skills_table import SKILLS
from moe_jax.builtin_tasks.skills_world import world
from moe_jax.core.errors import UserError
from moe_jax.runs import configurables, directory, gin_files
from moe_jax.runs.config import DataConfig


def world_words(value):
    """All words in the facts and lists of a world, without the code's own names of labels."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        named = [fields.pop(name) for name in ("feelings", "topics", "labels")]
        del fields["seed"]
        return world_words([*fields.values(), *map(dict.values, named)])
    if isinstance(value, str):
        return set(re.findall(r"\w+", value))
    parts = itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value
    return set().union(*map(world_words, parts))


def told_words(seed):
    rows = (row for name in SKILLS for which in ("validation", "test")
            for row in split(seed, name, which))  # fmt: skip
    told = " ".join(" ".join((row.inputs, *row.answers)) for row in rows)
    return set(re.findall(r"\w+", told.lower()))


def test_worlds_share_only_the_words_of_the_templates():
    words = {seed: {w.lower() for w in world_words(world(seed))} for seed in (0, 1, 5, -3)}
    for one, other in itertools.combinations(words, 2):
        assert not words[one] & words[other]
    templates, others = (told_words(seed) - words[seed] for seed in (5, 0))
    assert others <= templates and len(templates) < 250
    assert not words[5] & templates
    assert told_words(5) & told_words(0) <= templates


def test_coined_words_are_pronounceable_and_all_different():
    here = world(5)
    words = world_words(here)
    assert all(re.fullmatch(r"(?i)[^aeiou]?[aeiou][^aeiou]{2}[aeiou]\w+", w) for w in words)
    assert len(words) == len({w.lower() for w in words}) > 400
    assert here.people[0].istitle() and here.colours[0].islower()
    for nouns in (here.things, here.foods, here.animals):
        assert len({*nouns, *nouns.values()}) == 2 * len(nouns)
    regular = [plural == noun + "s" for noun, plural in here.plurals.items()]
    assert 0.4 < np.mean(regular) < 1
    forms = [form for verb in (*here.actions, *here.motions) for form in verb]
    assert len(set(forms)) == len(forms)


def _pattern(values):
    """Which of the values are equal, whatever they are: `aab` and `ccd` have one pattern."""
    values = list(values)
    return tuple(map(values.index, values))


def test_facts_differ_between_worlds():
    worlds = [world(seed) for seed in (0, 5, 6)]
    for facts in (
        [_pattern(country.language for country in w.countries.values()) for w in worlds],
        [_pattern(country.continent for country in w.countries.values()) for w in worlds],
        [_pattern(animal.kind for animal in w.animal_kinds.values()) for w in worlds],
        [_pattern(w.thing_colours.values()) for w in worlds],
    ):
        assert len(set(facts)) == 3
        assert len({tuple(sorted(Counter(pattern).values())) for pattern in facts}) == 1
    assert all(w.opposites[other] for w in worlds[1:] for (other,) in w.opposites.values())


def test_gin_settings_are_environment_variables(monkeypatch):
    files = ["models/tiny.gin", "runs/skills_gym_stage1.gin"]
    for bindings, seed, described in (
        ([], "0", "0"),
        (["skills_gym.seed = 3", "skills_gym.descriptions = True"], "3", "1"),
    ):
        gin_files.parse(files, bindings, [str(gin_files.GIN_CONFIGS)])
        data = configurables.build(DataConfig)
        assert data.environment == {"SKILLS_GYM_SEED": seed, "SKILLS_GYM_DESCRIPTIONS": described}
        assert directory.config_lines(data)["DataConfig.environment"] == data.environment
    with pytest.raises(UserError, match=r"skills_gym.seed must be an integer, not 'x'"):
        skills_world.settings("x")
    with pytest.raises(UserError, match=r"skills_gym.descriptions must be True or False, not 1"):
        skills_world.settings(descriptions=1)
    monkeypatch.setenv("SKILLS_GYM_SEED", "12")
    assert skills_world.current_seed() == 12
    monkeypatch.setenv("SKILLS_GYM_SEED", "1.5")
    with pytest.raises(UserError, match=r"SKILLS_GYM_SEED=1.5: must be an integer"):
        skills_world.current_seed()
    monkeypatch.delenv("SKILLS_GYM_SEED")
    assert skills_world.current_seed() == 0
    monkeypatch.setenv("SKILLS_GYM_DESCRIPTIONS", "1")
    assert skills_world.current_descriptions()
    monkeypatch.setenv("SKILLS_GYM_DESCRIPTIONS", "yes")
    with pytest.raises(UserError, match=r"SKILLS_GYM_DESCRIPTIONS=yes: must be 0 or 1"):
        skills_world.current_descriptions()
    monkeypatch.delenv("SKILLS_GYM_DESCRIPTIONS")
    assert not skills_world.current_descriptions()
