"""Sentences about a world: what happened, what somebody thinks of something, what there is."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from .skills_base import maybe
from .skills_words import Verb, World


class Event(NamedTuple):
    """Somebody did something to some things, somewhere, on some day."""

    person: str
    verb: Verb
    number: str
    colour: str
    things: str
    place: str
    day: str


def draw_event(rng: Random, world: World) -> Event:
    """An event of which every part is drawn alone."""
    return Event(
        rng.choice(world.people),
        rng.choice(world.actions),
        rng.choice(world.numbers),
        rng.choice(world.colours),
        world.plurals[rng.choice(world.nouns)],
        rng.choice(world.places),
        rng.choice(world.days),
    )


def draw_two_events(rng: Random, world: World) -> tuple[Event, Event]:
    """Two events that differ in every part, so that a question about one has one answer."""
    first, second = draw_event(rng, world), draw_event(rng, world)
    while any(a == b for a, b in zip(first, second, strict=True)):
        second = draw_event(rng, world)
    return first, second


def sentence(text: str) -> str:
    """`text` with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def a(phrase: str) -> str:
    """`phrase` with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def tell(rng: Random, event: Event, leave_out: tuple[str, ...] = ()) -> str:
    """A sentence about an event, without the parts in `leave_out` (number, colour, place, day)."""
    words = [event.person, event.verb.past]
    words += [] if "number" in leave_out else [event.number]
    words += [] if "colour" in leave_out else [event.colour]
    clause = " ".join([*words, event.things])
    ends = [] if "place" in leave_out else [f"in {event.place}"]
    ends += [] if "day" in leave_out else [f"on {event.day}"]
    if len(ends) == 2 and maybe(rng):
        ends.reverse()
    if ends and maybe(rng):
        return sentence(f"{ends[0]}, {' '.join([clause, *ends[1:]])}")
    return sentence(" ".join([clause, *ends]))


def review(rng: Random, world: World, person: str, positive: bool) -> str:
    """What a person thinks of something; half of the reviews also name an opposite opinion."""
    words = (world.positive, world.negative)
    same, opposite = map(rng.choice, words if positive else words[::-1])
    reviewed = rng.choice(world.reviewed)
    return rng.choice(
        (
            f"{person} found the {reviewed} {same}.",
            f"The {reviewed} was {same}, said {person}.",
            f"To {person} the {reviewed} was not {opposite}.",
            f"To {person} the {reviewed} was not {opposite} but {same}.",
            f"{person} expected {a(opposite)} {reviewed}, but it was {same}.",
        )
    )


def remark(rng: Random, world: World, person: str, positive: bool) -> str:
    """What a person writes of one part of a stay somewhere."""
    adjective = rng.choice(world.positive if positive else world.negative)
    service, place = rng.choice(world.services), rng.choice(world.places)
    return f"{person} writes: the {service} in {place} was {adjective}."


def shopping(rng: Random, person: str, wanted: Sequence[str] | None, others: Sequence[str]) -> str:
    """Somebody has three things, one of which is `wanted`, if anything is."""
    items = rng.sample(others, 3)
    if wanted is not None:
        items[rng.randrange(3)] = rng.choice(wanted)
    first, second, third = map(a, items)
    return f"{person} has {first}, {second} and {third}."


def draw_list(rng: Random, world: World) -> tuple[str, list[str]]:
    """Somebody's list of three to five things, as a text and as its items."""
    items = rng.sample(world.nouns, rng.randint(3, 5))
    return f"The list of {rng.choice(world.people)}: {', '.join(items)}.", items
