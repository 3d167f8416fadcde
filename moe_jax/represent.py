"""Computes representations of tasks from their examples or descriptions.

    python -m moe_jax.represent --gin.MODEL_DIR=DENSE --gin.represent.kind=fisher \\
        --gin.represent.output=FILE.npz [--gin.represent.mixtures="('UNSEEN',)"]

MODEL_DIR is a dense model: a run, or what `convert from-hf` wrote; for `description` and `request`,
any run. The principal components are computed from the tasks of MIXTURE_OR_TASK_NAME (by default
the run's training mixture). Tasks of further mixtures are projected on the same components, and so
are later tasks with represent.pca_from=FILE.npz.

`train` starts from the file (RunConfig.representations_path), `eval` takes the rows of unseen
tasks from it (eval.representations). Every batch is spread over the devices of MeshConfig's data
axes; the results are those of one device, except for dropout in fine-tuning. Started again, an
interrupted command continues with the task where it stopped.
"""

from moe_jax.runs import configurables, flags
from moe_jax.runs.config import Config
from moe_jax.unseen.representations import RepresentConfig, represent

configurables.register(RepresentConfig)

if __name__ == "__main__":
    flags.run(represent, Config, RepresentConfig, from_model_dir=True)
