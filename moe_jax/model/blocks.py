"""An encoder layer and a decoder layer. Each expert is one such layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.kernels.activations import ACTIVATIONS
from moe_jax.kernels.diagonals import from_diagonals
from moe_jax.kernels.dropout import Dropout
from moe_jax.kernels.linear import add_bias, linear
from moe_jax.kernels.norm import norm
from moe_jax.model.attention import (
    Projected,
    Visible,
    attend,
    attend_by_rows,
    attend_fused,
    split_heads,
)
from moe_jax.model.config import ModelConfig

# The name of what layers keep if `ModelConfig.kept_activations` is `products`: results of matrix
# products, from which the backward pass computes norms, activations and dropout again.
KEPT = "kept"


def param(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]):
    """A parameter with logical axes. If the random stream `experts` exists, noise is added, so that
    copies of a layer differ (`ModelConfig.expert_noise`)."""

    def noisy(key, shape):
        value, scale = init(key, shape), module.config.expert_noise
        if module.has_rng("experts") and scale:
            value += scale * jax.random.normal(module.make_rng("experts"), shape)
        return value

    return module.param(name, nn.with_logical_partitioning(noisy, axes), shape)


def _weights(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std):
    return param(module, name, nn.initializers.normal(std), shape, axes).astype(module.config.dtype)


def _bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]):
    """A bias, float32, or None if the family has none."""
    biases = module.config.family.biases
    return param(module, name, nn.initializers.zeros, shape, axes) if biases else None


def _kept(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, KEPT)


class Norm(nn.Module):
    """LayerNorm, or RMS norm without mean and bias; computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        axes = ("norm",)
        scale = param(self, "scale", nn.initializers.ones, (dim,), axes)
        layer = self.config.family.norm == "layer"
        bias = param(self, "bias", nn.initializers.zeros, (dim,), axes) if layer else None
        return norm(x, scale, bias, self.config.family.norm_epsilon, KEPT)


class Attention(nn.Module):
    """Projections around `attend`. Self-attention projects q, k, v with one matrix product."""

    config: ModelConfig
    cross: bool = False

    def setup(self) -> None:
        c = self.config
        # Heads and their width share one axis. With two axes, a TPU pads the last one to 128.
        D, HK = c.d_model, c.heads * c.head_dim
        axes = ("embed", "qkv", "heads")
        if self.cross:
            self.q_kernel = _weights(self, "q_kernel", (D, 1, HK), axes, c.init_std)
            self.q_bias = _bias(self, "q_bias", (1, HK), axes[1:])
            self.kv_kernel = _weights(self, "kv_kernel", (D, 2, HK), axes, c.init_std)
            self.kv_bias = _bias(self, "kv_bias", (2, HK), axes[1:])
        else:
            self.qkv_kernel = _weights(self, "qkv_kernel", (D, 3, HK), axes, c.init_std)
            self.qkv_bias = _bias(self, "qkv_bias", (3, HK), axes[1:])
        self.out_kernel = _weights(self, "out_kernel", (HK, D), ("heads", "embed"), c.init_std)
        self.out_bias = _bias(self, "out_bias", (D,), ("norm",))

    def project(self, x_RxLxD: jax.Array) -> jax.Array:
        """Query, key and value of self-attention: [R, L, 3, H * K]."""
        return _kept(add_bias(linear(x_RxLxD, self.qkv_kernel), self.qkv_bias))

    def project_query(self, x_RxLxD: jax.Array) -> jax.Array:
        """Query of cross-attention: [R, L, 1, H * K]."""
        return _kept(add_bias(linear(x_RxLxD, self.q_kernel), self.q_bias))

    def project_key_value(self, encoded_RxLxD: jax.Array) -> jax.Array:
        """Key and value of cross-attention: [R, L, 2, H * K]."""
        return _kept(add_bias(linear(encoded_RxLxD, self.kv_kernel), self.kv_bias))

    def attend(
        self, projected: Projected, visible: Visible, bias_HxS=None, deterministic: bool = True
    ) -> jax.Array:
        """The results of all heads: [R, L_q, H * K].

        Args:
            projected: query, key and value in one array, or the query and the other two.
            bias_HxS: added to the scores, by the distance from key to query: S = L_q + L_k - 1
                numbers, from the first query with the last key to the last query with the first.
        """
        c = self.config
        rate = 0.0 if deterministic else c.attention_dropout_rate
        settings = {"scale": c.attention_scale, "dropout_rate": rate}
        settings["dropout_key"] = self.make_rng("dropout") if rate else None
        if c.attention == "fused" and not deterministic:
            settings |= {"heads": c.heads, "bias_HxS": bias_HxS, "kept": KEPT}
            return attend_fused(projected, visible, **settings)
        q, k, v = split_heads(projected, c.heads)
        if bias_HxS is not None:
            settings["bias"] = from_diagonals(bias_HxS, q.shape[1], k.shape[1])[None]
        rows = 0 if deterministic else c.attention_rows
        run = partial(attend_by_rows, rows) if 0 < rows < q.shape[0] else attend
        y = run(q, k, v, visible.mask(), **settings)
        return _kept(y.reshape(*y.shape[:2], -1))

    def output(self, y_RxLxHK: jax.Array) -> jax.Array:
        """Projects the results of all heads to [R, L, D]."""
        return add_bias(linear(y_RxLxHK, self.out_kernel), self.out_bias)


