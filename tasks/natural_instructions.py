"""Super-NaturalInstructions as SeqIO tasks, over the files of `natural_instructions_data`.

Set NATURAL_INSTRUCTIONS_DIR, or gin's `natural_instructions.data_dir`. An input is the task's
definition, two positive examples (NATURAL_INSTRUCTIONS_POSITIVE_EXAMPLES, or in gin
`natural_instructions.positive_examples`, says how many) and the instance. Registered are, for the
files that are present there:

    ni_<task file's name>
    natural_instructions_train, natural_instructions_test         the default split
"""

import functools
from pathlib import Path

import seqio
import tensorflow as tf

from moe_jax.metrics import answers_or_target, match, stemmed_rouge_l

from . import natural_instructions_data as data
from .data_directory import data_directory

ENVIRONMENT = (data.DATA_DIR, data.POSITIVE_EXAMPLES)
ONTOLOGY: dict[str, dict[str, list[str]]] = {}  # category -> "" -> tasks
DESCRIPTIONS: dict[str, str] = {}
LISTED: dict[str, int] = {}  # mixture -> how many tasks its list names
_FILES: dict[str, list[str]] = {}


def data_files(name: str) -> list[str]:
    """The task's file and the two lists."""
    return _FILES[name]


def missing_hint(name: str) -> str | None:
    """Why the task or mixture `name` is not registered; None where it is no such name."""
    if not name.startswith(("ni_", "natural_instructions_")):
        return None
    path = data_directory(data.DATA_DIR)
    if path is None:
        return (
            f"{name!r} needs {data.DATA_DIR} (in gin: natural_instructions.data_dir), which is"
            " not set"
        )
    if name in LISTED:
        return f"none of the {LISTED[name]} tasks of {name!r} is present in {path / 'tasks'}"
    return None


def _dataset(
    split: str,
    shuffle_files: bool,
    seed: int | None = None,
    *,
    file: Path,
    part: str,
    examples: int,
) -> tf.data.Dataset:
    del shuffle_files, seed
    rows = data.read(file, part, split, examples)
    answers = [list(outputs) for _, *outputs in rows]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [row[0] for row in rows],
            "targets": [row[1] for row in rows],
            "answers": tf.ragged.constant(answers, tf.string),
        }
    )


_FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
_PREPROCESSORS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def _add_all() -> None:
    path = data_directory(data.DATA_DIR)
    if path is None:
        return
    examples = data.positive_examples()
    read = [str(data.list_file(path, part)) for part in data.PARTS]
    for part, names in data.lists(path).items():
        mixture, added = f"natural_instructions_{part}", []
        LISTED[mixture] = len(names)
        for task in names:
            file = path / "tasks" / f"{task}.json"
            if not file.is_file():
                continue
            name = f"ni_{task}"
            seqio.TaskRegistry.add(
                name,
                source=seqio.FunctionDataSource(
                    functools.partial(_dataset, file=file, part=part, examples=examples),
                    splits=data.splits(file, part),
                ),
                preprocessors=_PREPROCESSORS,
                postprocess_fn=answers_or_target,
                metric_fns=[stemmed_rouge_l, match],
                output_features={"inputs": _FEATURE, "targets": _FEATURE},
            )
            _FILES[name] = [str(file), *read]
            ONTOLOGY.setdefault(data.category(file), {}).setdefault("", []).append(name)
            DESCRIPTIONS[name] = data.definition(file)
            added.append(name)
        if added:
            seqio.MixtureRegistry.add(mixture, added, default_rate=1.0)


_add_all()
