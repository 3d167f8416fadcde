"""Data inside T5X: SeqIO's examples with their task, and this package's own batches.

Imports TensorFlow, as T5X does.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from clu.data import dataset_iterator

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data import vocabulary
from moe_jax.data.batch import of_rows
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import train_batches
from moe_jax.data.registry import FEATURES, load_vocabulary, seqio, tf, with_vocabulary
from moe_jax.data.seqio_tokenizers import SeqioTokenizers
from moe_jax.decoding.search import DecodingIds
from moe_jax.runs import configurables
from moe_jax.runs.config import DataConfig, RunConfig
from moe_jax.runs.mixtures import prepare_mixtures

# The task of every row. Rows that follow each other in groups of `DataConfig.rows_per_group` have
# it under the second name.
TASK_ID, GROUP_TASK_ID = "task_id", "group_task_id"
# T5X's name -> ours.
NAMES = {
    "encoder_input_tokens": "inputs",
    "encoder_segment_ids": "input_segments",
    "encoder_positions": "input_positions",
    "decoder_input_tokens": "decoder_inputs",
    "decoder_target_tokens": "targets",
    "decoder_segment_ids": "target_segments",
    "decoder_positions": "target_positions",
}
_SPEC = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)


class TaskFeatureConverter(seqio.FeatureConverter):
    """One example per row, with the row of the task table that its task has.

    The examples are those of tasks that `register` has registered. A row is laid out as
    `data.packing.build` does.

    Args:
        ids: the vocabulary's special ids.
        pack: must be False.
    """

    TASK_FEATURES = dict.fromkeys((*FEATURES, TASK_ID), _SPEC)
    MODEL_FEATURES = dict.fromkeys((*NAMES, TASK_ID), _SPEC)
    PACKING_FEATURE_DTYPES = None

    def __init__(self, ids: DecodingIds, pack: bool = False, **settings: Any):
        if pack:
            raise UserError(
                "DatasetConfig.pack is True, but SeqIO would pack examples of several tasks into"
                " one row, which has one route: set it to False, or train on"
                " @moe.get_dataset, which packs the examples of each task"
            )
        super().__init__(pack=False, **settings)
        self._ids = ids

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> Any:
        if TASK_ID not in ds.element_spec:
            raise UserError(
                "a task of this data is not in the model's task table, which has the tasks of"
                " DataConfig.mixture_or_task_name: T5X can only use tasks that the model trains on"
            )
        return super().__call__(ds, {**task_feature_lengths, TASK_ID: 1})

    def _convert_features(self, ds, task_feature_lengths):
        ids = self._ids

        def side(tokens, length):
            def filled(values, padding=0):
                padded = tf.pad(values, [[0, length - count]], constant_values=padding)
                return tf.ensure_shape(padded, [length])

            tokens = tokens[:length]
            count = tf.size(tokens)
            ones = tf.ones_like(tokens)
            return filled(tokens, ids.pad), filled(ones), filled(tf.range(count))

        def convert(example):
            inputs, targets = (side(example[name], task_feature_lengths[name]) for name in FEATURES)
            moved = tf.concat([[ids.start], targets[0][:-1]], 0)
            decoder_inputs = tf.where(targets[1] > 0, moved, ids.pad)
            values = (*inputs, decoder_inputs, *targets, example[TASK_ID])
            return dict(zip((*NAMES, TASK_ID), values, strict=True))

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths):
        lengths = {
            name: task_feature_lengths["inputs" if name.startswith("encoder") else "targets"]
            for name in NAMES
        }
        return {**lengths, TASK_ID: 1}


def register(mixture: PreparedMixture) -> seqio.Vocabulary:
    """Registers the tasks of a mixture again: in its vocabulary, with their row of the task table.

    They keep their names, and mixtures of them alone have the new ones. Examples that are too long
    are cut as `data.packing.truncate` cuts them, so that EOS stays.

    Returns:
        The vocabulary.
    """
    shared = seqio_vocabulary(mixture.vocabulary_dir)
    row = seqio.Feature(
        seqio.PassThroughVocabulary(len(mixture.names)), add_eos=False, dtype=tf.int32
    )
    for task_id, name in enumerate(mixture.names):
        task = seqio.TaskRegistry.get(name)
        if TASK_ID in task.output_features:  # by an earlier model of this process
            continue
        task = with_vocabulary(task, shared)
        task = task.replace(
            output_features={**task.output_features, TASK_ID: row},
            preprocessors=[*task.preprocessors, _finish(task_id, shared.eos_id)],
        )
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add_provider(name, task)
    for name in list(seqio.MixtureRegistry.names()):  # the parts of a mixture come before it
        old = seqio.MixtureRegistry.get(name)
        if {task.name for task in old.tasks} <= {*mixture.names}:
            seqio.MixtureRegistry.remove(name)
            parts = list(old.rate_per_task_name.items())
            seqio.MixtureRegistry.add(name, parts, sample_fn=old._sample_fn)
    return shared


def _finish(task_id: int, eos: int) -> Callable[..., tf.data.Dataset]:
    """The last preprocessor of a task."""

    def cut(tokens, length):
        if length is None or length <= 0:
            return tokens
        end = tf.where(tokens[-1:] == eos, tokens[-1:], tokens[length - 1 : length])
        return tf.cond(
            tf.size(tokens) <= length,
            lambda: tokens,
            lambda: tf.concat([tokens[: length - 1], end], 0),
        )

    def finish(
        dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None = None
    ) -> tf.data.Dataset:
        lengths = sequence_length or {}

        def one(example):
            tokens = {name: cut(example[name], lengths.get(name)) for name in FEATURES}
            return {**example, **tokens, TASK_ID: tf.constant([task_id], tf.int32)}

        return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)

    return finish


def seqio_vocabulary(directory: Path) -> seqio.Vocabulary:
    """A prepared vocabulary as SeqIO's: it gives the same ids as `vocabulary.load_vocabulary`."""
    settings = vocabulary.read_settings(directory)
    match settings["kind"]:
        case "bytes":
            return seqio.ByteVocabulary(settings["extra_ids"])
        case "sentencepiece":
            return seqio.SentencePieceVocabulary(str(directory / vocabulary.MODEL))
        case "tokenizers":
            return SeqioTokenizers(vocabulary.load_vocabulary(directory))
        case _:
            return load_vocabulary(settings, directory / vocabulary.FILE)


