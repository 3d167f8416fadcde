"""The loss: label-smoothed cross-entropy of target tokens."""

from functools import partial

import jax
import jax.numpy as jnp

# The maximum number of logits in memory at a time: 1 GB in float32. With fewer, the sum of the
# kernel's gradient is read and written more often.
MOST_LOGITS = 2**28


def token_losses(
    logits: jax.Array,
    targets: jax.Array,
    label_smoothing: float,
    mean_logits: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy against targets smoothed by a uniform distribution over the vocabulary.

    Args:
        logits: float32 [..., V].
        targets: int [...].
        label_smoothing: probability mass spread evenly over all V entries.
        mean_logits: float32 [...], their means over V, if these are known already.

    Returns:
        float32 [...], nats.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (1.0 - label_smoothing) * target_logits
    if label_smoothing:
        mean_logits = jnp.mean(logits, axis=-1) if mean_logits is None else mean_logits
        loss = loss - label_smoothing * mean_logits
    return loss


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_loss(
    hidden_TxD: jax.Array,
    kernel_DxV: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    label_smoothing: float,
    multiple: int = 1,
) -> jax.Array:
    """The weighted sum of `token_losses` of `hidden @ kernel`, without all logits in memory.

    Logits are computed for a part of the tokens at a time. The gradients by `hidden` and `kernel`
    are computed with them, so that no product is repeated. The gradient of logits has the dtype of
    `hidden`; the gradient of the kernel is summed in float32.

    Args:
        hidden_TxD: in the dtype of products.
        kernel_DxV: float32, cast to that dtype here.
        targets_T: int.
        weights_T: float32; gets no gradient.
        label_smoothing: as above.
        multiple: columns of zeros are added to the kernel to make V a multiple of this.

    Returns:
        float32 scalar.
    """
    args = (hidden_TxD, kernel_DxV, targets_T, weights_T, label_smoothing, multiple)
    return _in_parts(*args, differentiate=False)[0]


def _forward(*args):
    loss, d_hidden, d_kernel = _in_parts(*args, differentiate=True)
    return loss, (d_hidden, d_kernel)


def _backward(label_smoothing, multiple, gradients, d_loss):
    del label_smoothing, multiple
    d_hidden, d_kernel = (g * d_loss.astype(g.dtype) for g in gradients)
    return d_hidden, d_kernel, None, None


summed_loss.defvjp(_forward, _backward)


def _in_parts(hidden, kernel, targets, weights, label_smoothing, multiple, differentiate):
    """The loss and its gradients by hidden and kernel (None if not `differentiate`)."""
    vocabulary, tokens = kernel.shape[1], targets.size
    kernel_DxC = jnp.pad(kernel.astype(hidden.dtype), ((0, 0), (0, -vocabulary % multiple)))
    # The means of logits are a product with the mean of the kernel, and need no pass over logits.
    mean_D = jnp.sum(kernel_DxC, axis=1, dtype=jnp.float32) / vocabulary

    def one(hidden_TxD, targets_T, weights_T):
        logits_TxC = jnp.dot(hidden_TxD, kernel_DxC, preferred_element_type=jnp.float32)
        logits_TxV = logits_TxC[:, :vocabulary]
        mean_T = jnp.sum(hidden_TxD.astype(jnp.float32) * mean_D, axis=1)
        losses_T = token_losses(logits_TxV, targets_T, label_smoothing, mean_T)
        loss = jnp.sum(jnp.where(weights_T > 0, weights_T * losses_T, 0.0))
        if not differentiate:
            return None, (loss, None)
        # The gradient of `token_losses` in one expression, which XLA computes in one pass.
        column_C = jnp.arange(kernel_DxC.shape[1])
        wanted_TxC = jnp.where(column_C == targets_T[:, None], 1.0 - label_smoothing, 0.0)
        wanted_TxC += label_smoothing / vocabulary
        log_z_T = jax.nn.logsumexp(logits_TxV, axis=-1)
        d_logits = weights_T[:, None] * (jnp.exp(logits_TxC - log_z_T[:, None]) - wanted_TxC)
        d_logits = jnp.where(column_C < vocabulary, d_logits, 0.0).astype(hidden_TxD.dtype)
        d_hidden_TxD = jax.lax.dot_general(d_logits, kernel_DxC, (((1,), (1,)), ((), ())))
        d_kernel_CxD = jax.lax.dot_general(
            d_logits, hidden_TxD, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return d_hidden_TxD, (loss, d_kernel_CxD)

    parts = -(-tokens * kernel_DxC.shape[1] // MOST_LOGITS)
    if parts == 1:
        d_hidden, (loss, d_kernel) = one(hidden, targets, weights)
    else:
        # Equal parts, because a smaller last part would need extra memory.
        size = -(-tokens // parts)

        def cut(x):
            x = jnp.pad(x, ((0, -tokens % size), *((0, 0),) * (x.ndim - 1)))
            return x.reshape(-1, size, *x.shape[1:])

        def add(total, part):
            d_hidden, addend = one(*part)
            return jax.tree.map(jnp.add, total, addend), d_hidden

        xs = (cut(hidden), cut(targets), cut(weights))
        d_kernel = jnp.zeros(kernel_DxC.shape[::-1], jnp.float32) if differentiate else None
        (loss, d_kernel), d_hidden = jax.lax.scan(add, (jnp.float32(0), d_kernel), xs)
        if differentiate:
            d_hidden = d_hidden.reshape(-1, d_hidden.shape[-1])[:tokens]
    if not differentiate:
        return loss, None, None
    return loss, d_hidden, d_kernel[:vocabulary].T
