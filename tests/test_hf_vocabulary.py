"""Tokenizers of BART and T5: the ids of `transformers`, in NumPy, in SeqIO and in batches."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moe_jax.core.errors import UserError
from moe_jax.data import packing, vocabulary
from moe_jax.data.example import Example
from moe_jax.data.vocabulary import VocabularyConfig, read_tokenizers

DATA = Path(__file__).with_name("data") / "hf"
BART = read_tokenizers(DATA / "bart")
T5 = read_tokenizers(DATA / "t5")


# ---- ids ----


@pytest.mark.parametrize("name", ["bart", "t5", "t5_1_0", "mt5"])
def test_stored_ids(name):
    own = read_tokenizers(DATA / name)
    stored = json.loads((DATA / name / "ids.json").read_text())
    assert len(stored) > 10
    for text, ids in stored:
        assert [*own.encode(text), own.eos_id] == ids, repr(text)


# Any text except lone surrogates (which are not text), mixed with difficult cases for tokenizers.
_SPECIAL = ("</s>", "<s>", "<pad>", "<unk>", "<mask>", "<extra_id_3>")
_AWKWARD = ("word ", " the cat", "👩\u200d👩\u200d👧", "🇫🇷", "ﬁ", "\u0301", "▁", "Ġ", "1e-9")
_SPACES = ("\x00", "\x85", "\u2028", "\u3000", "\r\n", " ")
_PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text(st.characters(max_codepoint=0x2FF), max_size=12),
    st.sampled_from(_AWKWARD + _SPACES + _SPECIAL),
    st.integers(1, 3000).map(lambda n: "x" * n),
)
TEXTS = st.lists(_PIECES, max_size=6).map("".join)


def _same_ids(ours, theirs) -> None:
    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    @example("é" * 5000)
    def same(text):
        assert [*ours.encode(text), ours.eos_id] == theirs(text).input_ids

    same()
    for code in range(0x3100):  # every letter, mark, space and control character of many scripts
        text = f"ab{chr(code)}cd"
        assert [*ours.encode(text), ours.eos_id] == theirs(text).input_ids, hex(code)


def _transformers(directory):
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_bart_ids_are_those_of_transformers():
    _same_ids(BART, _transformers(DATA / "bart"))


def test_bart_from_vocabulary_and_merges(tmp_path):
    """BART's older files, without tokenizer.json."""
    model = json.loads((DATA / "bart" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {"<mask>": 271}))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
    )
    shutil.copy(DATA / "bart" / "config.json", tmp_path)
    own = read_tokenizers(tmp_path)
    assert own.size == 272
    for text, ids in json.loads((DATA / "bart" / "ids.json").read_text()):
        assert [*own.encode(text), own.eos_id] == ids, repr(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BartTokenizer"}')
    _same_ids(own, _transformers(tmp_path))


def test_t5_with_its_own_normalisation(tmp_path):
    """A SentencePiece model like T5's, with NFKC; then the tokenizer.json of `transformers`."""
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import make_hf_fixture

    (tmp_path / "spiece.model").write_bytes(make_hf_fixture.unigram(200))
    shutil.copy(DATA / "t5" / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    own = read_tokenizers(tmp_path)
    theirs = _transformers(tmp_path)
    assert own.size == len(theirs)
    assert own.encode("<extra_id_0>") == [own.size - 1]
    _same_ids(own, theirs)
    theirs.save_pretrained(tmp_path / "saved")
    shutil.copy(DATA / "t5" / "config.json", tmp_path / "saved")
    (tmp_path / "saved" / "spiece.model").unlink(missing_ok=True)
    again = read_tokenizers(tmp_path / "saved")
    for text in ("The old cat\tsat.", "ﬁ ① 日本", "a <extra_id_7> b", "é" * 3000):
        assert again.encode(text) == own.encode(text)


def test_mt5_with_its_own_sentinels_and_bytes(tmp_path):
    """A SentencePiece model like mT5's, whose pieces include bytes and sentinels."""
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import make_hf_fixture

    sentinels = [f"▁<extra_id_{i}>" for i in reversed(range(10))]
    model = make_hf_fixture.unigram(400, user_defined_symbols=sentinels, byte_fallback=True)
    (tmp_path / "spiece.model").write_bytes(model)
    for file in ("config.json", "tokenizer_config.json"):
        shutil.copy(DATA / "mt5" / file, tmp_path)
    own = read_tokenizers(tmp_path)
    assert len(own.encode("<extra_id_3>")) == 1
    _same_ids(own, _transformers(tmp_path))


ADDED = {"<sep>": True, "Wumpus": False}  # token -> whether it is special


def with_added_tokens(name: str, directory: Path, form: str) -> int:
    """Writes the files that a slow tokenizer saves after `add_tokens`; returns the first added
    id."""
    settings = json.loads((DATA / name / "tokenizer_config.json").read_text())
    shutil.copy(DATA / name / "config.json", directory)
    if name == "bart":
        model = json.loads((DATA / "bart" / "tokenizer.json").read_text())["model"]
        (directory / "vocab.json").write_text(json.dumps(model["vocab"] | {"<mask>": 271}))
        merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
        (directory / "merges.txt").write_text("#version: 0.2\n" + merges)
        first = 272
    else:
        shutil.copy(DATA / name / "spiece.model", directory)
        first = 61
    ids = {token: first + i for i, token in enumerate(ADDED)}
    if form == "added_tokens_decoder":
        flags = {"lstrip": False, "rstrip": False, "single_word": False}
        settings["added_tokens_decoder"] = {
            str(ids[token]): {"content": token, "normalized": not special, "special": special}
            | flags
            for token, special in ADDED.items()
        }
    else:
        (directory / "added_tokens.json").write_text(json.dumps(ids))
        special = {"extra_special_tokens": ["<sep>"]}
        (directory / "special_tokens_map.json").write_text(json.dumps(special))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return first


@pytest.mark.parametrize("form", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize("name", ["bart", "t5", "mt5"])
def test_added_tokens(name, form, tmp_path):
    first = with_added_tokens(name, tmp_path, form)
    own = read_tokenizers(tmp_path)
    assert own.size == first + len(ADDED)
    ids = own.encode("the cat <sep> a Wumpus")
    assert first in ids and first + 1 in ids
    text = own.decode(ids)
    assert "Wumpus" in text and "<sep>" not in text
    vocabulary.write_vocabulary(tmp_path / "again", own.settings, own.contents)
    assert vocabulary.load_vocabulary(tmp_path / "again").encode("a <sep>") == own.encode("a <sep>")
    theirs = _transformers(tmp_path)
    assert own.size == len(theirs)
    assert text == theirs.decode(ids, skip_special_tokens=True)
    for text in (
        "the cat",
        "the cat <sep> a dog<sep>",
        "Wumpus sat",
        "the Wumpus",
        "aWumpusb<sep>",
    ):
        assert [*own.encode(text), own.eos_id] == theirs(text).input_ids, text


SAVED = {  # what is added -> (token, its flags)
    "none": [],
    "special": [("<sep>", {"special": True, "normalized": False})],
    "plain": [("Wumpus", {}), ("foo bar", {}), ("the", {})],
    "single_word": [("cat", {"single_word": True})],
    "mask": [("<mask>", {"special": True, "normalized": False, "lstrip": True})],
}
_PARTS = ("the", "cat", "Wumpus", "aWumpusb", "<sep>", "foo bar", "foo  bar", "concat", "</s>",
          "<pad>", "<mask>", "<extra_id_3>", "\n", "é", "dog.", " ", "  ")  # fmt: skip


@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize("added", SAVED)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_added_tokens_as_transformers_saves_them(name, added, form, tmp_path):
    first = with_added_tokens(name, tmp_path, "added_tokens_decoder")
    shutil.copy(DATA / name / "tokenizer_config.json", tmp_path)
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    tokenizer = _transformers(tmp_path)
    tokens = [transformers.AddedToken(token, **flags) for token, flags in SAVED[added]]
    for token in tokens:
        tokenizer.add_tokens([token], special_tokens=token.special)
    tokenizer.save_pretrained(tmp_path)
    if form != "tokenizer.json":
        saved = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
        (tmp_path / "tokenizer.json").unlink()
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings.pop("added_tokens_decoder", None)
        if form == "added_tokens_decoder":
            settings[form] = {str(token.pop("id")): token for token in saved}
        else:
            new = [token for token in saved if token["id"] >= first]
            files_ = {"added_tokens.json": {token["content"]: token["id"] for token in new}}
            special = [token["content"] for token in new if token["special"]]
            files_["special_tokens_map.json"] = {"additional_special_tokens": special}
            for file, content in files_.items():
                (tmp_path / file).write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own, theirs = read_tokenizers(tmp_path), _transformers(tmp_path)
    assert own.size == len(theirs)
    rng = random.Random(f"{name} {added} {form}")
    for _ in range(300):
        text = "".join(rng.choices(_PARTS, k=rng.randrange(1, 8)))
        assert [*own.encode(text), own.eos_id] == theirs(text).input_ids, repr(text)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("added_tokens.json", {"Wumpus": 300}, r"'Wumpus' has id 300, .* is 273"),
        ("added_tokens.json", {"<sep>": 5}, r"'<sep>' has id 5, .* is 272"),
        ("added_tokens.json", {"Wumpus": "x"}, r"'Wumpus' has id 'x'"),
        ("tokenizer_config.json", {"unk_token": "[UNK]"}, r"unk_token is '\[UNK\]'; only '<unk>'"),
        ("special_tokens_map.json", {"eos_token": {"content": "."}}, r"eos_token is '\.'; only"),
    ],
)
def test_added_tokens_that_cannot_be_are_refused(file, change, message, tmp_path):
    with_added_tokens("bart", tmp_path, "added_tokens.json")
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=f"{tmp_path / file}: {message}"):
        read_tokenizers(tmp_path)


