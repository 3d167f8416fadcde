"""What a world of the skills gym consists of: its words, and the facts that hold in it."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

Words = tuple[str, ...]


class Verb(NamedTuple):
    """The forms of a verb: they `buy`, she `buys`, she `bought`."""

    base: str
    present: str
    past: str


class Country(NamedTuple):
    """What there is to know about a country."""

    capital: str
    language: str
    continent: str


class Animal(NamedTuple):
    """What there is to know about an animal."""

    plural: str
    kind: str


@dataclasses.dataclass(frozen=True)
class World:
    """All words and facts that the tasks draw from.

    Words are few and shared between tasks on purpose: what a model learns about a word in one task
    (its plural, what kind of word it is) can serve it in another.

    Attributes:
        seed: the number that the world was made from.
        people, days, numbers, colours, adjectives: words of these kinds.
        things, foods, animals: singular -> plural.
        actions: verbs with an object.
        motions: verbs without one.
        positive, negative: opinions about something.
        feelings: emotion (as in `labels`) -> feelings of a person.
        topics: topic (as in `labels`) -> words that belong to it.
        reviewed: what opinions are about.
        services: parts of a stay that can be good or bad.
        events: what people go to.
        countries: country -> facts. The countries are also the places of other tasks.
        animal_kinds: singular -> plural and class; as many animals of each class.
        babies: animal -> name of its young.
        thing_colours: thing -> its usual colour, then others that are right too.
        opposites: word -> the valid opposites.
        tools: job -> tool.
        labels: label as the code calls it -> the word that is the answer in this world.
    """

    seed: int
    people: Words
    days: Words
    numbers: Words
    colours: Words
    adjectives: Words
    things: Mapping[str, str]
    foods: Mapping[str, str]
    animals: Mapping[str, str]
    actions: tuple[Verb, ...]
    motions: tuple[Verb, ...]
    positive: Words
    negative: Words
    feelings: Mapping[str, Words]
    topics: Mapping[str, Words]
    reviewed: Words
    services: Words
    events: Words
    countries: Mapping[str, Country]
    animal_kinds: Mapping[str, Animal]
    babies: Mapping[str, str]
    thing_colours: Mapping[str, Words]
    opposites: Mapping[str, Words]
    tools: Mapping[str, str]
    labels: Mapping[str, str]

    @cached_property
    def plurals(self) -> dict[str, str]:
        """Every noun and its plural."""
        return {**self.things, **self.foods, **self.animals}

    @cached_property
    def nouns(self) -> Words:
        return tuple(self.plurals)

    @cached_property
    def places(self) -> Words:
        return tuple(self.countries)

    @cached_property
    def jobs(self) -> Words:
        return tuple(self.tools)
