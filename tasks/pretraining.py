"""Plain text as SeqIO tasks: a model learns to restore what was corrupted in it.

Set PRETRAINING_DIR, or gin's `pretraining.data_dir`; see `pretraining_data`.

    pretraining_infilling   BART's text infilling of sentences in random order
    pretraining_spans       T5's span corruption
    pretraining_text        the text itself, for training a vocabulary on

A text is cut into pieces that fit into a row. Inputs and targets need a vocabulary with sentinels
(VocabularyConfig.extra_ids): one for infilling, one for every span of a piece for spans. Each
prepared copy of a text is corrupted in another way, and stays so.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import seqio
import tensorflow as tf

from moe_jax.core.errors import UserError

from . import denoising
from . import pretraining_data as data

ENVIRONMENT = (data.DATA_DIR, data.PARTITION, data.CHARACTERS, data.COPIES)
_ENDS = (".", "!", "?")

_Features = Mapping[str, seqio.Feature]
_Corruption = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def data_files(name: str) -> list[str]:
    """Every file that the texts are read from."""
    del name
    return list(map(str, data.files(data.directory())))


def missing_hint(name: str) -> str | None:
    """Why the task `name` is not registered; None for names of other modules."""
    if name.startswith("pretraining_") and data.directory() is None:
        return f"{name!r} needs {data.DATA_DIR} (in gin: pretraining.data_dir), which is not set"
    return None


def _texts(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del split, shuffle_files, seed
    texts = data.documents(data.files(data.directory()))
    return tf.data.Dataset.from_tensor_slices({"targets": texts})


def _cut(dataset: tf.data.Dataset, longest: int) -> tf.data.Dataset:
    """Each text in as few equal pieces as have at most `longest` tokens; not those of one token."""

    def pieces(example):
        tokens = example["targets"]
        count = tf.maximum(1, -(-tf.size(tokens) // longest))
        ends = tf.range(count + 1) * tf.size(tokens) // count
        return tf.data.Dataset.from_tensor_slices((ends[:-1], ends[1:])).map(
            lambda start, end: {"targets": tokens[start:end]}
        )

    return dataset.flat_map(pieces).filter(lambda example: tf.size(example["targets"]) > 1)


@seqio.map_over_dataset(num_seeds=1)
def _corrupt(example, corruption: _Corruption, seed):
    """Inputs and targets from `targets`."""

    def apply(tokens, seed):
        return corruption(tokens, np.random.default_rng(seed.astype(np.uint32)))

    given = [example["targets"], tf.stack(seed)]
    inputs, targets = tf.numpy_function(apply, given, (tf.int32, tf.int32))
    return {"inputs": tf.ensure_shape(inputs, [None]), "targets": tf.ensure_shape(targets, [None])}


def _infilling(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int], output_features: _Features
) -> tf.data.Dataset:
    longest = min(sequence_length["inputs"], sequence_length["targets"]) - 1  # and EOS
    vocabulary = output_features["inputs"].vocabulary
    (mask,) = _sentinels(vocabulary, 1)
    ends_sentence_V = np.array([text.endswith(_ENDS) for text in _pieces(vocabulary)])

    def corruption(tokens, rng):
        return denoising.infill(denoising.permute(tokens, rng, ends_sentence_V), rng, mask), tokens

    return _corrupt(_cut(dataset, longest).repeat(data.copies()), corruption=corruption)


def _spans(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int], output_features: _Features
) -> tf.data.Dataset:
    longest, fits = 1, True
    while fits:
        longest += 1
        noise, count = denoising.span_counts(longest + 1)
        most = {"inputs": longest + 1 - noise + count, "targets": noise + count}
        fits = all(most[name] < sequence_length[name] for name in most)  # EOS is added
    sentinels = _sentinels(output_features["inputs"].vocabulary, denoising.span_counts(longest)[1])

    def corruption(tokens, rng):
        return denoising.spans(tokens, rng, sentinels)

    return _corrupt(_cut(dataset, longest).repeat(data.copies()), corruption=corruption)


def _sentinels(vocabulary: seqio.Vocabulary, count: int) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ..., of bytes the last ids."""
    if vocabulary.extra_ids >= count:
        return [vocabulary.vocab_size - 1 - i for i in range(count)]
    # A prepared SentencePiece model holds them as pieces like others.
    ids = {text: i for i, text in enumerate(_pieces(vocabulary))}
    names = [f"<extra_id_{i}>" for i in range(count)]
    if not ids.keys() >= set(names):
        raise UserError(
            f"pre-training needs a vocabulary with {count} sentinels:"
            f" --gin.VocabularyConfig.extra_ids={count}"
        )
    return [ids[name] for name in names]


def _pieces(vocabulary: seqio.Vocabulary) -> list[str]:
    """The text of every id, without spaces around it."""
    return [vocabulary.decode([i]).strip() for i in range(vocabulary.vocab_size)]


@seqio.map_over_dataset
def _copied(example):
    return {"inputs": example["targets"], "targets": example["targets"]}


def _add_all() -> None:
    if data.directory() is None:
        return
    data.files(data.directory())  # fails early
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
    for name, corrupt in (("infilling", _infilling), ("spans", _spans), ("text", _copied)):
        seqio.TaskRegistry.add(
            f"pretraining_{name}",
            source=seqio.FunctionDataSource(_texts, splits=("train",)),
            preprocessors=[tokenize, corrupt, seqio.preprocessors.append_eos],
            output_features={"inputs": feature, "targets": feature},
        )


_add_all()
