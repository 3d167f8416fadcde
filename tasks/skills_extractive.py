"""Extractive tasks: the answer is a span of the input that the question names."""

from functools import partial

import numpy as np

from .skills_base import maybe, pick, pick_several, skill
from .skills_language import (
    ADJECTIVES,
    COLOURS,
    NOUNS,
    PEOPLE,
    Event,
    a,
    draw_event,
    draw_two_events,
    tell,
)

extractive = partial(skill, "extractive")
Drawn = tuple[str, str]


@extractive("named_span")
def who(rng: np.random.Generator) -> Drawn:
    event, told = _story(rng, ("number", "day"))
    return f"{told} Who {event.verb.past} the {event.things}?", event.person


@extractive("named_span")
def where(rng: np.random.Generator) -> Drawn:
    event, told = _story(rng, ("number", "colour"))
    question = f"Where did {event.person} {event.verb.base} the {event.things}?"
    return f"{told} {question}", event.place


@extractive("named_span")
def when(rng: np.random.Generator) -> Drawn:
    event, told = _story(rng, ("colour", "place"))
    question = f"On which day did {event.person} {event.verb.base} the {event.things}?"
    return f"{told} {question}", event.day


@extractive("named_span", unseen=True)
def what_things(rng: np.random.Generator) -> Drawn:
    event = draw_event(rng)
    return f"{tell(rng, event)} What did {event.person} {event.verb.base}?", event.things


@extractive("attribute")
def how_many(rng: np.random.Generator) -> Drawn:
    event, told = _story(rng, ("colour", "day"))
    question = f"How many {event.things} did {event.person} {event.verb.base}?"
    return f"{told} {question}", event.number


@extractive("attribute")
def what_colour(rng: np.random.Generator) -> Drawn:
    person = pick(rng, PEOPLE)
    asked, other = pick_several(rng, NOUNS, 2)
    colours = dict(zip((asked, other), pick_several(rng, COLOURS, 2), strict=True))
    described = {noun: a(f"{colour} {noun}") for noun, colour in colours.items()}
    if maybe(rng):
        described[other] = a(other)
    first, second = pick_several(rng, tuple(described.values()), 2)
    return f"{person} has {first} and {second}. What colour is the {asked}?", colours[asked]


@extractive("quotation")
def quoted(rng: np.random.Generator) -> Drawn:
    adjectives, nouns = pick_several(rng, ADJECTIVES, 2), pick_several(rng, NOUNS, 3)
    written, read = (" ".join(phrase) for phrase in zip(adjectives, nouns, strict=False))
    person = pick(rng, PEOPLE)
    wordings = (
        f'{person} wrote "{written}" on the {nouns[2]}.',
        f'{person} read "{read}" and wrote "{written}".',
        f'{person} wrote "{written}" after reading "{read}".',
    )
    return f"{pick(rng, wordings)} What was written?", written


@extractive("position")
def last_item(rng: np.random.Generator) -> Drawn:
    text, items = _list(rng)
    return f"{text} What comes last?", items[-1]


@extractive("position")
def second_item(rng: np.random.Generator) -> Drawn:
    text, items = _list(rng)
    return f"{text} What comes second?", items[1]


@extractive("position", unseen=True)
def first_item(rng: np.random.Generator) -> Drawn:
    text, items = _list(rng)
    return f"{text} What comes first?", items[0]


def _story(rng: np.random.Generator, leave_out: tuple[str, ...]) -> tuple[Event, str]:
    """The event to ask about, and a text that tells it, every other time beside another one."""
    asked, other = draw_two_events(rng)
    told = [tell(rng, asked, leave_out)]
    if maybe(rng):
        told.insert(int(rng.integers(2)), tell(rng, other, leave_out))
    return asked, " ".join(told)


def _list(rng: np.random.Generator) -> tuple[str, list[str]]:
    items = pick_several(rng, NOUNS, int(rng.integers(3, 6)))
    return f"The list of {pick(rng, PEOPLE)}: {', '.join(items)}.", items