def test_tokens_that_tokenizer_json_lacks_are_refused(tmp_path):
    shutil.copytree(DATA / "bart", tmp_path / "hf")
    (tmp_path / "hf" / "added_tokens.json").write_text('{"<sep>": 272}')
    with pytest.raises(UserError, match=r"added_tokens\.json: tokenizer\.json has no '<sep>'"):
        read_tokenizers(tmp_path / "hf")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bart_gives_any_text_back(text):
    assume(not any(special in text for special in _SPECIAL))
    assert BART.decode([*BART.encode(text), BART.eos_id, 5, 6]) == text
    assert BART.decode(BART.encode(text) + [BART.pad_id] * 3) == text


# ---- special ids ----


def test_special_ids():
    assert (BART.bos_id, BART.pad_id, BART.eos_id, BART.unk_id) == (0, 1, 2, 3)
    assert (T5.bos_id, T5.pad_id, T5.eos_id, T5.unk_id) == (None, 0, 1, 2)
    # Decoding starts with the same token as training: </s> for BART.
    assert (BART.decoder_start_id, T5.decoder_start_id) == (2, 0)
    assert BART.encode("a")[0] == 0 and BART.size == 272 and T5.size == 61


@pytest.mark.parametrize("own", [BART, T5])
def test_batches_are_what_transformers_trains_on(own):
    """For BART, labels are `<s> ... </s>` and decoder inputs `</s> <s> ...`, as in
    `transformers`."""
    inputs = np.array([*own.encode("The red cat"), own.eos_id], np.int32)
    targets = np.array([*own.encode("sat"), own.eos_id], np.int32)
    one = Example(inputs, targets, "", [])
    lengths = {"inputs": 64, "targets": 32}
    batch = packing.build([[one, one], []], lengths, own)
    n = len(targets)
    start = [own.decoder_start_id, *targets[:-1]]
    np.testing.assert_array_equal(batch["decoder_inputs"][0, : 2 * n], start * 2)
    np.testing.assert_array_equal(batch["decoder_inputs"][0, 2 * n :], own.pad_id)
    np.testing.assert_array_equal(batch["inputs"][1], own.pad_id)
    encoded = packing.encode_inputs(own, ["The red cat"], 64)["inputs"][0]
    np.testing.assert_array_equal(encoded[: len(inputs)], inputs)
    np.testing.assert_array_equal(encoded[len(inputs) :], own.pad_id)


