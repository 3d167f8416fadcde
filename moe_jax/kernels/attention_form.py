"""What all forms of `attention` share: settings, arrays, and small functions."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MASKED = float(jnp.finfo(jnp.float32).min)  # the score of a key that is not seen
# Axes that `dot` sums over: a @ b, a @ b.T and a.T @ b.
PLAIN, BY_ROWS, BY_COLUMNS = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fixed for one program: shapes and settings, as `attention.fused_attention` has them.

    Attributes:
        queries, keys: the lengths L_q and L_k.
        width: D, of one head.
        rate: of dropout.
    """

    rows: int
    queries: int
    keys: int
    heads: int
    width: int
    dtype: Any
    causal: bool
    scale: float
    rate: float

    @property
    def distances(self) -> int:
        """How many distances from a key to a query there are: S."""
        return self.queries + self.keys - 1

    def products(self, count: int) -> int:
        """Floating-point operations of so many products of all queries with all keys."""
        return 2 * count * self.rows * self.heads * self.queries * self.keys * self.width


class Packed(NamedTuple):
    """The arrays.

    Attributes:
        projected: queries, keys and values, as in `attention.fused_attention`.
        bias_HxS: float32, or None.
        dropout_words_4: uint32, those of `kernels.dropout.key_words`.
        heads_2: int32 [number of the first of these heads, number of all heads].
        query_segments_RxLq, key_segments_RxLk: int32; a query sees the keys of its segment.
    """

    projected: tuple[jax.Array, ...]
    bias_HxS: jax.Array | None
    dropout_words_4: jax.Array
    heads_2: jax.Array
    query_segments_RxLq: jax.Array
    key_segments_RxLk: jax.Array

    def joined(self, dq: jax.Array, dk: jax.Array, dv: jax.Array) -> tuple[jax.Array, ...]:
        """Gradients by `projected`, the inverse of `split`."""
        if len(self.projected) == 1:
            return (jnp.stack([dq, dk, dv], axis=2),)
        return dq[:, :, None], jnp.stack([dk, dv], axis=2)


class Attended(NamedTuple):
    """What the backward pass gets from the forward pass.

    Attributes:
        y: the result, [R, L_q, H * D].
        log_sums_RxHxLq: float32, logarithms of the sums of powers in a softmax over scores.
    """

    y: jax.Array
    log_sums_RxHxLq: jax.Array


def split(projected: Sequence[jax.Array]) -> list[jax.Array]:
    """The N arrays [R, L, H * D] in each array [R, L, N, H * D]: queries, keys and values."""
    return [x[:, :, n] for x in projected for n in range(x.shape[2])]


def dot(a: jax.Array, b: jax.Array, axes=PLAIN) -> jax.Array:
    """The product of two matrices, summed in float32."""
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def weight_number(form: Form, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """uint32, the number of a weight in an array [R, H, L_q, L_k] of all heads, for `is_kept`.

    Args:
        head: its number among the heads of all rows, `row * H + head`.
    """
    return ((head * form.queries + query) * form.keys + key).astype(jnp.uint32)


def padded(x: jax.Array, sizes: dict[int, int], fill: int = 0) -> jax.Array:
    """x, with axes filled up at their end: axis -> its new size."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)


def heads_apart(form: Form, x_RxLxHD: jax.Array) -> jax.Array:
    """[R, L, H * D] -> [R, L, H, D]."""
    return x_RxLxHD.reshape(*x_RxLxHD.shape[:2], form.heads, form.width)


def softmax_sums(y: jax.Array, dy: jax.Array) -> jax.Array:
    """What the gradient of a softmax subtracts: the sum over keys of weights times their gradients
    is the product of the result with its gradient (FlashAttention, arXiv 2205.14135, appendix B.4).

    Args:
        y, dy: [..., D].

    Returns:
        float32 [...].
    """
    return jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum`, summed in float32."""
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
