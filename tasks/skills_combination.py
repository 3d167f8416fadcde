"""Combinations: unseen tasks that need two skills, each of which the training tasks teach."""

from functools import partial
from random import Random

from .skills_base import maybe, skill
from .skills_language import draw_event, draw_list, sentence, tell
from .skills_words import World

combination = partial(skill, "combination", unseen=True)
Drawn = tuple[str, str | tuple[str, ...]]


@combination("place+capital")
def capital_of_visited(rng: Random, world: World) -> Drawn:
    """Find the place, and give the capital of that country."""
    event = draw_event(rng, world)
    question = "What is the capital of that country?"
    return f"{tell(rng, event, ('number',))} {question}", world.countries[event.place].capital


@combination("things+nature")
def class_of_seen(rng: Random, world: World) -> Drawn:
    """Find the things, and give the kind of animal."""
    event = draw_event(rng, world)
    animals = rng.choice(tuple(world.animal_kinds.values()))
    ends = rng.sample((f"in {event.place}", f"on {event.day}"), 2)
    told = f"{event.person} saw {event.number} {event.colour} {animals.plural} {' '.join(ends)}"
    return f"{sentence(told)} What kind of animals are they?", animals.kind


@combination("person+sentiment", metric="classification_f1", labels=("positive", "negative"))
def opinion_of(rng: Random, world: World, label: str) -> str:
    """Find the person, and judge the sentiment."""
    asked, other = rng.sample(world.people, 2)
    reviewed = rng.choice(world.reviewed)
    said, denied = map(rng.choice, (world.positive, world.negative))
    if label == "negative":
        said, denied = denied, said
    told = [
        f"{asked} found the {reviewed} {said}.",
        f"{other} found the {reviewed} {denied}.",
    ]
    if maybe(rng):
        told.reverse()
    return f"{' '.join(told)} What did {asked} think?"


@combination("continent+pairs", metric="classification_f1", labels=("yes", "no"))
def same_continent(rng: Random, world: World, label: str) -> str:
    """Decide whether both countries are on the same continent."""
    first = rng.choice(world.places)
    continent = world.countries[first].continent
    second = rng.choice(
        [
            place
            for place, known in world.countries.items()
            if place != first and (known.continent == continent) == (label == "yes")
        ]
    )
    day = f" on {rng.choice(world.days)}" if maybe(rng) else ""
    person = rng.choice(world.people)
    return f"{person} went from {first} to {second}{day}. Are they on one continent?"


@combination("first+inflection")
def plural_of_first(rng: Random, world: World) -> Drawn:
    """Find the first item, and give its plural."""
    text, items = draw_list(rng, world)
    number = rng.choice(world.numbers)
    question = f"Of the first, {number} are needed."
    return f"{text} {question}", f"{number} {world.plurals[items[0]]}"


@combination("last+opposite")
def opposite_of_last(rng: Random, world: World) -> Drawn:
    """Find the last word, and give its opposite."""
    words = rng.sample(tuple(world.opposites), 3)
    while set(world.opposites[words[-1]]) & set(words):  # the answer must not be in the text
        words = rng.sample(tuple(world.opposites), 3)
    said = ", then ".join(words)
    text = f"{rng.choice(world.people)} said {said}. What is the opposite of what came last?"
    return text, world.opposites[words[-1]]