# ---- SeqIO and the cache ----


@pytest.mark.parametrize("own", [BART, T5])
def test_seqio_sees_the_same_ids(own):
    from moe_jax.data.registry import tf
    from moe_jax.data.seqio_tokenizers import SeqioTokenizers

    theirs = SeqioTokenizers(own)
    assert (theirs.vocab_size, theirs.pad_id, theirs.eos_id) == (own.size, own.pad_id, own.eos_id)
    texts = ["The red cat", "", "naïve 日本 🙂"]
    wanted = [own.encode(text) for text in texts]
    assert [list(theirs.encode(text)) for text in texts] == wanted
    assert [theirs.encode_tf(tf.constant(text)).numpy().tolist() for text in texts] == wanted
    assert theirs.encode_tf(tf.constant(texts)).to_list() == wanted
    ids = [*wanted[0], own.eos_id, 7]
    assert (
        theirs.decode(ids) == theirs.decode_tf(tf.constant(ids)).numpy().decode() == "The red cat"
    )
    graph = tf.data.Dataset.from_tensor_slices(texts).map(theirs.encode_tf)
    assert [ids.tolist() for ids in graph.as_numpy_iterator()] == wanted
    other = T5 if own is BART else BART
    assert theirs == SeqioTokenizers(own) and theirs != SeqioTokenizers(other)


