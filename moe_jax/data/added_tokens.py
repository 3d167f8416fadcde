"""Tokens that were added to a Hugging Face tokenizer after it was trained.

Newer files name them, with their ids, as `added_tokens_decoder` in `tokenizer_config.json`; older
ones in `added_tokens.json`, and say in `special_tokens_map.json` which of them are special.
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
    """A token, its id as a file says it, and that file; the id None: whatever comes next."""

    token: AddedToken
    index: Any
    file: Path


def add(tokenizer: Tokenizer, directory: Path) -> None:
    """Adds a directory's tokens to a tokenizer that was made from the rest of its files.

    Raises:
        UserError: a token's id is not the one that follows, so that `transformers` would give it
            another one too; or a special token has another name than BART's and T5's.
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
        found = tokenizer.token_to_id(token.content)
        if index is not None and index != found:
            raise UserError(
                f"{file}: {token.content!r} has id {index!r}, but the one that comes next in the"
                f" vocabulary, or that it has already, is {found}"
            )


def check(tokenizer: Tokenizer, directory: Path, name: str) -> None:
    """Compares a directory's tokens with those of its complete tokenizer.

    Args:
        name: of the tokenizer's file.

    Raises:
        UserError: it lacks one, or gives it another id.
    """
    for token, index, file in _added(directory):
        found = tokenizer.token_to_id(token.content)
        if found is None or index not in (None, found):
            has = f"no {token.content!r}" if found is None else f"{token.content!r} as {found}"
            raise UserError(f"{file}: {name} has {has}; save the tokenizer again with transformers")


def _added(directory: Path) -> Iterator[_Added]:
    """What was added, in the order of the ids; then the special tokens that have none."""
    settings, special = _read(directory / SETTINGS), _read(directory / SPECIAL_TOKENS)
    if _DECODER in settings:
        special = {}  # as transformers does
        found = [
            _Added(_token(value), int(index), directory / SETTINGS)
            for index, value in settings[_DECODER].items()
        ]
    else:
        extra = {_text(value) for value in (*_extra(settings), *_extra(special))}
        found = [
            _Added(
                AddedToken(text, normalized=text not in extra, special=text in extra),
                index,
                directory / ADDED_TOKENS,
            )
            for text, index in _read(directory / ADDED_TOKENS).items()
        ]
    yield from sorted(found, key=lambda added: (str(type(added.index)), added.index))
    for file, content in ((SETTINGS, settings), (SPECIAL_TOKENS, special)):
        for value in _extra(content):
            yield _Added(_token(value, special=True), None, directory / file)


def _read(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    return [value for key in _EXTRA for value in settings.get(key) or ()]


def _text(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else value["content"]


def _token(value: str | Mapping[str, Any], **flags: bool) -> AddedToken:
    if not isinstance(value, str):
        flags = {key: value[key] for key in _FLAGS if key in value} | flags
    return AddedToken(_text(value), **flags)
