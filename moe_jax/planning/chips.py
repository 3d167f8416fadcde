"""Peak rates and memory of accelerators."""

import dataclasses
import os

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak rates of one JAX device.

    Attributes:
        kind: the start of `jax.Device.device_kind`.
        flops: bfloat16 operations per second; a multiply-add counts as two.
        memory_bytes: memory that a program may use.
        memory_rate: bytes per second, read and written together.
        link_rate: bytes per second sent to other devices, over all links together.
        source: the source of the rates.
    """

    kind: str
    flops: float
    memory_bytes: int
    memory_rate: float
    link_rate: float
    source: str


# The memory of TPUs is the limit of the compiler in libtpu 0.0.42.1, a little less than the
# published one. `link_rate` is half of the published "bidirectional" figure. A device of TPU7x is
# half a chip; the other devices are whole chips.
CHIPS = (
    Chip("TPU v4", 275e12, int(31.25 * GIB), 1200e9, 300e9, "cloud.google.com/tpu/docs/v4"),
    Chip("TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    Chip("TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
    Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1600e9, 400e9, "cloud.google.com/tpu/docs/v6e"),
    Chip("TPU7x", 1153.5e12, int(94.75 * GIB), 3690e9, 300e9, "cloud.google.com/tpu/docs/tpu7x"),
    Chip("NVIDIA H100", 989e12, 80 * 10**9, 3350e9, 450e9, "nvidia.com/en-us/data-center/h100"),
)
# One core of a server: two AVX-512 units at 3 GHz, float32. An order of magnitude, not a published
# figure.
CORE_FLOPS, CORE_MEMORY_RATE = 192e9, 20e9


def chip_of(device: jax.Device, devices: int) -> Chip | None:
    """The chip of a device; None if the table does not have it.

    Virtual CPU devices share the cores and the memory of this machine.

    Args:
        devices: the number of devices.
    """
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        share = (os.cpu_count() or 1) / devices
        rate = CORE_MEMORY_RATE * share
        return Chip("cpu", CORE_FLOPS * share, memory // devices, rate, rate, "an order of size")
    named = [chip for chip in CHIPS if device.device_kind.startswith(chip.kind)]
    return max(named, key=lambda chip: len(chip.kind), default=None)
