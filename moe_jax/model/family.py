"""Families of encoder-decoders: the differences between BART and the T5s, as records.

To add a family, register a record, also from outside the package:

    register(Family(name="mine", norm="rms", norm_first=True, ...))
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Family:
    """The computation of a family's layers; sizes are in `ModelConfig`.

    Attributes:
        norm: `layer` (LayerNorm with mean and bias) or `rms` (neither).
        norm_first: norms come before each block and after the last layer (pre-norm); otherwise
            after each residual sum and after the embedding (post-norm).
        norm_epsilon: added to the variance.
        biases: whether matrix products have biases.
        positions: `learned` embeddings added to the input, or a `relative` bias of the attention
            scores, shared by the layers of a side.
        activation: activation of the feed-forward block; `gelu_tanh` is GELU's tanh approximation.
        gated: the activation is multiplied with a second product of the input (GLU).
        scale_attention: scores are divided by sqrt(head_dim). T5 has this factor in the query's
            initialisation.
        embedding_std: standard deviation of fresh embeddings; None for `ModelConfig.init_std`.
        tie_embeddings: logits use the input embedding, unless `ModelConfig` says otherwise.
        scale_tied_logits: tied logits are divided by sqrt(d_model), unless `ModelConfig` says
            otherwise.
    """

    name: str
    norm: Literal["layer", "rms"]
    norm_first: bool
    norm_epsilon: float
    biases: bool
    positions: Literal["learned", "relative"]
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"]
    gated: bool
    scale_attention: bool
    embedding_std: float | None
    tie_embeddings: bool
    scale_tied_logits: bool


FAMILIES: dict[str, Family] = {}  # by name


def register(family: Family) -> Family:
    """Registers a family by its name; replaces an earlier one of the same name."""
    FAMILIES[family.name] = family
    return family


# Lewis et al. 2020, arXiv 1910.13461.
register(
    Family(
        name="bart",
        norm="layer",
        norm_first=False,
        norm_epsilon=1e-5,
        biases=True,
        positions="learned",
        activation="gelu",
        gated=False,
        scale_attention=True,
        embedding_std=None,
        tie_embeddings=True,
        scale_tied_logits=False,
    )
)
# T5 1.1 (Shazeer 2020, arXiv 2002.05202), Flan-T5.
T5_1_1 = register(
    Family(
        name="t5",
        norm="rms",
        norm_first=True,
        norm_epsilon=1e-6,
        biases=False,
        positions="relative",
        activation="gelu_tanh",
        gated=True,
        scale_attention=False,
        embedding_std=1.0,
        tie_embeddings=False,
        scale_tied_logits=False,
    )
)
# Raffel et al. 2020, arXiv 1910.10683: t5-small to t5-11b.
register(
    dataclasses.replace(
        T5_1_1,
        name="t5_1_0",
        activation="relu",
        gated=False,
        tie_embeddings=True,
        scale_tied_logits=True,
    )
)
# Xue et al. 2021, arXiv 2010.11934: T5 1.1 with another vocabulary.
register(dataclasses.replace(T5_1_1, name="mt5"))