class Batches(dataset_iterator.DatasetIterator):
    """The batches of `train_batches` as T5X wants them: [B, L], the rows of a group adjacent."""

    def __init__(self, batches: Any, rows_per_group: int, rows: int, lengths: Mapping[str, int]):
        self._batches = iter(batches)
        self._rows_per_group, self._rows, self._lengths = rows_per_group, rows, lengths

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        rows = {name: a.reshape(-1, a.shape[-1]) for name, a in of_rows(batch).items()}
        result = {theirs: rows[ours] for theirs, ours in NAMES.items()}
        return result | {GROUP_TASK_ID: np.repeat(batch["task_id"], self._rows_per_group)[:, None]}

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        shapes = {
            name: self._lengths["inputs" if name.startswith("encoder") else "targets"]
            for name in NAMES
        }
        return {
            name: dataset_iterator.ArraySpec(np.int32, (self._rows, length))
            for name, length in {**shapes, GROUP_TASK_ID: 1}.items()
        }

    def save(self, filename: Any) -> None:
        """Writes the position in the data."""
        files.write_json(Path(filename), self._batches.get_state())

    def restore(self, filename: Any) -> None:
        """Goes on where `save` was called."""
        self._batches.set_state(files.read_json(Path(filename)))


def get_dataset(
    cfg: Any,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Callable[..., Any],
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
) -> Batches:
    """The training batches of `moe_jax.train`, for T5X's `train.get_dataset_fn`.

    Everything comes from `DataConfig` and SEED; of `cfg`, T5X's `DatasetConfig`, only the batch
    size is read, which must agree.

    Raises:
        UserError: it does not, or rows have several shapes.
    """
    del feature_converter_cls, num_epochs, continue_from_last_checkpoint
    data, seed = configurables.build(DataConfig), configurables.build(RunConfig).seed
    if cfg.batch_size != data.batch_size:
        raise UserError(
            f"DatasetConfig.batch_size is {cfg.batch_size}, DataConfig.batch_size"
            f" {data.batch_size}: set both by BATCH_SIZE"
        )
    if data.row_shapes > 1:
        raise UserError(
            f"DataConfig.row_shapes is {data.row_shapes}, but T5X compiles one shape of rows"
        )
    batches = train_batches(
        prepare_mixtures(data)[data.mixture_or_task_name], **data.batching, seed=seed,
        part=(shard_id, num_shards),
    )  # fmt: skip
    return Batches(batches, data.rows_per_group, data.batch_size // num_shards, data.lengths)
