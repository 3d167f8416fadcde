"""Reads a T5 (1.0, 1.1, Flan-T5), mT5 or TaskMoE from a T5X checkpoint into a model directory."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError, nearest
from moe_jax.data import tokenizer_files, vocabulary
from moe_jax.data.vocabulary import TokenizersVocabulary
from moe_jax.interop import hf_families, hf_weights, t5x_run
from moe_jax.interop.hf_weights import Part
from moe_jax.interop.model_directory import check_parts, write_initial
from moe_jax.interop.t5x_checkpoint import Checkpoint
from moe_jax.model.config import ModelConfig

_EMBEDDING = "token_embedder/embedding"
_HEAD = "decoder/logits_dense/kernel"
_RELATIVE = "relpos_bias/rel_embedding"
_FIRST = "encoder/layers_0/mlp/{}/kernel"
_DROPOUT = 0.1


class T5XFamily(NamedTuple):
    """How to recognise a family by its parameters, because checkpoints do not name it.

    Attributes:
        architecture: name of the family in `model.family`.
        feed_forward: the first matrix of its feed-forward blocks.
        vocabulary_size: vocabulary size of its published models; None matches any other size.
    """

    architecture: str
    feed_forward: str
    vocabulary_size: int | None = None


_T5_1_1 = T5XFamily("t5", "wi_0")
# The first match counts.
FAMILIES = [T5XFamily("mt5", "wi_0", 250_112), _T5_1_1, T5XFamily("t5_1_0", "wi")]


def from_t5x(source: str, out: str | Path, sentencepiece: str | None = None) -> ModelConfig:
    """Writes a model directory from a T5X checkpoint, parameter by parameter.

    Sizes are read from the shapes of the parameters. Other settings are those of T5X's own models:
    distances up to 128, dropout of 0.1, and, without an output embedding, tied and scaled logits.

    Args:
        source: directory of a checkpoint, such as `checkpoint_1000000`. Of a TaskMoE that T5X
            trained, `moe_jax/` must be beside it.
        sentencepiece: the model's tokenizer, which checkpoints do not hold; None writes no
            tokenizer.

    Raises:
        UserError: it is not such a T5, a file is missing or damaged, or `out` exists.
    """
    out = paths.local(out)
    files.check_new(out)
    own = None if sentencepiece is None else _read_vocabulary(paths.local(sentencepiece))
    checkpoint = Checkpoint(paths.local(source))
    if t5x_run.is_run(checkpoint):
        if own is not None:
            raise UserError(f"{source} has its own vocabulary: leave --sentencepiece out")
        return t5x_run.read_run(checkpoint, out).model
    config = read_config(checkpoint.shapes, checkpoint.directory)
    wanted = parts(config)
    check_parts(config, wanted, checkpoint.shapes, checkpoint.directory, "the others say")
    known = {part.name for part in wanted}
    others = sorted(checkpoint.shapes.keys() - known)
    if others:
        hint = nearest(others[0], known)
        title = hf_families.of_architecture(config.architecture).title
        raise UserError(f"{checkpoint.directory}: {others[0]} belongs to no {title}{hint}")
    with files.new_directory(out) as new:
        write_initial(
            new, out, config, wanted, lambda part: checkpoint.read(part.name), own, Path(source)
        )
    return config


def _read_vocabulary(path: Path) -> TokenizersVocabulary:
    """The tokenizer that `transformers` makes from a T5's SentencePiece model."""
    plain = vocabulary.read_sentencepiece(path)
    # T5X's files (`cc_all.32000.100extra`) include the sentinels, those of `transformers` do not.
    extra_ids = 0 if len(plain.encode("<extra_id_0>")) <= 2 else 100
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files.write_json(directory / tokenizer_files.CONFIG, {"model_type": "t5"})
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids}
        files.write_json(directory / tokenizer_files.SETTINGS, settings)
        files.write_bytes(directory / tokenizer_files.SENTENCEPIECE, path.read_bytes())
        return vocabulary.read_tokenizers(directory)


