"""The devices that a step is compiled for. They need not exist."""

import os
import re

import jax
from jax.experimental import topologies

from moe_jax.core.errors import UserError, first_line, nearest
from moe_jax.planning.gpus import GPUS

_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")

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
    """The devices of a topology, or `count` virtual CPU devices, or this machine's devices.

    Call it before JAX's backends start.

    Raises:
        UserError: both are given, `count` is below 1, a compiler is missing or knows no such
            topology.
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
    """The devices of a topology of TPUs such as `v5e:4x4`, or of GPUs such as `h100:8`.

    They need not exist. `h100:2x8` are two hosts of eight GPUs.

    Raises:
        UserError: the compiler is missing, or knows no such topology.
    """
    kind = name.partition(":")[0]
    if kind not in GPUS and not re.match(r"v\d|tpu", kind):
        raise UserError(
            f"--topology={name}: there is no {kind!r}{nearest(kind, (*GPUS, *_TPUS))}; names are "
            f"such as v5e:4x4 for TPUs, and h100:8 for GPUs ({', '.join(GPUS)})"
        )
    jax.config.update("jax_platforms", "cpu")  # does not use an accelerator of this machine
    # Programs for devices that do not exist cannot be loaded from the compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)
    return _gpus(name) if kind in GPUS else _tpus(name)


def _tpus(name: str) -> list[jax.Device]:
    try:
        import libtpu  # noqa: F401
    except ImportError as e:
        raise UserError(f"--topology={name} needs libtpu: pip install 'moe_jax[plan]'") from e
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


def _gpus(name: str) -> list[jax.Device]:
    kind, _, shape = name.partition(":")
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-8])", shape)
    if match is None:
        raise UserError(
            f"--topology={name}: give the GPUs of one host, 1 to 8, such as {kind}:8, or hosts and "
            f"the GPUs of each, such as {kind}:2x8"
        )
    hosts, count = match[1] or 1, match[2]
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[kind].target_config(), topology=f"1x{hosts}x{count}"
        )
    except NotImplementedError as e:
        raise UserError(
            f"--topology={name} needs JAX's plugin for CUDA: pip install 'moe_jax[gpu]'"
        ) from e
    return list(topology.devices)
