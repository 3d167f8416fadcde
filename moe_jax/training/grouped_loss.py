"""Loss and gradients of the groups that one device holds, under their routes.

Where routes are hard, each group gathers the experts that its task uses and runs a dense model
(DESIGN: route the weights, not the tokens): groups run one after the other in a scan, so that
activations of one group at a time are alive, and gradients are added in place into the full tree.
Where all groups share all weights (the dense model, or all experts computed), their rows are
merged into one batch.
"""

from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import GROUP_AXES
from moe_jax.model.experts import Params, gather, scatter_add
from moe_jax.model.moe import Assignment, TaskMoE
from moe_jax.training.lazy import Slots
from moe_jax.training.loss import token_losses_in_chunks

Batch = dict[str, jax.Array]
# Tokens that are merged at most: matrix products reach their speed before, and the activations of
# more leave a CPU's caches.
CPU_TOKENS, DEVICE_TOKENS = 2048, 8192


def group_loss(
    model: TaskMoE,
    backbone: Params,
    weights_NxK: jax.Array | None,
    group: Batch,
    key: jax.Array | None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Summed loss of one group under its route; `key` drives dropout (None: none).

    Args:
        backbone: with the K experts per routed layer that the weights are of.
        weights_NxK: the route; or [N, K, R], that of each row; None for a dense model.
        group: [R, L] arrays.
    """
    experts = 1 if weights_NxK is None else weights_NxK.shape[1]
    rngs = None if key is None else {"dropout": key}
    call = partial(model.backbone(experts).apply, {"params": backbone}, rngs=rngs)
    hidden_RxLxD = call(group, weights_NxK, key is None, method="hidden")
    logits = partial(call, kernel=call(method="logits_kernel"), method="logits")
    losses = token_losses_in_chunks(logits, hidden_RxLxD, group["targets"], label_smoothing)
    return jnp.sum(jnp.where(group["target_segments"] > 0, losses, 0.0))


def local_gradients(
    model: TaskMoE,
    backbone: Params,
    batch: Batch,
    assignment: Assignment | None,
    slots: Slots | None,
    scale: jax.Array,
    key: jax.Array,
    *,
    label_smoothing: float,
    groups_at_once: int,
    shards: int,
    weighted: bool,
) -> tuple[jax.Array, Params, jax.Array]:
    """Scaled sums over this device's G groups, then over devices.

    Args:
        batch: [G, R, L] arrays.
        assignment: of the groups; None for a dense model.
        slots: see `lazy`; None for the gradient by all experts.
        scale: of the loss, and so of its gradients.
        groups_at_once: see `StepConfig`.
        shards: devices that share the batch.
        weighted: whether the gradient by the routes is wanted.

    Returns:
        (loss, its gradient by the backbone, or by the slots of each routed layer, its gradient by
        each group's weights [G, N, K]).
    """
    groups = batch["task_id"].shape[0]
    tokens = {name: array for name, array in batch.items() if name != "task_id"}
    index = None if assignment is None else assignment.index_GxNxK
    weights = None if assignment is None else assignment.weights_GxNxK
    shared = index is None
    unroll = model.config.unroll_layers
    at_once = min(groups_at_once or (_most_at_once(tokens) if shared else 1), groups)
    if groups % at_once:
        raise UserError(
            f"StepConfig.groups_at_once {at_once} does not divide the {groups} groups per device"
        )
    first = jax.lax.axis_index(GROUP_AXES) * groups if shards > 1 else 0
    keys_G = jax.vmap(lambda g: jax.random.fold_in(key, g))(first + jnp.arange(groups))

    def differentiate(loss, chosen, weights):
        """(scaled loss, its gradient by the backbone chosen, its gradient by the routes)."""

        def scaled(chosen, weights):
            return scale * loss(chosen, weights)

        if weighted:
            value, grads = jax.value_and_grad(scaled, (0, 1))(chosen, weights)
            return value, *grads
        value, grads = jax.value_and_grad(scaled)(chosen, weights)
        return value, grads, jnp.zeros(at_once) if weights is None else jnp.zeros_like(weights)

    def merged(tokens_W, weights_WxNxK, keys_W):
        rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tokens_W)
        each = rows["inputs"].shape[0] // at_once

        def loss(backbone, weights_WxNxK):
            weights_NxKxR = None
            if weights_WxNxK is not None:
                weights_NxKxR = jnp.repeat(jnp.moveaxis(weights_WxNxK, 0, -1), each, axis=-1)
            return group_loss(model, backbone, weights_NxKxR, rows, keys_W[0], label_smoothing)

        return differentiate(loss, backbone, weights_WxNxK)

    def gathered(group, index_NxK, _, weights_NxK, group_key):
        def loss(chosen, weights_NxK):
            return group_loss(model, chosen, weights_NxK, group, group_key, label_smoothing)

        return differentiate(loss, gather(backbone, index_NxK, unroll), weights_NxK)

    def add(carry, xs):
        """Adds W groups."""
        total_loss, total = carry
        if shared:
            loss, grads, d_weights = merged(*xs)
            return (total_loss + loss, jax.tree.map(jnp.add, total, grads)), d_weights
        if at_once == 1:
            found = jax.tree.map(lambda a: a[None], gathered(*jax.tree.map(lambda a: a[0], xs)))
        else:
            found = jax.vmap(gathered)(*xs)
        losses_W, grads_W, d_weights = found
        for w in range(at_once):
            grads = jax.tree.map(lambda g, w=w: g[w], grads_W)
            total = scatter_add(total, grads, xs[2][w], unroll)
        return (total_loss + losses_W.sum(), total), d_weights

    xs = (tokens, weights, keys_G)
    whole = backbone
    if not shared:
        xs = (tokens, index, index if slots is None else slots.slots_GxNxK, weights, keys_G)
        whole = backbone if slots is None else jax.eval_shape(gather, backbone, slots.experts_NxS)
    if shared and groups == at_once:
        loss, total, d_weights = merged(*xs)
    else:
        xs = jax.tree.map(lambda a: a.reshape(-1, at_once, *a.shape[1:]), xs)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), whole)
        (loss, total), d_weights = jax.lax.scan(add, (jnp.float32(0), zeros), xs)
        d_weights = d_weights.reshape(groups, *d_weights.shape[2:])
    if shards > 1:
        loss, total = jax.lax.psum((loss, total), GROUP_AXES)
    return loss, total, d_weights


def _most_at_once(tokens: Batch) -> int:
    """The largest divisor of G whose groups make at most so many tokens; 1 at least."""
    most = CPU_TOKENS if jax.default_backend() == "cpu" else DEVICE_TOKENS
    groups = tokens["inputs"].shape[0]
    each = (tokens["inputs"].size + tokens["targets"].size) // groups
    fit = (w for w in range(2, groups + 1) if groups % w == 0 and w * each <= most)
    return max(fit, default=1)
