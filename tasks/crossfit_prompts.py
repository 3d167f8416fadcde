"""CrossFit's tasks in words: templates with answer choices. No TensorFlow here.

`crossfit_prompts.json` has, for every task, how its inputs are written and two or more prompts:

    {"glue-rte": {"input": "sentence 1: {premise} [SEP] sentence 2: {hypothesis}",
                  "prompts": {"conclude": {"text": "{premise} So ... {hypothesis}?",
                                           "choices": {"entailment": "yes", ...}}}}}

`choices` gives each label its word. "options" takes the choices from the field `{options}` of the
input, `(A) one (B) another`; without `choices` any text may be the answer. The wording is this
project's own.
"""

import functools
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.core.errors import UserError
from moe_jax.core.files import read_json

FILE = Path(__file__).with_name("crossfit_prompts.json")
_DATA: dict[str, dict[str, Any]] = read_json(FILE)
_OPTIONS = "options"


class Prompt(NamedTuple):
    """One wording of a task.

    Attributes:
        task, name: CrossFit's name of the task, and the prompt's.
        text: the input, with fields as in `str.format`.
        labels: answer choice -> label; empty where the choices are the input's options, or none.
    """

    task: str
    name: str
    text: str
    labels: Mapping[str, str]


class Rendered(NamedTuple):
    """One example in a prompt's words; `answers` are all valid outputs, `choices` may be none."""

    inputs: str
    answers: list[str]
    choices: list[str]


def prompts(task: str) -> list[Prompt]:
    """The prompts of a CrossFit task, in order; none where it has no templates."""
    found = []
    for name, prompt in _DATA.get(task, {"prompts": {}})["prompts"].items():
        choices = prompt.get("choices", {})
        words = {} if choices == _OPTIONS else {word: label for label, word in choices.items()}
        found.append(Prompt(task, name, prompt["text"], words))
    return found


def render(prompt: Prompt, inputs: str, outputs: tuple[str, ...]) -> Rendered:
    """An example of the task, as CrossFit's file has it, in the prompt's words.

    Raises:
        UserError: the input is not written as the templates expect, or an output is no choice.
    """
    matched = _pattern(prompt.task).fullmatch(inputs)
    if not matched:
        raise UserError(
            f"{FILE.name}: an input of {prompt.task!r} is not of the form"
            f" {_DATA[prompt.task]['input']!r}: {inputs[:80]!r}"
        )
    fields = matched.groupdict()
    answers = list(outputs)
    choices = options(fields[_OPTIONS]) if _OPTIONS in fields else list(prompt.labels)
    if prompt.labels:
        words = {label: word for word, label in prompt.labels.items()}
        answers = [words.get(label, label) for label in outputs]
    if choices and not set(answers) <= set(choices):
        raise UserError(
            f"{FILE.name}: {outputs[0]!r} is no answer choice of {prompt.task!r} in {inputs[:80]!r}"
        )
    return Rendered(prompt.text.format_map(fields), answers, choices)


def options(text: str) -> list[str]:
    """'(A) one (B) another' or '(1) one (2) another' -> ['one', 'another'].

    Marks out of order are part of the text.
    """
    marks = string.digits[1:] if text.startswith("(1)") else string.ascii_uppercase
    found = []
    for mark, following in zip(marks, [*marks[1:], ""], strict=True):
        _, _, text = text.partition(f"({mark}) ")
        here, more, _ = text.partition(f" ({following}) ")
        found.append(here.strip())
        if not more:
            break
    return found


@functools.cache
def _pattern(task: str) -> re.Pattern:
    """The regular expression of a task's inputs, with its fields as named groups."""
    expression = ""
    for literal, field, _, _ in string.Formatter().parse(_DATA[task]["input"]):
        # A field at the end may be empty, and its label then has lost the space behind it.
        expression += r"\s*".join(map(re.escape, re.split(r"\s+", literal)))
        if field == _OPTIONS:
            expression += rf"(?P<{field}>\([A1]\) .*?)"
        elif field is not None:
            expression += rf"(?P<{field}>.*?)"
    return re.compile(expression, re.DOTALL)
