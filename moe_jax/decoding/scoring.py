"""Log-likelihoods of given targets, without decoding."""

import jax
import jax.numpy as jnp

from moe_jax.data.batch import Batch
from moe_jax.decoding.rows import RowModel

ROWS_AT_ONCE = 8  # rows whose logits are in memory at the same time


def log_likelihoods(model: RowModel, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood of every row's target, summed over its tokens.

    Args:
        batch: arrays [R, L], as `data.packing.build` lays them out.

    Returns:
        (float32 [R] sum of natural logarithms, int32 [R] number of target tokens); 0 for an empty
        row.
    """
    hidden_RxLxD = model.hidden(batch)
    kernel = model.call(lambda m: m.logits_kernel())
    real_RxL = batch["target_segments"] > 0

    def one_row(row):
        hidden_LxD, targets_L, real_L = row
        logits_LxV = model.call(lambda m: m.logits(hidden_LxD, kernel))
        log_probabilities_LxV = jax.nn.log_softmax(logits_LxV)
        chosen_L = jnp.take_along_axis(log_probabilities_LxV, targets_L[:, None], -1)[:, 0]
        return jnp.sum(jnp.where(real_L, chosen_L, 0.0))

    rows = (hidden_RxLxD, batch["targets"], real_RxL)
    sums_R = jax.lax.map(one_row, rows, batch_size=min(ROWS_AT_ONCE, real_RxL.shape[0]))
    return sums_R, jnp.sum(real_RxL, -1, dtype=jnp.int32)
