"""Extractive tasks: the answer is a span of the input.

A question, or only the task's name, says which span.
"""

from functools import partial
from random import Random

from .skills_base import maybe, skill
from .skills_language import (
    Event,
    a,
    draw_event,
    draw_list,
    draw_two_events,
    remark,
    review,
    tell,
)
from .skills_words import World

extractive = partial(skill, "extractive")
Drawn = tuple[str, str]


# A story and a question about it.


@extractive("person")
def who(rng: Random, world: World) -> Drawn:
    """Find the person who did it."""
    event, told = _stories(rng, world, ("number", "day"))
    return f"{told} Who {event.verb.past} the {event.things}?", event.person


@extractive("place")
def where(rng: Random, world: World) -> Drawn:
    """Find the place where it happened."""
    event, told = _stories(rng, world, ("number", "colour"))
    question = f"Where did {event.person} {event.verb.base} the {event.things}?"
    return f"{told} {question}", event.place


@extractive("day")
def when(rng: Random, world: World) -> Drawn:
    """Find the day when it happened."""
    event, told = _stories(rng, world, ("colour", "place"))
    question = f"On which day did {event.person} {event.verb.base} the {event.things}?"
    return f"{told} {question}", event.day


@extractive("things", unseen=True)
def what_things(rng: Random, world: World) -> Drawn:
    """Find the things in question."""
    event = draw_event(rng, world)
    return f"{tell(rng, event)} What did {event.person} {event.verb.base}?", event.things


@extractive("attribute")
def how_many(rng: Random, world: World) -> Drawn:
    """Find the number of things."""
    event, told = _stories(rng, world, ("colour", "day"))
    question = f"How many {event.things} did {event.person} {event.verb.base}?"
    return f"{told} {question}", event.number


def _stories(rng: Random, world: World, leave_out: tuple[str, ...]) -> tuple[Event, str]:
    """The event to ask about, and a text that tells it, every other time beside another one."""
    asked, other = draw_two_events(rng, world)
    told = [tell(rng, asked, leave_out)]
    if maybe(rng):
        told.insert(rng.randrange(2), tell(rng, other, leave_out))
    return asked, " ".join(told)


# A story without a question.


@extractive("person", surface="story")
def story_person(rng: Random, world: World) -> Drawn:
    """Find the person of the story."""
    event = draw_event(rng, world)
    return tell(rng, event), event.person


@extractive("place", surface="story")
def story_place(rng: Random, world: World) -> Drawn:
    """Find the place of the story."""
    event = draw_event(rng, world)
    return tell(rng, event), event.place


@extractive("day", surface="story")
def story_day(rng: Random, world: World) -> Drawn:
    """Find the day of the story."""
    event = draw_event(rng, world)
    return tell(rng, event), event.day


@extractive("things", surface="story")
def story_things(rng: Random, world: World) -> Drawn:
    """Find the things of the story."""
    event = draw_event(rng, world)
    return tell(rng, event), event.things


@extractive("attribute", surface="story")
def story_number(rng: Random, world: World) -> Drawn:
    """Find the number in the story."""
    event = draw_event(rng, world)
    return tell(rng, event), event.number


# Other texts.


@extractive("person", surface="review")
def review_person(rng: Random, world: World) -> Drawn:
    """Find the person of the review."""
    person = rng.choice(world.people)
    return review(rng, world, person, maybe(rng)), person


@extractive("person", unseen=True)
def feedback_person(rng: Random, world: World) -> Drawn:
    """Find the person of the feedback."""
    person = rng.choice(world.people)
    return f"{remark(rng, world, person, maybe(rng))} Who is that?", person


@extractive("things")
def packed(rng: Random, world: World) -> Drawn:
    """Find the things that were packed."""
    things, left = (world.plurals[noun] for noun in rng.sample(world.nouns, 2))
    person, place = rng.choice(world.people), rng.choice(world.places)
    wordings = (
        f"{person} packed {things} for {place} and left the {left} at home.",
        f"{person} left the {left} at home and packed {things} for {place}.",
        f"For {place}, {person} packed {things}.",
    )
    return f"{rng.choice(wordings)} What is in the bag?", things


