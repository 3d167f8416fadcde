"""The loss: label-smoothed cross-entropy of target tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Logits that exist together at most: 512 MB in float32.
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
    """`token_losses` of `logits(hidden)`, a part at a time where all would be over `MOST_LOGITS`.

    The backward pass makes each part's logits anew.

    Args:
        logits: [..., D] -> float32 [..., V].
        label_smoothing: as above.

    Returns:
        float32 [R, L], nats.
    """
    tokens = targets_RxL.size
    chunks = -(-jax.eval_shape(logits, hidden_RxLxD).size // MOST_LOGITS)
    if chunks == 1:
        return token_losses(logits(hidden_RxLxD), targets_RxL, label_smoothing)
    each = -(-tokens // chunks)

    def split(x_RxLx):
        x_Tx = x_RxLx.reshape(tokens, *x_RxLx.shape[2:])
        padding = [(0, chunks * each - tokens)] + [(0, 0)] * (x_Tx.ndim - 1)
        return jnp.pad(x_Tx, padding).reshape(chunks, each, *x_Tx.shape[1:])

    @jax.checkpoint
    def chunk(xs):
        hidden_TxD, targets_T = xs
        return token_losses(logits(hidden_TxD), targets_T, label_smoothing)

    losses = jax.lax.map(chunk, (split(hidden_RxLxD), split(targets_RxL)))
    return losses.reshape(-1)[:tokens].reshape(targets_RxL.shape)
