"""CrossFit's NLP Few-shot Gym as SeqIO tasks and mixtures, over the files of `crossfit_data`.

Set CROSSFIT_DIR (few-shot files) and CROSSFIT_FULL_DIR (full-size files), or gin's
`crossfit.data_dir`, `crossfit.full_dir`; CROSSFIT_PARTITION or `crossfit.partition` may add a
partition's JSON file. For the tasks present there, these names are registered:

    crossfit_<task>, crossfit_full_<task>                      '-' in the task's name becomes '_'
    crossfit_{train,dev,test}, crossfit_full_{...}             the partition "random" (120/20/20)
    crossfit_<partition>_{train,dev,test}, crossfit_full_<partition>_{...}    the others
    crossfit_<task>:<prompt>, crossfit_full_<task>:<prompt>    in the words of `crossfit_prompts`
    crossfit_prompts_{train,dev,test}, ...                     the mixtures of those

Inputs are `[<published task name>] <input>`, or a prompt's text. A prompt with answer choices is
ranked, and scored by the task's own labels and metric. Importing this module lists directories and
reads no data; a bad line is reported when its split is read.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import seqio
import tensorflow as tf

from moe_jax.core.errors import nearest
from moe_jax.metrics import METRICS, answers_or_target, label_of_choice

from . import crossfit_data as data
from . import crossfit_prompts
from .crossfit_prompts import Prompt, Rendered

# Environment variables that decide what is registered.
ENVIRONMENT = (data.DATA_DIR, data.FULL_DIR, data.PARTITION)
# {category: {subcategory: [registered task names]}}
ONTOLOGY: dict[str, dict[str, list[str]]] = {}
# Registered task -> what it asks for, whatever its prompt and files.
DESCRIPTIONS: dict[str, str] = {}
# Registered task -> its prompts.
PROMPTS: dict[str, list[str]] = {}
# Mixture -> number of tasks in its partition. The mixture holds those that are present.
LISTED: dict[str, int] = {}


class _Kind(NamedTuple):
    """Few-shot or full-size: where its files are and how they are read."""

    prefix: str
    variable: str
    setting: str
    splits: Callable[[Path, str], dict[str, list[Path]]]
    read: Callable[[data.Splits, str], list[data.Example]]

    def name(self, task: str) -> str:
        """SeqIO name of a published task name, for example `glue-mnli` -> `crossfit_glue_mnli`."""
        return self.prefix + task.replace("-", "_")


# The longer prefix comes first, because a name belongs to the first kind whose prefix matches.
_KINDS = (
    _Kind("crossfit_full_", data.FULL_DIR, "full_dir", data.full_splits, data.read_full),
    _Kind("crossfit_", data.DATA_DIR, "data_dir", data.few_shot_splits, data.read_few_shot),
)
_files: dict[str, dict[str, list[Path]]] = {}  # registered task -> split -> files


def data_files(name: str) -> list[str]:
    """Every file that the registered task `name` is read from: its data, sorted, and its facts."""
    task, _, prompt = name.partition(":")
    written = [data.FACTS, crossfit_prompts.FILE] if prompt else [data.FACTS]
    return [*sorted({str(f) for files in _files[task].values() for f in files}), *map(str, written)]


def missing_hint(name: str) -> str | None:
    """Why the CrossFit task or mixture `name` is not registered; None for other names."""
    kind = _kind_of(name)
    if kind is None:
        return None
    path = data.directory(kind.variable)
    if path is None:
        return f"{name!r} needs {kind.variable} (in gin: crossfit.{kind.setting}), which is not set"
    if name in LISTED:
        return f"none of the {LISTED[name]} tasks that {name!r} lists is present in {path}"
    task, _, prompt = name.partition(":")
    if task not in map(kind.name, data.TASKS):
        return None
    if task not in _files:
        return f"the CrossFit task {task!r} is not present in {path}"
    names = [known.partition(":")[2] for known in PROMPTS.get(task, ())]
    return f"{task!r} has no prompt {prompt!r}{nearest(prompt, names)}"


def _kind_of(name: str) -> _Kind | None:
    return next((kind for kind in _KINDS if name.startswith(kind.prefix)), None)


def _dataset(
    split: str,
    shuffle_files: bool,
    seed: int | None = None,
    *,
    task: str,
    name: str,
    prompt: Prompt | None = None,
) -> tf.data.Dataset:
    """The examples of a split. Files are read here, not in TensorFlow, for clear errors."""
    del shuffle_files, seed  # examples keep the files' order; the input pipeline shuffles
    rows = [
        Rendered(f"[{task}] {inputs}", outputs, ())
        if prompt is None
        else crossfit_prompts.render(prompt, inputs, outputs)
        for inputs, *outputs in _kind_of(name).read(_files[name], split)
    ]
    features = {
        "inputs": [row.inputs for row in rows],
        "targets": [row.answers[0] for row in rows],
        "answers": _ragged([row.answers for row in rows]),
    }
    if prompt is not None:
        features["answer_choices"] = _ragged([row.choices for row in rows])
    return tf.data.Dataset.from_tensor_slices(features)


def _ragged(lists: Sequence[Sequence[str]]) -> tf.RaggedTensor:
    flat = tf.constant([text for texts in lists for text in texts], tf.string)
    return tf.RaggedTensor.from_row_lengths(flat, [len(texts) for texts in lists])


_FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
_PREPROCESSORS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def _add_task(kind: _Kind, path: Path, task: str) -> str | None:
    name = kind.name(task)
    splits = kind.splits(path, task)
    if not splits:
        return None
    _files[name] = splits
    facts = data.TASKS[task]
    of_kind = ONTOLOGY.setdefault(facts["category"], {}).setdefault(facts["subcategory"], [])
    for prompt in (None, *crossfit_prompts.prompts(task)):
        full_name, postprocess = name, answers_or_target
        if prompt is not None:
            full_name = f"{name}:{prompt.name}"
            PROMPTS.setdefault(name, []).append(full_name)
            if prompt.labels:
                postprocess = functools.partial(label_of_choice, labels=prompt.labels)
        seqio.TaskRegistry.add(
            full_name,
            source=seqio.FunctionDataSource(
                functools.partial(_dataset, task=task, name=name, prompt=prompt),
                splits=tuple(splits),
            ),
            preprocessors=_PREPROCESSORS,
            postprocess_fn=postprocess,
            metric_fns=[METRICS[facts["metric"]]],
            output_features={"inputs": _FEATURE, "targets": _FEATURE},
        )
        of_kind.append(full_name)
        DESCRIPTIONS[full_name] = facts["description"]
    return name


def _add_kind(kind: _Kind) -> None:
    path = data.directory(kind.variable)
    if path is None:
        return
    added = {task: _add_task(kind, path, task) for task in data.present(path)}  # None: no files
    for partition, lists in data.partitions().items():
        counts = []
        for part, tasks in lists.items():
            infix = "" if partition == "random" else f"{partition}_"
            mixture = f"{kind.prefix}{infix}{part}"
            names = [added[task] for task in tasks if added.get(task)]
            LISTED[mixture] = len(tasks)
            if names:
                seqio.MixtureRegistry.add(mixture, names, default_rate=1.0)
            if prompted := [prompt for name in names for prompt in PROMPTS.get(name, ())]:
                mixture = f"{kind.prefix}prompts_{infix}{part}"
                seqio.MixtureRegistry.add(mixture, prompted, default_rate=1.0)
            counts.append(f"{len(names)} of {len(tasks)} {part}")
        if partition == "random" or partition not in data.PUBLISHED:  # the rest: `tasks list`
            print(
                f"{kind.prefix}*: {', '.join(counts)} tasks of partition {partition!r}"
                f" present in {path}",
                file=sys.stderr,
            )


for _kind in _KINDS:
    _add_kind(_kind)
