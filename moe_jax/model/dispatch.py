"""How the experts of a routed layer are used: all experts, a group's experts, or each row's.

A dispatch holds the routes of N routed layers, encoder first, as the leading axis of every array. A
stack gives each layer its slice. There, the dispatch is called with the layer and the layer's
arguments. The layer is a bound module, whose parameters have a leading axis of experts (no such
axis if there is one expert).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.model.experts import Params
from moe_jax.model.placement import Placement

# The maximum number of experts in an unrolled loop; more would take long to compile.
UNROLLED = 3


class Mix(struct.PyTreeNode):
    """All experts, weighted (paper section 4, equation 1). With one expert, the dense model.

    Attributes:
        weights_NxE: the route of all rows; or [N, E, R], the route of each row.
    """

    weights_NxE: jax.Array

    def __call__(
        self, layer: nn.Module, x: jax.Array, rows: Sequence[jax.Array], shared: Sequence[Any],
        placement: Placement | None, prefix: str,
    ) -> jax.Array:  # fmt: skip
        weights_E = self.weights_NxE  # of this layer
        count = weights_E.shape[0]

        def one(layer, pick):
            return with_params(layer, pick, x, *rows, *shared)

        def whole(params):
            return params if placement is None else placement.gather(params, prefix, stacked=2)

        if count == 1:
            return weighted(one(layer, whole), weights_E[0])
        if placement is not None:

            def add(layer, total, weight):
                return total + weighted(one(layer, whole), weight), None

            # Fetches one expert at a time to this device.
            scan = nn.scan(
                nn.remat(add), variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"dropout": True},
            )  # fmt: skip
            return scan(layer, jnp.zeros_like(x), weights_E)[0]
        if count <= UNROLLED:
            # A quarter faster on CPU than products with an axis of experts.
            return sum(
                weighted(one(layer, lambda params, e=e: expert(params, e)), weights_E[e])
                for e in range(count)
            )
        every = nn.vmap(
            lambda layer: layer(x, *rows, *shared),
            variable_axes={"params": 0, "intermediates": 0}, split_rngs={"dropout": True},
        )  # fmt: skip
        return weighted_sum(every(layer), weights_E)


class Gather(struct.PyTreeNode):
    """The K experts of a group with the largest weights in its route.

    Attributes:
        index_NxK: int, which experts.
        weights_NxK: their weights.
        peers_NxPxK: if parameters are sharded: the experts that each of the P devices along
            `SHARD_AXES` uses at the same time.
        slots_NxPxK: the slots of the gradients of these (`placement.Slotted`), if they have some.
    """

    index_NxK: jax.Array
    weights_NxK: jax.Array
    peers_NxPxK: jax.Array | None = None
    slots_NxPxK: jax.Array | None = None

    def __call__(
        self, layer: nn.Module, x: jax.Array, rows: Sequence[jax.Array], shared: Sequence[Any],
        placement: Placement | None, prefix: str,
    ) -> jax.Array:  # fmt: skip
        total = 0.0
        for k in range(self.index_NxK.shape[0]):

            def pick(params, k=k):
                if placement is None:
                    return expert(params, self.index_NxK[k])
                slot_P = None if self.slots_NxPxK is None else self.slots_NxPxK[:, k]
                return placement.exchange(params, self.peers_NxPxK[:, k], slot_P, prefix)

            y = with_params(layer, pick, x, *rows, *shared)
            total = total + weighted(y, self.weights_NxK[k])
        return total


def with_params(layer: nn.Module, pick: Callable[[Params], Params], *args: Any) -> jax.Array:
    """Calls the layer with `pick(parameters)` in place of its parameters."""

    def picked(variables):
        return {name: pick(params) for name, params in variables.items()}

    call = nn.map_variables(lambda layer: layer(*args), "params", trans_in_fn=picked)
    return call(layer)


def expert(params_E: Params, e: jax.Array | int) -> Params:
    """One expert's parameters."""
    return jax.tree.map(lambda p: p[e], params_E)


@jax.custom_vjp
def weighted(y_Rx: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows times one weight, or times a weight per row [R].

    The gradient of the weight, from which a router learns, is summed over tokens in float32.
    JAX would sum it in the dtype of `y`: in bfloat16 it stops growing after a few hundred tokens.
    """
    return weight.astype(y_Rx.dtype).reshape(-1, *[1] * (y_Rx.ndim - 1)) * y_Rx


def _weighted_forward(y_Rx, weight):
    return weighted(y_Rx, weight), (y_Rx, weight)


def _weighted_backward(kept, dy_Rx):
    y_Rx, weight = kept
    products_Rx = dy_Rx.astype(jnp.float32) * y_Rx.astype(jnp.float32)
    d_weight = jnp.sum(products_Rx, tuple(range(weight.ndim, y_Rx.ndim)))
    return weighted(dy_Rx, weight), d_weight.astype(weight.dtype)


weighted.defvjp(_weighted_forward, _weighted_backward)


@jax.custom_vjp
def weighted_sum(y_Ex: jax.Array, weights_E: jax.Array) -> jax.Array:
    """The sum over experts of rows times a weight [E], or times a weight per row [E, R].

    The gradients of the weights are float32, as in `weighted`.
    """
    weights_E = weights_E.astype(y_Ex.dtype)
    if weights_E.ndim == 1:
        return jnp.tensordot(weights_E, y_Ex, axes=1)
    return jnp.einsum("er,er...->r...", weights_E, y_Ex)


def _sum_forward(y_Ex, weights_E):
    return weighted_sum(y_Ex, weights_E), (y_Ex, weights_E)


def _sum_backward(kept, dy):
    y_Ex, weights_E = kept
    ones = (1,) * (y_Ex.ndim - weights_E.ndim)
    d_y_Ex = weights_E.astype(dy.dtype).reshape(*weights_E.shape, *ones) * dy
    flat_Ex, flat = y_Ex.reshape(*weights_E.shape, -1), dy.reshape(*weights_E.shape[1:], -1)
    products = "ex,x->e" if weights_E.ndim == 1 else "erx,rx->er"
    d_weights_E = jnp.einsum(products, flat_Ex, flat, preferred_element_type=jnp.float32)
    return d_y_Ex, d_weights_E.astype(weights_E.dtype)


weighted_sum.defvjp(_sum_forward, _sum_backward)