def test_prepared_vocabularies_hold_all_files(tmp_path):
    vocabulary.write_vocabulary(tmp_path / vocabulary.DIRECTORY, BART.settings, BART.contents)
    for path in (tmp_path, tmp_path / vocabulary.DIRECTORY):  # a model directory contains one
        again = read_tokenizers(path)
        assert again.settings == BART.settings and again.contents == BART.contents
        assert VocabularyConfig(kind="tokenizers", path=str(path)).files()
    assert "tokenizer_config.json" in again.contents
    loaded = vocabulary.load_vocabulary(tmp_path / vocabulary.DIRECTORY)
    assert loaded.encode("The red cat") == BART.encode("The red cat")
    vocabulary.write_vocabulary(tmp_path / "t5", T5.settings, T5.contents)
    assert read_tokenizers(tmp_path / "t5").encode("The cat") == T5.encode("The cat")


# ---- errors ----


def test_settings_without_a_path_are_refused():
    with pytest.raises(UserError, match=r"needs VocabularyConfig\.path"):
        VocabularyConfig(kind="tokenizers")


@pytest.mark.parametrize("broken", ["no config", "no tokenizer", "no json", "gpt2"])
def test_broken_directories_are_one_line(tmp_path, broken):
    shutil.copytree(DATA / "bart", tmp_path / "hf")
    if broken == "no config":
        (tmp_path / "hf" / "config.json").unlink()
    elif broken == "no tokenizer":
        (tmp_path / "hf" / "tokenizer.json").unlink()
    elif broken == "no json":
        (tmp_path / "hf" / "tokenizer.json").write_text("{")
    else:
        (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        read_tokenizers(tmp_path / "hf")
    assert "\n" not in str(error.value)
