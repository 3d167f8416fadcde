"""Combinations: unseen tasks that need two skills, each of which the training tasks teach."""

from functools import partial

import numpy as np

from .skills_base import maybe, pick, pick_several, skill
from .skills_knowledge import ANIMAL_CLASSES, COUNTRIES
from .skills_language import (
    NEGATIVE,
    PEOPLE,
    PLACES,
    POSITIVE,
    REVIEWED,
    draw_event,
    sentence,
    tell,
)

combination = partial(skill, "combination", unseen=True)
Drawn = tuple[str, str]


@combination("extractive+world_knowledge")
def capital_of_visited(rng: np.random.Generator) -> Drawn:
    event = draw_event(rng)
    question = "What is the capital of that country?"
    return f"{tell(rng, event, ('number',))} {question}", COUNTRIES[event.place][0]


@combination("extractive+world_knowledge")
def class_of_seen(rng: np.random.Generator) -> Drawn:
    event = draw_event(rng)
    plural, kind = ANIMAL_CLASSES[pick(rng, tuple(ANIMAL_CLASSES))]
    ends = pick_several(rng, (f"in {event.place}", f"on {event.day}"), 2)
    told = f"{event.person} saw {event.number} {event.colour} {plural} {' '.join(ends)}"
    return f"{sentence(told)} What kind of animals are they?", kind


@combination(
    "extractive+classification", metric="classification_f1", labels=("positive", "negative")
)
def opinion_of(rng: np.random.Generator, label: str) -> str:
    asked, other = pick_several(rng, PEOPLE, 2)
    words = (POSITIVE, NEGATIVE) if label == "positive" else (NEGATIVE, POSITIVE)
    reviewed = pick(rng, REVIEWED)
    told = [
        f"{person} found the {reviewed} {pick(rng, choices)}."
        for person, choices in zip((asked, other), words, strict=True)
    ]
    if maybe(rng):
        told.reverse()
    return f"{' '.join(told)} What did {asked} think?"


@combination("classification+world_knowledge", metric="classification_f1", labels=("yes", "no"))
def same_continent(rng: np.random.Generator, label: str) -> str:
    first = pick(rng, PLACES)
    continent = COUNTRIES[first][2]
    second = pick(
        rng,
        [
            place
            for place in PLACES
            if place != first and (COUNTRIES[place][2] == continent) == (label == "yes")
        ],
    )
    person = pick(rng, PEOPLE)
    return f"{person} went from {first} to {second}. Are they on one continent?"
