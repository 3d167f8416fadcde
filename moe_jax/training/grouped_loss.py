"""The loss of many groups, each with its own route, and its memory-saving gradient.

`grouped_loss` is a plain function of parameters and routes. Its gradient is implemented by hand.
Groups run one after the other, forward and backward, so that only the activations of one group are
in memory; small ones run side by side. Each group's gradient is added in place to the gradient of
the whole model.

- If every device holds all parameters, a group gathers the experts that its task uses and runs a
  dense model: weights are routed, not tokens.
- If parameters are sharded, each layer fetches the expert that it needs (`model.placement`), and
  gradients stay sharded.
- If all groups use all weights (the dense model, or all experts), their rows are merged into one
  batch.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import (
    GROUP_AXES,
    SHARD_AXES,
    group_shards,
    over_groups,
    size_of,
)
from moe_jax.data.batch import Batch, of_rows
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.dispatch import Gather, Mix
from moe_jax.model.experts import Params, gather, scatter_add, sum_by_expert
from moe_jax.model.placement import Placement, slotted
from moe_jax.model.task_moe import TaskMoE, parameter_shardings
from moe_jax.training.loss import summed_loss
from moe_jax.training.slots import Slots, with_slots

# The maximum number of tokens to merge. Matrix products reach full speed below it, and the
# activations of more tokens do not fit into a CPU's caches.
CPU_TOKENS, DEVICE_TOKENS = 2048, 8192
# The maximum size of a product of groups side by side, tokens * d_model ** 2 multiplications. Below
# it, starting an operation costs much of its time (`docs/performance.md`).
CPU_PRODUCT, DEVICE_PRODUCT = 2**26, 2**28


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How the groups of a batch are computed.

    Attributes:
        groups_at_once: see `StepConfig`.
        backbone_free, routes_free: whether the gradients by backbone and routes are needed.
    """

    model: TaskMoE
    mesh: Mesh
    label_smoothing: float
    groups_at_once: int
    backbone_free: bool = True
    routes_free: bool = True