# ---- names and sizes ----

_NORMS = {
    "encoder": ["attention", "mlp"],
    "decoder": ["self_attention", "cross_attention", "mlp"],
}
_ATTENTIONS = {
    "encoder": ["attention"],
    "decoder": ["self_attention", "encoder_decoder_attention"],
}
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def parts(config: ModelConfig) -> list[Part]:
    """All tensors of a dense T5, with T5X's names and axis order, grouped by parameter."""
    result = []
    for part in hf_weights.parts(config):
        name, form = _name(part.name), part.form
        if name == _HEAD:
            form = "table"
        elif name.endswith(_RELATIVE):
            form = "kernel"  # [heads, buckets] there
        elif form == "kernel":
            form = "matrix"
        result.append(part._replace(name=name, form=form))
    return result


def _name(name: str) -> str:
    """T5X's name of the tensor that `transformers` calls `name`."""
    match name.split("."):
        case ["shared", _]:
            return _EMBEDDING
        case ["lm_head", _]:
            return _HEAD
        case [side, "final_layer_norm", _]:
            return f"{side}/{side}_norm/scale"
        case [side, *_, "relative_attention_bias", _]:
            return f"{side}/{_RELATIVE}"
        case [side, _, layer, _, i, "layer_norm", _]:
            return f"{side}/layers_{layer}/pre_{_NORMS[side][int(i)]}_layer_norm/scale"
        case [side, _, layer, _, _, "DenseReluDense", which, _]:
            return f"{side}/layers_{layer}/mlp/{which}/kernel"
        case [side, _, layer, _, i, _, which, _]:
            attention = _ATTENTIONS[side][int(i)]
            return f"{side}/layers_{layer}/{attention}/{_PROJECTIONS[which]}/kernel"
    raise ValueError(name)


def read_config(shapes: Mapping[str, tuple[int, ...]], source: Path) -> ModelConfig:
    """The dense model that has parameters of these shapes.

    Args:
        shapes: name -> shape.
        source: named in errors.

    Raises:
        UserError: a parameter that determines a size is missing, or the model is known to be of
            another kind.
    """
    if any(name.startswith(("encoder/encoder/", "decoder/decoder/")) for name in shapes):
        raise UserError(
            f"{source}: its layers are stacked (scan_layers); such models have position biases of"
            " their own in every layer, unlike published T5s, and cannot be read"
        )

    def sizes(name: str) -> tuple[int, int]:
        shape = shapes.get(name)
        if shape is None:
            raise UserError(f"{source}: the weights have no {name}{nearest(name, shapes)}")
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{source}: {name} has shape {list(shape)}, it is not a matrix")
        return shape

    def depth(side: str) -> int:
        layers = (re.match(rf"{side}/layers_(\d+)/", name) for name in shapes)
        return len({layer[1] for layer in layers if layer})

    vocabulary_size, d_model = sizes(_EMBEDDING)
    heads, buckets = sizes(f"encoder/{_RELATIVE}")
    fitting = (
        family
        for family in FAMILIES
        if _FIRST.format(family.feed_forward) in shapes
        and family.vocabulary_size in (None, vocabulary_size)
    )
    family = next(fitting, _T5_1_1)
    return ModelConfig(
        architecture=family.architecture,
        vocabulary_size=vocabulary_size,
        d_model=d_model,
        d_ff=sizes(_FIRST.format(family.feed_forward))[1],
        heads=heads,
        head_dim=sizes("encoder/layers_0/attention/query/kernel")[1] // heads,
        encoder_layers=depth("encoder"),
        decoder_layers=depth("decoder"),
        relative_buckets=buckets,
        tie_embeddings=_HEAD not in shapes,
        scale_tied_logits=_HEAD not in shapes,
        dropout_rate=_DROPOUT,
        attention_dropout_rate=_DROPOUT,
        activation_dropout_rate=_DROPOUT,
    )
