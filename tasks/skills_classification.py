"""Classification tasks: the answer is one of a few label words, in equal numbers."""

from collections.abc import Iterable
from functools import partial
from random import Random

from . import skills_language as language
from .skills_base import maybe, skill
from .skills_language import a, draw_event, sentence, tell
from .skills_words import World

classification = partial(skill, "classification", metric="classification_f1")
ACCEPTABILITY = ("acceptable", "unacceptable")
CONTRARY = {
    "positive": "negative", "negative": "positive", "liked": "disliked", "disliked": "liked",
    "praise": "complaint", "complaint": "praise",
}  # fmt: skip


@classification("sentiment", labels=("positive", "negative"), surface="review")
def review(rng: Random, world: World, label: str) -> str:
    """Judge the sentiment of the review."""
    return language.review(rng, world, rng.choice(world.people), label == "positive")


@classification("sentiment", labels=("liked", "disliked"), surface="visit")
def visit(rng: Random, world: World, label: str) -> str:
    """Judge the sentiment of the visit."""
    adjective = rng.choice(world.positive if label == "liked" else world.negative)
    other = rng.choice(world.negative if label == "liked" else world.positive)
    first, second = rng.sample(world.services, 2)
    person, event = rng.choice(world.people), rng.choice(world.events)
    return rng.choice(
        (
            f"{person} came to the {event} for the {first}, which was {adjective}.",
            f"At the {event}, {person} had {a(adjective)} {first}.",
            f"{person} knows the {event} for its {adjective} {first}, not for the {second}.",
            f"No {other} {first} at the {event}: it was {adjective}, said {person}.",
        )
    )


@classification("sentiment", labels=("joy", "anger", "sadness", "fear"))
def emotion(rng: Random, world: World, label: str) -> str:
    """Judge the sentiment, and name the emotion."""
    person, event = rng.choice(world.people), rng.choice(world.events)
    feeling = rng.choice(world.feelings[label])
    other = rng.choice(world.feelings[_another(rng, world.feelings, label)])
    return rng.choice(
        (
            f"{person} felt {feeling} after the {event}.",
            f"After the {event}, {person} was {feeling}, not {other}.",
            f"{person} was not {other} but {feeling} about the {event}.",
        )
    )


@classification("sentiment", labels=("praise", "complaint"), unseen=True, surface="feedback")
def feedback(rng: Random, world: World, label: str) -> str:
    """Judge the sentiment of the feedback."""
    return language.remark(rng, world, rng.choice(world.people), label == "praise")


# The same inputs, but the labels are exchanged (and so listed in the other order).


@classification("contrary", labels=("negative", "positive"), surface="review")
def review_contrary(rng: Random, world: World, label: str) -> str:
    """Give the contrary of the sentiment of the review."""
    return review(rng, world, CONTRARY[label])


@classification("contrary", labels=("disliked", "liked"), surface="visit")
def visit_contrary(rng: Random, world: World, label: str) -> str:
    """Give the contrary of the sentiment of the visit."""
    return visit(rng, world, CONTRARY[label])


@classification("contrary", labels=("complaint", "praise"), unseen=True, surface="feedback")
def feedback_contrary(rng: Random, world: World, label: str) -> str:
    """Give the contrary of the sentiment of the feedback."""
    return feedback(rng, world, CONTRARY[label])


@classification("topic", labels=("sport", "food", "music", "travel"))
def topic(rng: Random, world: World, label: str) -> str:
    """Name the topic of the text."""
    first, second = rng.sample(world.topics[label], 2)
    stray = rng.choice(world.topics[_another(rng, world.topics, label)])
    person = rng.choice(world.people)
    return rng.choice(
        (
            f"{person} talked about the {first} and the {second}, but not about the {stray}.",
            f"After the {stray}, {person} asked about the {first} and the {second}.",
            f"{person} forgot the {stray} because of the {first} and the {second}.",
        )
    )


@classification("topic", labels=("yes", "no"))
def mentions_animal(rng: Random, world: World, label: str) -> str:
    """Decide whether the text mentions an animal."""
    animals = tuple(world.animals) if label == "yes" else None
    others = (*world.foods, *world.things)
    told = language.shopping(rng, rng.choice(world.people), animals, others)
    return f"{told} Is there an animal?"


@classification("topic", labels=("yes", "no"), unseen=True)
def mentions_food(rng: Random, world: World, label: str) -> str:
    """Decide whether the text mentions food."""
    foods = tuple(world.foods) if label == "yes" else None
    others = (*world.animals, *world.things)
    told = language.shopping(rng, rng.choice(world.people), foods, others)
    return f"{told} Is there any food?"


