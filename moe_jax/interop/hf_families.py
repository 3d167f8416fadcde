"""What `transformers` calls a family's settings and tensors: one record per family.

To add a family, register a record here and its `Family` in model/family.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.core.errors import UserError, nearest, shown


class Setting(NamedTuple):
    """A key of `config.json` that holds a field of `ModelConfig`.

    Attributes:
        key: its name in `config.json`.
        field: of `ModelConfig`. Two keys of one field must have the same value.
        otherwise: the key that is used if this one is absent or null.
    """

    key: str
    field: str
    otherwise: str | None = None


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of modules in `transformers`. Their tensors are called `NAME.weight` and `NAME.bias`.

    Attributes:
        positions: of a side's position table, with `{side}`.
        norm: of the norm outside a side's layers, with `{side}`.
        layer: prefix of the modules of a layer, with `{side}` and `{layer}`.
        blocks: side -> our block -> name within the layer, or, for a block of several matrices,
            our matrix (`q`, `k`, `v`, `in`, `gate`, `out`) -> name.
        prefix: prefix of all names in the files of the whole model.
    """

    positions: str
    norm: str
    layer: str
    blocks: Mapping[str, Mapping[str, str | Mapping[str, str]]]
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class HuggingFaceFamily:
    """How `transformers` stores the models of a family.

    Attributes:
        architecture: name of the family in `model.family`.
        title: what people call it, for messages.
        model_type: the key `model_type` of `config.json`. Families may share one and differ in
            `fixed`.
        model_class: the class of `transformers` that holds a model with its output embedding.
        settings: keys of `config.json` that vary within the family.
        fixed: key -> the value that this family requires.
        implied: key -> the meaning of an absent key. A key that is neither here nor in `fixed` is
            required.
        written: further keys that are written, but not read.
        always_tied: `transformers` has no such model with an output embedding of its own.
        logits_bias: files hold `final_logits_bias`, which is zero.
    """

    architecture: str
    title: str
    model_type: str
    model_class: str
    names: Names
    settings: tuple[Setting, ...]
    fixed: Mapping[str, Any]
    implied: Mapping[str, Any]
    written: Mapping[str, Any]
    always_tied: bool = False
    logits_bias: bool = False

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        """The value of `key` in a `config.json`, given or implied; None if there is neither."""
        value = config.get(key)
        return self.implied.get(key, self.fixed.get(key)) if value is None else value


_FAMILIES: dict[str, HuggingFaceFamily] = {}


def register(family: HuggingFaceFamily) -> HuggingFaceFamily:
    """Registers a family; replaces an earlier one of the same architecture."""
    _FAMILIES[family.architecture] = family
    return family


def of_architecture(name: str) -> HuggingFaceFamily:
    """The Hugging Face record of one of our families.

    Raises:
        UserError: `transformers` has no such family.
    """
    if name not in _FAMILIES:
        raise UserError(
            f"transformers has no model of ModelConfig.architecture {name!r}; it has"
            f" {', '.join(_FAMILIES)}{nearest(name, _FAMILIES)}"
        )
    return _FAMILIES[name]


def of_config(config: Mapping[str, Any], source: Any) -> HuggingFaceFamily:
    """The record of the family that a `config.json` describes.

    Args:
        config: its content.
        source: named in errors.

    Raises:
        UserError: it is of no known family, or a variant that our layers do not support.
    """
    kind = config.get("model_type")
    kinds = sorted({family.model_type for family in _FAMILIES.values()})
    candidates = [family for family in _FAMILIES.values() if family.model_type == kind]
    if not candidates:
        raise UserError(
            f"{source}: model_type is {shown(kind)}; it can be one of {', '.join(kinds)}"
            f"{nearest(shown(kind), kinds)}"
        )
    for key in dict.fromkeys(key for family in candidates for key in family.fixed):
        fitting = [
            f for f in candidates if key not in f.fixed or f.value(config, key) == f.fixed[key]
        ]
        if not fitting:
            known = " or ".join(repr(family.fixed[key]) for family in candidates)
            value = candidates[0].value(config, key)
            raise UserError(f"{source}: {key} is {shown(value)}; only {known} is supported")
        candidates = fitting
    return candidates[0]


# ---- BART ----


def _attention(name: str, out: str) -> dict[str, str]:
    """Names of the four matrices of an attention. `{}` in `name` stands for the matrix."""
    return {"q": name.format("q"), "k": name.format("k"), "v": name.format("v"),
            "out": name.format(out)}  # fmt: skip