class FeedForward(nn.Module):
    """One hidden layer, gated or not."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_RxLxD: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        gates = 2 if c.family.gated else 1
        kernel = _weights(
            self, "in_kernel", (c.d_model, gates, c.d_ff), ("embed", "gate", "mlp"), c.init_std
        )
        bias = _bias(self, "in_bias", (gates, c.d_ff), ("gate", "mlp"))
        h = add_bias(_kept(linear(x_RxLxD, kernel)), bias)
        y = ACTIVATIONS[c.family.activation](h[:, :, 0])
        h = y * h[:, :, 1] if c.family.gated else y
        h = Dropout(c.activation_dropout_rate)(h, deterministic=deterministic)
        kernel = _weights(self, "out_kernel", (c.d_ff, c.d_model), ("mlp", "embed"), c.init_std)
        return add_bias(linear(h, kernel), _bias(self, "out_bias", (c.d_model,), ("norm",)))


class _Layer(nn.Module):
    """Residual blocks: norm before the block (pre-norm) or after the sum (post-norm)."""

    config: ModelConfig

    def before(self, norm: nn.Module, x: jax.Array) -> jax.Array:
        return norm(x) if self.config.family.norm_first else x

    def after(self, norm: nn.Module, x: jax.Array, y: jax.Array, deterministic: bool) -> jax.Array:
        y = _kept(x + self.dropout(y, deterministic=deterministic))
        return y if self.config.family.norm_first else norm(y)


class EncoderLayer(_Layer):
    """Self-attention and feed-forward."""

    def setup(self) -> None:
        self.self_attention = Attention(self.config)
        self.self_attention_norm = Norm(self.config)
        self.feed_forward = FeedForward(self.config)
        self.feed_forward_norm = Norm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def __call__(self, x_RxLxD, segments_RxL, bias_HxS, deterministic: bool = True) -> jax.Array:
        """[R, L, D] -> [R, L, D]; a token sees its segment; `bias_HxS` as in `attend`."""
        visible = Visible(segments_RxL, segments_RxL)
        qkv = self.self_attention.project(self.before(self.self_attention_norm, x_RxLxD))
        y = self.self_attention.attend((qkv,), visible, bias_HxS, deterministic)
        y = self.self_attention.output(y)
        x = self.after(self.self_attention_norm, x_RxLxD, y, deterministic)
        y = self.feed_forward(self.before(self.feed_forward_norm, x), deterministic)
        return self.after(self.feed_forward_norm, x, y, deterministic)


def run_decoder_layer(
    part: Callable[..., Any],
    x_RxLxD: jax.Array,
    read_past: Callable[[jax.Array], jax.Array],
    read_input: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Runs a decoder layer, with the reading of keys and the use of weights left to the caller.

    Args:
        part: (`start`, `middle` or `end`, its arguments) -> the result of this method of
            `DecoderLayer`.
        read_past: query, key and value -> the result of self-attention.
        read_input: query -> the result of cross-attention.
    """
    x, q = part("middle", x_RxLxD, read_past(part("start", x_RxLxD)))
    return part("end", x, read_input(q))


class DecoderLayer(_Layer):
    """Causal self-attention, cross-attention and feed-forward.

    `start`, `middle` and `end` are the parts around the two attentions. They hold all weights.
    """

    def setup(self) -> None:
        self.self_attention = Attention(self.config)
        self.self_attention_norm = Norm(self.config)
        self.cross_attention = Attention(self.config, cross=True)
        self.cross_attention_norm = Norm(self.config)
        self.feed_forward = FeedForward(self.config)
        self.feed_forward_norm = Norm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def __call__(
        self, x_RxLxD, encoded_RxLinxD, input_segments_RxLin, segments_RxL, bias_HxS,
        deterministic: bool = True,
    ) -> jax.Array:  # fmt: skip
        """A whole target at once: [R, L, D] -> [R, L, D]; `bias_HxS` as in `attend`."""
        past = Visible(segments_RxL, segments_RxL, causal=True)
        whole_input = Visible(segments_RxL, input_segments_RxLin)
        cross = self.cross_key_value(encoded_RxLinxD)

        def part(name: str, *xs: jax.Array):
            return getattr(self, name)(*xs, deterministic)

        def read_past(qkv):
            return self.self_attention.attend((qkv,), past, bias_HxS, deterministic)

        def read_input(q):
            return self.cross_attention.attend((q, cross), whole_input, None, deterministic)

        return run_decoder_layer(part, x_RxLxD, read_past, read_input)

    def cross_key_value(self, encoded_RxLinxD: jax.Array) -> jax.Array:
        """Key and value of cross-attention, computed once per input and read at every step:
        [R, L_in, 2, H * K]."""
        return self.cross_attention.project_key_value(encoded_RxLinxD)

    def start(self, x_RxLxD, deterministic: bool = True) -> jax.Array:
        """Query, key and value of self-attention: [R, L, 3, H * K]."""
        del deterministic  # nothing is dropped here
        return self.self_attention.project(self.before(self.self_attention_norm, x_RxLxD))

    def middle(self, x_RxLxD, y_RxLxHK, deterministic: bool = True):
        """From the result of self-attention: (x, query of cross-attention)."""
        y = self.self_attention.output(y_RxLxHK)
        x = self.after(self.self_attention_norm, x_RxLxD, y, deterministic)
        return x, self.cross_attention.project_query(self.before(self.cross_attention_norm, x))

    def end(self, x_RxLxD, y_RxLxHK, deterministic: bool = True) -> jax.Array:
        """From the result of cross-attention: the layer's output [R, L, D]."""
        y = self.cross_attention.output(y_RxLxHK)
        x = self.after(self.cross_attention_norm, x_RxLxD, y, deterministic)
        y = self.feed_forward(self.before(self.feed_forward_norm, x), deterministic)
        return self.after(self.feed_forward_norm, x, y, deterministic)
