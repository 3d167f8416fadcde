"""The device mesh and the one table that says where each logical axis lives."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import gin
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.core.errors import UserError, check_fields

MESH_AXES = ("data", "fsdp", "expert", "model")
# Groups, the leading axis of a batch, are spread over these.
GROUP_AXES = ("data", "fsdp")

# logical axis -> mesh axis. A name missing here is an error: JAX would silently replicate it.
LOGICAL_AXES = {
    "direction": None,
    "embed": "fsdp",
    "expert": "expert",
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


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; `data` 0 takes all the devices that the others leave."""

    data: int = 0
    fsdp: int = 1
    expert: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for axis in MESH_AXES:
            if getattr(self, axis) < (0 if axis == "data" else 1):
                raise UserError(f"MeshConfig.{axis} is {getattr(self, axis)}, below its minimum")


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


def group_shards(mesh: Mesh) -> int:
    """How many parts the groups of a batch are spread over."""
    return math.prod(mesh.shape[a] for a in GROUP_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def by_group(mesh: Mesh) -> NamedSharding:
    """Leading axis over the data axes of the mesh."""
    return NamedSharding(mesh, P(GROUP_AXES))


def global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process holds, as one array over all devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedSharding of every array, from the logical axes in its box; without a box: replicated.

    An axis that its mesh axis does not divide is replicated.

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
            axes.append(axis if axis and size % mesh.shape[axis] == 0 else None)
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
