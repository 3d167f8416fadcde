"""World knowledge: the answer is not in the input, so the model must remember it.

Training and test inputs share the facts and differ in the wording. Unseen tasks ask for the same
facts the other way round.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from .skills_base import pick, skill
from .skills_language import PEOPLE, PLACES

knowledge = partial(skill, "world_knowledge")
Drawn = tuple[str, str | tuple[str, ...]]

# Country: capital, language, continent. The countries are the places of the other tasks.
COUNTRIES = {
    "France": ("Paris", "French", "Europe"),
    "Spain": ("Madrid", "Spanish", "Europe"),
    "Italy": ("Rome", "Italian", "Europe"),
    "Austria": ("Vienna", "German", "Europe"),
    "Greece": ("Athens", "Greek", "Europe"),
    "Poland": ("Warsaw", "Polish", "Europe"),
    "Japan": ("Tokyo", "Japanese", "Asia"),
    "China": ("Beijing", "Chinese", "Asia"),
    "Iran": ("Tehran", "Persian", "Asia"),
    "Vietnam": ("Hanoi", "Vietnamese", "Asia"),
    "Egypt": ("Cairo", "Arabic", "Africa"),
    "Kenya": ("Nairobi", "Swahili", "Africa"),
    "Morocco": ("Rabat", "Arabic", "Africa"),
    "Ghana": ("Accra", "English", "Africa"),
    "Peru": ("Lima", "Spanish", "America"),
    "Chile": ("Santiago", "Spanish", "America"),
    "Brazil": ("Brasilia", "Portuguese", "America"),
    "Canada": ("Ottawa", "English", "America"),
}
# Singular: plural and class; as many animals of each class.
ANIMAL_CLASSES = {
    "horse": ("horses", "mammal"), "cow": ("cows", "mammal"), "dog": ("dogs", "mammal"),
    "mouse": ("mice", "mammal"), "duck": ("ducks", "bird"), "goose": ("geese", "bird"),
    "owl": ("owls", "bird"), "eagle": ("eagles", "bird"), "shark": ("sharks", "fish"),
    "salmon": ("salmon", "fish"), "trout": ("trout", "fish"), "eel": ("eels", "fish"),
    "bee": ("bees", "insect"), "ant": ("ants", "insect"), "beetle": ("beetles", "insect"),
    "moth": ("moths", "insect"), "snake": ("snakes", "reptile"), "lizard": ("lizards", "reptile"),
    "turtle": ("turtles", "reptile"), "crocodile": ("crocodiles", "reptile"),
}  # fmt: skip
BABIES = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb",
    "hen": "chick", "duck": "duckling", "goose": "gosling", "goat": "kid", "pig": "piglet",
    "bear": "cub", "deer": "fawn", "swan": "cygnet", "frog": "tadpole", "eagle": "eaglet",
    "kangaroo": "joey",
}  # fmt: skip
# The usual colour first, then others that are right too.
THING_COLOURS = {
    "snow": ("white",), "milk": ("white",), "salt": ("white",), "coal": ("black",),
    "tar": ("black",), "grass": ("green",), "broccoli": ("green",), "a cucumber": ("green",),
    "blood": ("red",), "a tomato": ("red",), "a strawberry": ("red",), "the sky": ("blue",),
    "the sea": ("blue", "green"), "a lemon": ("yellow",), "a banana": ("yellow", "green"),
    "chocolate": ("brown", "white", "black"), "soil": ("brown", "black"), "a flamingo": ("pink",),
    "an apple": ("red", "green", "yellow"), "a rose": ("red", "pink", "white", "yellow"),
}  # fmt: skip
OPPOSITES = {
    "big": ("small",), "small": ("big",), "hot": ("cold",), "cold": ("hot",),
    "fast": ("slow",), "slow": ("fast",), "high": ("low",), "low": ("high",),
    "wet": ("dry",), "dry": ("wet",), "full": ("empty",), "empty": ("full",),
    "clean": ("dirty",), "dirty": ("clean",), "strong": ("weak",), "weak": ("strong",),
    "loud": ("quiet",), "quiet": ("loud",), "old": ("new", "young"), "new": ("old",),
    "heavy": ("light",), "light": ("heavy", "dark"), "short": ("long", "tall"),
    "long": ("short",),
}  # fmt: skip
TOOLS = {
    "carpenter": "hammer", "painter": "brush", "tailor": "needle", "cook": "pan",
    "farmer": "tractor", "writer": "pen", "photographer": "camera", "gardener": "spade",
    "barber": "scissors", "baker": "oven", "fisherman": "net", "astronomer": "telescope",
    "dentist": "drill", "plumber": "wrench", "firefighter": "hose", "surgeon": "scalpel",
}  # fmt: skip


@knowledge("geography")
def capital_of(rng: np.random.Generator) -> Drawn:
    country = pick(rng, PLACES)
    wordings = (
        "{person} asks for the capital of {it}.",
        "What is the capital of {it}, {person}?",
        "{person} lives in the capital of {it}. Which city is that?",
        "{person} left {other} for {it}. What is the capital there?",
        "Tell {person} the capital of {it}, not of {other}.",
    )
    return _ask(rng, wordings, country, PLACES), COUNTRIES[country][0]


@knowledge("geography")
def language_of(rng: np.random.Generator) -> Drawn:
    country = pick(rng, PLACES)
    language = COUNTRIES[country][1]
    wordings = (
        "{person} comes from {it}. Which language does {person} speak?",
        "Which language will {person} hear in {it}?",
        "{person} lives in {other} but comes from {it}. What is the mother tongue?",
        "{person} left {other} for {it} and learns the language.",
        "Tell {person} the language of {it}.",
    )
    return _ask(rng, wordings, country, PLACES), language


@knowledge("geography")
def continent_of(rng: np.random.Generator) -> Drawn:
    country = pick(rng, PLACES)
    wordings = (
        "{person} is in {it}. Which continent is that?",
        "On which continent is {it}, {person}?",
        "{person} flies from {other} to {it}. To which continent?",
        "{person} flies to {it} from {other}. To which continent?",
        "Tell {person} the continent of {it}.",
    )
    return _ask(rng, wordings, country, PLACES), COUNTRIES[country][2]


@knowledge("geography", unseen=True)
def country_of_capital(rng: np.random.Generator) -> Drawn:
    country = pick(rng, PLACES)
    capital = COUNTRIES[country][0]
    wordings = (
        "{person} lives in {it}. Which country is that?",
        "{it} is the capital of which country, {person}?",
        "{person} asks which country has the capital {it}.",
        "Tell {person} the country of {it}.",
    )
    capitals = [names[0] for names in COUNTRIES.values()]
    return _ask(rng, wordings, capital, capitals), country


@knowledge("nature")
def animal_class(rng: np.random.Generator) -> Drawn:
    animal = pick(rng, tuple(ANIMAL_CLASSES))
    wordings = (
        "{person} saw a small {it}. What kind of animal is it?",
        "What kind of animal is the {it}, {person}?",
        "{person} asks which class the {it} belongs to.",
        "{person} likes the {other} but loves the {it}. Which class is the loved one?",
        "{person} loves the {it} but likes the {other}. Which class is the loved one?",
    )
    return _ask(rng, wordings, animal, ANIMAL_CLASSES), ANIMAL_CLASSES[animal][1]


@knowledge("nature")
def baby_animal(rng: np.random.Generator) -> Drawn:
    animal = pick(rng, tuple(BABIES))
    wordings = (
        "{person} has a {it}. What is its baby called?",
        "What is a young {it} called, {person}?",
        "{person} saw a {other} and the baby of a {it}. What was the baby?",
        "{person} saw the baby of a {it} and a {other}. What was the baby?",
        "Tell {person} the name of a baby {it}.",
    )
    return _ask(rng, wordings, animal, BABIES), BABIES[animal]


@knowledge("nature")
def colour_of_thing(rng: np.random.Generator) -> Drawn:
    thing = pick(rng, tuple(THING_COLOURS))
    wordings = (
        "{person} thinks of {it}. What colour is it?",
        "What is the usual colour of {it}, {person}?",
        "{person} draws {other} and paints {it}. In which colour?",
        "{person} paints {it} and draws {other}. In which colour?",
        "Tell {person} the colour of {it}.",
    )
    return _ask(rng, wordings, thing, THING_COLOURS), THING_COLOURS[thing]


@knowledge("words")
def opposite(rng: np.random.Generator) -> Drawn:
    word = pick(rng, tuple(OPPOSITES))
    wordings = (
        "What is the opposite of {it}, {person}?",
        "{person} says {it}. What is the opposite?",
        "{person} heard {other} and says {it}. What is the opposite?",
        "{person} says {it} and heard {other}. What is the opposite?",
        "Tell {person} the opposite of {it}.",
    )
    others = [other for other in OPPOSITES if other not in OPPOSITES[word]]
    return _ask(rng, wordings, word, others), OPPOSITES[word]


@knowledge("work")
def tool_of_job(rng: np.random.Generator) -> Drawn:
    job = pick(rng, tuple(TOOLS))
    wordings = (
        "{person} is a {it}. Which tool does {person} need?",
        "Which tool does a {it} use, {person}?",
        "{person} was a {other} and became a {it}. Which tool is in the bag now?",
        "{person} became a {it} and was a {other} before. Which tool is in the bag now?",
        "Tell {person} the tool of the {it}.",
    )
    return _ask(rng, wordings, job, TOOLS), TOOLS[job]


@knowledge("work", unseen=True)
def job_of_tool(rng: np.random.Generator) -> Drawn:
    job = pick(rng, tuple(TOOLS))
    wordings = (
        "{person} works with this tool: {it}. What is the job?",
        "{person} needs one thing at work: {it}. What is the job of {person}?",
        "Who uses this tool, {person}: {it}?",
        "Tell {person} who needs this: {it}.",
    )
    return _ask(rng, wordings, TOOLS[job], TOOLS.values()), job


def _ask(
    rng: np.random.Generator, wordings: Sequence[str], subject: str, others: Iterable[str]
) -> str:
    """One of the wordings, about the subject (`{it}`), beside another one (`{other}`)."""
    other = pick(rng, [other for other in others if other != subject])
    return pick(rng, wordings).format(person=pick(rng, PEOPLE), it=subject, other=other)
