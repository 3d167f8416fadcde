"""A Hugging Face tokenizer as a vocabulary of SeqIO. Imports TensorFlow."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.registry import seqio, tf  # not `import seqio`: this import is quiet
from moe_jax.data.vocabulary import TokenizersVocabulary


class SeqioTokenizers(seqio.Vocabulary):
    """A Hugging Face tokenizer for SeqIO tasks; gives the same ids as `own`."""

    def __init__(self, own: TokenizersVocabulary):
        super().__init__()
        self.own = own

    bos_id = property(lambda self: self.own.bos_id)
    eos_id = property(lambda self: self.own.eos_id)
    pad_id = property(lambda self: self.own.pad_id)
    unk_id = property(lambda self: self.own.unk_id)
    _base_vocab_size = property(lambda self: self.own.size)

    def _encode(self, s: str) -> list[int]:
        return self.own.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.own.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """A string scalar gives int32 [n]; an array of strings gives a ragged [..., n]."""
        if s.shape.rank:
            signature = tf.RaggedTensorSpec([None] * s.shape.rank, tf.int32, s.shape.rank - 1)
            return tf.map_fn(self._encode_tf, s, fn_output_signature=signature)

        def encode(text: bytes | np.ndarray) -> np.ndarray:
            text = text if isinstance(text, bytes) else text.item()  # bytes only in graphs
            return np.array(self.own.encode(text.decode(errors="replace")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """int32 [n] gives a string scalar; [..., n] gives an array of strings."""
        if ids.shape.rank > 1:
            return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)
        text = tf.numpy_function(self.own.decode, [ids], tf.string, stateful=False)
        text.set_shape([])
        return text

    def __eq__(self, other: Any) -> bool:
        if type(other) is not SeqioTokenizers:
            return False
        mine, theirs = self.own, other.own
        return (mine.settings, mine.contents) == (theirs.settings, theirs.contents)

    __hash__ = None
