"""Attention of packed rows, forward and backward, whose memory grows with the length of rows
and not with its square; its reference is `model.attention`.

On TPUs and NVIDIA GPUs a kernel. On other devices, and for shapes that the kernels cannot take, a
loop over blocks of queries. Each has a module with two functions:

    forward(form, packed) -> Attended
    backward(form, packed, attended, dy) -> gradients by `packed.projected` and the bias

Beside its arguments, only `Attended` is kept for the backward pass, which computes scores and
dropout masks again.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.kernels import blockwise_attention, gpu_attention, tpu_attention
from moe_jax.kernels.attention_form import Attended, Form, Packed
from moe_jax.kernels.dropout import key_words


def fused_attention(
    projected: tuple[jax.Array, ...],
    query_segments_RxLq: jax.Array,
    key_segments_RxLk: jax.Array,
    bias_HxS: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    *,
    heads: int,
    causal: bool = False,
    scale: float,
    dropout_rate: float = 0.0,
    first_head: jax.Array | int = 0,
    all_heads: int | None = None,
    kept: str = "",
    interpret: Literal["tpu", "cuda"] | None = None,
) -> jax.Array:
    """Multi-head attention of packed rows, as `model.attention.attend` defines it.

    Scores and softmax are float32. What a query gets that sees no key is not defined, but finite.

    Args:
        projected: queries, keys and values in one array, [R, L, 3, H * D], or queries
            [R, L_q, 1, H * D], and keys and values [R, L_k, 2, H * D].
        query_segments_RxLq, key_segments_RxLk: int32; a query sees the keys of its segment.
        bias_HxS: float32 numbers, S = L_q + L_k - 1, one of which is added to the score of a query
            and a key: that at `query - key + L_k - 1`.
        causal: a query sees no key after it.
        dropout_rate: dropout of the attention weights, with the mask that `kernels.dropout` draws
            for an array [R, H, L_q, L_k].
        first_head, all_heads: which part of all heads these are, if they are on several devices.
        kept: the name of `Attended` for the policies of `jax.checkpoint`. If they do not keep it,
            the backward pass computes it again.
        interpret: runs this platform's kernel, interpreted: for tests on other devices.

    Returns:
        [R, L_q, H * D] in their dtype.
    """
    rows, queries, _, columns = projected[0].shape
    keys, dtype = projected[-1].shape[1], projected[0].dtype
    form = Form(rows, queries, keys, heads, columns // heads, dtype, causal, scale, dropout_rate)
    no_words = jnp.zeros(4, jnp.uint32)
    packed = Packed(
        projected,
        bias_HxS,
        no_words if dropout_key is None else key_words(dropout_key),
        jnp.stack([jnp.asarray(first_head, jnp.int32), jnp.int32(all_heads or heads)]),
        query_segments_RxLq,
        key_segments_RxLk,
    )
    return _attend((form, kept, interpret), *packed)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, *packed):
    return _run("forward", settings, Packed(*packed)).y


def _forward(settings, *packed):
    attended = _run("forward", settings, Packed(*packed))
    attended = Attended(*(checkpoint_name(x, settings[1]) for x in attended))
    return attended.y, (packed, attended)


def _backward(settings, residuals, dy):
    packed, attended = residuals
    gradients = _run("backward", settings, Packed(*packed), attended, dy)
    return *gradients, None, None, None, None


_attend.defvjp(_forward, _backward)


def _run(which: str, settings, packed: Packed, *args):
    """Runs one of the two functions of a module, chosen by platform and shape."""
    form, _, interpret = settings
    modules = {"tpu": tpu_attention, "cuda": gpu_attention}
    if interpret:
        return getattr(modules[interpret], which)(form, packed, *args, interpret=True)
    biased = packed.bias_HxS is not None
    choices = {
        platform: partial(getattr(module, which), form)
        for platform, module in modules.items()
        if module.takes(form, biased)
    }
    loop = partial(getattr(blockwise_attention, which), form)
    return jax.lax.platform_dependent(packed, *args, **choices, default=loop)
