"""Reads the tokenizer files of a Hugging Face directory, and its special ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moe_jax.core import files
from moe_jax.core.errors import UserError, first_line, nearest, shown
from moe_jax.data import added_tokens
from moe_jax.data.added_tokens import ADDED_TOKENS, SETTINGS, SPECIAL_TOKENS

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
SENTENCEPIECE = "spiece.model"
_MOST_SENTINELS = 10_000
# All files of a tokenizer, so that it can be copied unchanged.
FILES = (
    TOKENIZER,
    SETTINGS,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    _VOCABULARY,
    _MERGES,
    SENTENCEPIECE,
)

# Ids that `transformers` uses where config.json has none, by model_type.
_T5_IDS = {"pad": 0, "bos": None, "eos": 1, "decoder_start": 0}
SPECIAL_IDS = {
    "bart": {"pad": 1, "bos": 0, "eos": 2, "decoder_start": 2},
    "t5": _T5_IDS,
    "mt5": _T5_IDS,
}


def special_ids(
    config: Mapping[str, Any], source: Any, generation: Mapping[str, Any] | None = None
) -> dict[str, int | None]:
    """`pad`, `bos` (None: none), `eos` and `decoder_start` as a `config.json` has them.

    Args:
        config: its content.
        source: named in errors.
        generation: the content of the `generation_config.json` beside it, which may have what
            `config.json` lacks.

    Raises:
        UserError: its model_type is not one of those whose tokenizers are known, an id is none, or
            the two files disagree: the model would be trained with one id and decoded with another.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in SPECIAL_IDS:
        raise UserError(
            f"{source}: model_type is {shown(kind)}; its tokenizer can be read for one of"
            f" {', '.join(SPECIAL_IDS)}{nearest(str(kind), SPECIAL_IDS)}"
        )
    ids = dict(SPECIAL_IDS[kind])
    for name in ids:
        key = f"{name}_token_id"
        value, other = config.get(key), (generation or {}).get(key)
        # `eos` may be a list of ids that end an answer.
        first, allowed = (v if isinstance(v, list) and v else [v] for v in (value, other))
        for i in (*first, *allowed):
            if i is not None and (type(i) is not int or i < 0):
                raise UserError(f"{source}: {key} is {shown(i)}; it is an id")
        if value is not None and other is not None and first[0] not in allowed:
            raise UserError(
                f"{source}: {key} is {shown(value)}, but {shown(other)} in {GENERATION_CONFIG}"
                " beside it"
            )
        found = first[0] if value is not None else allowed[0]
        if found is not None:
            ids[name] = found
    return ids


def read_tokenizer(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, int | None]]:
    """The tokenizer that `transformers` loads from a directory, and its special ids.

    From `tokenizer.json`; else byte-level BPE from `vocab.json` and `merges.txt` (BART), or the
    SentencePiece unigram model `spiece.model` (T5).

    Returns:
        The tokenizer, and `special_ids` with `unk`.

    Raises:
        UserError: the files are missing, one cannot be read, or added tokens do not fit.
    """
    config = files.read_object(directory / CONFIG)
    generation = directory / GENERATION_CONFIG
    generation = files.read_object(generation) if generation.is_file() else None
    ids = special_ids(config, directory / CONFIG, generation)
    settings = {}
    if (directory / SETTINGS).is_file():
        settings = files.read_object(directory / SETTINGS)
    try:
        if (directory / TOKENIZER).is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER))
            added_tokens.check(tokenizer, directory, TOKENIZER)
        elif (directory / _MERGES).is_file():
            tokenizer = _byte_level(directory, settings)
        elif (directory / SENTENCEPIECE).is_file():
            tokenizer = _unigram(directory, settings)
        else:
            names = f"{TOKENIZER}, {_MERGES} and {SENTENCEPIECE}"
            raise UserError(f"{directory} has no tokenizer: none of {names}")
    except UserError:
        raise
    except Exception as e:  # `tokenizers` and protobuf raise plain Exceptions
        reason = first_line(e)[:200]  # it may quote the file
        raise UserError(f"cannot read the tokenizer of {directory}: {reason}") from e
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    for name, i in ids.items():
        if i is not None and i >= size:
            raise UserError(f"{directory}: {name}_token_id is {i}; the tokenizer has {size} tokens")
    unk = tokenizer.token_to_id("<unk>")
    return tokenizer, {**ids, "unk": ids["pad"] if unk is None else unk}


def _byte_level(directory: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BART's tokenizer: GPT-2's byte pairs between `<s>` and `</s>`."""
    model = models.BPE.from_file(str(directory / _VOCABULARY), str(directory / _MERGES))
    tokenizer = tokenizers.Tokenizer(model)
    space = settings.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    added_tokens.add(tokenizer, directory)
    # What the files say of spaces around such a token is not to be lost.
    listed = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    special = [t for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if t not in listed]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=space)
    return tokenizer


def _unigram(directory: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """T5's tokenizer: SentencePiece's pieces, then the sentinels in descending order."""
    from sentencepiece import sentencepiece_model_pb2  # imports protobuf, which is rarely needed

    content = (directory / SENTENCEPIECE).read_bytes()
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    count = settings.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= _MOST_SENTINELS:
        raise UserError(f"{directory / SETTINGS}: extra_ids is {shown(count)}")
    sentinels = [f"<extra_id_{i}>" for i in range(count)]
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    pieces += [(sentinel, 0.0) for sentinel in reversed(sentinels)]
    unk = proto.trainer_spec.unk_id
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unk, byte_fallback=False))
    if proto.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    space = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    added_tokens.add(tokenizer, directory)
    special = ["</s>", "<unk>", "<pad>", *sentinels]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    eos = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[eos]
    )
    return tokenizer
