"""Maps each tensor of a `transformers` model to its place in our parameter tree.

The map is a list of `Part`s; both directions read it. It is for dense models: one expert, no
vanilla layers, so that every layer is at `layers/routed` with indices [layer, 0].
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from moe_jax.interop import hf_families
from moe_jax.interop.hf_families import Names
from moe_jax.model.config import ModelConfig
from moe_jax.model.family import Family

EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"
# Other names of the embedding, which files may contain as copies; HEAD is one if it is tied.
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Tensors without effect: zeros, and leftovers in early T5 files.
ZERO = "final_logits_bias"
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

Place = tuple[int | slice, ...]


class Part(NamedTuple):
    """One tensor of `transformers` and its place in one of our parameters.

    Attributes:
        name: name in `transformers`, without the prefix `model.`, or in another library.
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
        """Returns the tensor from our parameter; a view if possible."""
        own = parameter[self.place]
        if self.form == "table":
            return own
        if self.form == "vector":
            return own.reshape(-1)
        matrix = own.reshape(own.shape[0], -1)
        return matrix if self.form == "matrix" else matrix.T

    def put(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the tensor into our parameter, cast to its dtype."""
        own = parameter[self.place]
        own[...] = (tensor.T if self.form == "kernel" else tensor).reshape(own.shape)


# Ours: block -> {which: (parameter, index on its axis of fused matrices, or None)}.
_BLOCKS: dict[str, dict[str, tuple[str, int | None]]] = {
    "self_attention": {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "out": ("out", None)},
    "cross_attention": {"q": ("q", 0), "k": ("kv", 0), "v": ("kv", 1), "out": ("out", None)},
    "feed_forward": {"in": ("in", 0), "gate": ("in", 1), "out": ("out", None)},
}
_POSITIONS = {"learned": "position", "relative": "relative"}


def parts(config: ModelConfig) -> list[Part]:
    """All tensors of a dense model, grouped by parameter.

    Raises:
        UserError: `transformers` has no model of this architecture.
    """
    names = hf_families.of_architecture(config.architecture).names
    family = config.family
    layer_norm = family.norm == "layer"
    result = [Part(EMBEDDING, "embedding", (), "table")]
    if not config.tie_embeddings:
        result.append(Part(HEAD, "head", (), "kernel"))
    for side in ("encoder", "decoder"):
        positions = names.positions.format(side=side)
        path = f"{side}/{_POSITIONS[family.positions]}"
        result.append(Part(f"{positions}.weight", path, (), "table"))
        result += _norm(names.norm.format(side=side), f"{side}/norm", (), layer_norm)
        for layer in range(getattr(config, f"{side}_layers")):
            result += _layer(names, family, side, layer)
    return sorted(result, key=lambda part: part.path)


def _norm(name: str, path: str, place: Place, bias: bool) -> Iterator[Part]:
    yield Part(f"{name}.weight", f"{path}/scale", place, "vector")
    if bias:
        yield Part(f"{name}.bias", f"{path}/bias", place, "vector")


def _layer(names: Names, family: Family, side: str, layer: int) -> Iterator[Part]:
    prefix, place = names.layer.format(side=side, layer=layer), (layer, 0)
    for block, theirs in names.blocks[side].items():
        path = f"{side}/layers/routed/{block}"
        if isinstance(theirs, str):
            yield from _norm(prefix + theirs, path, place, family.norm == "layer")
            continue
        for which, name in theirs.items():
            parameter, index = _BLOCKS[block][which]
            inner = () if index is None else (slice(None), index)
            path_of = f"{path}/{parameter}"
            yield Part(f"{prefix}{name}.weight", f"{path_of}_kernel", place + inner, "kernel")
            if family.biases:
                inner = () if index is None else (index,)
                yield Part(f"{prefix}{name}.bias", f"{path_of}_bias", place + inner, "vector")
