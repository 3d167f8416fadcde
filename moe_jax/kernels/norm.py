"""LayerNorm and RMS norm, with their backward pass written out.

It needs the input, and the mean and deviation of each vector. From JAX's own gradient, XLA makes
float32 arrays of the input's size on a GPU, and sums these over all tokens for the scale's
gradient. With mean and deviation at hand, it computes what it sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float, kept: str = ""
) -> jax.Array:
    """Normalises the last axis, in float32.

    Args:
        x: [..., D].
        bias_D: None for an RMS norm (Zhang & Sennrich 2019), which has no mean either.
        epsilon: added to the variance.
        kept: the name, for `jax.checkpoint`, of what the backward pass needs beside x.

    Returns:
        [..., D] in the dtype of x.
    """
    return _forward(x, scale_D, bias_D, epsilon, kept)[0]


def _forward(x, scale, bias, epsilon, kept):
    centred, mean = x.astype(jnp.float32), None
    if bias is not None:
        mean = checkpoint_name(jnp.mean(centred, -1), kept)
        centred = centred - mean[..., None]
    variance = jnp.mean(jnp.square(centred), -1)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + epsilon), kept)
    y = centred * inverse[..., None] * scale
    y = y if bias is None else y + bias
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _backward(epsilon, kept, residuals, dy):
    x, scale, mean, inverse = residuals
    dy, inverse = dy.astype(jnp.float32), inverse[..., None]
    centred = x.astype(jnp.float32)
    centred = centred if mean is None else centred - mean[..., None]
    normed = centred * inverse
    d_normed = dy * scale
    dx = d_normed - normed * jnp.mean(d_normed * normed, -1, keepdims=True)
    tokens = tuple(range(x.ndim - 1))
    d_bias = None
    if mean is not None:
        dx = dx - jnp.mean(d_normed, -1, keepdims=True)
        d_bias = jnp.sum(dy, tokens)
    return (inverse * dx).astype(x.dtype), jnp.sum(dy * normed, tokens), d_bias


norm.defvjp(_forward, _backward)
