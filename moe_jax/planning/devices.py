"""The devices that a step is compiled for. They need not exist."""

import os

import jax

from moe_jax.core.errors import UserError, first_line

# Without these, libtpu asks the network for this machine's TPU, only one process at a time can load
# it, and its compiler's threads run out of stack on large fused programs.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "LIBTPU_INIT_ARGS": f"--fibers_default_thread_stack_size={4 << 20}",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def plan_devices(topology: str | None, count: int | None) -> list[jax.Device]:
    """The devices of a TPU topology, or `count` virtual CPU devices, or this machine's devices.

    Call it before JAX's backends start.

    Raises:
        UserError: both are given, `count` is below 1, libtpu is missing or knows no such topology.
    """
    if topology is not None and count is not None:
        raise UserError("give --topology or --devices, not both")
    if topology is not None:
        return topology_devices(topology)
    if count is not None:
        if count < 1:
            raise UserError(f"--devices is {count}; it must be at least 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()


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
    jax.config.update("jax_platforms", "cpu")  # does not use a TPU of this machine
    # Programs for devices that do not exist cannot be loaded from the compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    # A TPU v4 has two cores, which JAX uses as one device.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as e:  # libtpu has no specific error type for this
        reason = first_line(e)
        raise UserError(
            f"libtpu knows no topology {name!r}; names are such as v5e:4x4, v5p:2x2x2 or v6e:8x8 "
            f"({reason})"
        ) from e
    return list(topology.devices)
