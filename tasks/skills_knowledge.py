"""World knowledge: the answer is not in the input, so the model must remember it.

Training and test inputs share the facts and differ in the wording. Unseen tasks ask for the same
facts the other way round, or in another form.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from random import Random

from .skills_base import maybe, skill
from .skills_language import a
from .skills_words import World

knowledge = partial(skill, "world_knowledge")
Drawn = tuple[str, str | tuple[str, ...]]


# Countries: a question, or a journey without one.


@knowledge("capital")
def capital_of(rng: Random, world: World) -> Drawn:
    """Give the capital of the country."""
    wordings = (
        "{person} asks for the capital of {it}.",
        "What is the capital of {it}, {person}?",
        "{person} lives in the capital of {it}. Which city is that?",
        "{person} left {other} for {it}. What is the capital there?",
        "Tell {person} the capital of {it}, not of {other}.",
    )
    country = rng.choice(world.places)
    return _ask(rng, world, wordings, country, world.places), world.countries[country].capital


@knowledge("language")
def language_of(rng: Random, world: World) -> Drawn:
    """Give the language of the country."""
    wordings = (
        "{person} comes from {it}. Which language does {person} speak?",
        "Which language will {person} hear in {it}?",
        "{person} lives in {other} but comes from {it}. What is the mother tongue?",
        "{person} left {other} for {it} and learns the language.",
        "Tell {person} the language of {it}.",
    )
    country = rng.choice(world.places)
    return _ask(rng, world, wordings, country, world.places), world.countries[country].language


@knowledge("continent")
def continent_of(rng: Random, world: World) -> Drawn:
    """Give the continent of the country."""
    wordings = (
        "{person} is in {it}. Which continent is that?",
        "On which continent is {it}, {person}?",
        "{person} flies from {other} to {it}. To which continent?",
        "{person} flies to {it} from {other}. To which continent?",
        "Tell {person} the continent of {it}.",
    )
    country = rng.choice(world.places)
    return _ask(rng, world, wordings, country, world.places), world.countries[country].continent


@knowledge("capital", surface="trip")
def trip_capital(rng: Random, world: World) -> Drawn:
    """Give the capital of the country of the trip."""
    text, country = _trip(rng, world)
    return text, world.countries[country].capital


@knowledge("language", surface="trip")
def trip_language(rng: Random, world: World) -> Drawn:
    """Give the language of the country of the trip."""
    text, country = _trip(rng, world)
    return text, world.countries[country].language


@knowledge("continent", surface="trip")
def trip_continent(rng: Random, world: World) -> Drawn:
    """Give the continent of the country of the trip."""
    text, country = _trip(rng, world)
    return text, world.countries[country].continent


@knowledge("capital", unseen=True)
def country_of_capital(rng: Random, world: World) -> Drawn:
    """Give the country of the capital."""
    wordings = (
        "{person} lives in {it}. Which country is that?",
        "{it} is the capital of which country, {person}?",
        "{person} asks which country has the capital {it}.",
        "Tell {person} the country of {it}.",
    )
    country = rng.choice(world.places)
    capitals = [known.capital for known in world.countries.values()]
    return _ask(rng, world, wordings, world.countries[country].capital, capitals), country


def _trip(rng: Random, world: World) -> tuple[str, str]:
    """A text on a journey, and the country where it ends."""
    wordings = (
        "{person} travels to {it}.",
        "{person} left {other} for {it}.",
        "{person} arrived in {it} from {other}.",
        "To {it} goes {person}, far from {other}.",
    )
    country = rng.choice(world.places)
    return _ask(rng, world, wordings, country, world.places), country


# Nature.


@knowledge("nature")
def animal_class(rng: Random, world: World) -> Drawn:
    """Give the kind of the animal."""
    wordings = (
        "{person} saw a small {it}. What kind of animal is it?",
        "What kind of animal is the {it}, {person}?",
        "{person} asks which class the {it} belongs to.",
        "{person} likes the {other} but loves the {it}. Which class is the loved one?",
        "{person} loves the {it} but likes the {other}. Which class is the loved one?",
    )
    animal = rng.choice(tuple(world.animal_kinds))
    text = _ask(rng, world, wordings, animal, world.animal_kinds)
    return text, world.animal_kinds[animal].kind


@knowledge("nature")
def baby_animal(rng: Random, world: World) -> Drawn:
    """Give the baby of the animal."""
    wordings = (
        "{person} has {a_it}. What is its baby called?",
        "What is a young {it} called, {person}?",
        "{person} saw {a_other} and the baby of {a_it}. What was the baby?",
        "{person} saw the baby of {a_it} and {a_other}. What was the baby?",
        "Tell {person} the name of a baby {it}.",
    )
    animal = rng.choice(tuple(world.babies))
    return _ask(rng, world, wordings, animal, world.babies), world.babies[animal]


@knowledge("nature")
def colour_of_thing(rng: Random, world: World) -> Drawn:
    """Give the natural colour of the thing."""
    wordings = (
        "{person} thinks of {it}. What colour is it?",
        "What is the usual colour of {it}, {person}?",
        "{person} draws {other} and paints {it}. In which colour?",
        "{person} paints {it} and draws {other}. In which colour?",
        "Tell {person} the colour of {it}.",
    )
    thing = rng.choice(tuple(world.thing_colours))
    return _ask(rng, world, wordings, thing, world.thing_colours), world.thing_colours[thing]


@knowledge("nature", unseen=True)
def parent_of_baby(rng: Random, world: World) -> Drawn:
    """Give the parent of the baby animal."""
    wordings = (
        "{person} found {a_it}. Which animal is its mother?",
        "Which animal will {a_it} become, {person}?",
        "{person} saw {a_it} and {a_other}. What will the first become?",
        "Tell {person} what {a_it} grows up to be.",
    )
    # Not those whose name tells: a piglet.
    parents = {baby: one for one, baby in world.babies.items() if not baby.startswith(one)}
    baby = rng.choice(tuple(parents))
    return _ask(rng, world, wordings, baby, parents), parents[baby]


# Opposites.


@knowledge("opposite")
def opposite(rng: Random, world: World) -> Drawn:
    """Give the opposite of the word."""
    wordings = (
        "What is the opposite of {it}, {person}?",
        "{person} says {it}. What is the opposite?",
        "{person} heard {other} and says {it}. What is the opposite?",
        "{person} says {it} and heard {other}. What is the opposite?",
        "Tell {person} the opposite of {it}.",
    )
    return _ask_opposite(rng, world, wordings)


@knowledge("opposite")
def other_kind(rng: Random, world: World) -> Drawn:
    """Give the opposite of the property."""
    wordings = (
        "{person} wants no {it} {thing}. What then?",
        "This {thing} is too {it}, says {person}. What should it be?",
        "{person} has a {thing}, which is not {it} at all. What is it?",
        "A {it} {thing} is not for {person}. What kind is?",
    )
    return _ask_opposite(rng, world, wordings)


@knowledge("opposite", unseen=True)
def contrast(rng: Random, world: World) -> Drawn:
    """Give the opposite of what is said."""
    wordings = (
        "Unlike the {it} {thing}, the one of {person} is what?",
        "One {thing} is {it}, and the one of {person} differs. How?",
        "{person} calls the {thing} {it}, but we say the contrary.",
    )
    return _ask_opposite(rng, world, wordings)


def _ask_opposite(rng: Random, world: World, wordings: Sequence[str]) -> Drawn:
    word = rng.choice(tuple(world.opposites))
    others = [other for other in world.opposites if other not in world.opposites[word]]
    return _ask(rng, world, wordings, word, others), world.opposites[word]


# Work.


@knowledge("work")
def tool_of_job(rng: Random, world: World) -> Drawn:
    """Give the tool of the job."""
    wordings = (
        "{person} is {a_it}. Which tool does {person} need?",
        "Which tool does {a_it} use, {person}?",
        "{person} was {a_other} and became {a_it}. Which tool is in the bag now?",
        "{person} became {a_it} and was {a_other} before. Which tool is in the bag now?",
        "Tell {person} the tool of the {it}.",
    )
    job = rng.choice(world.jobs)
    return _ask(rng, world, wordings, job, world.jobs), world.tools[job]


@knowledge("work")
def lost_at_work(rng: Random, world: World) -> Drawn:
    """Give the tool that was lost."""
    wordings = (
        "{person} the {it} lost something and cannot work.",
        "The {it} asks {person} for something to work with.",
        "{person} the {other} gives {a_it} something for work.",
        "A gift for {a_it} from {person} the {other}.",
    )
    job = rng.choice(world.jobs)
    return _ask(rng, world, wordings, job, world.jobs), world.tools[job]


@knowledge("work", unseen=True)
def job_of_tool(rng: Random, world: World) -> Drawn:
    """Give the job of the tool."""
    wordings = (
        "{person} works with this tool: {it}. What is the job?",
        "{person} needs one thing at work: {it}. What is the job of {person}?",
        "Who uses this tool, {person}: {it}?",
        "Tell {person} who needs this: {it}.",
    )
    job = rng.choice(world.jobs)
    return _ask(rng, world, wordings, world.tools[job], world.tools.values()), job


def _ask(
    rng: Random, world: World, wordings: Sequence[str], subject: str, others: Iterable[str]
) -> str:
    """One of the wordings, about the subject (`{it}`), beside another one (`{other}`).

    Every other time, the day is told before.
    """
    other = rng.choice([other for other in others if other != subject])
    text = rng.choice(wordings).format(
        person=rng.choice(world.people),
        it=subject,
        a_it=a(subject),
        other=other,
        a_other=a(other),
        thing=rng.choice(tuple(world.things)),
    )
    return f"It is {rng.choice(world.days)}. {text}" if maybe(rng) else text
