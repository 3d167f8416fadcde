"""Compiles the train step of a run for devices that need not exist."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import by_group, replicated
from moe_jax.data.batch import INPUTS, TARGETS
from moe_jax.model.task_moe import TaskMoE, init_params
from moe_jax.planning.chips import chip_of
from moe_jax.planning.flops import flops
from moe_jax.planning.hlo import Program, Sent
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import PRNG, StepConfig, init_state, make_train_step, state_shardings

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Groups in all, rows of each, and lengths of a row."""

    groups: int
    rows: int
    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step needs of one device.

    Attributes:
        parameters: of the whole model.
        memory_bytes: the device's memory; 0 where it is not known.
        state_bytes: parameters and optimizer state, as they lie in memory.
        temporary_bytes: what else is alive at the worst moment of a step.
        collectives: by kind, in one step.
        flops: of matrix products, in one step.
        bytes_accessed: in one step; an upper bound.
        least_seconds: the longest of computing, moving and sending, each at its peak rate.
        bound: which of them that is.
    """

    device: str
    devices: int
    parameters: int
    memory_bytes: int
    state_bytes: int
    temporary_bytes: int
    collectives: dict[str, Sent]
    flops: float
    bytes_accessed: int
    least_seconds: float | None
    bound: str

    @property
    def fits(self) -> bool:
        """Whether state and temporaries fit into the device's memory."""
        total = self.state_bytes + self.temporary_bytes
        return not self.memory_bytes or total <= self.memory_bytes

    def json(self) -> dict[str, Any]:
        """For `--json`."""
        return dataclasses.asdict(self) | {"fits": self.fits}


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as `v5e:4x4`, without any TPU.

    Raises:
        UserError: libtpu is missing, or knows no such topology.
    """
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError as e:
        raise UserError("--topology needs libtpu: pip install 'moe_jax[plan]'") from e
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as e:  # whatever libtpu makes of the name
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"libtpu knows no topology {name!r}; names are such as v5e:4x4, v5p:2x2x2, v6e:8x8"
            f" ({reason})"
        ) from e


def plan_step(
    model: TaskMoE,
    optimizer_config: OptimizerConfig,
    step_config: StepConfig,
    mesh: Mesh,
    shape: BatchShape,
) -> Plan:
    """Compiles the step for the mesh's devices and reads what it needs."""
    with jax.set_mesh(mesh):
        step, args = abstract_step(model, optimizer_config, step_config, mesh, shape)
        lowered = step.lower(*args)
        products = flops(step, *args)
        device = mesh.devices.flat[0]
        chip = chip_of(device.device_kind)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(args[0].params))
        common = {
            "device": device.device_kind,
            "devices": mesh.devices.size,
            "parameters": parameters,
            "memory_bytes": int(chip.memory_bytes) if chip else 0,
            "flops": products,
        }
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            return _too_large(str(e), args[0], common)
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    sent, moved = program.collectives(), program.bytes_accessed()
    seconds = {}
    if chip:
        seconds = {
            "computing": products / chip.flops,
            "memory": moved / chip.memory_rate,
            "sending": sum(s.bytes for s in sent.values()) / chip.link_rate,
        }
    bound = max(seconds, key=seconds.get, default="")
    return Plan(
        **common,
        state_bytes=_state_bytes(memory, args),
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=sent,
        bytes_accessed=moved,
        least_seconds=seconds.get(bound),
        bound=bound,
    )


def abstract_step(model, optimizer_config, step_config, mesh, shape: BatchShape) -> tuple[Any, Any]:
    """(the jitted step, its arguments without values but with their shardings)."""
    optimizer = make_optimizer(optimizer_config)
    boxed = jax.eval_shape(
        lambda: init_state(init_params(model, jax.random.key(0, impl=PRNG)), optimizer)
    )
    places = state_shardings(model, optimizer, mesh)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.meta.unbox(boxed),
        places,
    )

    def ints(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.int32, sharding=by_group(mesh))

    groups, rows = shape.groups, shape.rows
    batch = {name: ints(groups, rows, shape.inputs) for name in INPUTS}
    batch |= {name: ints(groups, rows, shape.targets) for name in TARGETS}
    batch["task_id"] = ints(groups)
    rates = {
        part: jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
        for part in optimizer_config.learning_rates
    }
    step = make_train_step(model, optimizer_config, step_config, mesh, total_steps=1000, seed=0)
    return step, (state, batch, rates)


def _state_bytes(memory: Any, args: Sequence[Any]) -> int:
    """Arguments on one device but for the batch; what padding in memory adds is counted."""
    batch = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(args[1:]))
    return memory.argument_size_in_bytes - batch


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    size = leaf.dtype.itemsize
    for length in leaf.sharding.shard_shape(leaf.shape):
        size *= length
    return size


def _too_large(message: str, state: Any, common: dict[str, Any]) -> Plan:
    """What the compiler says of a program that does not fit.

    Raises:
        UserError: it failed for another reason.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise UserError(f"the step does not compile: {message.strip().splitlines()[0]}")
    state_bytes = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state))
    found = re.search(r"HLO temporaries \(([\d.]+)([KMG])\)", message)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    temporary = int(float(found[1]) * unit[found[2]]) if found else common["memory_bytes"]
    return Plan(
        **common,
        state_bytes=state_bytes,
        temporary_bytes=temporary,
        collectives={},
        bytes_accessed=0,
        least_seconds=None,
        bound="",
    )
