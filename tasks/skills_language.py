"""The small world that the skills gym talks about: its words, and sentences made of them.

Words are few and shared between tasks on purpose: what a model learns about a word in one task
(its plural, what kind of word it is) can serve it in another.
"""

from typing import NamedTuple

import numpy as np

from .skills_base import maybe, pick

PEOPLE = (
    "Anna", "Omar", "Lucy", "Ben", "Mia", "Tom", "Nina", "Sam",
    "Eva", "Leo", "Rosa", "Ivan", "Kate", "Hugo", "Zoe", "Adam",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "pink")
PLACES = (
    "France", "Spain", "Italy", "Austria", "Greece", "Poland", "Japan", "China", "Iran",
    "Vietnam", "Egypt", "Kenya", "Morocco", "Ghana", "Peru", "Chile", "Brazil", "Canada",
)  # fmt: skip
ADJECTIVES = ("old", "small", "big", "clean", "quiet", "heavy")

# Singular and plural.
THINGS = {
    "cup": "cups", "hat": "hats", "box": "boxes", "book": "books", "lamp": "lamps",
    "chair": "chairs", "knife": "knives", "watch": "watches", "key": "keys", "shelf": "shelves",
}  # fmt: skip
FOODS = {
    "apple": "apples", "pear": "pears", "peach": "peaches", "cake": "cakes",
    "potato": "potatoes", "cherry": "cherries", "egg": "eggs", "loaf": "loaves",
}  # fmt: skip
ANIMALS = {
    "horse": "horses", "cow": "cows", "dog": "dogs", "cat": "cats", "duck": "ducks",
    "goose": "geese", "mouse": "mice", "fox": "foxes", "wolf": "wolves", "bee": "bees",
}  # fmt: skip
PLURALS = THINGS | FOODS | ANIMALS
NOUNS = tuple(PLURALS)


class Verb(NamedTuple):
    """The forms of a verb: they `buy`, she `buys`, she `bought`."""

    base: str
    present: str
    past: str


ACTIONS = (
    Verb("buy", "buys", "bought"), Verb("sell", "sells", "sold"), Verb("find", "finds", "found"),
    Verb("see", "sees", "saw"), Verb("draw", "draws", "drew"), Verb("wash", "washes", "washed"),
    Verb("count", "counts", "counted"), Verb("carry", "carries", "carried"),
    Verb("lose", "loses", "lost"), Verb("keep", "keeps", "kept"), Verb("hide", "hides", "hid"),
    Verb("paint", "paints", "painted"),
)  # fmt: skip
MOTIONS = (
    Verb("sleep", "sleeps", "slept"), Verb("run", "runs", "ran"), Verb("wait", "waits", "waited"),
    Verb("sit", "sits", "sat"), Verb("jump", "jumps", "jumped"), Verb("eat", "eats", "ate"),
)  # fmt: skip

# Opinions about a thing, and feelings of a person.
POSITIVE = ("good", "great", "lovely", "wonderful", "excellent", "pleasant", "superb", "charming")
NEGATIVE = ("bad", "awful", "terrible", "horrible", "dull", "poor", "boring", "nasty")
FEELINGS = {
    "joy": ("happy", "glad", "cheerful", "delighted", "merry"),
    "anger": ("angry", "furious", "annoyed", "cross", "mad"),
    "sadness": ("sad", "gloomy", "unhappy", "miserable", "tearful"),
    "fear": ("afraid", "scared", "frightened", "terrified", "nervous"),
}
TOPICS = {
    "sport": ("match", "goal", "team", "coach", "race", "ball", "player", "stadium"),
    "food": ("bread", "soup", "cheese", "salad", "kitchen", "rice", "butter", "cake"),
    "music": ("song", "guitar", "piano", "concert", "drum", "choir", "violin", "singer"),
    "travel": ("train", "ticket", "hotel", "airport", "passport", "flight", "map", "suitcase"),
}
REVIEWED = ("film", "book", "hotel", "song", "show", "soup", "concert", "cake")


class Event(NamedTuple):
    """Somebody did something to some things, somewhere, on some day."""

    person: str
    verb: Verb
    number: str
    colour: str
    noun: str
    place: str
    day: str

    @property
    def things(self) -> str:
        return PLURALS[self.noun]


def draw_event(rng: np.random.Generator) -> Event:
    """An event of which every part is drawn alone."""
    lists = (PEOPLE, ACTIONS, NUMBERS, COLOURS, NOUNS, PLACES, DAYS)
    return Event(*(pick(rng, choices) for choices in lists))


def draw_two_events(rng: np.random.Generator) -> tuple[Event, Event]:
    """Two events that differ in every part, so that a question about one has one answer."""
    first, second = draw_event(rng), draw_event(rng)
    while any(a == b for a, b in zip(first, second, strict=True)):
        second = draw_event(rng)
    return first, second


def sentence(text: str) -> str:
    """`text` with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def a(phrase: str) -> str:
    """`phrase` with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def tell(rng: np.random.Generator, event: Event, leave_out: tuple[str, ...] = ()) -> str:
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
