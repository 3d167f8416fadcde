"""Attention, masks and relative positions as pure functions."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.core.errors import UserError
from moe_jax.kernels.attention import fused_attention
from moe_jax.kernels.attention_form import split
from moe_jax.kernels.softmax_attention import softmax_attention

# Queries, keys and values: ([R, L, 3, H * D],) of self-attention; ([R, L_q, 1, H * D],
# [R, L_k, 2, H * D]) of cross-attention. As one array, they need not be copied apart for a kernel.
Projected = tuple[jax.Array, ...]


def split_heads(projected: Projected, heads: int) -> list[jax.Array]:
    """Queries, keys and values, each [R, L, H, D]."""
    return [x.reshape(*x.shape[:2], heads, -1) for x in split(projected)]


class Visible(NamedTuple):
    """Which keys a query sees: those of its segment and, if `causal`, none after it."""

    query_segments_RxLq: jax.Array
    key_segments_RxLk: jax.Array
    causal: bool = False

    def mask(self) -> jax.Array:
        """bool [R, 1, L_q, L_k]."""
        mask = segment_mask(self.query_segments_RxLq, self.key_segments_RxLk)
        return jnp.tril(mask) if self.causal else mask


def segment_mask(query_segments_RxLq: jax.Array, key_segments_RxLk: jax.Array) -> jax.Array:
    """Each query sees only the keys of its own example. Padding (0) sees only padding.

    Returns:
        bool [R, 1, L_q, L_k].
    """
    return query_segments_RxLq[:, None, :, None] == key_segments_RxLk[:, None, None, :]


def attend(
    q_RxLqxHxD: jax.Array,
    k_RxLkxHxD: jax.Array,
    v_RxLkxHxD: jax.Array,
    mask: jax.Array | None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention; softmax in float32.

    Args:
        mask: bool, broadcastable to [R, H, L_q, L_k]; True means visible.
        bias: added to the scores, broadcastable to the same shape, with as many axes.
        scale: of the scores; D ** -0.5 when None.
        dropout_rate: dropout of the attention weights.

    Returns:
        [R, L_q, H, D] in the dtype of `q`.
    """
    scale = q_RxLqxHxD.shape[-1] ** -0.5 if scale is None else scale
    arrays = (q_RxLqxHxD, k_RxLkxHxD, v_RxLkxHxD, mask, bias, dropout_key)
    return softmax_attention(*arrays, scale, dropout_rate)


def attend_by_rows(
    rows: int,
    q_RxLqxHxD: jax.Array,
    k_RxLkxHxD: jax.Array,
    v_RxLkxHxD: jax.Array,
    mask_Rx1xLqxLk: jax.Array,
    *,
    dropout_key: jax.Array | None = None,
    **settings: Any,
) -> jax.Array:
    """`attend` in a loop over some rows at a time; each row has its own key of dropout.

    Memory for scores grows with `rows` and not with R, because the backward pass computes them
    again.
    """
    keys_R = None if dropout_key is None else jax.random.split(dropout_key, q_RxLqxHxD.shape[0])

    # No barrier against merging equal computations: forward and backward are different loops.
    @partial(jax.checkpoint, prevent_cse=False)
    def one(row):
        *arrays, key = row
        return attend(*(a[None] for a in arrays), dropout_key=key, **settings)[0]

    xs = (q_RxLqxHxD, k_RxLkxHxD, v_RxLkxHxD, mask_Rx1xLqxLk, keys_R)
    return jax.lax.map(one, xs, batch_size=rows)


def attend_fused(
    projected: Projected,
    visible: Visible,
    *,
    heads: int,
    bias_HxS: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    **settings: Any,
) -> jax.Array:
    """`attend` by `kernels.attention`, which explains the arguments: [R, L_q, H * D].

    Heads may be spread over the mesh axis `model`. The partitioner cannot split a kernel, so this
    does it, by all axes that no `shard_map` outside has split.

    Raises:
        UserError: `heads` is no multiple of the size of that axis.
    """
    segments = (visible.query_segments_RxLq, visible.key_segments_RxLk)
    args = (projected, *segments, bias_HxS, dropout_key)
    settings |= {"causal": visible.causal, "all_heads": heads}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fused_attention(*args, heads=heads, **settings)
    own_heads, rest = divmod(heads, mesh.shape["model"])
    if rest:
        raise UserError(
            f"ModelConfig.attention 'fused' needs as many heads on each device: ModelConfig.heads "
            f"{heads} is no multiple of MeshConfig.model {mesh.shape['model']}"
        )

    def of_heads(*args):
        first = jax.lax.axis_index("model") * own_heads
        return fused_attention(*args, heads=own_heads, first_head=first, **settings)

    return jax.shard_map(
        of_heads,
        in_specs=(P(None, None, None, "model"), P(), P(), P("model"), P()),
        out_specs=P(None, None, "model"),
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(*args)


def relative_buckets(
    distance: jax.Array,
    *,
    bidirectional: bool,
    buckets: int,
    max_distance: int,
) -> jax.Array:
    """T5's relative position buckets (Raffel et al. 2020, section 2.1).

    Half of the buckets count exact distances, the rest grow logarithmically up to
    `max_distance`; a bidirectional table spends half of all buckets on each direction.

    Args:
        distance: int, positions of queries minus those of keys, of any shape.

    Returns:
        int32 in [0, buckets), of the same shape.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance < 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
    logarithmic = exact + (
        jnp.log(ratio) / np.log(max_distance / exact) * (buckets - exact)
    ).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(logarithmic, buckets - 1))
