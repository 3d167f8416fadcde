"""Tokens that were added to a Hugging Face tokenizer after it was trained.

Newer files list them, with their ids, as `added_tokens_decoder` in `tokenizer_config.json`. Older
ones list them in `added_tokens.json`, and the special ones in `special_tokens_map.json`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from moe_jax.core import files
from moe_jax.core.errors import UserError

SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
_DECODER = "added_tokens_decoder"
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
# The special tokens of BART and T5; a T5 lacks some.
_NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


class _Added(NamedTuple):
    """A token, its id in a file, and that file. An id of None means the next free id."""

    token: AddedToken
    index: Any
    file: Path


def add(tokenizer: Tokenizer, directory: Path) -> None:
    """Adds a directory's tokens to a tokenizer that was made from the rest of its files.

    Raises:
        UserError: a token's id is not the next free one, so `transformers` would assign another id;
            or a special token has another name than in BART and T5.
    """
    for file in (SETTINGS, SPECIAL_TOKENS):
        for key, value in _read(directory / file).items():
            if key in _NAMED and value is not None and _text(value) != _NAMED[key]:
                raise UserError(
                    f"{directory / file}: {key} is {_text(value)!r}; only {_NAMED[key]!r} is"
                    " supported"
                )
    for token, index, file in _added(directory):
        tokenizer.add_tokens([token])
        existing = tokenizer.token_to_id(token.content)
        if index is not None and index != existing:
            raise UserError(
                f"{file}: {token.content!r} has id {index!r}, but the one that comes next in the"
                f" vocabulary, or that it has already, is {existing}"
            )


def check(tokenizer: Tokenizer, directory: Path, name: str) -> None:
    """Checks that a complete tokenizer has a directory's added tokens.

    Args:
        name: name of the tokenizer's file.

    Raises:
        UserError: the tokenizer lacks a token, or gives it another id.
    """
    for token, index, file in _added(directory):
        own = tokenizer.token_to_id(token.content)
        if own is None or index not in (None, own):
            has = f"no {token.content!r}" if own is None else f"{token.content!r} as {own}"
            raise UserError(f"{file}: {name} has {has}; save the tokenizer again with transformers")


def _added(directory: Path) -> Iterator[_Added]:
    """The added tokens in the order of their ids, then special tokens without an id."""
    settings, special = _read(directory / SETTINGS), _read(directory / SPECIAL_TOKENS)
    if _DECODER in settings:
        special = {}  # as transformers does
        tokens = [
            _Added(_token(value), int(index), directory / SETTINGS)
            for index, value in settings[_DECODER].items()
        ]
    else:
        extra = {_text(value) for value in (*_extra(settings), *_extra(special))}
        tokens = [
            _Added(
                AddedToken(text, normalized=text not in extra, special=text in extra),
                index,
                directory / ADDED_TOKENS,
            )
            for text, index in _read(directory / ADDED_TOKENS).items()
        ]
    yield from sorted(tokens, key=lambda added: (str(type(added.index)), added.index))
    for file, content in ((SETTINGS, settings), (SPECIAL_TOKENS, special)):
        for value in _extra(content):
            yield _Added(_token(value, special=True), None, directory / file)


def _read(path: Path) -> dict[str, Any]:
    return files.read_object(path) if path.is_file() else {}


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    return [value for key in _EXTRA for value in settings.get(key) or ()]


def _text(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else value["content"]


def _token(value: str | Mapping[str, Any], **flags: bool) -> AddedToken:
    if not isinstance(value, str):
        flags = {key: value[key] for key in _FLAGS if key in value} | flags
    return AddedToken(_text(value), **flags)
