"""The decoder one position at a time, with a cache of keys and values.

Four choices make a step cheap on CPU (measured at BART-base size):

- Each layer's weights are separate arrays. A slice of a stack would be copied at every step, which
  is three times the memory traffic.
- The cache is updated in place.
- Keys are stored as [.., head_dim, places] and values as [.., places, head_dim], the order in which
  matrix products read them. As [places, heads, head_dim] they would be transposed at every step,
  at ten times the cost.
- The beams of a row are queries of one attention, so the row's encoded input is read once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.decoding.rows import Places, RowModel, by_expert, input_block, step_block
from moe_jax.kernels.attention_form import MASKED
from moe_jax.model.attention import split_heads
from moe_jax.model.blocks import DecoderLayer, run_decoder_layer
from moe_jax.model.experts import Params


class KeyValue(NamedTuple):
    """Keys [V, H, K, C] and values [V, H, C, K]."""

    key: jax.Array
    value: jax.Array


# For each layer; column C = position * beams + beam.
Cache = tuple[KeyValue, ...]


class _Layer(NamedTuple):
    """The arrays that a layer reads at every step."""

    params_S: list[Params]
    places: Places
    cross: KeyValue  # C = L_in
    cross_mask: jax.Array  # [V, 1, L_in]


class CachedDecoder:
    """Decodes R rows with Q beams each, all at the same position."""

    def __init__(
        self,
        model: RowModel,
        encoded_RxLxD: jax.Array,
        input_segments_RxL: jax.Array,
        length: int,
        beams: int = 1,
    ):
        self._model = model
        self._layer = DecoderLayer(model.config, parent=None)
        self._shape = (length, beams)
        self._kernel = model.call(lambda m: m.logits_kernel())
        self._layers = [
            self._prepare(params_S, places, encoded_RxLxD, input_segments_RxL)
            for params_S, places in model.decoder_layers()
        ]

    def _apply(self, layer: _Layer, method: str, *xs, block: int | None = None):
        def apply(params, *xs):
            return self._layer.apply({"params": params}, *xs, method=method)

        if block is None:
            block = step_block(xs[0].shape[0], len(layer.params_S), self._shape[1])
        return by_expert(apply, layer.params_S, layer.places, block, *xs)

    def _prepare(self, params_S: list[Params], places: Places, encoded, segments) -> _Layer:
        layer = _Layer(params_S, places, None, places.enter(segments)[:, None] > 0)
        block = input_block(encoded.shape[1])
        kv = self._apply(layer, "cross_key_value", places.enter(encoded), block=block)
        return layer._replace(cross=_columns(*split_heads((kv,), self._layer.config.heads)))

    def cache(self) -> Cache:
        """An empty cache."""
        length, beams = self._shape

        def empty(cross: KeyValue) -> KeyValue:
            rows, heads, dim, _ = cross.key.shape
            columns = length * beams
            return KeyValue(
                jnp.zeros((rows, heads, dim, columns), cross.key.dtype),
                jnp.zeros((rows, heads, columns, dim), cross.value.dtype),
            )

        return tuple(empty(layer.cross) for layer in self._layers)

    def step(
        self, token_RxQ: jax.Array, index: jax.Array, cache: Cache, seen_RxQxC: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One position for every beam of every row.

        Args:
            token_RxQ: int, the previous tokens.
            index: int scalar, their position.
            cache: from `cache()` or the previous step.
            seen_RxQxC: bool, the columns of the cache that hold a beam's past, including this
                position. The first axis may be 1.

        Returns:
            (float32 logits [R, Q, V], the new cache).
        """
        model, (length, beams) = self._model, self._shape
        scale = model.config.attention_scale
        column_position_C = jnp.arange(length * beams) // beams

        def embed(m):
            x = m.decoder.embed(m.embed(token_RxQ), jnp.full_like(token_RxQ, index), False)
            return x, m.decoder.bias(index - column_position_C)

        x_RxQxD, bias_HxC = model.call(embed)
        new = []
        for layer, (keys, values) in zip(self._layers, cache, strict=True):
            enter = layer.places.enter
            seen = seen_RxQxC if seen_RxQxC.shape[0] == 1 else enter(seen_RxQxC)

            def read_past(qkv, keys=keys, values=values, seen=seen):
                q, *kv = split_heads((qkv,), model.config.heads)
                kv = _columns(*kv)
                keys = jax.lax.dynamic_update_slice_in_dim(keys, kv.key, index * beams, 3)
                values = jax.lax.dynamic_update_slice_in_dim(values, kv.value, index * beams, 2)
                new.append(KeyValue(keys, values))
                return attend_columns(q, new[-1], seen, scale, bias_HxC)

            def read_input(q, layer=layer):
                (q,) = split_heads((q,), model.config.heads)
                return attend_columns(q, layer.cross, layer.cross_mask, scale)

            y = run_decoder_layer(
                partial(self._apply, layer), enter(x_RxQxD), read_past, read_input
            )
            x_RxQxD = layer.places.leave(y)
        hidden = model.call(lambda m: m.decoder.finish(x_RxQxD, False))
        return model.call(lambda m: m.logits(hidden, self._kernel)), tuple(new)


def _columns(key_VxLxHxK: jax.Array, value_VxLxHxK: jax.Array) -> KeyValue:
    return KeyValue(key_VxLxHxK.transpose(0, 2, 3, 1), value_VxLxHxK.transpose(0, 2, 1, 3))


def attend_columns(
    q_VxQxHxK: jax.Array,
    kv: KeyValue,
    mask_VxQxC: jax.Array,
    scale: float,
    bias_HxC: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend` for keys [V, H, K, C] and values [V, H, C, K].

    Args:
        mask_VxQxC: bool; axes V and Q may be 1.
        bias_HxC: added to the scores of all rows and queries.

    Returns:
        [V, Q, H * K].
    """
    scores = jnp.einsum(
        "vqhk,vhkc->vhqc", q_VxQxHxK, kv.key, preferred_element_type=jnp.float32
    )  # fmt: skip
    scores = scores * scale
    if bias_HxC is not None:
        scores = scores + bias_HxC[None, :, None]
    scores = jnp.where(mask_VxQxC[:, None], scores, MASKED)
    probabilities = jax.nn.softmax(scores).astype(kv.value.dtype)
    # In this order the product is not transposed; as [V, Q, H, K] it would be.
    y_VxQxHxK = jnp.matmul(probabilities, kv.value).swapaxes(1, 2)
    return y_VxQxHxK.reshape(*y_VxQxHxK.shape[:2], -1)
