"""Splits of the skills gym in an English and a coined world, drawn once per process."""

from functools import cache

import pytest

from moe_jax.builtin_tasks.skills_table import ONTOLOGY, SKILLS, examples

WORLDS = (0, 5)

every_world = pytest.mark.parametrize("seed", WORLDS)
every_task = pytest.mark.parametrize("name", SKILLS)


@cache
def split(seed, name, which):
    return examples(SKILLS[name], which, seed)


def texts(seed, name, which):
    return [row.inputs for row in split(seed, name, which)]


def of(category):
    return [name for names in ONTOLOGY[category].values() for name in names]
