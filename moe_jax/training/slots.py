"""Slots: gradients and in-place updates of only the experts that a batch uses.

With K experts per route and G groups, a batch uses at most G K of a layer's E experts. So gradients
are stored in S = min(E, G K) slots per layer. AdamW still updates all experts, because unused ones
move by momentum and decay. With *lazy* experts, unused experts and their moments stay unchanged and
cost nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.model.experts import Params, places, replace_routed, routed
from moe_jax.model.task_moe import TaskMoE

# (params, opt_state, grads) -> (params, opt_state)
Update = Callable[[Params, Any, Params], tuple[Params, Any]]


class Slots(NamedTuple):
    """The experts that one batch touches.

    Attributes:
        experts_NxS: int32, distinct experts of every routed layer, those in use first.
        used_NxS: bool, which of them are in use.
        slots_GxNxK: int32 in [0, S), the slots of each group's experts.
    """

    experts_NxS: jax.Array
    used_NxS: jax.Array
    slots_GxNxK: jax.Array


def find_slots(index_GxNxK: jax.Array, experts: int) -> Slots:
    """`Slots` of a batch whose groups use `index_GxNxK`, out of `experts` experts."""
    groups, layers, count = index_GxNxK.shape
    layer_GxNxK = jnp.broadcast_to(jnp.arange(layers)[:, None], index_GxNxK.shape)
    used_NxE = jnp.zeros((layers, experts), bool).at[layer_GxNxK, index_GxNxK].set(True)
    order_NxE = jnp.argsort(~used_NxE, axis=1, stable=True)
    experts_NxS = order_NxE[:, : min(experts, groups * count)]
    slots_GxNxK = jnp.argsort(order_NxE, axis=1)[layer_GxNxK, index_GxNxK]
    return Slots(experts_NxS, jnp.take_along_axis(used_NxE, experts_NxS, 1), slots_GxNxK)


def slot_count(model: TaskMoE, groups: int) -> int:
    """S, slots per layer of a batch of G groups; E if groups do not gather experts."""
    return min(model.config.experts, groups * model.experts_per_layer)


def with_slots(backbone: Params, count: int) -> Params:
    """The form of gradients in slots: the backbone, zeros for `count` experts per routed layer."""
    result = backbone
    for side, stack in routed(backbone):
        slots = jax.tree.map(lambda a: jnp.zeros((a.shape[0], count, *a.shape[2:]), a.dtype), stack)
        result = replace_routed(result, side, slots)
    return result


def update_in_slots(
    update: Update,
    params: Params,
    opt_state: Any,
    grads: Params,
    slots: Slots,
    lazy: bool,
    sharded: bool,
) -> tuple[Params, Any]:
    """Applies `update(params, opt_state, grads)` in place, with gradients in slots.

    Args:
        update: an elementwise update, which can take any subset of the parameters; counters of
            `opt_state` must not depend on the subset.
        opt_state: optimizer state, with moments in the shape of `params`.
        grads: gradients of `params`, with slots in place of experts.
        lazy: leaves unused experts unchanged; otherwise their gradient is zero.
        sharded: whether devices share the parameters, and memory counts more than time.
    """
    whole = (params, opt_state)
    sides = routed(params["backbone"], slots.experts_NxS, slots.used_NxS)
    pass_over = _update_used if lazy else _update_by_layer if sharded else _update_all

    def without_experts(tree: Params) -> Params:
        for side, *_ in sides:
            tree = _with_experts(tree, side, {})
        return tree

    result = update(*_map_params(without_experts, whole), without_experts(grads))
    for side, _, experts_LxS, used_LxS in sides:
        stacks = _map_params(partial(_only_experts, side=side), whole)
        stacks = pass_over(update, stacks, _only_experts(grads, side), experts_LxS, used_LxS)
        result = _map_params(
            lambda tree, stack, side=side: _with_experts(tree, side, _experts(stack, side)),
            result, stacks,
        )  # fmt: skip
    return result


def _update_used(update: Update, stacks: Any, grads: Params, experts_LxS, used_LxS) -> Any:
    """Updates the used experts, one after the other."""

    def one(stacks, slot):
        at, used, grad = slot

        def old(stacks):
            return _map_params(lambda t: jax.tree.map(lambda a: a[at[0], at[1]], t), stacks)

        def put(stack, value):
            return jax.tree.map(lambda a, v: a.at[at[0], at[1]].set(v), stack, value)

        # The condition also prevents XLA from fusing slices into writes. Such fusions would read
        # arrays that others change, so XLA would copy everything in each iteration.
        new = jax.lax.cond(used, lambda s: update(*old(s), grad), old, stacks)
        return _map_params(put, stacks, new), None

    grads_P = jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), grads)
    return jax.lax.scan(one, stacks, (places(experts_LxS), used_LxS.ravel(), grads_P))[0]


def _update_all(update: Update, stacks: Any, grads: Params, experts_LxS, used_LxS) -> Any:
    """Updates all experts at once; unused experts have a gradient of zero.

    XLA looks for an expert's gradient where it updates the expert, on a GPU and a CPU. A TPU's
    compiler makes the gradient of all experts, for one parameter at a time.
    """
    slot_LxE = _slot_of_each(stacks, experts_LxS, used_LxS)
    return update(*stacks, jax.tree.map(partial(_spread, slot_LxE), grads))


def _update_by_layer(update: Update, stacks: Any, grads: Params, experts_LxS, used_LxS) -> Any:
    """`_update_all`, one layer after the other: no temporary array has the size of all experts, but
    XLA copies what it has updated."""

    def one(stacks, xs):
        layer, slot_E, grads_S = xs

        def old(stack):
            return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, 0, False), stack)

        def put(stack, value):
            def one(a, v):
                return jax.lax.dynamic_update_index_in_dim(a, v, layer, 0)

            return jax.tree.map(one, stack, value)

        new = update(*_map_params(old, stacks), jax.tree.map(partial(_spread, slot_E), grads_S))
        return _map_params(put, stacks, new), None

    slot_LxE = _slot_of_each(stacks, experts_LxS, used_LxS)
    return jax.lax.scan(one, stacks, (jnp.arange(len(slot_LxE)), slot_LxE, grads))[0]


def _slot_of_each(stacks: Any, experts_LxS: jax.Array, used_LxS: jax.Array) -> jax.Array:
    """The slot of each expert, S if it is not in use: int32 [L, E]."""
    layers, count = experts_LxS.shape
    experts = jax.tree.leaves(stacks[0])[0].shape[1]
    slot_LxS = jnp.where(used_LxS, jnp.arange(count), count)
    of_each = jnp.full((layers, experts), count)
    return of_each.at[jnp.arange(layers)[:, None], experts_LxS].set(slot_LxS)


def _spread(slot_xE: jax.Array, grads_xSx: jax.Array) -> jax.Array:
    """Gradients in slots as those of all experts; zeros for unused ones."""
    axis = slot_xE.ndim - 1
    index = slot_xE.reshape(*slot_xE.shape, *[1] * (grads_xSx.ndim - slot_xE.ndim))
    return jnp.take_along_axis(grads_xSx, index, axis, mode="fill", fill_value=0)


def _experts(params: Params, side: str) -> Params:
    return params["backbone"][side]["layers"]["routed"]


def _with_experts(params: Params, side: str, experts: Params) -> Params:
    return {**params, "backbone": replace_routed(params["backbone"], side, experts)}


def _only_experts(params: Params, side: str) -> Params:
    return {"backbone": {side: {"layers": {"routed": _experts(params, side)}}}}


def _map_params(function: Callable[..., Any], *trees: Any) -> Any:
    """Applies `function` to the parameters in a tree, and to moments kept in their form; other
    leaves are the first tree's."""

    def is_params(tree: Any) -> bool:
        return isinstance(tree, dict) and isinstance(tree.get("backbone"), dict)

    def one(*parts: Any) -> Any:
        return function(*parts) if is_params(parts[0]) else parts[0]

    return jax.tree.map(one, *trees, is_leaf=is_params)
