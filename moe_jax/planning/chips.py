"""Peak rates and memory of accelerators."""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax

from moe_jax.core.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak rates of one JAX device.

    Attributes:
        kind: the start of `jax.Device.device_kind`.
        flops: bfloat16 operations per second; a multiply-add counts as two.
        memory_bytes: memory that a program may use.
        memory_rate: bytes per second, read and written together.
        link_rate: bytes per second sent to other devices, over all links together; 0 if unknown.
        source: the source of the rates.
    """

    kind: str
    flops: float
    memory_bytes: int
    memory_rate: float
    link_rate: float
    source: str


_NVIDIA = "nvidia.com/en-us/data-center/"
# The memory of TPUs is the limit of the compiler in libtpu 0.0.42.1, a little less than the
# published one; that of GPUs is all of it, as the driver reports it. `link_rate` is half of the
# published "bidirectional" figure. A device of TPU7x is half a chip; the other devices are whole
# chips. GPUs are those with NVLink; operations are those without sparsity.
CHIPS = (
    Chip("TPU v4", 275e12, int(31.25 * GIB), 1200e9, 300e9, "cloud.google.com/tpu/docs/v4"),
    Chip("TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    Chip("TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
    Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1600e9, 400e9, "cloud.google.com/tpu/docs/v6e"),
    Chip("TPU7x", 1153.5e12, int(94.75 * GIB), 3690e9, 300e9, "cloud.google.com/tpu/docs/tpu7x"),
    Chip("NVIDIA A100-SXM4-80GB", 312e12, 85_100_068_864, 2039.04e9, 300e9, _NVIDIA + "a100"),
    Chip("NVIDIA H100 80GB HBM3", 989e12, 84_942_979_072, 3352.32e9, 450e9, _NVIDIA + "h100"),
    Chip("NVIDIA H200", 989e12, 151_397_597_184, 4800e9, 450e9, _NVIDIA + "h200"),
)
# The share of a GPU's memory that JAX takes, in the environment: the variable's new and old name.
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# One core of a server: two AVX-512 units at 3 GHz, float32. An order of magnitude, not a published
# figure.
CORE_FLOPS, CORE_MEMORY_RATE = 192e9, 20e9


def chip_of(devices: Sequence[jax.Device]) -> Chip | None:
    """The chip of which the devices are; None if the table does not have it.

    Virtual CPU devices share the cores and the memory of this machine. JAX takes a share of a GPU's
    memory: `XLA_CLIENT_MEM_FRACTION` in the environment, else 75 %. GPUs of several hosts talk over
    a network whose rate is not known.

    Raises:
        UserError: `XLA_CLIENT_MEM_FRACTION` is not a number above 0.
    """
    device = devices[0]
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        share = (os.cpu_count() or 1) / len(devices)
        rate = CORE_MEMORY_RATE * share
        return Chip(
            "cpu", CORE_FLOPS * share, memory // len(devices), rate, rate, "an order of size"
        )
    chip = named(device.device_kind)
    if chip is None or device.platform != "gpu":
        return chip
    hosts = len({d.process_index for d in devices})
    return dataclasses.replace(
        chip,
        memory_bytes=int(chip.memory_bytes * _memory_fraction()),
        link_rate=chip.link_rate if hosts == 1 else 0.0,
    )


def fraction_variable() -> str:
    """The environment variable that says which share of a GPU's memory JAX takes."""
    return next((name for name in FRACTIONS if name in os.environ), FRACTIONS[0])


def named(kind: str) -> Chip | None:
    """The chip with the longest name that `kind` starts with; None if there is none."""
    chips = [chip for chip in CHIPS if kind.startswith(chip.kind)]
    return max(chips, key=lambda chip: len(chip.kind), default=None)


def _memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes."""
    if all(name in os.environ for name in FRACTIONS):
        raise UserError(f"{' and '.join(FRACTIONS)} are both set, which JAX refuses: unset one")
    name = fraction_variable()
    text = os.environ.get(name) or "0.75"
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < math.inf:
        raise UserError(f"{name} is {text!r}; it must be a share of memory, such as 0.9")
    return fraction