def group_loss(
    model: TaskMoE,
    backbone: Params,
    dispatch: Any,
    group: Batch,
    key: jax.Array | None,
    label_smoothing: float = 0.0,
    placement: Placement | None = None,
    scale: jax.Array | float = 1.0,
) -> jax.Array:
    """`scale` times the summed loss of one group.

    Args:
        key: key of dropout; None for no dropout.
        dispatch: how the experts of `backbone` are used (see `EncoderDecoder`).
        group: [R, L] arrays.
    """
    rngs = None if key is None else {"dropout": key}
    module = EncoderDecoder(model.config, placement)
    call = partial(module.apply, {"params": backbone}, rngs=rngs)
    hidden_RxLxD = call(group, dispatch, key is not None, method="hidden")
    hidden_RxLxD, kernel_DxV = call(hidden_RxLxD, method="logits_factors")
    weights_T = jnp.where(group["target_segments"].ravel() > 0, jnp.float32(scale), 0.0)
    return summed_loss(
        hidden_RxLxD.reshape(-1, kernel_DxV.shape[0]), kernel_DxV, group["targets"].ravel(),
        weights_T, label_smoothing, model.config.vocabulary_multiple,
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_loss(
    grouping: Grouping,
    into: Params,
    weights_GxNxK: jax.Array | None,
    backbone: Params,
    batch: Batch,
    index_GxNxK: jax.Array | None,
    slots: Slots | None,
    scale: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """`scale` times the summed loss of all groups: float32 scalar.

    Its gradient by the backbone is the gradient by `into`, which has the value of `backbone` or, if
    gradients are in slots, the shape of the slots (see `slots`).

    Args:
        weights_GxNxK, index_GxNxK: an `Assignment`; None for a dense model.
        batch: [G, R, L] arrays, groups spread over `GROUP_AXES`.
        key: key of dropout.
    """
    args = (into, weights_GxNxK, backbone, batch, index_GxNxK, slots, scale, key)
    return _forward(grouping, *args)[0]


def _forward(grouping, into, weights, backbone, batch, index, slots, scale, key):
    mesh = grouping.mesh
    places = parameter_shardings(grouping.model, mesh)["backbone"]
    placement = Placement.of(places, grouping.model.config.dtype)
    parts = jax.tree.map(_parts, places)
    groups = P(GROUP_AXES)
    local = partial(_local_gradients, grouping, placement)
    if group_shards(mesh) > 1:  # else plain: runs side by side are mapped and spread around it
        of_slots = Slots(P(), P(), P()) if slots else P()
        in_specs = (parts, groups, groups, P(), of_slots, P(), P())
        out_specs = (P(), parts if grouping.backbone_free else P(), groups)
        local = over_groups(local, mesh, in_specs, out_specs)
    loss, *gradients = local(backbone, weights, batch, index, slots, scale, key)
    return loss, gradients


def _backward(grouping, gradients, d_loss):
    d_into, d_weights = (jax.tree.map(lambda g: g * d_loss.astype(g.dtype), g) for g in gradients)
    return d_into, d_weights, None, None, None, None, None, None


grouped_loss.defvjp(_forward, _backward)


def _parts(sharding: jax.sharding.NamedSharding) -> P:
    """The axes that `shard_map` cuts an array along."""
    return P(*(SHARD_AXES if names == SHARD_AXES else None for names in sharding.spec))


def _local_gradients(
    grouping: Grouping,
    placement: Placement | None,
    backbone: Params,
    weights: jax.Array | None,
    batch: Batch,
    index: jax.Array | None,
    slots: Slots | None,
    scale: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Params | None, jax.Array | None]:
    """Sums the loss and its gradients over this device's G groups, then over devices.

    Args:
        backbone: this device's shards.
        weights, batch: those of this device's groups.
        index, slots: those of all groups.

    Returns:
        (loss, its gradient by the backbone or by the slots of each routed layer, its gradient by
        each group's weights [G, N, K]); None for a gradient that is not needed.
    """
    model, mesh = grouping.model, grouping.mesh
    groups = batch["task_id"].shape[0]
    tokens = of_rows(batch)
    merge = index is None
    by_rule = most_at_once(tokens, model.config.d_model, merge, placement is not None, mesh)
    at_once = min(grouping.groups_at_once or by_rule, groups)
    if groups % at_once:
        raise UserError(
            f"StepConfig.groups_at_once {at_once} does not divide the {groups} groups per device"
        )
    place = jax.lax.axis_index(GROUP_AXES) if group_shards(mesh) > 1 else 0
    keys_G = jax.vmap(lambda g: jax.random.fold_in(key, g))(place * groups + jnp.arange(groups))

    def own(array_Gx):
        """The part of an array of all groups that belongs to this device's groups."""
        return jax.lax.dynamic_slice_in_dim(array_Gx, place * groups, groups)

    xs = {"tokens": tokens, "weights": weights, "key": keys_G}
    whole = backbone if placement is None else placement.outside(backbone)
    if not merge:
        xs |= {"index": own(index), "slots": own(index if slots is None else slots.slots_GxNxK)}
        if placement is not None:
            xs["peers"] = _of_peers(mesh, groups, index)
            xs["peers_slots"] = slots and _of_peers(mesh, groups, slots.slots_GxNxK)
    into = whole if slots is None else with_slots(whole, slots.experts_NxS.shape[1])
    differentiate = partial(_differentiate, grouping, placement, scale)

    def merged(x_W):
        """Computes W groups that share all weights."""
        rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), x_W["tokens"])
        each = rows["inputs"].shape[0] // at_once

        def dispatch(weights_WxNxE):
            return Mix(jnp.repeat(jnp.moveaxis(weights_WxNxE, 0, -1), each, axis=-1))

        return differentiate(dispatch, whole, x_W["weights"], rows, x_W["key"][0])

    def gathered(x):
        """Computes one group, with its experts gathered on this device."""
        chosen = gather(whole, x["index"], model.config.unroll_layers, model.config.dtype)
        return differentiate(Mix, chosen, x["weights"], x["tokens"], x["key"])

    def fetched(x):
        """Computes one group, whose layers fetch their experts from all devices."""

        def dispatch(weights_NxK):
            return Gather(x["index"], weights_NxK, x["peers"], x["peers_slots"])

        return differentiate(dispatch, whole, x["weights"], x["tokens"], x["key"], into)

    def summed(total, grads_W, slots_WxNxK):
        """Adds the gradients of W groups that do not share all weights."""
        unroll = model.config.unroll_layers

        def add_one(total, x):
            return scatter_add(total, *x, unroll) if placement is None else _add(total, x[0])

        def one_by_one(total, *xs):
            return jax.lax.scan(lambda total, x: (add_one(total, x), None), total, xs)[0]

        def together(total, *xs):
            count = model.config.experts if slots is None else slots.experts_NxS.shape[1]
            return _add(total, sum_by_expert(*xs, count))

        args = (total, grads_W, slots_WxNxK)
        if placement is None and 1 < at_once == groups:  # so `total` is zeros
            return jax.lax.platform_dependent(*args, cpu=one_by_one, default=together)
        return one_by_one(*args)

    def add(carry, x_W):
        """Adds the loss and gradients of W groups."""
        total_loss, total = carry
        if merge:
            loss, grads, d_weights = merged(x_W)
            return (total_loss + loss, _add(total, grads)), d_weights
        one = gathered if placement is None else fetched
        if at_once == 1:
            results = jax.tree.map(lambda a: a[None], one(jax.tree.map(lambda a: a[0], x_W)))
        else:
            results = jax.vmap(one)(x_W)
        losses_W, grads_W, d_weights = results

        if grouping.backbone_free:
            total = summed(total, grads_W, x_W["slots"])
        return (total_loss + losses_W.sum(), total), d_weights

    like = into if grouping.backbone_free else None
    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, like))
    xs = jax.tree.map(lambda a: a.reshape(-1, at_once, *a.shape[1:]), xs)
    if groups == at_once:
        (loss, total), d_weights = add(nothing, jax.tree.map(lambda a: a[0], xs))
    else:
        (loss, total), d_weights = jax.lax.scan(add, nothing, xs)
        d_weights = jax.tree.map(lambda d: d.reshape(groups, *d.shape[2:]), d_weights)
    if placement is not None:
        total = placement.put_back(total)
    if group_shards(mesh) > 1:
        loss = jax.lax.psum(loss, GROUP_AXES)
        total = _sum_over_devices(grouping, total)
    return loss, total, d_weights


