"""The encoder-decoder: embeddings, the routed stacks of both sides, logits.

The same forward pass runs the stored model with its E experts, a group's gathered experts, the
plain dense model, and rows of different tasks (see `dispatch`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batch import Batch
from moe_jax.kernels.dropout import Dropout
from moe_jax.model.attention import relative_buckets
from moe_jax.model.blocks import Norm
from moe_jax.model.config import ModelConfig
from moe_jax.model.dispatch import Mix
from moe_jax.model.placement import Placement
from moe_jax.model.routed_stack import RoutedStack

# BART's position table starts with two unused rows.
POSITION_OFFSET = 2


class Side(nn.Module):
    """The encoder or the decoder: positions, layers, and the norm before or after them."""

    config: ModelConfig
    side: str  # "encoder" or "decoder"
    placement: Placement | None = None

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        if c.family.positions == "learned":
            init = nn.with_logical_partitioning(normal, ("position", "embed"))
            shape = (c.max_positions + POSITION_OFFSET, c.d_model)
            self.position = self.param("position", init, shape)
        else:
            init = nn.with_logical_partitioning(normal, ("relative", "heads"))
            self.relative = self.param("relative", init, (c.relative_buckets, c.heads))
        self.layers = RoutedStack(c, self.side, self.placement)
        self.norm = Norm(c)
        self.dropout = Dropout(c.dropout_rate)

    def embed(self, x: jax.Array, positions: jax.Array, train: bool) -> jax.Array:
        """The input of the first layer."""
        family = self.config.family
        if family.positions == "learned":
            x = x + self.position[positions + POSITION_OFFSET].astype(x.dtype)
        if not family.norm_first:
            x = self.norm(x)
        return self.dropout(x, deterministic=not train)

    def finish(self, x: jax.Array, train: bool) -> jax.Array:
        """The output after the last layer."""
        if self.config.family.norm_first:
            x = self.dropout(self.norm(x), deterministic=not train)
        return x

    def bias(self, distances_S: jax.Array) -> jax.Array | None:
        """Relative position bias, float32 [H, S], for queries so far after their keys; None if
        positions are learned embeddings."""
        if self.config.family.positions == "learned":
            return None
        buckets_S = relative_buckets(
            distances_S,
            bidirectional=self.side == "encoder",
            buckets=self.config.relative_buckets,
            max_distance=self.config.relative_max_distance,
        )
        return self.relative[buckets_S].T

    def __call__(self, x, positions, rows, dispatch, train: bool) -> jax.Array:
        """Embedded tokens [R, L, D] -> states [R, L, D]; `rows` as in `RoutedStack`."""
        x = self.embed(x, positions, train)
        # Examples lie in one piece, so relative positions in a row are those in an example.
        bias_HxS = self.bias(jnp.arange(1 - x.shape[1], x.shape[1]))
        x = self.layers(x, rows, (bias_HxS,), dispatch, train)
        return self.finish(x, train)


class EncoderDecoder(nn.Module):
    """Tokens -> logits.

    Methods take `dispatch`, which says how the experts of the N routed layers are used. It is a
    dispatch object; or weights of all experts, [N, E] or [N, E, R], short for `Mix`; or None if
    every layer has one expert.

    Attributes:
        placement: given if parameters are sharded and this runs inside `shard_map`. Arrays outside
            layers are never sharded there.
    """

    config: ModelConfig
    placement: Placement | None = None

    def setup(self) -> None:
        c = self.config
        std = c.init_std if c.family.embedding_std is None else c.family.embedding_std
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(std), ("vocab", "embed")),
            (c.vocabulary_size, c.d_model),
        )
        self.encoder = Side(c, "encoder", self.placement)
        self.decoder = Side(c, "decoder", self.placement)
        if not c.tie_embeddings:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(c.d_model**-0.5), ("embed", "vocab")
            )
            self.head = self.param("head", init, (c.d_model, c.vocabulary_size))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [...] -> [..., D]."""
        return self.embedding[tokens].astype(self.config.dtype)

    def encode(self, inputs, segments, positions, dispatch=None, train=False) -> jax.Array:
        """int [R, L_in] tokens, segments (0: padding), positions -> [R, L_in, D]."""
        own = _of_side(dispatch, slice(0, self.config.encoder_routed_layers))
        return self.encoder(self.embed(inputs), positions, (segments,), own, train)

    def decode(
        self, encoded, input_segments, decoder_inputs, segments, positions, dispatch=None,
        train=False,
    ) -> jax.Array:  # fmt: skip
        """Whole targets at once (teacher forcing): int [R, L_out] -> hidden [R, L_out, D]."""
        own = _of_side(dispatch, slice(self.config.encoder_routed_layers, None))
        rows = (encoded, input_segments, segments)
        return self.decoder(self.embed(decoder_inputs), positions, rows, own, train)

    def logits_factors(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits are the product of these: [..., D], and a parameter, float32 [D, V]."""
        c = self.config
        if c.tie_embeddings and c.scale_tied_logits:
            hidden = hidden * c.d_model**-0.5
        return hidden, self._head()

    def logits_kernel(self) -> jax.Array:
        """[D, V], in the dtype of activations."""
        return self._head().astype(self.config.dtype)

    def logits(self, hidden: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """[..., D] -> float32 [..., V]; `kernel` comes from `logits_kernel`."""
        hidden, _ = self.logits_factors(hidden)
        kernel = self.logits_kernel() if kernel is None else kernel
        return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)

    def _head(self) -> jax.Array:
        return self.embedding.T if self.config.tie_embeddings else self.head

    def hidden(self, batch: Batch, dispatch: Any = None, train: bool = False) -> jax.Array:
        """[R, L_out, D] of the rows of one group."""
        segments = batch["input_segments"]
        encoded = self.encode(batch["inputs"], segments, batch["input_positions"], dispatch, train)
        return self.decode(
            encoded, segments, batch["decoder_inputs"], batch["target_segments"],
            batch["target_positions"], dispatch, train,
        )  # fmt: skip

    def __call__(self, batch: Batch, dispatch: Any = None, train: bool = False) -> jax.Array:
        """Logits float32 [R, L_out, V] of the rows of one group."""
        return self.logits(self.hidden(batch, dispatch, train))


def _of_side(dispatch: Any, layers: slice) -> Any:
    """The part of a dispatch for some of the routed layers."""
    if isinstance(dispatch, jax.Array | np.ndarray):
        dispatch = Mix(dispatch)
    return jax.tree.map(lambda a: a[layers], dispatch)
