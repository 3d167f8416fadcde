"""Says whether a run fits devices that are not at hand, and how fast a step can be at best.

    python -m moe_jax.plan --topology=v5e:4x4 --gin_file=models/bart_large.gin \\
        --gin_file=runs/paper_stage1.gin --gin.ModelConfig.vocabulary_size=50265
    python -m moe_jax.plan --devices=8 ...

Compiles the run's own train step: for a TPU topology (needs `pip install 'moe_jax[plan]'`, but no
TPU), or for virtual CPU devices. Reads no data. Exit code 0 where it fits, 3 where it does not.
"""

import sys
import time

import jax
from absl import flags

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, group_shards, make_mesh
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE
from moe_jax.planning.program import BatchShape, plan_step, topology_devices
from moe_jax.planning.report import advice, table
from moe_jax.runs import flags as cli
from moe_jax.runs.config import DataConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

DOES_NOT_FIT = 3

_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU topology, such as v5e:4x4 or v5p:2x2x2.")
_DEVICES = flags.DEFINE_integer("devices", None, "Number of virtual CPU devices instead.")
_TASKS = flags.DEFINE_integer("tasks", 100, "Rows of the task table.")
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def plan() -> None:
    """Compiles, prints, and ends the process with the exit code."""
    data, model_config, step_config = DataConfig(), ModelConfig(), StepConfig()
    if (_TOPOLOGY.value is None) == (_DEVICES.value is None):
        raise UserError("give either --topology=v5e:4x4 or --devices=8")
    if not model_config.vocabulary_size:
        raise UserError(
            "ModelConfig.vocabulary_size is 0, to be taken from the data: give it here, such as "
            "--gin.ModelConfig.vocabulary_size=50265"
        )
    jax.config.update("jax_platforms", "cpu")  # no TPU is asked for, even where there is one
    if _DEVICES.value is not None:
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
        devices = jax.devices()
    else:
        devices = topology_devices(_TOPOLOGY.value)
    mesh = make_mesh(MeshConfig(), devices)
    if data.groups % group_shards(mesh):
        raise UserError(
            f"BATCH_SIZE {data.batch_size} is {data.groups} groups of {data.rows_per_group} rows: "
            f"no multiple of the mesh's {group_shards(mesh)} data shards"
        )
    shape = BatchShape(
        data.groups, data.rows_per_group, data.lengths["inputs"], data.lengths["targets"]
    )
    print(f"compiling for {mesh.devices.size} devices (a minute or two)...", file=sys.stderr)
    begin = time.perf_counter()
    found = plan_step(
        TaskMoE(model_config, RouterConfig(), _TASKS.value), OptimizerConfig(), step_config, mesh,
        shape,
    )  # fmt: skip
    print(f"compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    print(table(found))
    if _JSON.value:
        files.write_json(_JSON.value, found.json())
    if not found.fits:
        print("What would help:")
        for line in advice(found, mesh, shape, model_config.remat):
            print(f"- {line}")
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    cli.run(plan)
