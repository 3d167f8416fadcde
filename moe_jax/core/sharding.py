"""The device mesh, and the one table that says where each logical axis lives."""

import dataclasses
import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.core.configuration import Configuration, Range
from moe_jax.core.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "model")
# Groups, the leading axis of a batch, are spread over these.
GROUP_AXES = ("data", "fsdp", "expert")
# Parameters are cut into as many parts as these have devices together. A layer's weights travel
# over them when the layer is computed (`model.placement`).
SHARD_AXES = ("fsdp", "expert")

# logical axis -> mesh axes. A name missing here is an error: JAX would silently replicate it.
# The axis of experts is never cut: every device holds its part of every expert, so that what a
# layer fetches is one expert's size, however many experts there are.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "direction": None,
    "embed": SHARD_AXES,
    "expert": None,
    "gate": None,
    "head_dim": None,
    "heads": "model",
    "layer": None,
    "mlp": "model",
    "norm": None,
    "position": None,
    "qkv": None,
    "relative": None,
    "representation": None,
    "router_gate": None,
    "router_in": None,
    "router_out": None,
    "task": None,
    "unit": None,
    "vocab": "model",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig(Configuration):
    """Sizes of the mesh axes.

    Attributes:
        data: replicas of the parameters; 0 takes all the devices that the others leave.
        fsdp: parts that parameters, gradients and moments are cut into.
        expert: multiplies `fsdp`.
        model: parts that heads, hidden units and the vocabulary are cut into, in computing too.
    """

    data: Annotated[int, Range(0, 2**20)] = 0
    fsdp: Annotated[int, Range(1, 2**20)] = 1
    expert: Annotated[int, Range(1, 2**20)] = 1
    model: Annotated[int, Range(1, 2**20)] = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh `(data, fsdp, expert, model)` over all devices.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    rest = config.fsdp * config.expert * config.model
    data = config.data or len(devices) // rest
    shape = (data, config.fsdp, config.expert, config.model)
    if math.prod(shape) != len(devices):
        raise UserError(
            f"MeshConfig asks for {' x '.join(map(str, shape))} = {math.prod(shape)} devices, "
            f"but there are {len(devices)}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def size_of(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    """The number of devices along some axes together."""
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[a] for a in axes)


def group_shards(mesh: Mesh) -> int:
    """How many parts the groups of a batch are spread over."""
    return size_of(mesh, GROUP_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def by_group(mesh: Mesh) -> NamedSharding:
    """Leading axis over the axes that groups are spread over."""
    return NamedSharding(mesh, P(GROUP_AXES))


def global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process holds, as one array over all devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedSharding of every array, from the logical axes in its box; without a box: replicated.

    An axis that its mesh axes do not divide is replicated.

    Raises:
        ValueError: a logical axis is missing from `LOGICAL_AXES`.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        if not hasattr(leaf.value, "shape"):  # what optax leaves where a frozen part has no state
            return leaf.value
        axes = []
        for size, name in zip(leaf.value.shape, leaf.names, strict=True):
            if name not in LOGICAL_AXES:
                raise ValueError(f"logical axis {name!r} is missing from LOGICAL_AXES")
            axis = LOGICAL_AXES[name]
            axes.append(axis if axis and size % size_of(mesh, axis) == 0 else None)
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