_BART_ENCODER = {
    "self_attention": _attention("self_attn.{}_proj", "out"),
    "self_attention_norm": "self_attn_layer_norm",
    "feed_forward": {"in": "fc1", "out": "fc2"},
    "feed_forward_norm": "final_layer_norm",
}
_BART_CROSS_ATTENTION = {
    "cross_attention": _attention("encoder_attn.{}_proj", "out"),
    "cross_attention_norm": "encoder_attn_layer_norm",
}
register(
    HuggingFaceFamily(
        architecture="bart",
        title="BART",
        model_type="bart",
        model_class="BartForConditionalGeneration",
        names=Names(
            prefix="model.",
            positions="{side}.embed_positions",
            norm="{side}.layernorm_embedding",
            layer="{side}.layers.{layer}.",
            blocks={"encoder": _BART_ENCODER, "decoder": _BART_ENCODER | _BART_CROSS_ATTENTION},
        ),
        settings=(
            Setting("vocab_size", "vocabulary_size"),
            Setting("d_model", "d_model"),
            Setting("encoder_ffn_dim", "d_ff"),
            Setting("decoder_ffn_dim", "d_ff", "encoder_ffn_dim"),
            Setting("encoder_attention_heads", "heads"),
            Setting("decoder_attention_heads", "heads", "encoder_attention_heads"),
            Setting("encoder_layers", "encoder_layers"),
            Setting("decoder_layers", "decoder_layers"),
            Setting("max_position_embeddings", "max_positions"),
            Setting("init_std", "init_std"),
            Setting("dropout", "dropout_rate"),
            Setting("attention_dropout", "attention_dropout_rate"),
            Setting("activation_dropout", "activation_dropout_rate"),
        ),
        fixed={
            "activation_function": "gelu",
            "scale_embedding": False,
            "normalize_before": False,
            "add_final_layer_norm": False,
            "normalize_embedding": True,
            "static_position_embeddings": False,
        },
        implied={
            "init_std": 0.02,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
        written={"forced_eos_token_id": None},
        always_tied=True,
        logits_bias=True,
    )
)

# ---- T5 ----


def _t5_names(feed_forward: Mapping[str, str]) -> Names:
    """Names in a T5, where a layer's blocks are numbered."""
    kinds = {
        "self_attention": _attention("SelfAttention.{}", "o"),
        "cross_attention": _attention("EncDecAttention.{}", "o"),
        "feed_forward": {which: f"DenseReluDense.{name}" for which, name in feed_forward.items()},
    }
    blocks: dict[str, dict[str, Any]] = {"encoder": {}, "decoder": {}}
    for side, of_side in blocks.items():
        used = [kind for kind in kinds if (side, kind) != ("encoder", "cross_attention")]
        for i, kind in enumerate(used):
            of_side[kind] = {w: f"layer.{i}.{name}" for w, name in kinds[kind].items()}
            of_side[f"{kind}_norm"] = f"layer.{i}.layer_norm"
    return Names(
        positions="{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        norm="{side}.final_layer_norm",
        layer="{side}.block.{layer}.",
        blocks=blocks,
    )


_T5_SETTINGS = (
    Setting("vocab_size", "vocabulary_size"),
    Setting("d_model", "d_model"),
    Setting("d_ff", "d_ff"),
    Setting("num_heads", "heads"),
    Setting("d_kv", "head_dim"),
    Setting("num_layers", "encoder_layers"),
    Setting("num_decoder_layers", "decoder_layers", "num_layers"),
    Setting("relative_attention_num_buckets", "relative_buckets"),
    Setting("relative_attention_max_distance", "relative_max_distance"),
    Setting("dropout_rate", "dropout_rate"),
    Setting("dropout_rate", "attention_dropout_rate"),
    Setting("dropout_rate", "activation_dropout_rate"),
)
_T5_1_1 = register(
    HuggingFaceFamily(
        architecture="t5",
        title="T5 1.1",
        model_type="t5",
        model_class="T5ForConditionalGeneration",
        # The activation is applied to wi_0 x, the first of our two input matrices.
        names=_t5_names({"in": "wi_0", "gate": "wi_1", "out": "wo"}),
        # Older files do not say whether logits are scaled: they are if embeddings are tied.
        settings=(
            *_T5_SETTINGS,
            Setting("scale_decoder_outputs", "scale_tied_logits", "tie_word_embeddings"),
        ),
        fixed={"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6},
        implied={
            "feed_forward_proj": "relu",
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "dropout_rate": 0.1,
            "tie_word_embeddings": True,
        },
        written={"is_gated_act": True, "dense_act_fn": "gelu_new"},
    )
)
register(
    dataclasses.replace(
        _T5_1_1,
        architecture="t5_1_0",
        title="T5 1.0",
        names=_t5_names({"in": "wi", "out": "wo"}),
        fixed={"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6},
        written={"is_gated_act": False, "dense_act_fn": "relu"},
    )
)
register(
    dataclasses.replace(
        _T5_1_1,
        architecture="mt5",
        title="mT5",
        model_type="mt5",
        model_class="MT5ForConditionalGeneration",
        settings=_T5_SETTINGS,  # transformers never scales its logits
        implied=dict(_T5_1_1.implied) | {"feed_forward_proj": "gated-gelu"},
    )
)
