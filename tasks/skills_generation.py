"""Generation and rewriting: the answer is a new text, made from the words of the input."""

from functools import partial
from random import Random

from .skills_base import skill
from .skills_language import a, draw_event
from .skills_words import World

generation = partial(skill, "generation")
Drawn = tuple[str, str]


# The order of words: told, or not.


@generation("reverse")
def reverse_words(rng: Random, world: World) -> Drawn:
    """Reverse the words."""
    words = rng.sample(world.nouns, 3)
    return f"Turn the words around: {' '.join(words)}", " ".join(reversed(words))


@generation("sort")
def sort_words(rng: Random, world: World) -> Drawn:
    """Sort the words."""
    words = rng.sample(world.nouns, 3)
    return f"Sort the words from A to Z: {' '.join(words)}", " ".join(sorted(words))


@generation("reverse", surface="words")
def words_reversed(rng: Random, world: World) -> Drawn:
    """Reverse the bare words."""
    words = rng.sample(world.nouns, 3)
    return " ".join(words), " ".join(reversed(words))


@generation("sort", surface="words")
def words_sorted(rng: Random, world: World) -> Drawn:
    """Sort the bare words."""
    words = rng.sample(world.nouns, 3)
    return " ".join(words), " ".join(sorted(words))


@generation("reverse", unseen=True)
def reverse_people(rng: Random, world: World) -> Drawn:
    """Reverse the people."""
    people = rng.sample(world.people, 3)
    return f"Name them from the back: {' '.join(people)}", " ".join(reversed(people))


@generation("inflection")
def plural(rng: Random, world: World) -> Drawn:
    """Give the plural."""
    person, colour = rng.choice(world.people), rng.choice(world.colours)
    noun, number = rng.choice(world.nouns), rng.choice(world.numbers)
    text = f"{person} has one {colour} {noun} and wants {number}."
    return text, f"{number} {colour} {world.plurals[noun]}"


@generation("inflection")
def past_tense(rng: Random, world: World) -> Drawn:
    """Give the past tense."""
    first, second = rng.sample(world.people, 2)
    verb, other_verb = rng.sample(world.actions, 2)
    one, other = map(a, rng.sample(world.nouns, 2))
    return (
        f"Today {first} {verb.present} {one} and {second} {other_verb.present} {other}.",
        f"Yesterday {first} {verb.past} {one} and {second} {other_verb.past} {other}.",
    )


@generation("inflection", unseen=True)
def present_verb(rng: Random, world: World) -> Drawn:
    """Give the present tense of the verb."""
    person, verb, noun = map(rng.choice, (world.people, world.actions, world.nouns))
    return f"Yesterday {person} {verb.past} {a(noun)}. And today?", verb.present


@generation("rewriting")
def negate(rng: Random, world: World) -> Drawn:
    """Rewrite the sentence in the negative."""
    person = rng.choice(world.people)
    feeling = rng.choice(rng.choice(tuple(world.feelings.values())))
    event, day = rng.choice(world.events), rng.choice(world.days)
    motion, action = rng.choice(world.motions), rng.choice(world.actions)
    thing = a(f"{rng.choice(world.colours)} {rng.choice(world.nouns)}")
    before, changed, after = rng.choice(
        (
            (f"{person} is", f"not {feeling}", f"about the {event}"),
            (f"{person} can", f"not {motion.base}", f"on {day}"),
            (f"{person}", f"did not {action.base}", thing),
        )
    )
    plain = action.past if changed.startswith("did") else changed.removeprefix("not ")
    return f"{before} {plain} {after}.", f"{before} {changed} {after}."


@generation("rewriting")
def join_people(rng: Random, world: World) -> Drawn:
    """Rewrite the sentences as one."""
    first, second = rng.sample(world.people, 2)
    verb, colour = rng.choice(world.actions), rng.choice(world.colours)
    things = f"{colour} {world.plurals[rng.choice(world.nouns)]}"
    told = f"{first} {verb.present} {things}. {second} {verb.present} {things}."
    return told, f"{first} and {second} {verb.base} {things}."


@generation("rewriting")
def remove_word(rng: Random, world: World) -> Drawn:
    """Rewrite the sentence without a word."""
    event = draw_event(rng, world)
    words = [event.person, event.verb.past, event.number, event.colour, event.things]
    gone = rng.randint(2, 3)
    kept = [word for i, word in enumerate(words) if i != gone]
    return f"Leave out {words[gone]}: {' '.join(words)}.", f"{' '.join(kept)}."


@generation("data_to_text", metric="rouge_l")
def introduce(rng: Random, world: World) -> Drawn:
    """Write a sentence from the data, to introduce a person."""
    person, job, place = map(rng.choice, (world.people, world.jobs, world.places))
    food = rng.choice(tuple(world.foods.values()))
    facts = (
        (f"job: {job}", f"is {a(job)}"),
        (f"country: {place}", f"lives in {place}"),
        (f"food: {food}", f"likes {food}"),
    )
    (field, clause), (other_field, other_clause) = rng.sample(facts, 2)
    text = f"name: {person}; {field}; {other_field}"
    return text, f"{person} {clause} and {other_clause}."


@generation("data_to_text", metric="rouge_l")
def advertise(rng: Random, world: World) -> Drawn:
    """Write a sentence from the data, to advertise a thing."""
    thing, adjective, colour = map(rng.choice, (world.nouns, world.adjectives, world.colours))
    person, place = rng.choice(world.people), rng.choice(world.places)
    fields = [f"article: {thing}", f"colour: {colour}", f"state: {adjective}", f"from: {place}"]
    rng.shuffle(fields)
    text = f"seller: {person}; {'; '.join(fields)}"
    return text, f"{person} sells {a(adjective)} {colour} {thing} from {place}."


@generation("data_to_text", metric="rouge_l", unseen=True)
def invite(rng: Random, world: World) -> Drawn:
    """Write a sentence from the data, to invite a guest."""
    person, day = rng.choice(world.people), rng.choice(world.days)
    food = rng.choice(tuple(world.foods.values()))
    fields = rng.sample((f"guest: {person}", f"food: {food}", f"day: {day}"), 3)
    return "; ".join(fields), f"{person} eats {food} on {day}."
