"""Prints a plan: a short table and, if the step does not fit, advice."""

import dataclasses
import math

import jax
from jax.sharding import Mesh

from moe_jax.core.sharding import MESH_AXES, MeshConfig, group_shards, make_mesh
from moe_jax.model.task_moe import TaskMoE
from moe_jax.planning.chips import fraction_variable, named
from moe_jax.planning.step_plan import BatchShape, Plan, local_bytes
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import abstract_state

# A change that saves a smaller share than this is not advised.
WORTHWHILE = 0.05


def table(plan: Plan, mesh: Mesh) -> str:
    """The figures of one step on one device, one per line."""
    axes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in MESH_AXES)
    lines = [
        f"{plan.devices} x {plan.device}, mesh {axes}; figures are of one device and one step",
        _line("parameters", f"{plan.parameters:,}", "of the whole model"),
        _line("state", _size(plan.state_bytes), f"parameters, optimizer{_padding(plan)}"),
        _line("temporaries", _size(plan.temporary_bytes), "activations, gradients, batch"),
        _line("total", _size(plan.total_bytes), _verdict(plan)),
    ]
    for kind, c in plan.collectives.items():
        note = f"{c.count:,} times, {_size(c.largest_bytes)} the largest"
        lines.append(_line(kind, _size(c.bytes), note))
    lines.append(
        _line("matrix products", f"{plan.flops / 1e12:,.3f} TFLOP", _at_peak(plan, "computing"))
    )
    if plan.bytes_accessed is not None:
        note = _at_peak(plan, "memory")
        lines.append(_line("memory accessed", _size(plan.bytes_accessed), note))
        note = "started one after the other"
        lines.append(_line("operations", f"{plan.operations:,}", note))
    if plan.collectives:
        sent = _size(sum(c.wire_bytes for c in plan.collectives.values()))
        lines.append(_line("sent to others", sent, _at_peak(plan, "sending")))
    if plan.least_seconds is not None:
        bound = max(plan.seconds, key=plan.seconds.__getitem__)
        note = f"all at once at peak rates; {bound} takes longest"
        lines.append(_line("least step time", _time(plan.least_seconds), note))
    if plan.unknown_loops:
        lines.append(f"{plan.unknown_loops} loops of unknown length are counted once.")
    return "\n".join(lines)


def _line(name: str, figure: str, note: str) -> str:
    return f"{name:<18}{figure:>18}  {note}".rstrip()


def _size(size: float) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:,.2f} {name}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _at_peak(plan: Plan, what: str) -> str:
    if what not in plan.seconds:
        return "the peak rate is not known"
    return f"{_time(plan.seconds[what])} at the peak rate"


def _padding(plan: Plan) -> str:
    padding = plan.state_bytes - plan.unpadded_state_bytes
    if padding < WORTHWHILE * plan.state_bytes:
        return ""
    return f"; {_size(padding)} of it pads arrays to the chip's tiles"


def _verdict(plan: Plan) -> str:
    if not plan.memory_bytes:
        return "the device's memory is not known"
    return f"of {_size(plan.memory_bytes)}: {'fits' if plan.fits else 'does not fit'}"


def advice(
    plan: Plan, model: TaskMoE, optimizer_config: OptimizerConfig, mesh: Mesh, shape: BatchShape
) -> list[str]:
    """Advice for a plan that does not fit: changes to what takes the memory."""
    of_state = _advice_on_state(plan, model, optimizer_config, mesh)
    of_temporaries = _advice_on_temporaries(plan, model, mesh, shape)
    room = plan.memory_bytes - plan.state_bytes
    if room < plan.memory_bytes / 4:  # the state alone takes most of the memory
        return [*_advice_on_memory(plan), *of_state, *of_temporaries]
    return [*_advice_on_memory(plan), *of_temporaries, *of_state]


def _advice_on_memory(plan: Plan) -> list[str]:
    """More of a GPU's memory, if that is enough."""
    chip = named(plan.device)
    most = int(0.9 * chip.memory_bytes) if chip else 0  # the rest is for CUDA and its libraries
    if not plan.memory_bytes < plan.total_bytes <= most:
        return []
    return [
        f"{fraction_variable()}=0.9 in the environment: {_size(most)} of memory, not "
        f"{_size(plan.memory_bytes)}"
    ]


def _advice_on_state(
    plan: Plan, model: TaskMoE, optimizer_config: OptimizerConfig, mesh: Mesh
) -> list[str]:
    """Changes of mesh and optimizer, with the resulting size of the state."""
    padded = plan.state_bytes / plan.unpadded_state_bytes  # assumed to stay the same
    parts = mesh.devices.size // mesh.shape["model"]
    sharded = make_mesh(
        MeshConfig(data=1, fsdp=parts, model=mesh.shape["model"]), list(mesh.devices.flat)
    )
    half = dataclasses.replace(optimizer_config, first_moment_dtype="bfloat16")
    changes = {
        f"MeshConfig.data=1, MeshConfig.fsdp={parts}, MeshConfig.expert=1": (
            optimizer_config, sharded,
        ),
        "OptimizerConfig.first_moment_dtype='bfloat16'": (half, mesh),
    }  # fmt: skip
    result = []
    for name, (config, where) in changes.items():
        size = padded * local_bytes(abstract_state(model, make_optimizer(config), where))
        if size < (1 - WORTHWHILE) * plan.state_bytes:
            result.append(f"{name}: about {_size(size)} of state, not {_size(plan.state_bytes)}")
    if plan.state_bytes > plan.memory_bytes / 2:
        leaves = jax.tree.leaves(abstract_state(model, make_optimizer(optimizer_config), mesh))
        whole = padded * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        enough = math.ceil(2 * whole / plan.memory_bytes)
        result.append(
            f"more devices: with about {enough:,.0f} of them and MeshConfig.fsdp to match, the "
            "state takes half of their memory"
        )
    return result


def _advice_on_temporaries(plan: Plan, model: TaskMoE, mesh: Mesh, shape: BatchShape) -> list[str]:
    """Changes that make activations smaller."""
    if plan.temporary_bytes < plan.memory_bytes / 4:
        return []
    result = []
    keep = {
        "products": "keeps the inputs of matrix products and computes the rest again",
        "inputs": "keeps the inputs of layers and computes the rest again",
    }
    smaller = {"all": ["products", "inputs"], "products": ["inputs"], "inputs": []}
    for kept in smaller[model.config.kept_activations]:
        result.append(f"ModelConfig.kept_activations='{kept}': {keep[kept]}")
    if model.config.dtype == "float32":
        result.append("ModelConfig.dtype='bfloat16': activations half as large")
    if shape.rows > 1:
        result.append(
            f"DataConfig.rows_per_group={shape.rows // 2}, of {shape.rows}: as many rows in a "
            "step, about half as many activations at a time"
        )
    if not model.gathers and shape.groups > group_shards(mesh):
        result.append("StepConfig.groups_at_once=1: the activations of one group at a time")
    return [*result, "TASK_FEATURE_LENGTHS: shorter rows"]
