"""Slots: gradients and in-place updates of only the experts that a batch uses.

With K experts per route and G groups, a batch uses at most G K of a layer's E experts. So gradients
are stored in S = min(E, G K) slots per layer. AdamW still updates all experts, layer by layer,
because unused ones move by momentum and decay. With *lazy* experts, unused experts and their
moments stay unchanged and cost nothing. At E = 24, updating all experts takes longer than the rest
of the step.
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
    update: Update, params: Params, opt_state: Any, grads: Params, slots: Slots, lazy: bool
) -> tuple[Params, Any]:
    """Applies `update(params, opt_state, grads)` in place, with gradients in slots.

    No temporary array has the size of all experts.

    Args:
        update: an elementwise update, which can take any subset of the parameters; counters of
            `opt_state` must not depend on the subset.
        opt_state: optimizer state, with moments in the shape of `params`.
        grads: gradients of `params`, with slots in place of experts.
        lazy: leaves unused experts unchanged; otherwise their gradient is zero.
    """
    whole = (params, opt_state)
    sides = routed(params["backbone"], slots.experts_NxS, slots.used_NxS)

    def without_experts(tree: Params) -> Params:
        for side, *_ in sides:
            tree = _with_experts(tree, side, {})
        return tree

    result = update(*_map_params(without_experts, whole), without_experts(grads))
    for side, _, experts_LxS, used_LxS in sides:
        stacks = _map_params(partial(_only_experts, side=side), whole)
        pass_over = _update_used if lazy else _update_all
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
    """Updates all experts, one layer after the other; unused experts have a gradient of zero."""
    experts = jax.tree.leaves(stacks[0])[0].shape[1]

    def one(stacks, xs):
        layer, expert_S, used_S, grads_S = xs
        old = _map_params(lambda t: jax.tree.map(lambda a: a[layer], t), stacks)

        def spread(g_Sx):
            mine = used_S.reshape(-1, *[1] * (g_Sx.ndim - 1))
            zeros = jnp.zeros((experts, *g_Sx.shape[1:]), g_Sx.dtype)
            return zeros.at[expert_S].add(jnp.where(mine, g_Sx, 0))

        def put(stack, value):
            return jax.tree.map(lambda a, v: a.at[layer].set(v), stack, value)

        return _map_params(put, stacks, update(*old, jax.tree.map(spread, grads_S))), None

    xs = (jnp.arange(experts_LxS.shape[0]), experts_LxS, used_LxS, grads)
    return jax.lax.scan(one, stacks, xs)[0]


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
