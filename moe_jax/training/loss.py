"""The loss: label-smoothed cross-entropy of target tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# The maximum number of logits in memory at a time: 512 MB in float32.
MOST_LOGITS = 2**27


def token_losses(logits: jax.Array, targets: jax.Array, label_smoothing: float) -> jax.Array:
    """Cross-entropy against targets smoothed by a uniform distribution over the vocabulary.

    Args:
        logits: float32 [..., V].
        targets: int [...].
        label_smoothing: probability mass spread evenly over all V entries.

    Returns:
        float32 [...], nats.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (1.0 - label_smoothing) * target_logits
    if label_smoothing:
        loss = loss - label_smoothing * jnp.mean(logits, axis=-1)
    return loss


def token_losses_in_chunks(
    logits: Callable[[jax.Array], jax.Array],
    hidden_RxLxD: jax.Array,
    targets_RxL: jax.Array,
    label_smoothing: float,
) -> jax.Array:
    """`token_losses` of `logits(hidden)`, in parts of at most `MOST_LOGITS` logits.

    The backward pass computes each part's logits again.

    Args:
        logits: [..., D] -> float32 [..., V].
        label_smoothing: as above.

    Returns:
        float32 [R, L], nats.
    """
    most = max(1, MOST_LOGITS // jax.eval_shape(logits, hidden_RxLxD).shape[-1])
    chunks = -(-targets_RxL.size // most)
    if chunks <= 1:
        return token_losses(logits(hidden_RxLxD), targets_RxL, label_smoothing)

    @jax.checkpoint
    def one(token):
        hidden_D, target = token
        return token_losses(logits(hidden_D), target, label_smoothing)

    tokens = (hidden_RxLxD.reshape(targets_RxL.size, -1), targets_RxL.ravel())
    # Equal parts, because a smaller last part would need extra memory.
    at_once = -(-targets_RxL.size // chunks)
    return jax.lax.map(one, tokens, batch_size=at_once).reshape(targets_RxL.shape)
