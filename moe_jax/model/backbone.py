"""The encoder-decoder, with any number of experts in its routed layers.

The same module serves as the stored model (E experts), as the sparse model of one group (the k
experts its route chose, see `experts.gather`) and, with one expert, as the plain dense model.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.kernels.dropout import Dropout
from moe_jax.model.attention import causal_mask, relative_buckets, segment_mask
from moe_jax.model.blocks import DecoderLayer, EncoderLayer, Norm
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import init_experts, mix

# BART's position table starts with two unused rows.
POSITION_OFFSET = 2


def layer_runs(config: ModelConfig, side: str) -> list[tuple[str, slice]]:
    """Runs of neighbouring layers of one kind, in order: ("routed" or "vanilla", its place among
    the layers of that kind)."""
    depth = getattr(config, f"{side}_layers")
    vanilla = getattr(config, f"{side}_vanilla_layers")
    result, done = [], {"routed": 0, "vanilla": 0}
    kinds = ["vanilla" if i in vanilla else "routed" for i in range(depth)]
    for kind, run in itertools.groupby(kinds):
        start = done[kind]
        done[kind] += len(list(run))
        result.append((kind, slice(start, done[kind])))
    return result


class Stack(nn.Module):
    """Embedding of positions, layers with their experts, and the norm of one side."""

    config: ModelConfig
    side: str  # "encoder" or "decoder"
    experts: int

    def setup(self) -> None:
        c = self.config
        decoder = self.side == "decoder"
        self.depth = c.decoder_layers if decoder else c.encoder_layers
        self.vanilla = c.decoder_vanilla_layers if decoder else c.encoder_vanilla_layers
        # Not a submodule: its parameters are a plain tree that experts can be taken from.
        self.layer = (DecoderLayer if decoder else EncoderLayer)(c, parent=None)
        normal = nn.initializers.normal(c.init_std)
        if c.family.positions == "learned":
            init = nn.with_logical_partitioning(normal, ("position", "embed"))
            shape = (c.max_positions + POSITION_OFFSET, c.d_model)
            self.position = self.param("position", init, shape)
        else:
            init = nn.with_logical_partitioning(normal, ("relative", "heads"))
            self.relative = self.param("relative", init, (c.relative_buckets, c.heads))
        # `param` would trace the initialisation of all layers again at every call.
        self.layers = (
            self.param("layers", self._init_layers)
            if self.is_initializing()
            else self.get_variable("params", "layers")
        )
        self.norm = Norm(c)
        self.dropout = Dropout(c.dropout_rate)

    def _init_layers(self, key: jax.Array) -> dict[str, Any]:
        x = jnp.zeros((1, 1, self.config.d_model), self.config.dtype)
        args = (x, x, None, None, None) if self.side == "decoder" else (x, None, None)
        counts = {
            "routed": (self.depth - len(self.vanilla), self.experts),
            "vanilla": (len(self.vanilla), 1),
        }
        return {
            kind: init_experts(
                lambda k: self.layer.init(k, *args)["params"],
                jax.random.fold_in(key, i),
                layers,
                experts,
                self.config.expert_noise,
            )
            for i, (kind, (layers, experts)) in enumerate(counts.items())
            if layers
        }

    def embed(self, x: jax.Array, positions: jax.Array, deterministic: bool) -> jax.Array:
        """What goes into the first layer."""
        family = self.config.family
        if family.positions == "learned":
            x = x + self.position[positions + POSITION_OFFSET].astype(x.dtype)
        if not family.norm_first:
            x = self.norm(x)
        return self.dropout(x, deterministic=deterministic)

    def finish(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """What comes out of the last layer."""
        if self.config.family.norm_first:
            x = self.dropout(self.norm(x), deterministic=deterministic)
        return x

    def bias(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array | None:
        """Relative position bias [1, H, L_q, L_k]; None where positions are learned."""
        if self.config.family.positions == "learned":
            return None
        buckets = relative_buckets(
            query_positions,
            key_positions,
            bidirectional=self.side == "encoder",
            buckets=self.config.relative_buckets,
            max_distance=self.config.relative_max_distance,
        )
        return self.relative[buckets].transpose(2, 0, 1)[None].astype(self.config.dtype)

    def __call__(self, x, args, weights_NxK, deterministic: bool) -> jax.Array:
        """Runs all layers; `args` follow x in the layer's call. [R, L, D] -> [R, L, D].

        Args:
            weights_NxK: routes of this side's routed layers, or [N, K, R]; None where the model
                is dense.
        """
        keys = None if deterministic else jax.random.split(self.make_rng("dropout"), self.depth)

        def apply(params, x, key):
            rngs = None if key is None else {"dropout": key}
            return self.layer.apply({"params": params}, x, *args, deterministic, rngs=rngs)

        def one(x, layer):
            params, weights_K, key = layer
            y = apply(params, x, key)
            if weights_K is not None:
                y = y * weights_K[0].reshape(-1, 1, 1).astype(y.dtype)
            return y, None

        def several(x, layer):
            params_K, weights_K, key = layer
            return mix(lambda params: apply(params, x, key), params_K, weights_K), None

        start = 0
        for kind, place in layer_runs(self.config, self.side):
            count = place.stop - place.start
            params = self.layers[kind]
            depth, experts = jax.tree.leaves(params)[0].shape[:2]
            if count < depth:
                params = jax.tree.map(lambda p, at=place: p[at], params)
            if experts == 1:
                # Here, not in the scan, whose backward pass would then keep a copy of all weights.
                params = jax.tree.map(lambda p: p[:, 0], params)
            weights = weights_NxK[place] if kind == "routed" and weights_NxK is not None else None
            own_keys = None if keys is None else keys[start : start + count]
            run = one if experts == 1 else several
            run = jax.checkpoint(run) if self.config.remat else run
            layers = (params, weights, own_keys)
            x, _ = jax.lax.scan(run, x, layers, unroll=self.config.unroll_layers)
            start += count
        return x


class EncoderDecoder(nn.Module):
    """An encoder-decoder whose routed layers hold `experts` experts each.

    Every method takes `weights_NxK`, the route of the one task that all R rows belong to: for
    each routed layer (encoder first) the weights of its experts; or [N, K, R], the route of each
    row; None only where experts = 1.
    """

    config: ModelConfig
    experts: int

    def setup(self) -> None:
        c = self.config
        std = c.init_std if c.family.embedding_std is None else c.family.embedding_std
        init = nn.initializers.normal(std)
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(init, ("vocab", "embed")),
            (c.vocabulary_size, c.d_model),
        )
        self.encoder = Stack(c, "encoder", self.experts)
        self.decoder = Stack(c, "decoder", self.experts)
        if not c.tie_embeddings:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(c.d_model**-0.5), ("embed", "vocab")
            )
            self.head = self.param("head", init, (c.d_model, c.vocabulary_size))

    def split_weights(self, weights_NxK: jax.Array | None):
        """The route's encoder and decoder part."""
        if weights_NxK is None:
            return None, None
        encoder = self.config.encoder_layers - len(self.config.encoder_vanilla_layers)
        return weights_NxK[:encoder], weights_NxK[encoder:]

    def encode(self, inputs, segments, positions, weights_NxK, deterministic=True) -> jax.Array:
        """int [R, L_in] tokens, segments (0: padding), positions -> [R, L_in, D]."""
        x = self.embedding[inputs].astype(self.config.dtype)
        x = self.encoder.embed(x, positions, deterministic)
        places = jnp.arange(inputs.shape[1])
        args = (segment_mask(segments, segments), self.encoder.bias(places, places))
        x = self.encoder(x, args, self.split_weights(weights_NxK)[0], deterministic)
        return self.encoder.finish(x, deterministic)

    def decode(
        self, encoded, input_segments, decoder_inputs, segments, positions, weights_NxK,
        deterministic=True,
    ) -> jax.Array:  # fmt: skip
        """Whole targets at once (teacher forcing): int [R, L_out] -> hidden [R, L_out, D]."""
        x = self.embedding[decoder_inputs].astype(self.config.dtype)
        x = self.decoder.embed(x, positions, deterministic)
        places = jnp.arange(decoder_inputs.shape[1])
        mask = segment_mask(segments, segments) & causal_mask(decoder_inputs.shape[1])
        cross_mask = segment_mask(segments, input_segments)
        args = (encoded, mask, cross_mask, self.decoder.bias(places, places))
        x = self.decoder(x, args, self.split_weights(weights_NxK)[1], deterministic)
        return self.decoder.finish(x, deterministic)

    def logits_kernel(self) -> jax.Array:
        """[D, V]."""
        kernel = self.embedding.T if self.config.tie_embeddings else self.head
        return kernel.astype(self.config.dtype)

    def logits(self, hidden: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """[..., D] -> float32 [..., V]; `kernel` is that of `logits_kernel`."""
        c = self.config
        if c.tie_embeddings and c.scale_tied_logits:
            hidden = hidden * c.d_model**-0.5
        kernel = self.logits_kernel() if kernel is None else kernel
        return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)

    def hidden(self, batch, weights_NxK, deterministic=True) -> jax.Array:
        """[R, L_out, D] of one group of a training batch (see `data.pipeline`)."""
        encoded = self.encode(
            batch["inputs"], batch["input_segments"], batch["input_positions"], weights_NxK,
            deterministic,
        )  # fmt: skip
        return self.decode(
            encoded, batch["input_segments"], batch["decoder_inputs"], batch["target_segments"],
            batch["target_positions"], weights_NxK, deterministic,
        )  # fmt: skip

    def __call__(self, batch, weights_NxK, deterministic=True) -> jax.Array:
        """Logits [R, L_out, V] of one group of a training batch."""
        return self.logits(self.hidden(batch, weights_NxK, deterministic))
