"""Shared by all tasks of the skills gym: the table of tasks, splits, random numbers.

A task is one small function decorated with `skill`. It draws a single example of a world from a
random generator; everything else (splits, balance of labels, uniqueness) happens in `examples`. No
TensorFlow here: only `skills_gym` imports SeqIO.
"""

import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from .skills_world import world

SIZES = {"train": 2000, "validation": 64, "test": 128}
FEWSHOT_SEEDS = (13, 21, 42)
FEWSHOT = 16  # examples in a few-shot split; per label, if a task has labels


class Example(NamedTuple):
    """One example: the input, and the valid outputs, best first."""

    inputs: str
    answers: tuple[str, ...]


class Skill(NamedTuple):
    """A task of the gym.

    Attributes:
        name: registered task name.
        description: what the task asks for: the docstring of its function.
        category, subcategory: the skill that was planted; of a combination, `skill+skill`.
        metric: name of the metric function in `moe_jax.metrics`.
        labels: the outputs of a classification task, as keys of `World.labels`; empty for any
            other task.
        unseen: kept out of the training mixture, and given few-shot splits.
        surface: name of the kind of input that this task shares with others, which want other
            answers. Empty if the input itself tells the task.
        draw: `draw(rng, world) -> (text, answer)`, where an answer is a string or a tuple of valid
            strings; of a classification task `draw(rng, world, label) -> text`.
    """

    name: str
    description: str
    category: str
    subcategory: str
    metric: str
    labels: tuple[str, ...]
    unseen: bool
    surface: str
    draw: Callable[..., Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples of each split."""
        if not self.unseen:
            return dict(SIZES)
        shots = FEWSHOT * max(1, len(self.labels))
        return SIZES | {
            f"fewshot_{seed}_{split}": shots
            for seed in FEWSHOT_SEEDS
            for split in ("train", "validation")
        }


SKILLS: dict[str, Skill] = {}


def skill(
    category: str,
    subcategory: str,
    *,
    metric: str = "exact_match",
    labels: Sequence[str] = (),
    unseen: bool = False,
    surface: str = "",
) -> Callable[[Callable], Callable]:
    """Decorator: adds the `draw` function (see `Skill`) to the table under its name."""

    def enter(draw: Callable) -> Callable:
        name = f"skills_{draw.__name__}"
        if name in SKILLS:
            raise ValueError(f"two tasks are called {name}")
        SKILLS[name] = Skill(
            name, draw.__doc__, category, subcategory, metric, tuple(labels), unseen, surface, draw
        )
        return draw

    return enter


def examples(task: Skill, split: str, seed: int = 0) -> list[Example]:
    """Draws a split in the world of `seed`.

    They are always the same examples, each input once, labels in equal numbers. Splits share no
    input, because the hash of an input's text says which split it belongs to. Few-shot splits are
    drawn from the same share as `train` and `validation`. Tasks of one surface draw the same
    inputs, as far as they consume the same random numbers.

    Raises:
        ValueError: the task has no such split, or not enough different inputs to fill it.
    """
    size = task.sizes.get(split)
    if size is None:
        raise ValueError(f"{task.name} has no split {split!r}, only {', '.join(task.sizes)}")
    here = world(seed)
    rng = Random(_digest(f"{seed}/{task.surface or task.name}/{split}"))
    share = split.rsplit("_", 1)[-1]
    drawn: dict[str, tuple[str, ...]] = {}
    for _ in range(100 * size):
        if len(drawn) == size:
            break
        if task.labels:
            label = task.labels[len(drawn) % len(task.labels)]
            text, answer = task.draw(rng, here, label), here.labels[label]
        else:
            text, answer = task.draw(rng, here)
        if text not in drawn and _share(text) == share:
            drawn[text] = (answer,) if isinstance(answer, str) else tuple(answer)
    else:
        raise ValueError(f"{task.name} has fewer than {size} inputs for its split {split!r}")
    rows = [Example(text, answers) for text, answers in drawn.items()]
    rng.shuffle(rows)
    return rows


def _share(text: str) -> str:
    """The split that an input belongs to: a tenth validation, a fifth test, the rest train."""
    slot = _digest(text) % 10
    return "validation" if slot == 0 else "test" if slot <= 2 else "train"


def _digest(text: str) -> int:
    """A 128-bit number that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def maybe(rng: Random) -> bool:
    """Draws True every other time."""
    return rng.random() < 0.5
