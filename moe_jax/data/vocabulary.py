"""Vocabularies without TensorFlow: text to token ids and back.

A prepared vocabulary is a directory with `vocabulary.json` and the model's files;
`load_vocabulary` dispatches on its `kind`. Special ids follow T5: pad 0, EOS 1, unknown 2, and
decoding starts with pad. A vocabulary of kind `tokenizers` has the special ids of its model. Token
ids equal those of `seqio.SentencePieceVocabulary`, `seqio.ByteVocabulary` and `transformers`,
respectively.
"""

import abc
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import sentencepiece
import tokenizers

from moe_jax.core import checksums, files, paths
from moe_jax.core.configuration import Configuration, Place, Range, Text
from moe_jax.core.errors import UserError
from moe_jax.data import tokenizer_files
from moe_jax.data.tokenizer_files import TOKENIZER

DIRECTORY = "vocabulary"  # in a model directory: a copy of the prepared vocabulary
FILE = "vocabulary.json"
MODEL = "sentencepiece.model"
_TEXTS = (".json", ".txt", ".model")  # suffixes of a tokenizer's files and of config.json


@dataclasses.dataclass(frozen=True)
class VocabularyConfig(Configuration):
    """Which vocabulary tokenises a run's tasks.

    Attributes:
        kind: `sentencepiece` (trained by `prepare`, or the model at `path`), `tokenizers` (the
            tokenizer of the BART or T5 at `path`), `bytes`, `seqio` (the result of `factory`), or
            `task` (the vocabulary that the tasks were registered with; also two, one of the inputs
            and one of the targets).
        size: number of tokens to train; fewer if the text is too short for so many.
        trained_on: mixture or task whose training texts train the model; '' takes the first that is
            prepared.
        path: an existing SentencePiece model, in place of training. For `tokenizers`: a Hugging
            Face directory, or a model directory that `convert from-hf` wrote.
        factory: 'package.module:function' or 'file.py:function' returning a `seqio.Vocabulary`.
        extra_ids: number of sentinel tokens at the end of the vocabulary, counted in
            `Vocabulary.size`.
    """

    kind: Literal["sentencepiece", "tokenizers", "bytes", "seqio", "task"] = "sentencepiece"
    size: Annotated[int, Range(1, 2**24)] = 4096
    trained_on: Annotated[str, Text(0, 4096)] = ""
    path: Annotated[str, Place(0, 4096, here=True)] = ""
    factory: Annotated[str, Text(0, 4096)] = ""
    extra_ids: Annotated[int, Range(0, 2**16)] = 0

    def __post_init__(self):
        super().__post_init__()
        if (self.kind == "seqio") != bool(self.factory):
            raise UserError("VocabularyConfig.factory goes with kind='seqio', and only with it")
        if self.kind == "tokenizers" and not self.path:
            raise UserError("VocabularyConfig.kind 'tokenizers' needs VocabularyConfig.path")
        if self.path:  # from anywhere: a run that stores it is read from other directories
            object.__setattr__(self, "path", os.path.abspath(self.path))

    def check(self) -> None:
        """Raises a UserError where there is no model at `path`. A run does without: it has its own
        copy."""
        if self.kind != "tokenizers" and self.path and not os.path.isfile(self.path):
            raise UserError(f"VocabularyConfig.path: no SentencePiece model at {self.path}")

    def files(self) -> list[str]:
        """The files at `path`; a change in them makes a different vocabulary."""
        if self.kind != "tokenizers":
            return [self.path] if self.path else []
        directory = _tokenizer_directory(self.path)
        return sorted(str(path) for path in directory.glob("*.*") if path.suffix in _TEXTS)


