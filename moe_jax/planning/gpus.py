"""Descriptions of NVIDIA GPUs, for which XLA compiles without having one."""

import dataclasses

from moe_jax.planning.chips import Chip, named

# A `GpuTargetConfigProto` of XLA. What stands here as a number is the same on all GPUs below. XLA
# uses only those parts of cuDNN that its version has.
_TARGET = """
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {capability} feature_extension: {extension} }}
  core_count: {cores}
  fpus_per_core: {lanes}
  clock_rate_ghz: {gigahertz}
  memory_bandwidth: {memory_rate:.0f}
  device_memory_size: {memory_bytes}
  l2_cache_size: {cache_bytes}
  shared_memory_per_core: {shared_bytes}
  shared_memory_per_block_optin: {shared_bytes_of_block}
  shared_memory_per_block: 49152
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties of a GPU on which XLA's compiler depends.

    Source: github.com/openxla/xla, xla/backends/gpu/target_config/specs.

    Attributes:
        chip: its kind, memory, and memory rate.
        capability: major number of the compute capability; the minor one is 0.
        extension: the features that the compute capability has beside its number.
        cores: streaming multiprocessors.
        lanes: float32 units of a core.
        cache_bytes: size of the L2 cache.
        shared_bytes: shared memory of a core.
        shared_bytes_of_block: shared memory that one block of threads may take.
    """

    chip: Chip
    capability: int
    extension: str
    cores: int
    lanes: int
    gigahertz: float
    cache_bytes: int
    shared_bytes: int
    shared_bytes_of_block: int

    def target_config(self) -> str:
        """The text from which `topologies.get_topology_desc` makes such devices."""
        return _TARGET.format(**vars(self.chip), **vars(self))


def _hopper(kind: str) -> Gpu:
    return Gpu(
        named(kind), capability=9, extension="ACCELERATED_FEATURES", cores=132, lanes=128,
        gigahertz=1.98, cache_bytes=50 << 20, shared_bytes=228 << 10,
        shared_bytes_of_block=227 << 10,
    )  # fmt: skip


# Name in `--topology` -> the GPU.
GPUS = {
    "a100": Gpu(
        named("NVIDIA A100-SXM4-80GB"), capability=8, extension="NONE", cores=108, lanes=64,
        gigahertz=1.41, cache_bytes=40 << 20, shared_bytes=164 << 10,
        shared_bytes_of_block=163 << 10,
    ),
    "h100": _hopper("NVIDIA H100 80GB HBM3"),
    "h200": _hopper("NVIDIA H200"),
}  # fmt: skip
