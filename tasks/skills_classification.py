"""Classification tasks: the answer is one of a few label words, in equal numbers."""

from functools import partial

import numpy as np

from .skills_base import maybe, pick, pick_several, skill
from .skills_language import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    DAYS,
    FEELINGS,
    FOODS,
    MOTIONS,
    NEGATIVE,
    NOUNS,
    NUMBERS,
    PEOPLE,
    PLACES,
    PLURALS,
    POSITIVE,
    REVIEWED,
    THINGS,
    TOPICS,
    a,
    draw_event,
    sentence,
    tell,
)

classification = partial(skill, "classification", metric="classification_f1")
ACCEPTABILITY = ("acceptable", "unacceptable")


@classification("sentiment", labels=("positive", "negative"))
def review(rng: np.random.Generator, label: str) -> str:
    return _opinion(rng, pick(rng, PEOPLE), pick(rng, REVIEWED), label == "positive")


@classification("sentiment", labels=tuple(FEELINGS))
def emotion(rng: np.random.Generator, label: str) -> str:
    person = pick(rng, PEOPLE)
    feeling = pick(rng, FEELINGS[label])
    other = pick(rng, FEELINGS[pick(rng, [name for name in FEELINGS if name != label])])
    event = pick(rng, ("match", "concert", "flight", "race", "show"))
    return pick(
        rng,
        (
            f"{person} felt {feeling} after the {event}.",
            f"After the {event}, {person} was {feeling}, not {other}.",
            f"{person} was not {other} but {feeling} about the {event}.",
        ),
    )


@classification("sentiment", labels=("praise", "complaint"), unseen=True)
def feedback(rng: np.random.Generator, label: str) -> str:
    adjective = pick(rng, POSITIVE if label == "praise" else NEGATIVE)
    service, place = pick(rng, ("room", "food", "music", "seat")), pick(rng, PLACES)
    return f"{pick(rng, PEOPLE)} writes: the {service} in {place} was {adjective}."


@classification("topic", labels=tuple(TOPICS))
def topic(rng: np.random.Generator, label: str) -> str:
    first, second = pick_several(rng, TOPICS[label], 2)
    stray = pick(rng, TOPICS[pick(rng, [name for name in TOPICS if name != label])])
    person = pick(rng, PEOPLE)
    return pick(
        rng,
        (
            f"{person} talked about the {first} and the {second}, but not about the {stray}.",
            f"After the {stray}, {person} asked about the {first} and the {second}.",
            f"{person} forgot the {stray} because of the {first} and the {second}.",
        ),
    )


@classification("topic", labels=("yes", "no"))
def mentions_animal(rng: np.random.Generator, label: str) -> str:
    return f"{_shopping(rng, ANIMALS, FOODS | THINGS, label)} Is there an animal?"


@classification("topic", labels=("yes", "no"), unseen=True)
def mentions_food(rng: np.random.Generator, label: str) -> str:
    return f"{_shopping(rng, FOODS, ANIMALS | THINGS, label)} Is there any food?"


@classification("pairs", labels=("entailment", "neutral", "contradiction"))
def entailment(rng: np.random.Generator, label: str) -> str:
    event = draw_event(rng)
    part, choices = pick(
        rng, (("place", PLACES), ("colour", COLOURS), ("number", NUMBERS), ("day", DAYS))
    )
    claim = getattr(event, part)
    if label == "contradiction":
        claim = pick(rng, [choice for choice in choices if choice != claim])
    hypothesis = {
        "place": f"{event.person} was in {claim}.",
        "colour": f"The {event.things} were {claim}.",
        "number": f"There were {claim} {event.things}.",
        "day": f"It was on {claim}.",
    }[part]
    left_out = pick(rng, [name for name in ("place", "colour", "number", "day") if name != part])
    if label == "neutral":  # either about something else, or about what the premise leaves out
        if maybe(rng):
            hypothesis = f"{event.person} felt {pick(rng, FEELINGS[pick(rng, tuple(FEELINGS))])}."
        else:
            left_out = part
    return f"Premise: {tell(rng, event, (left_out,))} Hypothesis: {hypothesis}"


@classification("pairs", labels=("agree", "disagree"))
def same_opinion(rng: np.random.Generator, label: str) -> str:
    first, second = pick_several(rng, PEOPLE, 2)
    reviewed, positive = pick(rng, REVIEWED), maybe(rng)
    same, opposite = POSITIVE[:4], NEGATIVE[:4]  # few words, as comparing two is hard enough
    if not positive:
        same, opposite = opposite, same
    verdict, reply = pick(rng, same), pick(rng, same if label == "agree" else opposite)
    return f"{first}: the {reviewed} was {verdict}. {second}: it was {reply}."


@classification("acceptability", labels=ACCEPTABILITY)
def word_order(rng: np.random.Generator, label: str) -> str:
    place = f"near {pick(rng, PEOPLE)} on {pick(rng, DAYS)}"
    animal, adjective = pick(rng, tuple(ANIMALS)), pick(rng, ADJECTIVES)
    words = f"the {adjective} {animal} {pick(rng, MOTIONS).past} {place}".split()
    if label == "unacceptable":
        at = int(rng.integers(len(words) - 1))
        words[at], words[at + 1] = words[at + 1], words[at]
    return sentence(" ".join(words))


@classification("acceptability", labels=ACCEPTABILITY)
def agreement(rng: np.random.Generator, label: str) -> str:
    animal, verb = pick(rng, tuple(ANIMALS)), pick(rng, MOTIONS)
    plural = maybe(rng)
    subject = ANIMALS[animal] if plural else animal
    form = verb.base if plural == (label == "acceptable") else verb.present
    other = pick(rng, NOUNS)  # may have the other number, and stands next to the verb
    near = pick(rng, ("", f" near the {other}", f" near the {PLURALS[other]}"))
    return f"The {subject}{near} {form} in {pick(rng, PLACES)}."


def _opinion(rng: np.random.Generator, person: str, reviewed: str, positive: bool) -> str:
    """A review; half of them also name an opposite opinion."""
    same, opposite = (POSITIVE, NEGATIVE) if positive else (NEGATIVE, POSITIVE)
    return pick(
        rng,
        (
            f"{person} found the {reviewed} {pick(rng, same)}.",
            f"The {reviewed} was {pick(rng, same)}, said {person}.",
            f"To {person} the {reviewed} was not {pick(rng, opposite)}.",
            f"To {person} the {reviewed} was not {pick(rng, opposite)} but {pick(rng, same)}.",
            f"{person} expected {a(pick(rng, opposite))} {reviewed}, but it was {pick(rng, same)}.",
        ),
    )


def _shopping(rng: np.random.Generator, wanted: dict, others: dict, label: str) -> str:
    """Somebody has three things, one of which is of the wanted kind if `label` is yes."""
    items = pick_several(rng, tuple(others), 3)
    if label == "yes":
        items[int(rng.integers(3))] = pick(rng, tuple(wanted))
    first, second, third = map(a, items)
    return f"{pick(rng, PEOPLE)} has {first}, {second} and {third}."
