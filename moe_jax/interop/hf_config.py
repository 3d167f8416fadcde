"""`config.json` of `transformers` to `ModelConfig` and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.core.errors import UserError, shown
from moe_jax.data.vocabulary import Vocabulary
from moe_jax.interop import hf_families
from moe_jax.model.config import ModelConfig

# Fields of `ModelConfig` that change the output, but may have no key in `transformers`.
_CHECKED = ("head_dim", "scale_tied_logits")


def read_config(config: Mapping[str, Any], tied: bool, source: Any) -> ModelConfig:
    """The dense model that a `config.json` describes.

    Args:
        config: its content.
        tied: whether the output embedding is the input embedding. Determined from the weights,
            because `tie_word_embeddings` differs in meaning between versions of `transformers`.
        source: named in errors.

    Raises:
        UserError: it is of no family in `hf_families`, lacks a size, or is a variant that our
            layers do not support.
    """
    family = hf_families.of_config(config, source)
    fields: dict[str, Any] = {}
    for key, field, otherwise in family.settings:
        value = family.value(config, key)
        if value is None and otherwise:
            value = family.value(config, otherwise)
        if value is None:
            raise UserError(f"{source}: {key} is missing")
        if fields.setdefault(field, value) != value:
            raise UserError(
                f"{source}: {key} is {shown(value)}; only {shown(fields[field])} is supported"
            )
    if not tied and fields.get("scale_tied_logits"):
        raise UserError(
            f"{source}: logits are scaled (scale_decoder_outputs, or tie_word_embeddings in older"
            " files), but the weights have an output embedding of their own; only those of the"
            " input embedding can be scaled"
        )
    try:
        return ModelConfig(architecture=family.architecture, tie_embeddings=tied, **fields)
    except UserError as e:
        raise UserError(f"{source}: {e}") from e


def write_config(config: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The `config.json` of a dense model, for `transformers` 4 and 5.

    Raises:
        UserError: `transformers` has no such model.
    """
    family = hf_families.of_architecture(config.architecture)
    if family.always_tied and not config.tie_embeddings:
        raise UserError(
            f"transformers' {family.title} has tied embeddings; this model cannot be written as one"
        )
    if not config.tie_embeddings:
        config = dataclasses.replace(config, scale_tied_logits=False)  # no effect here
    result = {
        "model_type": family.model_type,
        "architectures": [family.model_class],
        "is_encoder_decoder": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings,
        **generation_config(vocabulary),
        **family.fixed,
        **family.written,
    }
    for key, field, _ in family.settings:
        result.setdefault(key, getattr(config, field))
    back = read_config(result, config.tie_embeddings, "config.json")
    for field in _CHECKED:
        if getattr(back, field) != getattr(config, field):
            raise UserError(
                f"transformers' {family.title} of this size has {field} {getattr(back, field)},"
                f" not {getattr(config, field)}; this model cannot be written as one"
            )
    return result


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The special ids for decoding, which `generation_config.json` needs."""
    return {
        "pad_token_id": vocabulary.pad_id,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "decoder_start_token_id": vocabulary.decoder_start_id,
    }
