"""Tells whether a run fits given devices, and the least time of a step. The devices need not exist.

    python -m moe_jax.plan --topology=v5e:4x4 --gin_file=models/bart_large.gin \\
        --gin_file=runs/paper_stage1.gin --gin.ModelConfig.vocabulary_size=50265
    python -m moe_jax.plan --topology=h100:8 ...
    python -m moe_jax.plan --devices=8 ...

Compiles the run's train step for TPUs (needs `pip install 'moe_jax[plan]'`, but no TPU), for NVIDIA
GPUs (needs `pip install 'moe_jax[gpu]'`, but no GPU), for virtual CPU devices, or, without either
flag, for the devices of this machine. Reads no data. The exit code is 0 if the step fits and 3 if
it does not. Of a GPU's memory, JAX takes 75 %, or the share that XLA_CLIENT_MEM_FRACTION in the
environment says.
"""

import sys
import time

from absl import flags

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import make_mesh
from moe_jax.model.task_moe import TaskMoE
from moe_jax.planning.devices import plan_devices
from moe_jax.planning.report import advice, table
from moe_jax.planning.step_plan import BatchShape, plan_step
from moe_jax.runs import flags as cli
from moe_jax.runs.config import Config

DOES_NOT_FIT = 3

_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPUs, such as v5e:4x4 or v5p:2x2x2; or GPUs (a100, h100 or h200), such as h100:8, or h100:2x8 "
    "for two hosts of eight.",
)
_DEVICES = flags.DEFINE_integer("devices", None, "Number of virtual CPU devices instead.")
_TASKS = flags.DEFINE_integer("tasks", 100, "Rows of the task table.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def plan(config: Config) -> None:
    """Compiles the step, prints the plan, and exits."""
    data, model_config = config.data, config.model
    if not model_config.vocabulary_size:
        raise UserError(
            "ModelConfig.vocabulary_size is 0, which means the data's, but `plan` does not "
            "read data: give it, such as --gin.ModelConfig.vocabulary_size=50265"
        )
    if _JSON.value:
        paths.parse(_JSON.value)  # fails early
    mesh = make_mesh(config.mesh, plan_devices(_TOPOLOGY.value, _DEVICES.value))
    config.check_groups(mesh)
    model = TaskMoE(model_config, config.router, _TASKS.value)
    shape = BatchShape(data.groups, data.rows_per_group, **data.lengths)
    print(f"compiling for {mesh.devices.size} devices, a minute or two ...", file=sys.stderr)
    begin = time.perf_counter()
    result = plan_step(model, config.optimizer, config.step, mesh, shape)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    print(table(result, mesh))
    if _JSON.value:
        files.write_json(_JSON.value, result.json())
    if not result.fits:
        print("What would help:")
        for line in advice(result, model, config.optimizer, mesh, shape):
            print(f"- {line}")
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    cli.run(plan, Config)
