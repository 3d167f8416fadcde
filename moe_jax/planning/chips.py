"""Peak rates of accelerators, from their makers' pages: the table that `plan` measures against."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
        flops: bfloat16 products and sums per second.
        memory_bytes: of its own memory.
        memory_rate: bytes per second to and from that memory.
        link_rate: bytes per second to other devices, over all links, one way.
        source: where the figures are from.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_rate: float
    link_rate: float
    source: str


# Memory of TPUs: what the runtime leaves to a program is a little less than the page says.
CHIPS = (
    Chip("TPU v4", 275e12, 31.25 * GIB, 1228e9, 300e9, "cloud.google.com/tpu/docs/v4"),
    Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
    Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 448e9, "cloud.google.com/tpu/docs/v6e"),
    Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, "nvidia.com/en-us/data-center/h100"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where the table has none."""
    named = [chip for chip in CHIPS if device_kind.startswith(chip.name)]
    return max(named, key=lambda chip: len(chip.name), default=None)