@extractive("attribute")
def what_colour(rng: Random, world: World) -> Drawn:
    """Find the colour of the thing."""
    text, asked, colour = _described(rng, world, world.colours)
    return f"{text} What colour is the {asked}?", colour


@extractive("attribute", unseen=True)
def what_like(rng: Random, world: World) -> Drawn:
    """Find the property of the thing."""
    text, asked, adjective = _described(rng, world, world.adjectives)
    return f"{text} What is the {asked} like?", adjective


def _described(rng: Random, world: World, words: tuple[str, ...]) -> tuple[str, str, str]:
    """Two things of somebody: the text, the thing to ask for, and the word that describes it."""
    asked, other = rng.sample(world.nouns, 2)
    word, other_word = rng.sample(words, 2)
    described = [a(f"{word} {asked}"), a(f"{other_word} {other}") if maybe(rng) else a(other)]
    first, second = rng.sample(described, 2)
    return f"{rng.choice(world.people)} has {first} and {second}.", asked, word


@extractive("quotation")
def quoted(rng: Random, world: World) -> Drawn:
    """Find the quotation."""
    written, read = _phrases(rng, world)
    person = rng.choice(world.people)
    wordings = (
        f'{person} wrote "{written}" on the {rng.choice(world.nouns)}.',
        f'{person} read "{read}" and wrote "{written}".',
        f'{person} wrote "{written}" after reading "{read}".',
    )
    return f"{rng.choice(wordings)} What was written?", written


@extractive("quotation")
def titled(rng: Random, world: World) -> Drawn:
    """Find the title."""
    title, other = _phrases(rng, world)
    person, reviewed = rng.choice(world.people), rng.choice(world.reviewed)
    wordings = (
        f'The {reviewed} of {person} is called "{title}".',
        f'{person} said "{other}" about the {reviewed} "{title}".',
        f'About the {reviewed} "{title}", {person} said "{other}".',
    )
    return f"{rng.choice(wordings)} What is the title?", title


def _phrases(rng: Random, world: World) -> tuple[str, str]:
    """Two phrases of two words, without a word in common."""
    adjectives, nouns = rng.sample(world.adjectives, 2), rng.sample(world.nouns, 2)
    first, second = map(" ".join, zip(adjectives, nouns, strict=True))
    return first, second


# Positions in a list or a row of people.


@extractive("last")
def last_item(rng: Random, world: World) -> Drawn:
    """Find the last item of the list."""
    text, items = draw_list(rng, world)
    return f"{text} What comes last?", items[-1]


@extractive("second")
def second_item(rng: Random, world: World) -> Drawn:
    """Find the second item of the list."""
    text, items = draw_list(rng, world)
    return f"{text} What comes second?", items[1]


@extractive("first", unseen=True)
def first_item(rng: Random, world: World) -> Drawn:
    """Find the first item of the list."""
    text, items = draw_list(rng, world)
    return f"{text} What comes first?", items[0]


@extractive("first", surface="list")
def list_first(rng: Random, world: World) -> Drawn:
    """Find the first item of the bare list."""
    text, items = draw_list(rng, world)
    return text, items[0]


@extractive("second", surface="list")
def list_second(rng: Random, world: World) -> Drawn:
    """Find the second item of the bare list."""
    text, items = draw_list(rng, world)
    return text, items[1]


@extractive("last", surface="list")
def list_last(rng: Random, world: World) -> Drawn:
    """Find the last item of the bare list."""
    text, items = draw_list(rng, world)
    return text, items[-1]


@extractive("first")
def queue_first(rng: Random, world: World) -> Drawn:
    """Find the first person of the queue."""
    text, people = _queue(rng, world)
    return f"{text} Who came first?", people[0]


@extractive("last")
def queue_last(rng: Random, world: World) -> Drawn:
    """Find the last person of the queue."""
    text, people = _queue(rng, world)
    return f"{text} Who came last?", people[-1]


def _queue(rng: Random, world: World) -> tuple[str, list[str]]:
    people = rng.sample(world.people, rng.randint(3, 4))
    return f"There came {', then '.join(people)}.", people
