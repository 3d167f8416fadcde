"""Tokenises SeqIO tasks once, into a cache that training reads without TensorFlow.

    python -m moe_jax.prepare --gin.MIXTURE_OR_TASK_NAME=skills_gym_train --gin.CACHE_DIR=cache

`train`, `eval` and the other commands do this themselves if the cache is not up to date. A child
process does the work, so that the calling process never imports TensorFlow.
"""

import dataclasses

from moe_jax.core.configuration import Configuration, Names
from moe_jax.runs import configurables, flags
from moe_jax.runs.config import DataConfig
from moe_jax.runs.mixtures import prepare_mixtures


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Configuration, called="prepare"):
    """Settings of this command.

    Attributes:
        mixtures: further mixtures or tasks to prepare with MIXTURE_OR_TASK_NAME, in its vocabulary.
    """

    mixtures: Names = ()


configurables.register(PrepareConfig)


def main(data: DataConfig, settings: PrepareConfig) -> None:
    """Prepares MIXTURE_OR_TASK_NAME and prints its size."""
    for name, mixture in prepare_mixtures(data, *settings.mixtures).items():
        examples = sum(split.examples for task in mixture.tasks for split in task.splits.values())
        print(
            f"{name}: {len(mixture.tasks)} tasks, {examples:,} examples,"
            f" {mixture.vocabulary.size} tokens in the vocabulary"
        )


if __name__ == "__main__":
    flags.run(main, DataConfig, PrepareConfig)
