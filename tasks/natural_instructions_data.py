"""Super-NaturalInstructions on disk: splits, task files, inputs. No TensorFlow here.

Wang et al., *Super-NaturalInstructions: Generalization via Declarative Instructions on 1600+ NLP
Tasks*, EMNLP 2022, arXiv 2204.07705. The data is the user's, a copy of its repository:

    NATURAL_INSTRUCTIONS_DIR/tasks/task*.json
    NATURAL_INSTRUCTIONS_DIR/splits/default/{train,test}_tasks.txt      a name per line

A task file has "Definition", "Categories", "Positive Examples" (each with "input" and "output") and
"Instances" (each with "input" and the list "output" of valid outputs).
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from moe_jax.core.errors import UserError, first_line
from moe_jax.core.files import read_object, read_text

from .data_directory import absolute

DATA_DIR = "NATURAL_INSTRUCTIONS_DIR"
POSITIVE_EXAMPLES = "NATURAL_INSTRUCTIONS_POSITIVE_EXAMPLES"
PARTS = ("train", "test")
_TEST_INSTANCES = 100  # the first ones of a test task, as the paper evaluates
_HELD_OUT_OF, _MAX_VALIDATION = 10, 100  # one of so many instances of a training task; at most

_NOW = "Now complete the following example -"

Example = tuple[str, ...]  # input, output, other valid outputs


@gin.configurable("natural_instructions")
def settings(data_dir: str | None = None, positive_examples: int | None = None) -> dict[str, str]:
    """Environment variables that say what gin says."""
    given = absolute(**{DATA_DIR: data_dir})
    if positive_examples is not None:
        given[POSITIVE_EXAMPLES] = str(positive_examples)
    return given


def positive_examples() -> int:
    """How many positive examples stand in an input: NATURAL_INSTRUCTIONS_POSITIVE_EXAMPLES, or 2.

    Raises:
        UserError: it is no number of at least 0.
    """
    value = os.environ.get(POSITIVE_EXAMPLES) or "2"
    if not value.isdecimal():
        raise UserError(f"{POSITIVE_EXAMPLES}={value}: must be a number of at least 0")
    return int(value)


def lists(path: Path) -> dict[str, list[str]]:
    """{"train" | "test": task names} of the default split, as its files list them.

    Raises:
        UserError: a list is missing, or is no text.
    """
    found = {}
    for part in PARTS:
        file = list_file(path, part)
        try:
            found[part] = read_text(file).split()
        except UserError as e:
            raise UserError(
                f"{e}; {DATA_DIR} must be a copy of the repository natural-instructions"
            ) from e
    return found


def list_file(path: Path, part: str) -> Path:
    return path / "splits" / "default" / f"{part}_tasks.txt"


def category(file: Path) -> str:
    """The first of the task's categories.

    Raises:
        UserError: the file has none, or cannot be read.
    """
    return _texts_of(file, "Categories")[0]


def definition(file: Path) -> str:
    """What the task asks for.

    Raises:
        UserError: the file does not say, or cannot be read.
    """
    return " ".join(_texts_of(file, "Definition"))


def _texts_of(file: Path, key: str) -> Sequence[str]:
    """The texts under a key of the file. Its instances, most of it, are not parsed."""
    text, block = "", 1 << 14
    pattern = re.compile(rf'(?<!\\)"{key}"\s*:\s*')
    try:
        with open(file, encoding="utf-8") as f:
            while more := f.read(block):
                text = text[-100:] + more  # the key may begin in the block before
                if pattern.search(text):
                    text += f.read(block)  # and its value may go on in the next
                    value, _ = json.JSONDecoder().raw_decode(text, pattern.search(text).end())
                    found = _strings(value, file, key)
                    "".join(found).encode()  # which half a character cannot be
                    return found
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{file}: no "{key}" can be read: {first_line(e)}') from e
    raise UserError(f'{file}: no "{key}"')


def splits(file: Path, part: str) -> tuple[str, ...]:
    """The splits of a task that have instances; see `read`.

    Raises:
        UserError: the file cannot be read.
    """
    if part == "test":
        return ("train", "test") if _has_instances(file, _TEST_INSTANCES + 1) else ("test",)
    return ("train", "validation") if _has_instances(file, _HELD_OUT_OF) else ("train",)


def _has_instances(file: Path, count: int) -> bool:
    """Whether a task has so many instances. Of its file no more is read than it takes."""
    text, found = "", 0
    try:
        with open(file, encoding="utf-8") as f:
            while found < count and (more := f.read(max(1 << 16, len(text)))):
                text += more
                found = len(re.findall(r'"output"\s*:', text.partition('"Instances"')[2]))
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: its instances cannot be read: {first_line(e)}") from e
    return found >= count


def read(file: Path, part: str, split: str, examples: int) -> list[Example]:
    """Examples of a split: inputs with definition and positive examples, then all valid outputs.

    A test task has `test`, its first 100 instances, and `train`, the others, if it has more. Of a
    training task `validation` is a tenth of the instances, at most 100, chosen by a hash, and
    `train` the rest; one of less than 10 instances has no `validation`.

    Args:
        part: of the default split, "train" or "test".
        examples: positive examples in an input.

    Raises:
        UserError: the file is not as it should be, or the split is empty.
    """
    task = read_object(file)
    frame = _instruction(task, file, examples)
    found = []
    for number, instance in enumerate(_list(task, file, "Instances")):
        where = f"Instances[{number}]"
        text = _text(instance, file, where, "input")
        outputs = _strings(instance.get("output"), file, f"{where}.output")
        found.append((f"{frame}{_NOW}\nInput: {text}\nOutput:", *outputs))
    if part == "test":
        cut = slice(_TEST_INSTANCES) if split == "test" else slice(_TEST_INSTANCES, None)
        found = found[cut]
    else:
        count = min(len(found) // _HELD_OUT_OF, _MAX_VALIDATION)
        held_out = set(sorted(set(found), key=_digest)[:count])
        found = [e for e in found if (e in held_out) == (split == "validation")]
    if not found:
        raise UserError(f"{file}: too few instances for a split {split!r}")
    return found


def _instruction(task: Mapping[str, Any], file: Path, examples: int) -> str:
    """What comes before an instance, in the words of the paper's models."""
    definition = " ".join(_strings(task.get("Definition"), file, "Definition"))
    parts = [f"Definition: {definition}"]
    for number, shown in enumerate(_list(task, file, "Positive Examples")[:examples], 1):
        where = f"Positive Examples[{number - 1}]"
        text, output = (_text(shown, file, where, key) for key in ("input", "output"))
        parts.append(f"Positive Example {number} -\nInput: {text}\nOutput: {output}")
    return "".join(f"{part}\n\n" for part in parts)


def _list(task: Mapping[str, Any], file: Path, key: str) -> list[Any]:
    value = task.get(key)
    if not isinstance(value, list):
        raise UserError(f"{file}: {key!r} is no list")
    return value


def _text(record: Any, file: Path, where: str, key: str) -> str:
    """A text of a record; the output of some positive examples is a list of one."""
    value = record.get(key) if isinstance(record, Mapping) else None
    return _strings(value, file, f"{where}.{key}")[0]


def _strings(value: Any, file: Path, where: str) -> list[str]:
    """A text, or a list of at least one."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not value or not all(isinstance(v, str) for v in value):
        raise UserError(f"{file}: {where} is no text, nor a list of texts")
    return [v.strip() for v in value]


def _digest(example: Example) -> bytes:
    return hashlib.blake2b("\t".join(example).encode(), digest_size=16).digest()
