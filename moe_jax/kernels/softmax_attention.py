"""Attention with its backward pass written out; its reference is JAX's own."""

from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.kernels.attention_form import MASKED, product, softmax_sums
from moe_jax.kernels.dropout import dropout


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def softmax_attention(
    q_RxLqxHxD: jax.Array,
    k_RxLkxHxD: jax.Array,
    v_RxLkxHxD: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    dropout_key: jax.Array | None,
    scale: float,
    dropout_rate: float = 0.0,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, with dropout of the weights and a faster gradient.

    The gradient of a softmax needs, for each query, the sum over keys of weights times their
    gradients. `softmax_sums` has it as a sum over D numbers; XLA's sum over keys took an eighth of
    a step of short rows on CPU (`docs/performance.md`).

    Args:
        mask: bool, broadcastable to [R, H, L_q, L_k]; True means visible.
        bias: added to the scores, broadcastable to the same shape with as many axes.
        dropout_key: as in `dropout`; read if there is a rate. Masks are drawn again in the backward
            pass, which keeps one float32 array of weights.

    Returns:
        [R, L_q, H, D] in the dtype of `q`.
    """
    arrays = (q_RxLqxHxD, k_RxLkxHxD, v_RxLkxHxD, mask, bias, dropout_key)
    return _forward(*arrays, scale, dropout_rate)[0]


def _forward(q, k, v, mask, bias, key, scale, rate):
    scores = scale * product("rqhd,rkhd->rhqk", q, k)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    weights = jax.nn.softmax(scores)
    y = jnp.einsum("rhqk,rkhd->rqhd", _dropped(weights, rate, key).astype(v.dtype), v)
    return y, (q, k, v, mask, bias, key, weights, y)


def _backward(scale, rate, kept, dy):
    q, k, v, mask, bias, key, weights, y = kept
    sums_RxLqxH = softmax_sums(y, dy)
    d_weights = _dropped(product("rqhd,rkhd->rhqk", dy, v), rate, key)
    d_scores = weights * (d_weights - sums_RxLqxH.swapaxes(1, 2)[..., None])
    if mask is not None:  # a query that sees nothing has equal weights, but no gradient
        d_scores = jnp.where(mask, d_scores, 0.0)
    d_products = (scale * d_scores).astype(q.dtype)
    dq = jnp.einsum("rhqk,rkhd->rqhd", d_products, k)
    dk = jnp.einsum("rhqk,rqhd->rkhd", d_products, q)
    dv = jnp.einsum("rhqk,rqhd->rkhd", _dropped(weights, rate, key).astype(v.dtype), dy)
    return dq, dk, dv, None, None if bias is None else _sum_to(d_scores, bias), None


softmax_attention.defvjp(_forward, _backward)


def _dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    return dropout(x, rate, key) if rate else x


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """x summed over the axes along which `like` was broadcast."""
    axes = [axis for axis, size in enumerate(like.shape) if size == 1 != x.shape[axis]]
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)
