"""Trains a model on a mixture of tasks.

    python -m moe_jax.train --gin_file=models/tiny.gin --gin_file=runs/skills_gym_stage1.gin \
        --gin.MODEL_DIR=/tmp/stage1

Started again, the same command continues from the last checkpoint, exactly.
"""

from moe_jax.runs import flags
from moe_jax.runs.config import Config
from moe_jax.runs.train_loop import train

if __name__ == "__main__":
    flags.run(train, Config)