def _of_peers(mesh: Mesh, groups: int, array_GxNxK: jax.Array) -> jax.Array:
    """For each of this device's groups, the experts that the devices along `SHARD_AXES` compute at
    the same time: [groups, N, P, K]."""
    shape = (mesh.shape["data"], size_of(mesh, SHARD_AXES), groups, *array_GxNxK.shape[1:])
    array_PxgxNxK = array_GxNxK.reshape(shape)[jax.lax.axis_index("data")]
    return array_PxgxNxK.transpose(1, 2, 0, 3)


def _sum_over_devices(grouping: Grouping, total: Params) -> Params:
    """Gradients summed over the devices that hold the same shard."""

    def one(sharding, gradient):
        cut = any(_parts(sharding))
        axes = ("data",) if cut else GROUP_AXES
        return jax.lax.psum(gradient, axes) if size_of(grouping.mesh, axes) > 1 else gradient

    places = parameter_shardings(grouping.model, grouping.mesh)["backbone"]
    return total and jax.tree.map(one, places, total)


def _differentiate(grouping, placement, scale, dispatch, backbone, weights, rows, key, into=None):
    """(scaled loss, its gradient by the backbone, its gradient by the weights), or None instead of
    a gradient.

    `into` has the form of the gradient by the backbone, if that is another (`placement.slotted`).
    """
    into = backbone if into is None else into

    def loss(free):
        chosen = slotted(backbone, free.get("backbone", into))
        route = free.get("weights", weights)
        how = None if route is None else dispatch(route)
        return group_loss(
            grouping.model, chosen, how, rows, key, grouping.label_smoothing, placement, scale
        )

    free = {}
    if grouping.backbone_free:
        free["backbone"] = into
    if grouping.routes_free and weights is not None:
        free["weights"] = weights
    value, grads = jax.value_and_grad(loss)(free)
    return value, grads.get("backbone"), grads.get("weights")


def _add(total: Params, addend: Params) -> Params:
    return total and jax.tree.map(jnp.add, total, addend)


def most_at_once(tokens: Batch, width: int, merge: bool, sharded: bool, mesh: Mesh) -> int:
    """The largest divisor of G whose groups are few enough to merge or to run side by side; at
    least 1. Sharded parameters are those of a large model: one group, one layer's experts at a
    time."""
    groups = tokens["inputs"].shape[0]
    each = (tokens["inputs"].size + tokens["targets"].size) // groups
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if merge:
        most = (CPU_TOKENS if on_cpu else DEVICE_TOKENS) // each
    else:
        most = 0 if sharded else (CPU_PRODUCT if on_cpu else DEVICE_PRODUCT) // (each * width**2)
    return max(w for w in range(1, groups + 1) if groups % w == 0 and w <= max(most, 1))
