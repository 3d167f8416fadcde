"""Lazy optimizer steps: only the experts that a batch uses are differentiated and updated.

With E experts per layer, K of them per route and G groups, a batch uses at most G K, yet AdamW
passes over all: at E = 24 that costs more than the model. Here gradients and updates live in
`slots`, S = min(E, G K) experts per layer; the others stay exactly as they are, their moments too.
With AdamW, an unused expert would go on moving by its momentum and weight decay.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.model.experts import Params, gather, scatter_set


class Slots(NamedTuple):
    """The experts that one batch touches.

    Attributes:
        experts_NxS: int32, distinct experts of every routed layer, those in use first.
        used_NxS: bool, which of them are in use.
        slots_GxNxK: int32 in [0, S), the place of each group's experts among them.
    """

    experts_NxS: jax.Array
    used_NxS: jax.Array
    slots_GxNxK: jax.Array


def find_slots(index_GxNxK: jax.Array, experts: int) -> Slots:
    """`Slots` of a batch whose groups use the experts of `index_GxNxK`, of `experts` in all."""
    groups, layers, count = index_GxNxK.shape
    layer_GxNxK = jnp.broadcast_to(jnp.arange(layers)[:, None], index_GxNxK.shape)
    used_NxE = jnp.zeros((layers, experts), bool).at[layer_GxNxK, index_GxNxK].set(True)
    order_NxE = jnp.argsort(~used_NxE, axis=1, stable=True)
    experts_NxS = order_NxE[:, : min(experts, groups * count)]
    slots_GxNxK = jnp.argsort(order_NxE, axis=1)[layer_GxNxK, index_GxNxK]
    return Slots(experts_NxS, jnp.take_along_axis(used_NxE, experts_NxS, 1), slots_GxNxK)


def take_slots(tree: Any, slots: Slots) -> Any:
    """Parameters, or an optimizer state, with only the slots of every routed layer."""
    return _map_backbones(lambda backbone: gather(backbone, slots.experts_NxS), tree)


def put_slots(tree: Any, taken: Any, slots: Slots) -> Any:
    """`tree` with what became of `take_slots(tree)`; experts not in use are left alone."""

    def put_one(whole: Params, part: Params) -> Params:
        return scatter_set(whole, part, slots.experts_NxS, slots.used_NxS)

    return _map_backbones(put_one, tree, taken)


def _map_backbones(function: Any, *trees: Any) -> Any:
    """Applies `function` to the backbones of parameters, and of moments kept in their form; other
    leaves are the last tree's."""

    def is_params(tree: Any) -> bool:
        # Where optax keeps no moments of the backbone, it has no leaves.
        return isinstance(tree, dict) and bool(jax.tree.leaves(tree.get("backbone")))

    def one(*parts: Any) -> Any:
        if not is_params(parts[0]):
            return parts[-1]
        return {**parts[-1], "backbone": function(*(part["backbone"] for part in parts))}

    return jax.tree.map(one, *trees, is_leaf=is_params)
