"""`config.json` of BART and T5 1.1 to `ModelConfig` and back."""

from collections.abc import Mapping
from typing import Any

from moe_jax.core.errors import UserError
from moe_jax.data.vocabulary import Vocabulary
from moe_jax.model.config import ModelConfig

# What our layers compute; a value that differs is another model. Absent keys count as equal.
_FIXED = {
    "bart": {
        "activation_function": "gelu",
        "scale_embedding": False,
        "normalize_before": False,
        "add_final_layer_norm": False,
        "normalize_embedding": True,
        "static_position_embeddings": False,
    },
    "t5": {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6},
}


def _architecture(config: Mapping[str, Any], source: Any) -> str:
    kind = config.get("model_type")
    if kind not in _FIXED:
        raise UserError(f"{source}: model_type is {kind!r}; only 'bart' and 't5' can be read")
    return kind


def read_config(config: Mapping[str, Any], tied: bool, source: Any) -> ModelConfig:
    """The dense model that a `config.json` describes.

    Args:
        config: its content.
        tied: whether the output embedding is the input embedding. The weights tell;
            `tie_word_embeddings` means different things in different versions of `transformers`.
        source: named in errors.

    Raises:
        UserError: it is neither BART nor T5 1.1, or a variant that our layers do not compute.
    """
    kind = _architecture(config, source)
    fixed = dict(_FIXED[kind])
    if kind == "bart":
        fixed |= {
            "decoder_ffn_dim": config.get("encoder_ffn_dim"),
            "decoder_attention_heads": config.get("encoder_attention_heads"),
        }
    for key, wanted in fixed.items():
        # T5 1.0's "relu" is what an absent feed_forward_proj means.
        found = config.get(key, "relu" if key == "feed_forward_proj" else wanted)
        if found != wanted:
            raise UserError(f"{source}: {key} is {found!r}; only {wanted!r} is supported")
    try:
        return _READERS[kind](config, tied)
    except KeyError as e:
        raise UserError(f"{source}: {e.args[0]} is missing") from e


def _read_bart(c: Mapping[str, Any], tied: bool) -> ModelConfig:
    return ModelConfig(
        architecture="bart",
        vocabulary_size=c["vocab_size"],
        d_model=c["d_model"],
        d_ff=c["encoder_ffn_dim"],
        heads=c["encoder_attention_heads"],
        encoder_layers=c["encoder_layers"],
        decoder_layers=c["decoder_layers"],
        max_positions=c["max_position_embeddings"],
        tie_embeddings=tied,
        init_std=c.get("init_std", 0.02),
        dropout_rate=c.get("dropout", 0.1),
        attention_dropout_rate=c.get("attention_dropout", 0.0),
        activation_dropout_rate=c.get("activation_dropout", 0.0),
    )


def _read_t5(c: Mapping[str, Any], tied: bool) -> ModelConfig:
    dropout = c.get("dropout_rate", 0.1)
    # Newer files say it; in older ones T5 1.0's scaling goes with tied embeddings.
    scale = c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True))
    return ModelConfig(
        architecture="t5",
        vocabulary_size=c["vocab_size"],
        d_model=c["d_model"],
        d_ff=c["d_ff"],
        heads=c["num_heads"],
        head_dim=c["d_kv"],
        encoder_layers=c["num_layers"],
        decoder_layers=c.get("num_decoder_layers") or c["num_layers"],
        relative_buckets=c.get("relative_attention_num_buckets", 32),
        relative_max_distance=c.get("relative_attention_max_distance", 128),
        tie_embeddings=tied,
        scale_tied_logits=bool(scale),
        dropout_rate=dropout,
        attention_dropout_rate=dropout,
        activation_dropout_rate=dropout,
    )


_READERS = {"bart": _read_bart, "t5": _read_t5}


def write_config(config: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The `config.json` of a dense model, for `transformers` 4 and 5.

    Raises:
        UserError: `transformers` has no such model.
    """
    result = {
        "is_encoder_decoder": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": config.vocabulary_size,
        "d_model": config.d_model,
        **generation_config(vocabulary),
    }
    if config.architecture == "bart":
        if not config.tie_embeddings or config.head_dim * config.heads != config.d_model:
            raise UserError(
                "transformers' BART has tied embeddings and head_dim = d_model / heads; "
                "this model cannot be written as one"
            )
        return result | {
            "model_type": "bart",
            "architectures": ["BartForConditionalGeneration"],
            "activation_function": "gelu",
            "scale_embedding": False,
            "encoder_ffn_dim": config.d_ff,
            "decoder_ffn_dim": config.d_ff,
            "encoder_attention_heads": config.heads,
            "decoder_attention_heads": config.heads,
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "max_position_embeddings": config.max_positions,
            "init_std": config.init_std,
            "dropout": config.dropout_rate,
            "attention_dropout": config.attention_dropout_rate,
            "activation_dropout": config.activation_dropout_rate,
            "forced_eos_token_id": None,
            "tie_word_embeddings": True,
        }
    scaled = config.tie_embeddings and config.scale_tied_logits
    return result | {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "layer_norm_epsilon": 1e-6,
        "d_ff": config.d_ff,
        "d_kv": config.head_dim,
        "num_heads": config.heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout_rate,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": scaled,
    }


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The ids that steer decoding; all that `generation_config.json` needs."""
    return {
        "pad_token_id": vocabulary.pad_id,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "decoder_start_token_id": vocabulary.decoder_start_id,
    }
