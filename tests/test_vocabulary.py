"""Vocabularies round-trip any text and agree with SeqIO's on the same model."""

import json
import random

import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.core import checksums
from moe_jax.core.errors import UserError
from moe_jax.data import vocabulary, vocabulary_training
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.data.vocabulary_training import train_sentencepiece
from moe_jax.runs import directory

TEXTS = [f"The {c} cat no. {n} sat,\nthen  left." for c in ("red", "old") for n in range(300)]
MODEL = train_sentencepiece(TEXTS, 420)
SENTENCEPIECE = vocabulary.SentencePieceVocabulary(MODEL)
BYTES = vocabulary.ByteVocabulary()
# "\r\n" and "▁" are the documented exceptions; surrogates are not text.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r▁"))


@settings(deadline=None)
@given(ANY_TEXT)
def test_any_text_comes_back(text):
    for vocab in (SENTENCEPIECE, BYTES):
        ids = vocab.encode(text)
        assert all(3 <= i < vocab.size for i in ids)
        assert vocab.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n", " a", "a ", "a  b\tc\n\nd", "</s> <pad>", "ﬁ 日本 ☃"]
)
def test_awkward_text_comes_back(text):
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == text


def test_documented_exceptions():
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode("a\r\nb▁c")) == "a\nb c"


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), max_size=20))
def test_decode_stops_at_eos_and_skips_padding(ids):
    for vocab in (SENTENCEPIECE, BYTES):
        known = [i for i in ids if 3 <= i < vocab.size]
        padded = [0, *known, 1, *ids, 0]
        assert vocab.decode(padded) == vocab.decode(known)


def test_short_texts_train_one():
    model = vocabulary.SentencePieceVocabulary(train_sentencepiece(["yes", "no"], 300))
    assert model.decode(model.encode("yes no")) == "yes no"


def test_training_is_deterministic_and_uses_its_size():
    assert train_sentencepiece(TEXTS, 420) == MODEL
    assert 300 < SENTENCEPIECE.size <= 420
    sentence = "The red cat no. 12 sat,\nthen  left."
    assert len(SENTENCEPIECE.encode(sentence)) < len(sentence) / 2
    assert SENTENCEPIECE.decoder_start_id == SENTENCEPIECE.pad_id == 0
    assert (SENTENCEPIECE.eos_id, SENTENCEPIECE.unk_id, SENTENCEPIECE.bos_id) == (1, 2, None)


def test_long_collections_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(vocabulary_training, "MAX_CHARACTERS", 1000)
    kept = list(vocabulary_training._sample(["x" * 10] * 500 + ["y" * 10] * 500))
    assert 900 <= sum(map(len, kept)) <= 1010
    assert kept.count("x" * 10) == kept.count("y" * 10)


@pytest.mark.parametrize("size", [3, 200])
def test_size_below_bytes_is_refused(size):
    with pytest.raises(UserError, match=f"vocabulary of size {size}"):
        train_sentencepiece(TEXTS, size)


def test_no_text_is_refused():
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(["", ""], 300)


@pytest.mark.parametrize("text", ["The old cat\nsat", "naïve  日本", "a\r\nb", ""])
def test_ids_are_those_of_seqio(tmp_path, text):
    model = tmp_path / "m.model"
    model.write_bytes(MODEL)
    theirs = seqio.SentencePieceVocabulary(str(model), extra_ids=0)
    for vocab, peer in ((SENTENCEPIECE, theirs), (BYTES, seqio.ByteVocabulary(extra_ids=0))):
        assert vocab.encode(text) == list(peer.encode(text))
        assert vocab.encode(text) == peer.encode_tf(text).numpy().tolist()
        assert vocab.size == peer.vocab_size
        assert (vocab.pad_id, vocab.eos_id, vocab.unk_id) == (
            peer.pad_id,
            peer.eos_id,
            peer.unk_id,
        )


def _save(directory, settings, model=None):
    (directory / vocabulary.FILE).write_text(json.dumps(settings))
    if model is not None:
        (directory / vocabulary.MODEL).write_bytes(model)
    return vocabulary.load_vocabulary(directory)


def test_load(tmp_path):
    loaded = _save(tmp_path, {"kind": "sentencepiece"}, MODEL)
    assert loaded.encode("The cat") == SENTENCEPIECE.encode("The cat")
    assert _save(tmp_path, {"kind": "bytes", "extra_ids": 10}).size == 269
    with pytest.raises(UserError, match="unknown kind of vocabulary 'words'"):
        _save(tmp_path, {"kind": "words"})


def test_load_any_seqio_vocabulary(tmp_path):
    (tmp_path / "factory.py").write_text(
        "import seqio\ndef words():\n  return seqio.UnigramVocabulary(['a', 'b'], True)\n"
    )
    loaded = _save(tmp_path, {"kind": "seqio", "factory": f"{tmp_path / 'factory.py'}:words"})
    assert loaded.encode("b a c") == [2, 1, 3]
    assert loaded.decode([2, 1]) == "b a"
    assert loaded.size == 4


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_missing_or_damaged_model_is_one_line(tmp_path, content):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.model"):
        vocabulary.read_sentencepiece(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "sentencepice"},
        {"kind": "seqio"},
        {"trained_on": ("a", "b")},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(UserError, match="VocabularyConfig"):
        VocabularyConfig(**settings)


def test_a_path_is_absolute_and_need_not_be_there_until_it_is_read(tmp_path, monkeypatch):
    """A run carries its vocabulary, and is read from other directories."""
    monkeypatch.chdir(tmp_path)
    config = VocabularyConfig(path="gone.model")
    assert config.path == str(tmp_path / "gone.model")
    with pytest.raises(UserError, match=r"VocabularyConfig\.path: no SentencePiece model at /"):
        config.check()


def test_a_damaged_vocabulary_of_a_run_is_named(tmp_path):
    """Any bit of any file; a run of before there were checksums is read."""
    vocabulary.write_vocabulary(tmp_path / "cache", {"kind": "sentencepiece"},
                                {vocabulary.MODEL: MODEL})  # fmt: skip
    checksums.seal(tmp_path / "cache")
    directory.copy_vocabulary(tmp_path / "run", tmp_path / "cache")
    own = tmp_path / "run" / vocabulary.DIRECTORY
    assert vocabulary.load_vocabulary(own).encode("The") == SENTENCEPIECE.encode("The")
    names = sorted(path.name for path in own.iterdir())
    assert names == [checksums.FILE, vocabulary.MODEL, vocabulary.FILE]
    rng = random.Random(0)
    for name in names * 5:
        good = (own / name).read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (own / name).write_bytes(bad)
        with pytest.raises(UserError, match=rf"{own}/\S+ is not ") as error:
            vocabulary.load_vocabulary(own)
        assert "\n" not in str(error.value)
        (own / name).write_bytes(good)
    (own / checksums.FILE).unlink()
    assert vocabulary.load_vocabulary(own).size == SENTENCEPIECE.size
