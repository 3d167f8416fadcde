"""Sends a layer's weights from the devices that store their shards to the device that computes it.

Under `fsdp` and `expert`, a device stores one shard of every array (`core.sharding`). It holds only
the current layer in full: the layer is fetched when it is computed, fetched again in the backward
pass, and dropped afterwards. Functions here run inside `jax.shard_map`, where arrays are the shards
of one device.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from moe_jax.core.sharding import SHARD_AXES
from moe_jax.model.experts import Params, cast

# The name of fetched weights for `jax.checkpoint`, so that they are not kept for the backward pass.
FETCHED = "fetched_weights"


class Slotted(struct.PyTreeNode):
    """An array of E experts, whose gradient goes to an array of fewer slots (`training.slots`).

    Attributes:
        experts_Ex: gets no gradient itself.
        slots_Sx: zeros, which are never read: the gradient by them is that of the experts in use.
    """

    experts_Ex: jax.Array
    slots_Sx: jax.Array


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which axis of each array is sharded.

    Attributes:
        cut: (name of a parameter such as `encoder/norm/scale`, axis) of every sharded array.
        dtype: the dtype in which weights are sent.
    """

    cut: tuple[tuple[str, int], ...]
    dtype: str

    @classmethod
    def of(cls, shardings: Params, dtype: str) -> "Placement | None":
        """The placement of a backbone; None if every device holds all of it.

        Args:
            shardings: its tree of NamedShardings.
        """
        cut = []
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
            cut += [(_name(path), axis) for axis in _cut_axes(sharding)]
        return cls(tuple(cut), dtype) if cut else None

    def axes(self, prefix: str = "") -> dict[str, int]:
        """Parameter -> axis, for names that start with `prefix`, which is removed."""
        names = {name: axis for name, axis in self.cut if name.startswith(prefix)}
        return {name.removeprefix(prefix): axis for name, axis in names.items()}

    def gather(self, params: Params, prefix: str = "", stacked: int = 0) -> Params:
        """Full arrays from the shards of all devices (all-gather; in the backward pass,
        reduce-scatter).

        Args:
            prefix: of the names of `params` in the backbone.
            stacked: number of leading axes that the arrays no longer have.
        """
        axes = self.axes(prefix)

        def whole(path, x):
            axis = axes.get(_name(path))
            return x if axis is None else _fetched(_all_gather(x, axis - stacked, self.dtype))

        return jax.tree_util.tree_map_with_path(whole, params)

    def outside(self, backbone: Params) -> Params:
        """The backbone with all arrays outside layers gathered, in float32."""
        return self._map_outside(lambda x, axis: _all_gather(x, axis, "float32"), backbone)

    def put_back(self, gradients: Params) -> Params:
        """Turns gradients by the result of `outside` into gradients by this device's shards."""
        return self._map_outside(_sum_and_cut, gradients)

    def _map_outside(self, function: Callable[[jax.Array, int], jax.Array], tree: Params) -> Params:
        axes = {name: axis for name, axis in self.cut if "/layers/" not in name}

        def one(path, x):
            axis = axes.get(_name(path))
            return x if axis is None else function(x, axis)

        return jax.tree_util.tree_map_with_path(one, tree)

    def exchange(
        self, params_E: Params, expert_P: jax.Array, slot_P: jax.Array | None, prefix: str
    ) -> Params:
        """Fetches each device's expert in full, by one all-to-all per array.

        Each device sends every peer its shard of the peer's expert. The volume is one layer,
        whatever E is. In the backward pass, gradients return to their owners the same way.

        Args:
            params_E: this device's shards of one layer's E experts; arrays, or all `Slotted`.
            expert_P: int, the expert that each of the P devices along `SHARD_AXES` uses.
            slot_P: int, the slots of these experts' gradients, where arrays are `Slotted`.
            prefix: of the layer's names in the backbone.
        """
        axes = self.axes(prefix)
        own = jax.lax.axis_index(SHARD_AXES)

        def whole(path, x):
            axis = axes.get(_name(path))
            if axis is None:
                mine = None if slot_P is None else slot_P[own][None]
                return _choose(x, expert_P[own][None], mine)[0]
            chosen_Px = _choose(x, expert_P, slot_P)
            # Cast after the selection, so that gradients are summed in float32.
            parts_Px = cast(chosen_Px, self.dtype)
            # Of [layer, expert, ...], two axes are gone and one of peers has come.
            y = jax.lax.all_to_all(parts_Px, SHARD_AXES, 0, axis - 1, tiled=True)
            return _fetched(y[0])

        return jax.tree_util.tree_map_with_path(whole, params_E, is_leaf=_is_slotted)


def slotted(whole: Params, slots: Params) -> Params:
    """Parameters whose gradients go to `slots`: equal arrays, and zeros for experts (`Slotted`)."""

    def one(x, slots_Sx):
        same = x.shape == slots_Sx.shape
        return slots_Sx if same else Slotted(jax.lax.stop_gradient(x), slots_Sx)

    return jax.tree.map(one, whole, slots)


def _is_slotted(x: Any) -> bool:
    return isinstance(x, Slotted)


def _choose(x: jax.Array | Slotted, expert_P: jax.Array, slot_P: jax.Array | None) -> jax.Array:
    if not _is_slotted(x):
        return _take(x, expert_P)
    return _take_slotted(x.slots_Sx.shape[0], x.slots_Sx, x.experts_Ex, expert_P, slot_P)


def _take(x_Ex: jax.Array, index_P: jax.Array) -> jax.Array:
    return x_Ex.at[index_P].get(mode="promise_in_bounds")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take_slotted(count, slots_Sx, x_Ex, expert_P, slot_P):
    del count, slots_Sx, slot_P
    return _take(x_Ex, expert_P)


def _take_slotted_forward(count, slots_Sx, x_Ex, expert_P, slot_P):
    return _take_slotted(count, slots_Sx, x_Ex, expert_P, slot_P), slot_P


def _take_slotted_backward(count, slot_P, dy_Px):
    zeros_Sx = jnp.zeros((count, *dy_Px.shape[1:]), dy_Px.dtype)
    return zeros_Sx.at[slot_P].add(dy_Px), None, None, None


_take_slotted.defvjp(_take_slotted_forward, _take_slotted_backward)


def _fetched(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, FETCHED)


def _name(path: tuple) -> str:
    return "/".join(p.key for p in path)


def _cut_axes(sharding: NamedSharding) -> list[int]:
    sizes = sharding.mesh.shape
    result = []
    for axis, names in enumerate(sharding.spec):
        names = (names,) if isinstance(names, str) else names or ()
        if any(sizes[name] > 1 for name in names if name in SHARD_AXES):
            result.append(axis)
    return result


def _sum_and_cut(x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.psum_scatter(x, SHARD_AXES, scatter_dimension=axis, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x: jax.Array, axis: int, dtype: str) -> jax.Array:
    return jax.lax.all_gather(cast(x, dtype), SHARD_AXES, axis=axis, tiled=True)


def _all_gather_forward(x, axis, dtype):
    return _all_gather(x, axis, dtype), None


def _all_gather_backward(axis, dtype, _, dy):
    del dtype
    # Summed in float32, whatever dtype the weights were sent in.
    return (_sum_and_cut(dy.astype(jnp.float32), axis),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)