@classification("pairs", labels=("entailment", "neutral", "contradiction"))
def entailment(rng: Random, world: World, label: str) -> str:
    """Decide whether the premise entails the hypothesis."""
    event = draw_event(rng, world)
    choices = {
        "place": world.places,
        "colour": world.colours,
        "number": world.numbers,
        "day": world.days,
    }
    part = rng.choice(tuple(choices))
    claim = getattr(event, part)
    if label == "contradiction":
        claim = _another(rng, choices[part], claim)
    hypothesis = {
        "place": f"{event.person} was in {claim}.",
        "colour": f"The {event.things} were {claim}.",
        "number": f"There were {claim} {event.things}.",
        "day": f"It was on {claim}.",
    }[part]
    left_out = _another(rng, choices, part)
    if label == "neutral":  # either about something else, or about what the premise leaves out
        if maybe(rng):
            hypothesis = f"{event.person} felt {_feeling(rng, world)}."
        else:
            left_out = part
    return f"Premise: {tell(rng, event, (left_out,))} Hypothesis: {hypothesis}"


@classification("pairs", labels=("agree", "disagree"))
def same_opinion(rng: Random, world: World, label: str) -> str:
    """Decide whether both opinions are the same."""
    first, second = rng.sample(world.people, 2)
    # Few words, as comparing two is hard enough.
    same, opposite = rng.sample((world.positive[:4], world.negative[:4]), 2)
    verdict, reply = rng.choice(same), rng.choice(same if label == "agree" else opposite)
    reviewed = rng.choice(world.reviewed)
    return f"{first}: the {reviewed} was {verdict}. {second}: it was {reply}."


@classification("pairs", labels=("same", "different"), unseen=True)
def same_feeling(rng: Random, world: World, label: str) -> str:
    """Decide whether both feelings are the same."""
    first, second = rng.sample(world.people, 2)
    one = rng.choice(tuple(world.feelings))
    other = one if label == "same" else _another(rng, world.feelings, one)
    feeling, reply = rng.choice(world.feelings[one]), rng.choice(world.feelings[other])
    return f"After the {rng.choice(world.events)} {first} was {feeling} and {second} was {reply}."


@classification("acceptability", labels=ACCEPTABILITY)
def word_order(rng: Random, world: World, label: str) -> str:
    """Decide whether the word order is acceptable."""
    place = f"near {rng.choice(world.people)} on {rng.choice(world.days)}"
    animal, adjective = rng.choice(tuple(world.animals)), rng.choice(world.adjectives)
    words = f"the {adjective} {animal} {rng.choice(world.motions).past} {place}".split()
    if label == "unacceptable":
        at = rng.randrange(len(words) - 1)
        words[at], words[at + 1] = words[at + 1], words[at]
    return sentence(" ".join(words))


@classification("acceptability", labels=ACCEPTABILITY)
def agreement(rng: Random, world: World, label: str) -> str:
    """Decide whether the agreement of the verb is acceptable."""
    animal, verb = rng.choice(tuple(world.animals)), rng.choice(world.motions)
    plural = maybe(rng)
    subject = world.animals[animal] if plural else animal
    form = verb.base if plural == (label == "acceptable") else verb.present
    other = rng.choice(world.nouns)  # may have the other number, and stands next to the verb
    near = rng.choice(("", f" near the {other}", f" near the {world.plurals[other]}"))
    return f"The {subject}{near} {form} in {rng.choice(world.places)}."


@classification("acceptability", labels=ACCEPTABILITY, unseen=True)
def article(rng: Random, world: World, label: str) -> str:
    """Decide whether the article is acceptable."""
    vowels = [noun for noun in world.nouns if noun[0] in "aeiou"]
    noun = rng.choice(vowels if vowels and maybe(rng) else world.nouns)
    phrase = a(noun)
    if label == "unacceptable":
        phrase = f"{'a' if noun in vowels else 'an'} {noun}"
    things = world.plurals[rng.choice(world.nouns)]
    return f"{rng.choice(world.people)} has {phrase} and {rng.choice(world.numbers)} {things}."


def _another(rng: Random, choices: Iterable[str], one: str) -> str:
    return rng.choice([choice for choice in choices if choice != one])


def _feeling(rng: Random, world: World) -> str:
    return rng.choice(world.feelings[rng.choice(tuple(world.feelings))])
