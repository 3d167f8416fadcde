"""Trains a model on a mixture of tasks.

    python -m moe_jax.train --gin_file=models/tiny.gin --gin_file=runs/skills_gym_stage1.gin \\
        --gin.MODEL_DIR=/tmp/stage1

Started again, the same command continues from the last checkpoint, exactly.

--profile=10,12 traces steps 10 to 12, for https://ui.perfetto.dev (perfetto_trace.json.gz) and for
TensorBoard with its profile plugin.
"""

from absl import flags as absl_flags

from moe_jax.runs import flags, profiling
from moe_jax.runs.config import Config
from moe_jax.runs.train_loop import train

_PROFILE = absl_flags.DEFINE_list(
    "profile", None, "FIRST,LAST: traces these steps into MODEL_DIR/profile."
)


def main(config: Config) -> None:
    """Trains as the configuration says."""
    train(config, profiling.parse_steps(_PROFILE.value))


if __name__ == "__main__":
    flags.run(main, Config)
