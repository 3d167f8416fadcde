"""The skills gym: text-to-text tasks generated from a seed, built from planted skills.

This is the default data. Training tasks (mixture `skills_gym_train`) teach four categories of
skill: extractive, classification, world knowledge and generation. Tasks of one skill have different
texts and labels. Some tasks interfere: they share their texts and want other answers, and nothing
in the text says which (with gin's `skills_gym.descriptions = True`, every input begins with the
description of its task). Unseen tasks (mixture `skills_gym_unseen`) are new tasks of these skills,
and combinations of two; they also have few-shot splits `fewshot_<seed>_train` and
`fewshot_<seed>_validation`. `ONTOLOGY` says which skill was planted where, so that it can be
compared with what the routes learn.

The gym's seed (gin's `skills_gym.seed`, or SKILLS_GYM_SEED) chooses the world that the tasks talk
about: its words, labels and facts. Names of tasks do not depend on it. Registering is cheap:
examples are drawn when a split is read.
"""

from functools import partial

import seqio
import tensorflow as tf

from moe_jax import metrics

from .skills_table import ONTOLOGY, SKILLS, TRAIN, UNSEEN, examples
from .skills_world import DESCRIBED, SEED, current_descriptions, current_seed

__all__ = ["DESCRIPTIONS", "ENVIRONMENT", "ONTOLOGY"]

# The environment variables that decide what is drawn.
ENVIRONMENT = (SEED, DESCRIBED)
DESCRIPTIONS = {task.name: task.description for task in SKILLS.values()}


def _dataset(
    name: str, split: str, shuffle_files: bool = False, seed: int | None = None
) -> tf.data.Dataset:
    """A split as strings: `inputs`, `targets`, and `answers` if any example has several.

    `shuffle_files` and `seed` are SeqIO's; the order is fixed, and the pipeline shuffles.
    """
    del shuffle_files, seed
    rows = examples(SKILLS[name], split, current_seed())
    prefix = f"{DESCRIPTIONS[name]} " if current_descriptions() else ""
    columns = {
        "inputs": tf.constant([prefix + row.inputs for row in rows]),
        "targets": tf.constant([row.answers[0] for row in rows]),
    }
    if any(len(row.answers) > 1 for row in rows):
        columns["answers"] = tf.ragged.constant([row.answers for row in rows])
    return tf.data.Dataset.from_tensor_slices(columns)


for _task in SKILLS.values():
    seqio.TaskRegistry.add(
        _task.name,
        source=seqio.FunctionDataSource(
            partial(_dataset, _task.name),
            splits=list(_task.sizes),
            num_input_examples=_task.sizes,
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        postprocess_fn=metrics.answers_or_target,
        metric_fns=[getattr(metrics, _task.metric)],
        output_features={
            "inputs": seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
            "targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
        },
    )

seqio.MixtureRegistry.add("skills_gym_train", [(name, 1.0) for name in TRAIN])
seqio.MixtureRegistry.add("skills_gym_unseen", [(name, 1.0) for name in UNSEEN])
