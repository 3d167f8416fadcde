"""The device mesh, and the table that maps logical axes to mesh axes."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.core.configuration import Configuration, Range
from moe_jax.core.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "model")
# Groups, the leading axis of a batch, are sharded over these.
GROUP_AXES = ("data", "fsdp", "expert")
# Parameters are sharded over these axes together. When a layer is computed, its weights are sent
# over them (`model.placement`).
SHARD_AXES = ("fsdp", "expert")
_MOST_CORES = 8  # that are devices

# logical axis -> mesh axes. A name missing here is an error, because JAX would silently replicate
# it. The axis of experts is never sharded: every device holds a part of every expert, so a layer
# fetches the bytes of one expert, however many experts there are.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "direction": None,
    "embed": SHARD_AXES,
    "expert": None,
    "gate": None,
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
        data: replicas of the parameters; 0 uses all devices that the other axes leave.
        fsdp: number of shards of parameters, gradients and moments.
        expert: multiplies the number of shards of `fsdp`.
        model: number of shards of heads, hidden units and the vocabulary, also while computing
            (tensor parallelism).
    """

    data: Annotated[int, Range(0, 2**20)] = 0
    fsdp: Annotated[int, Range(1, 2**20)] = 1
    expert: Annotated[int, Range(1, 2**20)] = 1
    model: Annotated[int, Range(1, 2**20)] = 1


def device_per_core() -> None:
    """Makes each CPU core a device, for programs whose parts are too small to share cores.

    Before JAX starts; afterwards, or where XLA_FLAGS give a number of devices, nothing changes.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started
            cores = min(_MOST_CORES, len(os.sched_getaffinity(0)))
            jax.config.update("jax_num_cpu_devices", cores)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh `(data, fsdp, expert, model)` over all devices.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    rest = config.fsdp * config.expert * config.model
    data = config.data or max(1, len(devices) // rest)
    shape = (data, config.fsdp, config.expert, config.model)
    if math.prod(shape) != len(devices):
        raise UserError(
            f"MeshConfig asks for {' x '.join(map(str, shape))} = {math.prod(shape)} devices, "
            f"but there are {len(devices)}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def size_of(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    """The product of the sizes of some mesh axes."""
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[a] for a in axes)


def group_shards(mesh: Mesh) -> int:
    """The number of shards of the groups of a batch."""
    return size_of(mesh, GROUP_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def by_group(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is groups."""
    return NamedSharding(mesh, P(GROUP_AXES))


def over_groups(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` as each device applies it to its own parts of the arguments: `jax.shard_map` over
    `GROUP_AXES`. The axis `model` is left to the partitioner.

    Args:
        in_specs, out_specs: the `PartitionSpec`s of arguments and results.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(GROUP_AXES),
        check_vma=False,
    )  # fmt: skip


def part_of_groups(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of a batch's groups the devices of this process hold.

    Processes over which `model` is spread hold the same part.

    Raises:
        UserError: the mesh is such that processes hold unequal parts.
    """
    indices = by_group(mesh).devices_indices_map((group_shards(mesh),))
    shards: dict[int, set[int]] = {}
    for device, (index,) in indices.items():
        shards.setdefault(device.process_index, set()).add(index.start or 0)
    parts = sorted({tuple(sorted(held)) for held in shards.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != group_shards(mesh):
        raise UserError(
            f"MeshConfig: the {mesh.size // mesh.shape['model']} x {mesh.shape['model']} devices"
            " cannot be laid out so that each process holds the same number of groups: let `model`"
            " divide the devices of a process, or be a multiple of them"
        )
    return parts.index(tuple(sorted(shards[jax.process_index()]))), len(parts)


def global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array made from a host array that every process holds."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedSharding of every array, from the logical axes in its box; replicated without a box.

    An axis whose size its mesh axes do not divide is replicated.

    Raises:
        ValueError: a logical axis is missing from `LOGICAL_AXES`.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        if not hasattr(leaf.value, "shape"):  # optax's placeholder for a frozen part without state
            return leaf.value
        axes = []
        for size, name in zip(leaf.value.shape, leaf.names, strict=True):
            if name not in LOGICAL_AXES:
                raise ValueError(f"logical axis {name!r} is missing from LOGICAL_AXES")
            axis = LOGICAL_AXES[name]
            axes.append(axis if axis and size % size_of(mesh, axis) == 0 else None)
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
