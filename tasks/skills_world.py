"""The worlds of the skills gym: one for every seed.

Seed 0 is the English world. Any other seed renames every word of it by a coined one, and draws the
facts anew. Templates, and so the tasks, stay the same. No TensorFlow here.
"""

import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import TypeVar

import gin

from moe_jax.core.errors import UserError

from .skills_english import ENGLISH
from .skills_words import Animal, Country, Verb, World

# Passed as environment variables, because tasks are registered in a child process (which imports
# TensorFlow), where gin is not configured.
SEED, DESCRIBED = "SKILLS_GYM_SEED", "SKILLS_GYM_DESCRIPTIONS"

# Coined words have two syllables, such as `mopkat` or `ilden`.
_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvz", "aeiou", "klmnpt"
_VOWEL_FIRST = 0.2  # of the words, so that some take the article `an`
# So many worlds, of seeds in a row, have no word in common.
_WORLDS = 97
_IRREGULAR = 0.25  # of the plurals and of the verbs' forms

T = TypeVar("T")


@gin.configurable("skills_gym")
def settings(seed: int = 0, descriptions: bool = False) -> dict[str, str]:
    """The gin settings as environment variables: SKILLS_GYM_SEED, and 0 or 1 for the other.

    Args:
        seed: chooses the world.
        descriptions: every input begins with the description of its task.

    Raises:
        UserError: a setting is of another type.
    """
    if type(seed) is not int:
        raise UserError(f"skills_gym.seed must be an integer, not {seed!r}")
    if type(descriptions) is not bool:
        raise UserError(f"skills_gym.descriptions must be True or False, not {descriptions!r}")
    return {SEED: str(seed), DESCRIBED: str(int(descriptions))}


def current_seed() -> int:
    """The seed in the environment; 0 without one.

    Raises:
        UserError: it is not an integer.
    """
    value = os.environ.get(SEED) or "0"
    try:
        return int(value)
    except ValueError as e:
        raise UserError(f"{SEED}={value}: must be an integer") from e


def current_descriptions() -> bool:
    """Whether inputs describe their task, by the environment; not without it.

    Raises:
        UserError: it is neither 0 nor 1.
    """
    value = os.environ.get(DESCRIBED) or "0"
    if value not in ("0", "1"):
        raise UserError(f"{DESCRIBED}={value}: must be 0 or 1")
    return value == "1"


@functools.cache
def world(seed: int) -> World:
    """The world of a seed, the same in every process."""
    return _coined(seed) if seed else ENGLISH


def _coined(seed: int) -> World:
    """The English world in other words: as many of every kind, and facts of the same shape."""
    rng = Random(f"world {seed}")
    words = _coin(rng, seed)

    @functools.cache  # an English word of several kinds, such as `cake`, is one word here too
    def name(english: str) -> str:
        word = next(words)
        return word.capitalize() if english[0].isupper() else word

    def names(english: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(name, english))

    plural_endings, present_endings, past_endings = (
        [regular, *rng.sample(("en", "im", "o", "ar", "u", "el"), 2)]
        for regular in ("s", "s", "ed")
    )

    def ending(choices: list[str]) -> str:
        return rng.choice(choices[1:]) if rng.random() < _IRREGULAR else choices[0]

    @functools.cache
    def plural(english: str) -> str:
        return name(english) + ending(plural_endings)

    def verb(english: Verb) -> Verb:
        base = name(english.base)
        return Verb(base, base + ending(present_endings), base + ending(past_endings))

    def anew(facts: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        """The subjects (in English) of some facts, each with what holds for any of them."""
        return zip(facts, _shuffled(rng, facts.values()), strict=True)

    e = ENGLISH
    facts = (_shuffled(rng, column) for column in zip(*e.countries.values(), strict=True))
    turned = _shuffled(rng, names(e.opposites))
    halves = [*zip(turned[::2], turned[1::2], strict=True)]
    return World(
        seed=seed,
        people=names(e.people),
        days=names(e.days),
        numbers=names(e.numbers),
        colours=names(e.colours),
        adjectives=names(e.adjectives),
        things={name(noun): plural(noun) for noun in e.things},
        foods={name(noun): plural(noun) for noun in e.foods},
        animals={name(noun): plural(noun) for noun in e.animals},
        actions=tuple(map(verb, e.actions)),
        motions=tuple(map(verb, e.motions)),
        positive=names(e.positive),
        negative=names(e.negative),
        feelings={label: names(words) for label, words in e.feelings.items()},
        topics={label: names(words) for label, words in e.topics.items()},
        reviewed=names(e.reviewed),
        services=names(e.services),
        events=names(e.events),
        countries={
            name(country): Country(*names(known))
            for country, known in zip(e.countries, zip(*facts, strict=True), strict=True)
        },
        animal_kinds={
            name(animal): Animal(plural(animal), name(known.kind))
            for animal, known in anew(e.animal_kinds)
        },
        babies={name(animal): name(baby) for animal, baby in anew(e.babies)},
        thing_colours={
            name(thing.split()[-1]): names(colours)  # without an article
            for thing, colours in anew(e.thing_colours)
        },
        opposites={one: (other,) for half in halves for one, other in (half, half[::-1])},
        tools={name(job): name(tool) for job, tool in anew(e.tools)},
        labels={label: name(word) for label, word in e.labels.items()},
    )


def _coin(rng: Random, seed: int) -> Iterator[str]:
    """New words without end, none of them English, and none of another world.

    All possible words are numbered, and a world has every 97th number. No word plus an ending is
    another word, because words have two vowels and end in one consonant.
    """
    coined = set(re.findall(r"\w+", repr(ENGLISH).lower()))
    while True:
        first = ("",) if rng.random() < _VOWEL_FIRST else _ONSETS
        parts = (first, _VOWELS, _CODAS, _ONSETS, _VOWELS, _CODAS)
        number = rng.randrange(math.prod(map(len, parts)) // _WORLDS) * _WORLDS + seed % _WORLDS
        word = ""
        for part in parts:
            number, index = divmod(number, len(part))
            word += part[index]
        if word not in coined:
            coined.add(word)
            yield word


def _shuffled(rng: Random, values: Iterable[T]) -> list[T]:
    values = list(values)
    return rng.sample(values, len(values))
