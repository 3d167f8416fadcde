"""Computes representations of tasks from their examples.

    python -m moe_jax.represent --gin.MODEL_DIR=DENSE --gin.represent.kind=fisher \\
        --gin.represent.output=FILE.npz [--gin.represent.mixtures="('UNSEEN',)"]

MODEL_DIR is a dense model: a run, or what `convert from-hf` wrote. The principal components are
those of the tasks of MIXTURE_OR_TASK_NAME (by default what the run was trained on); the tasks of
further mixtures are put beside them, and so is, later, any task with represent.pca_from=FILE.npz.

`train` starts from the file (RunConfig.representations_path), `eval` takes the rows of unseen
tasks from it (eval.representations). Every batch is spread over the devices of MeshConfig's data
axes; the numbers are those of one device, but for the noise of dropout in fine-tuning. Started
again, an interrupted command goes on with the task where it stopped.
"""

from moe_jax.runs import configurables, flags
from moe_jax.runs.config import Config
from moe_jax.unseen.representations import RepresentConfig, represent

configurables.register(RepresentConfig)

if __name__ == "__main__":
    flags.run(represent, Config, RepresentConfig, from_model_dir=True)
