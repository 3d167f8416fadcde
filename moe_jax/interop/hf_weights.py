"""Where each tensor of a `transformers` BART or T5 1.1 lives in our parameter tree.

The map is a list of `Part`s; both directions read it. It is for dense models: one expert, no
vanilla layers, so that every layer is at `layers/routed`, [layer, expert 0].
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_jax.model.config import ModelConfig

EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"
# Other names of the embedding, which files may or may not repeat; HEAD is one where it is tied.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In files, but of no effect: zeros, and what early T5 files left over.
ZERO = "final_logits_bias"
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

Place = tuple[int | slice, ...]


class Part(NamedTuple):
    """One tensor of `transformers`, and the part of one of our parameters that it is.

    Attributes:
        name: in `transformers`, without the prefix `model.`; or that of another library.
        path: of the parameter in the backbone, `encoder/layers/routed/...`.
        place: index into the parameter.
        form: `kernel`, [out, in] there and [in..., out...] here; `matrix`, [in, out] there (T5X);
            `vector`; or `table`, the same on both sides.
    """

    name: str
    path: str
    place: Place
    form: Literal["kernel", "matrix", "vector", "table"]

    def shape(self, parameter_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.take(np.broadcast_to(np.float32(0), parameter_shape)).shape

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor, from our parameter; a view where that is possible."""
        own = parameter[self.place]
        if self.form == "table":
            return own
        if self.form == "vector":
            return own.reshape(-1)
        matrix = own.reshape(own.shape[0], -1)
        return matrix if self.form == "matrix" else matrix.T

    def put(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the tensor into our parameter, in its dtype."""
        own = parameter[self.place]
        own[...] = (tensor.T if self.form == "kernel" else tensor).reshape(own.shape)


# Ours: block -> {which: (parameter, index on its axis of fused matrices, or None)}.
_BLOCKS: dict[str, dict[str, tuple[str, int | None]]] = {
    "self_attention": {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "out": ("out", None)},
    "cross_attention": {"q": ("q", 0), "k": ("kv", 0), "v": ("kv", 1), "out": ("out", None)},
    "feed_forward": {"in": ("in", 0), "gate": ("in", 1), "out": ("out", None)},
}
_BART = {
    "self_attention": "self_attn.{}_proj",
    "self_attention_norm": "self_attn_layer_norm",
    "cross_attention": "encoder_attn.{}_proj",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "feed_forward": {"in": "fc1", "out": "fc2"},
    "feed_forward_norm": "final_layer_norm",
}
# T5 1.1 multiplies gelu(wi_0 x), the first of our two input matrices, with wi_1 x.
_T5_FEED_FORWARD = {"in": "wi_0", "gate": "wi_1", "out": "wo"}


def _t5(side: str) -> dict[str, Any]:
    blocks = ["self_attention", "cross_attention", "feed_forward"]
    if side == "encoder":
        blocks.remove("cross_attention")
    names: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        names[f"{block}_norm"] = f"layer.{i}.layer_norm"
        match block:
            case "self_attention":
                names[block] = f"layer.{i}.SelfAttention.{{}}"
            case "cross_attention":
                names[block] = f"layer.{i}.EncDecAttention.{{}}"
            case "feed_forward":
                dense = f"layer.{i}.DenseReluDense."
                names[block] = {k: dense + v for k, v in _T5_FEED_FORWARD.items()}
    return names


def parts(config: ModelConfig) -> list[Part]:
    """All tensors of a dense model, grouped by parameter."""
    found = [Part(EMBEDDING, "embedding", (), "table")]
    if not config.tie_embeddings:
        found.append(Part(HEAD, "head", (), "kernel"))
    for side in ("encoder", "decoder"):
        if config.architecture == "bart":
            found.append(Part(f"{side}.embed_positions.weight", f"{side}/position", (), "table"))
            found += _norm(f"{side}.layernorm_embedding", f"{side}/norm", (), bias=True)
        else:
            name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            found.append(Part(name, f"{side}/relative", (), "table"))
            found += _norm(f"{side}.final_layer_norm", f"{side}/norm", (), bias=False)
        for layer in range(getattr(config, f"{side}_layers")):
            found += _layer(config, side, layer)
    return sorted(found, key=lambda part: part.path)


def _norm(name: str, path: str, place: Place, bias: bool) -> Iterator[Part]:
    yield Part(f"{name}.weight", f"{path}/scale", place, "vector")
    if bias:
        yield Part(f"{name}.bias", f"{path}/bias", place, "vector")


def _layer(config: ModelConfig, side: str, layer: int) -> Iterator[Part]:
    bart = config.architecture == "bart"
    prefix = f"{side}.layers.{layer}." if bart else f"{side}.block.{layer}."
    for block, names in (_BART if bart else _t5(side)).items():
        if block.startswith("cross_attention") and side == "encoder":
            continue
        path, place = f"{side}/layers/routed/{block}", (layer, 0)
        if block.endswith("_norm"):
            yield from _norm(prefix + names, path, place, bias=bart)
            continue
        for which, (parameter, index) in _BLOCKS[block].items():
            if isinstance(names, dict):
                if which not in names:
                    continue
                name = names[which]
            else:
                short = "o" if which == "out" and not bart else which
                name = names.format(short)
            fused = () if index is None else (slice(None), index)
            yield Part(
                f"{prefix}{name}.weight", f"{path}/{parameter}_kernel", (*place, *fused), "kernel"
            )
            if bart:
                fused = () if index is None else (index,)
                yield Part(
                    f"{prefix}{name}.bias", f"{path}/{parameter}_bias", (*place, *fused), "vector"
                )
