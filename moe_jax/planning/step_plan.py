"""Compiles the train step of a run for given devices and reads its needs per device."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import by_group, replicated
from moe_jax.data.batch import INPUTS, TARGETS
from moe_jax.model.task_moe import TaskMoE
from moe_jax.planning.chips import chip_of
from moe_jax.planning.flops import flops
from moe_jax.planning.hlo import Program
from moe_jax.planning.traffic import Collectives, accesses, collectives
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import StepConfig, TrainState, abstract_state, make_train_step

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Groups per batch over all devices, rows per group, and lengths of a row."""

    groups: int
    rows: int
    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of one step on one device.

    Attributes:
        parameters: number of parameters of the whole model.
        memory_bytes: the device's memory; 0 if unknown.
        state_bytes: parameters and optimizer state, as stored in memory.
        unpadded_state_bytes: the same without padding. A TPU pads an array's last two axes to
            multiples of 8 and 128.
        temporary_bytes: the peak of all other memory during a step.
        compiled: False if the compiler stopped because the step does not fit. Then collectives,
            bytes accessed and operations are unknown.
        collectives: kind -> the collectives of one step.
        flops: operations of matrix products in one step.
        bytes_accessed: read from and written to memory, in one step.
        operations: number of those that read or write memory, started one after the other; on a
            GPU, its kernels.
        seconds: {"computing", "memory", "sending"}: the least time of each whose rate is known.
        unknown_loops: number of loops of unknown length, whose bodies are counted once.
    """

    device: str
    devices: int
    parameters: int
    memory_bytes: int
    state_bytes: int
    unpadded_state_bytes: int
    temporary_bytes: int
    compiled: bool
    collectives: dict[str, Collectives]
    flops: float
    bytes_accessed: int | None
    operations: int | None
    seconds: dict[str, float]
    unknown_loops: int

    @property
    def total_bytes(self) -> int:
        """State and temporaries."""
        return self.state_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether the step runs in the device's memory."""
        return self.compiled and (not self.memory_bytes or self.total_bytes <= self.memory_bytes)

    @property
    def least_seconds(self) -> float | None:
        """The time of a step that computes, accesses memory and sends at the same time, all at peak
        rates."""
        return max(self.seconds.values(), default=None)

    def json(self) -> dict[str, Any]:
        """The figures as a JSON value."""
        by_kind = {
            kind: {"count": c.count, "bytes": c.bytes, "largest_bytes": c.largest_bytes}
            for kind, c in self.collectives.items()
        }
        computed = {
            "fits": self.fits, "total_bytes": self.total_bytes,
            "least_seconds": self.least_seconds, "collectives": by_kind,
        }  # fmt: skip
        return dataclasses.asdict(self) | computed


def plan_step(
    model: TaskMoE,
    optimizer_config: OptimizerConfig,
    step_config: StepConfig,
    mesh: Mesh,
    shape: BatchShape,
) -> Plan:
    """Compiles the step for the mesh's devices, without making any array.

    Raises:
        UserError: the step does not compile for a reason other than its size.
    """
    device, devices = mesh.devices.flat[0], mesh.devices.size
    chip = chip_of(list(mesh.devices.flat))
    state, batch, rates = abstract_arguments(model, optimizer_config, mesh, shape)
    with jax.set_mesh(mesh):
        step = make_train_step(model, optimizer_config, step_config, mesh, total_steps=1000, seed=0)
        products = flops(step, state, batch, rates)
        try:
            compiled = _compile(step.lower(state, batch, rates))
        except jax.errors.JaxRuntimeError as e:
            compiled, error = None, str(e)
    common = {
        "device": device.device_kind,
        "devices": devices,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "unpadded_state_bytes": local_bytes(state),
        "compiled": compiled is not None,
        "flops": products,
    }
    seconds = {"computing": products / chip.flops} if chip else {}
    if compiled is None:
        temporary_bytes, memory_bytes = _read_error(error)
        return Plan(
            **common, memory_bytes=memory_bytes, state_bytes=_state_bytes(state, mesh),
            temporary_bytes=temporary_bytes, collectives={}, bytes_accessed=None, operations=None,
            seconds=seconds, unknown_loops=0,
        )  # fmt: skip
    memory = compiled.memory_analysis()
    state_bytes = memory.argument_size_in_bytes - local_bytes((batch, rates))
    # Results that reuse the memory of an argument take no new memory.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = Program(compiled.as_text())
    sent, accessed = collectives(program, devices), accesses(program)
    if chip:
        seconds["memory"] = accessed.bytes / chip.memory_rate
    if chip and chip.link_rate:
        seconds["sending"] = sum(c.wire_bytes for c in sent.values()) / chip.link_rate
    return Plan(
        **common,
        memory_bytes=chip.memory_bytes if chip else 0,
        state_bytes=state_bytes,
        temporary_bytes=local_bytes((batch, rates)) + memory.temp_size_in_bytes + results,
        collectives=sent,
        bytes_accessed=accessed.bytes,
        operations=accessed.operations,
        seconds=seconds,
        unknown_loops=len(program.unknown_loops),
    )


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled step. Without a GPU to try them on, XLA knows no tiles for some small products
    in Triton; cuBLAS computes all products then."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "tile sizes" not in str(e):
            raise
    return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def abstract_arguments(
    model: TaskMoE, optimizer_config: OptimizerConfig, mesh: Mesh, shape: BatchShape
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """The step's state, batch and learning rates: shapes with shardings, no values."""

    def ints(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.int32, sharding=by_group(mesh))

    rows = (shape.groups, shape.rows)
    batch = {name: ints(*rows, shape.inputs) for name in INPUTS}
    batch |= {name: ints(*rows, shape.targets) for name in TARGETS}
    batch["task_id"] = ints(shape.groups)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    rates = dict.fromkeys(optimizer_config.learning_rates, rate)
    return abstract_state(model, make_optimizer(optimizer_config), mesh), batch, rates


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of some abstract arrays."""

    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _state_bytes(state: TrainState, mesh: Mesh) -> int:
    """Bytes of a state in a device's memory, with padding; without padding if it does not fit."""
    with jax.set_mesh(mesh):
        try:
            compiled = jax.jit(lambda s: s, donate_argnums=0).lower(state).compile()
        except jax.errors.JaxRuntimeError:
            return local_bytes(state)
    return compiled.memory_analysis().argument_size_in_bytes


def _read_error(message: str) -> tuple[int, int]:
    """Reads (bytes of temporaries, bytes of memory) from the compiler's error for a too large step.

    Raises:
        UserError: the error is about something else.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise UserError(f"the step does not compile: {message.strip().splitlines()[0]}")
    match = re.search(
        r"temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", message
    )
    if match is None:
        raise UserError(f"the step is too large: {message.strip().splitlines()[0]}")
    size, unit, memory, memory_unit = match.groups()
    return int(float(size) * _UNITS[unit]), int(float(memory) * _UNITS[memory_unit])