class Vocabulary(abc.ABC):
    """Base class. Subclasses define `encode` and `_text`.

    Attributes:
        size: number of ids, sentinels included: the number of rows of the embedding table.
        pad_id, eos_id, unk_id, decoder_start_id: special ids.
        bos_id: None if the vocabulary has none.
        inputs: that of the inputs, where the targets have another one; else itself.
    """

    size: int
    pad_id: int = 0
    eos_id: int = 1
    unk_id: int = 2
    bos_id: int | None = None

    @property
    def inputs(self) -> "Vocabulary":
        return self

    @property
    def decoder_start_id(self) -> int:
        return self.pad_id

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first EOS; padding is dropped."""
        kept = itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        return self._text([i for i in kept if i != self.pad_id])

    @abc.abstractmethod
    def _text(self, ids: list[int]) -> str: ...


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes, shifted by the three special ids, as in ByT5 (arXiv 2105.13626)."""

    def __init__(self, extra_ids: int = 0):
        self.size = 3 + 256 + extra_ids

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def _text(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="ignore")


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model, given as bytes."""

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._processor.get_piece_size()
        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        bos = self._processor.bos_id()
        self.bos_id = bos if bos >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _text(self, ids: list[int]) -> str:
        return self._processor.decode([i if 0 <= i < self.size else self.unk_id for i in ids])


class TokenizersVocabulary(Vocabulary):
    """A Hugging Face tokenizer with the special ids of its model.

    `encode` gives the ids of `transformers`, without the EOS at the end. If the tokenizer puts a
    BOS in front (BART's `<s>`), inputs and targets begin with it, as in BART's own training.

    Attributes:
        settings: the content of `vocabulary.json`.
        contents: name -> bytes of the tokenizer's files.
    """

    decoder_start_id = 0

    def __init__(self, ids: Mapping[str, int | None], contents: Mapping[str, bytes]):
        self.settings = {"kind": "tokenizers", "ids": dict(ids)}
        self.contents = dict(contents)
        self._tokenizer = tokenizers.Tokenizer.from_str(contents[TOKENIZER].decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.pad_id, self.bos_id = ids["pad"], ids["bos"]
        self.eos_id, self.unk_id = ids["eos"], ids["unk"]
        self.decoder_start_id = ids["decoder_start"]
        self._ends = self._tokenizer.encode("").ids[-1:] == [self.eos_id]

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text).ids
        return ids[:-1] if self._ends else ids

    def _text(self, ids: list[int]) -> str:
        known = [i for i in ids if 0 <= i < self.size]
        return self._tokenizer.decode(known, skip_special_tokens=True)


class SeqioVocabulary(Vocabulary):
    """Any other SeqIO vocabulary. Using it imports SeqIO and TensorFlow."""

    def __init__(self, vocabulary: Any):
        self._vocabulary = vocabulary
        self.size = vocabulary.vocab_size
        self.pad_id = vocabulary.pad_id
        self.eos_id = vocabulary.eos_id
        self.unk_id = vocabulary.unk_id if vocabulary.unk_id is not None else self.pad_id
        try:
            self.bos_id = vocabulary.bos_id
        except NotImplementedError:
            self.bos_id = None

    def encode(self, text: str) -> list[int]:
        return list(self._vocabulary.encode(text))

    def _text(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids)


class TwoVocabularies(Vocabulary):
    """One for the inputs and one for the targets, which share a table of embeddings.

    All methods and ids are those of the targets.

    Raises:
        UserError: they pad with different ids.
    """

    def __init__(self, inputs: Vocabulary, targets: Vocabulary):
        if inputs.pad_id != targets.pad_id:
            raise UserError(
                f"the vocabularies of inputs and targets pad with {inputs.pad_id} and "
                f"{targets.pad_id}: rows need one id for both"
            )
        self._inputs, self._targets = inputs, targets
        self.size = max(inputs.size, targets.size)
        self.pad_id, self.eos_id = targets.pad_id, targets.eos_id
        self.unk_id, self.bos_id = targets.unk_id, targets.bos_id

    @property
    def inputs(self) -> Vocabulary:
        return self._inputs

    def encode(self, text: str) -> list[int]:
        return self._targets.encode(text)

    def _text(self, ids: list[int]) -> str:
        return self._targets._text(ids)


def load_vocabulary(directory: str | Path) -> Vocabulary:
    """Reads a prepared vocabulary.

    Raises:
        UserError: `vocabulary.json` or the model is missing, or the kind is unknown.
    """
    directory = paths.parse(directory)
    settings = read_settings(directory)
    if settings["kind"] == "two":
        sides = ("inputs", "targets")
        return TwoVocabularies(*(_load(directory, settings[s], f"{s}.") for s in sides))
    return _load(directory, settings)


def _load(directory: Path, settings: Mapping[str, Any], prefix: str = "") -> Vocabulary:
    """One vocabulary; the names of its files begin with `prefix`."""
    match settings["kind"]:
        case "bytes":
            return ByteVocabulary(settings["extra_ids"])
        case "sentencepiece":
            return read_sentencepiece(directory / f"{prefix}{MODEL}")
        case "tokenizers":
            own = (FILE, checksums.FILE)
            names = [path for path in sorted(directory.iterdir()) if path.name not in own]
            contents = {path.name: path.read_bytes() for path in names}
            return TokenizersVocabulary(settings["ids"], contents)
        case "seqio":
            from moe_jax.data import registry  # imports TensorFlow, which no other kind needs

            return SeqioVocabulary(registry.load_vocabulary(settings, directory / FILE))


def read_settings(directory: Path) -> dict[str, Any]:
    """What `vocabulary.json` says: `kind`, what the kind needs.

    Raises:
        UserError: it is missing, or of an unknown kind; or a file of a directory with checksums is
            damaged: other ids would mean other texts, without a word.
    """
    if checksums.is_sealed(directory) and (problem := checksums.damage(directory)):
        raise UserError(problem)
    path = directory / FILE
    settings = files.read_json(path)
    kind = settings.get("kind") if isinstance(settings, dict) else None
    needed = {"bytes": ["extra_ids"], "sentencepiece": [], "tokenizers": ["ids"], "seqio": [],
              "two": ["inputs", "targets"]}  # fmt: skip
    if not isinstance(kind, str) or kind not in needed:
        raise UserError(f"{path}: unknown kind of vocabulary {kind!r}")
    for name in needed[kind]:
        if name not in settings:
            raise UserError(f"{path}: it has no {name!r}")
    return settings


def read_sentencepiece(path: str | Path) -> SentencePieceVocabulary:
    """Loads a `.model` file.

    Raises:
        UserError: it is missing, is not a SentencePiece model, or has no pad or EOS token.
    """
    try:
        vocabulary = SentencePieceVocabulary(files.read_bytes(path))
    except RuntimeError as e:
        raise UserError(f"{path} is not a SentencePiece model") from e
    if vocabulary.pad_id != 0 or vocabulary.eos_id < 0:
        raise UserError(f"{path}: the SentencePiece model needs pad_id=0 and an eos_id")
    return vocabulary


def read_tokenizers(path: str | Path) -> TokenizersVocabulary:
    """The vocabulary of a Hugging Face directory, or of a converted model directory.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    directory = _tokenizer_directory(path)
    if (directory / FILE).is_file():
        vocabulary = load_vocabulary(directory)
        if not isinstance(vocabulary, TokenizersVocabulary):
            raise UserError(f"{directory} is a vocabulary of another kind than 'tokenizers'")
        return vocabulary
    tokenizer, ids = tokenizer_files.read_tokenizer(directory)
    names = [name for name in tokenizer_files.FILES if (directory / name).is_file()]
    contents = {TOKENIZER: tokenizer.to_str(pretty=True).encode()}
    contents |= {name: (directory / name).read_bytes() for name in names}
    return TokenizersVocabulary(ids, contents)


def _tokenizer_directory(path: str | Path) -> Path:
    inner = Path(path) / DIRECTORY
    return inner if (inner / FILE).is_file() else Path(path)


def write_vocabulary(
    directory: str | Path, settings: Mapping[str, Any], contents: Mapping[str, bytes]
) -> None:
    """Writes a vocabulary that `load_vocabulary` reads.

    Args:
        settings: `kind` and the settings of that kind.
        contents: name -> bytes of the model's files.
    """
    data = json.dumps(settings, sort_keys=True).encode() + b"".join(contents.values())
    fingerprint = checksums.of_bytes(data)[:16]
    for name, content in contents.items():
        files.write_bytes(Path(directory) / name, content)
    files.write_json(Path(directory) / FILE, {**settings, "fingerprint": fingerprint})
