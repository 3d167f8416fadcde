"""Adapts models to unseen tasks with a few examples each, and compares their gains.

    python -m moe_jax.finetune --gin_file=runs/skills_gym_finetune.gin \\
        --gin.MODEL_DIR=/tmp/few_shot --gin.DENSE_DIR=/tmp/dense --gin.MOE_DIR=/tmp/stage2

For every starting point, task of the mixture and few-shot sample: trains on the task's few examples
with every learning rate and batch size and scores each on dev. The best one is scored on test.
Writes MODEL_DIR/runs.jsonl, arg.{json,csv,txt} (gains over direct fine-tuning) and gains.json
(gains over the dense model, with intervals): no gains where FinetuneConfig.starts has no
'untrained', no gains.json where it has no 'dense'. Started again, the command continues after the
last line of runs.jsonl.
"""

from moe_jax.runs import flags
from moe_jax.runs.config import FewShotConfig
from moe_jax.unseen.adaptation import adapt_all

if __name__ == "__main__":
    flags.run(adapt_all, FewShotConfig)
