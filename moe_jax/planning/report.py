"""A plan in words: a short table, and what would help where it does not fit."""

from moe_jax.core.sharding import SHARD_AXES, group_shards, size_of
from moe_jax.planning.program import GIB, BatchShape, Plan


def table(plan: Plan) -> str:
    """The figures of one device, a line each."""
    total = plan.state_bytes + plan.temporary_bytes
    memory = f" of {plan.memory_bytes / GIB:.2f} GiB" if plan.memory_bytes else ""
    lines = [
        f"{plan.devices} x {plan.device}",
        f"{'parameters':<22}{plan.parameters:>16,}",
        f"{'state':<22}{plan.state_bytes / GIB:>12.2f} GiB  parameters and optimizer",
        f"{'temporaries':<22}{plan.temporary_bytes / GIB:>12.2f} GiB",
        f"{'total per device':<22}{total / GIB:>12.2f} GiB{memory}: "
        f"{'fits' if plan.fits else 'does not fit'}",
    ]
    lines += [
        f"{kind:<22}{sent.count:>12,} x    {sent.bytes / GIB:.3f} GiB, "
        f"largest {sent.largest_bytes / 2**20:.1f} MiB"
        for kind, sent in sorted(plan.collectives.items())
    ]
    lines.append(f"{'matrix products':<22}{plan.flops / 1e12:>12.2f} TFLOP")
    if plan.bytes_accessed:
        lines.append(f"{'memory accessed':<22}{plan.bytes_accessed / GIB:>12.1f} GiB  at most")
    if plan.least_seconds is not None:
        lines.append(
            f"{'least step time':<22}{plan.least_seconds * 1e3:>12.1f} ms   bound by {plan.bound}"
        )
    return "\n".join(lines)


def advice(plan: Plan, mesh, shape: BatchShape, remat: bool) -> list[str]:
    """What would help a plan that does not fit, the most useful first."""
    result = []
    shards, replicas = size_of(mesh, SHARD_AXES), mesh.shape["data"]
    if plan.state_bytes > plan.memory_bytes / 2:
        if replicas > 1:
            result.append(
                f"MeshConfig.data=1, MeshConfig.fsdp={shards * replicas}: parameters and optimizer "
                f"are on each of {replicas} replicas"
            )
        result += [
            f"more devices: the state alone takes {plan.state_bytes / GIB:.1f} GiB of each",
            "OptimizerConfig.first_moment_dtype='bfloat16': a sixth less state",
        ]
    if plan.temporary_bytes > plan.memory_bytes / 4:
        if not remat:
            result.append("ModelConfig.remat=True: activations of one layer at a time are kept")
        if shape.rows > 1:
            result.append(
                f"DataConfig.rows_per_group={shape.rows // 2} and BATCH_SIZE="
                f"{shape.rows // 2 * shape.groups}: fewer rows at once"
            )
        if group_shards(mesh) < mesh.devices.size:
            result.append("MeshConfig.model=1: `model` leaves fewer devices to spread groups over")
    return result or ["more devices, or a smaller model"]
