"""Trains SentencePiece models on the texts of tasks."""

import io
import itertools
import tempfile
from collections.abc import Iterable, Sequence

import sentencepiece

from moe_jax.core.errors import UserError

# Training text is limited so that `prepare` stays quick: BPE takes about 0.4 s per megabyte.
MAX_TEXTS = 200_000
MAX_CHARACTERS = 8_000_000
# The only change made to text. (Without any rule, TensorFlow's tokenizer writes a line to standard
# error for every data set it reads.)
NORMALISATION = "D A\tA\n"


def train_sentencepiece(texts: Sequence[str], size: int) -> bytes:
    """Trains a byte-pair model that restores any text, with newlines and repeated spaces.

    Unknown characters are encoded as bytes. Two exceptions: '\\r\\n' becomes '\\n', and '▁'
    (U+2581) becomes a space. The result depends only on `texts` and `size`. From a large
    collection, an even sample is used.

    Raises:
        UserError: `size` is too small for all bytes and characters, or there is no text.
    """
    from sentencepiece import sentencepiece_model_pb2  # imports protobuf, which is rarely needed

    texts = list(_sample([text for text in texts if text]))
    if not texts:
        raise UserError("there is no text to train a vocabulary on")
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write(NORMALISATION)
        rules.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                hard_vocab_limit=False,
                byte_fallback=True,
                normalization_rule_tsv=rules.name,
                remove_extra_whitespaces=False,
                max_sentence_length=max([9, *(len(text.encode()) for text in texts)]) + 1,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=4,
                minloglevel=2,
            )
        except RuntimeError as e:
            reason = str(e).split("] ", 1)[-1] or str(e)
            raise UserError(f"cannot train a vocabulary of size {size}: {reason}") from e
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # the name of a temporary file
    return proto.SerializeToString(deterministic=True)


def _sample(texts: Sequence[str]) -> Iterable[str]:
    """Every k-th text, so that neither limit is exceeded by more than one text."""
    characters = sum(map(len, texts))
    step = max(-(-len(texts) // MAX_TEXTS), -(-characters // MAX_CHARACTERS))
    return itertools.islice(texts, 0, None, max(1, step))
