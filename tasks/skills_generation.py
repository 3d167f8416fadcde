"""Generation and rewriting: the answer is a new text, made from the words of the input."""

from functools import partial

import numpy as np

from .skills_base import pick, pick_several, skill
from .skills_language import (
    ACTIONS,
    COLOURS,
    DAYS,
    FEELINGS,
    FOODS,
    MOTIONS,
    NOUNS,
    NUMBERS,
    PEOPLE,
    PLACES,
    PLURALS,
    a,
    draw_event,
)

generation = partial(skill, "generation")
Drawn = tuple[str, str]
JOBS = ("doctor", "teacher", "cook", "painter", "farmer", "writer", "baker", "tailor")


@generation("reordering")
def reverse_words(rng: np.random.Generator) -> Drawn:
    words = _words(rng)
    return f"Turn the words around: {' '.join(words)}", " ".join(reversed(words))


@generation("reordering")
def sort_words(rng: np.random.Generator) -> Drawn:
    words = _words(rng)
    return f"Sort the words from A to Z: {' '.join(words)}", " ".join(sorted(words))


@generation("inflection")
def plural(rng: np.random.Generator) -> Drawn:
    person, colour, noun = pick(rng, PEOPLE), pick(rng, COLOURS), pick(rng, NOUNS)
    number = pick(rng, NUMBERS)
    text = f"{person} has one {colour} {noun} and wants {number}."
    return text, f"{number} {colour} {PLURALS[noun]}"


@generation("inflection")
def past_tense(rng: np.random.Generator) -> Drawn:
    (first, second), nouns = pick_several(rng, PEOPLE, 2), pick_several(rng, NOUNS, 2)
    verbs, (one, other) = pick_several(rng, ACTIONS, 2), map(a, nouns)
    now, then = ([getattr(verb, tense) for verb in verbs] for tense in ("present", "past"))
    return (
        f"Today {first} {now[0]} {one} and {second} {now[1]} {other}.",
        f"Yesterday {first} {then[0]} {one} and {second} {then[1]} {other}.",
    )


@generation("inflection", unseen=True)
def present_verb(rng: np.random.Generator) -> Drawn:
    person, verb, noun = pick(rng, PEOPLE), pick(rng, ACTIONS), pick(rng, NOUNS)
    return f"Yesterday {person} {verb.past} {a(noun)}. And today?", verb.present


@generation("rewriting")
def negate(rng: np.random.Generator) -> Drawn:
    person = pick(rng, PEOPLE)
    feeling = pick(rng, FEELINGS[pick(rng, tuple(FEELINGS))])
    motion, action = pick(rng, MOTIONS), pick(rng, ACTIONS)
    thing = a(f"{pick(rng, COLOURS)} {pick(rng, NOUNS)}")
    return pick(
        rng,
        (
            (f"{person} is {feeling}.", f"{person} is not {feeling}."),
            (f"{person} can {motion.base}.", f"{person} can not {motion.base}."),
            (f"{person} {action.past} {thing}.", f"{person} did not {action.base} {thing}."),
        ),
    )


@generation("rewriting")
def join_people(rng: np.random.Generator) -> Drawn:
    first, second = pick_several(rng, PEOPLE, 2)
    verb, things = pick(rng, ACTIONS), f"{pick(rng, COLOURS)} {PLURALS[pick(rng, NOUNS)]}"
    told = f"{first} {verb.present} {things}. {second} {verb.present} {things}."
    return told, f"{first} and {second} {verb.base} {things}."


@generation("rewriting")
def remove_word(rng: np.random.Generator) -> Drawn:
    event = draw_event(rng)
    words = [event.person, event.verb.past, event.number, event.colour, event.things]
    gone = int(rng.integers(2, 4))
    kept = [word for i, word in enumerate(words) if i != gone]
    return f"Leave out {words[gone]}: {' '.join(words)}.", f"{' '.join(kept)}."


@generation("data_to_text", metric="rouge_l")
def introduce(rng: np.random.Generator) -> Drawn:
    person, job, place = pick(rng, PEOPLE), pick(rng, JOBS), pick(rng, PLACES)
    food = PLURALS[pick(rng, tuple(FOODS))]
    facts = (
        (f"job: {job}", f"is a {job}"),
        (f"country: {place}", f"lives in {place}"),
        (f"food: {food}", f"likes {food}"),
    )
    (field, clause), (other_field, other_clause) = pick_several(rng, facts, 2)
    text = f"name: {person}; {field}; {other_field}"
    return text, f"{person} {clause} and {other_clause}."


@generation("data_to_text", metric="rouge_l", unseen=True)
def invite(rng: np.random.Generator) -> Drawn:
    person, food, day = pick(rng, PEOPLE), PLURALS[pick(rng, tuple(FOODS))], pick(rng, DAYS)
    fields = pick_several(rng, (f"guest: {person}", f"food: {food}", f"day: {day}"), 3)
    return "; ".join(fields), f"{person} eats {food} on {day}."


def _words(rng: np.random.Generator) -> list[str]:
    return pick_several(rng, NOUNS, 3)
