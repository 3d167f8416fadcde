"""The loss: label-smoothed cross-entropy, summed over target tokens."""

import jax
import jax.numpy as jnp


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
