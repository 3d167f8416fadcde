"""P3, T0's prompted datasets, as SeqIO tasks and mixtures, over the files of `p3_data`.

Set P3_DIR, or gin's `p3.data_dir`. Registered are, for the folders that are present there:

    p3_<folder>                                       a dataset in the words of one prompt
    p3_t0_train, p3_t0p_train, p3_t0pp_train          what T0, T0+ and T0++ were trained on
    p3_held_out, p3_held_out_<kind>                   what T0 was evaluated on: by kind,
        natural_language_inference, coreference, sentence_completion, word_sense_disambiguation

Training mixtures have T0's rates: as many examples as a dataset has, or 500,000 over the number of
its prompts where it has more. A held-out prompt is scored by its answer choices, or by its folder
`_score_eval` where it has none.
"""

import functools
import re
from collections.abc import Sequence

import seqio
import tensorflow as tf

from moe_jax.metrics import (
    accuracy,
    answers_or_target,
    choice_target,
    exact_match,
    rank_classification,
    rouge_l,
)

from . import p3_data as data
from .data_directory import data_directory

ENVIRONMENT = (data.DATA_DIR,)
ONTOLOGY: dict[str, dict[str, list[str]]] = {}  # kind of task -> dataset -> tasks
PROMPTS: dict[str, list[str]] = {}  # dataset -> tasks
_CAP = 500_000
_TRAIN = {"p3_t0_train": ["t0"], "p3_t0p_train": ["t0", "t0p"]}
_TRAIN["p3_t0pp_train"] = [*_TRAIN["p3_t0p_train"], "t0pp"]
_FILES: dict[str, list[str]] = {}


def data_files(name: str) -> list[str]:
    """Every file that the registered task `name` is read from."""
    return _FILES[name]


def missing_hint(name: str) -> str | None:
    """Why the task or mixture `name` is not registered; None where it is no such name."""
    if not name.startswith("p3_"):
        return None
    path = data_directory(data.DATA_DIR)
    if path is None:
        return f"{name!r} needs {data.DATA_DIR} (in gin: p3.data_dir), which is not set"
    if name in _TRAIN or name.startswith("p3_held_out"):
        return f"no prompt of {name!r} is present in {path}"
    return None


# Stored types, as SeqIO's cache writes them.
_STORED = {
    **dict.fromkeys(data.TEXTS, tf.io.FixedLenFeature([], tf.string)),
    "answer_choices": tf.io.RaggedFeature(tf.string),
    "idx": tf.io.FixedLenFeature([2], tf.int64),
    "is_correct": tf.io.FixedLenFeature([], tf.int64),
    "weight": tf.io.FixedLenFeature([], tf.float32),
}


def _source(prompt: data.Prompt) -> seqio.DataSource:
    if prompt.json_lines:
        read = functools.partial(_from_lines, prompt=prompt)
        return seqio.FunctionDataSource(read, splits=tuple(prompt.files))
    return seqio.TFExampleDataSource(
        {split: list(map(str, files)) for split, files in prompt.files.items()},
        {name: _STORED[name] for name in prompt.features},
    )


def _from_lines(
    split: str, shuffle_files: bool, seed: int | None = None, *, prompt: data.Prompt
) -> tf.data.Dataset:
    del shuffle_files, seed
    rows = list(data.read_lines(prompt, split))
    columns = {name: [row[name] for row in rows] for name in prompt.features}
    if "answer_choices" in columns:
        columns["answer_choices"] = tf.ragged.constant(columns["answer_choices"], tf.string)
    return tf.data.Dataset.from_tensor_slices(columns)


@seqio.map_over_dataset
def _texts(example):
    """P3's features by the names used here. Published targets begin with a space."""
    inputs, targets = (example.pop(name) for name in data.TEXTS)
    if "answer_choices" in example:
        example["answer_choices"] = tf.strings.strip(example["answer_choices"])
    return {"inputs": inputs, "targets": tf.strings.strip(targets), **example}


_FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
_PREPROCESSORS = [_texts, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def _add(prompt: data.Prompt) -> str:
    name = "p3_" + re.sub(r"[^\w.]", "_", prompt.folder)
    if prompt.scored:
        metrics = [rank_classification]
    elif "answer_choices" in prompt.features:
        metrics = [accuracy]
    else:
        metrics = [rouge_l, exact_match]
    seqio.TaskRegistry.add(
        name,
        source=_source(prompt),
        preprocessors=_PREPROCESSORS,
        postprocess_fn=choice_target if prompt.scored else answers_or_target,
        metric_fns=metrics,
        output_features={"inputs": _FEATURE, "targets": _FEATURE},
    )
    _FILES[name] = [str(file) for files in prompt.files.values() for file in files]
    kind = data.KINDS.get(prompt.dataset, "other")
    ONTOLOGY.setdefault(kind, {}).setdefault(prompt.dataset, []).append(name)
    if prompt.dataset in data.KINDS:
        PROMPTS.setdefault(prompt.dataset, []).append(name)
    return name


def _rate(task: seqio.Task, prompts: int) -> float:
    """T0's: examples of the dataset, or where they are too many the cap shared by its prompts."""
    examples = task.num_input_examples("train") or 0
    return examples if examples <= _CAP else _CAP // prompts


def _held_out(prompts: dict[str, data.Prompt]) -> list[str]:
    """Names of those that T0 was evaluated on: one for every prompt."""
    chosen: dict[tuple[str, str], str] = {}
    for name, prompt in prompts.items():  # a prompt's own folder comes before its `_score_eval`
        ranked = prompt.scored or "answer_choices" in prompt.features
        held_out = "held_out" in data.GROUPS.get(prompt.dataset, ())
        if held_out and ranked and prompt.prompt not in data.OTHER_TASKS.get(prompt.dataset, ()):
            chosen.setdefault((prompt.dataset, prompt.prompt), name)
    return list(chosen.values())


def _add_mixture(name: str, tasks: Sequence[str | tuple[str, object]]) -> None:
    if tasks:
        seqio.MixtureRegistry.add(name, list(tasks), default_rate=1.0)


def _add_all() -> None:
    path = data_directory(data.DATA_DIR)
    if path is None:
        return
    prompts = {_add(prompt): prompt for prompt in data.prompts(path)}
    plain = {n: p for n, p in prompts.items() if not p.scored and "train" in p.files}
    for mixture, groups in _TRAIN.items():
        chosen = {
            n: p
            for n, p in plain.items()
            if not set(groups).isdisjoint(data.GROUPS.get(p.dataset, ()))
        }
        counts = [p.dataset for p in chosen.values()]
        _add_mixture(
            mixture,
            [
                (n, functools.partial(_rate, prompts=counts.count(p.dataset)))
                for n, p in chosen.items()
            ],
        )
    held_out = _held_out(prompts)
    _add_mixture("p3_held_out", held_out)
    for kind in dict.fromkeys(data.KINDS.values()):
        of_kind = [n for n in held_out if data.KINDS[prompts[n].dataset] == kind]
        _add_mixture(f"p3_held_out_{kind}", of_kind)


_add_all()
