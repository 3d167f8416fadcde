"""A task from TSV files: the plural of an English noun. See README.md in this directory."""

import functools
from pathlib import Path

import seqio
import tensorflow as tf

from moe_jax.builtin_tasks.crossfit_data import read_tsv
from moe_jax.metrics import answers_or_target, exact_match

# Groups tasks in `moe_jax.tasks list` and reports; without it they have "no category".
ONTOLOGY = {"rewriting": {"inflection": ["my_plurals"]}}

FILES = {
    split: Path(__file__).resolve().with_name(f"plurals_{split}.tsv")
    for split in ("train", "validation", "test")
}


def dataset(split: str, shuffle_files: bool, seed: int | None = None, *, files: dict[str, Path]):
    """Lines `input<TAB>output[<TAB>other valid outputs]` as `inputs`, `targets` and `answers`.

    `read_tsv` names file and line of anything that is not such a line.
    """
    examples = read_tsv(files[split])
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [f"plural of: {noun}" for noun, *_ in examples],
            "targets": [first for _, first, *_ in examples],
            "answers": tf.ragged.constant([answers for _, *answers in examples]),
        }
    )


# Every output feature is tokenised. A run replaces this vocabulary by the one it chooses.
feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)

seqio.TaskRegistry.add(
    "my_plurals",
    # Nothing is read here: the function is called when the task is prepared.
    source=seqio.FunctionDataSource(functools.partial(dataset, files=FILES), splits=tuple(FILES)),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    postprocess_fn=answers_or_target,  # all of `answers` count as right
    metric_fns=[exact_match],  # the first value of the first function is the task's score
    output_features={"inputs": feature, "targets": feature},
)


def data_files(task_name: str) -> list[str]:
    """Local files the task reads: a change of one makes its prepared cache stale."""
    return [str(path) for path in FILES.values()]
