"""The stages of an experiment, without running them."""

import pytest
from absl import flags as absl_flags

from moe_jax import experiment
from moe_jax.runs.flags import rewrite_gin_flags


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """The commands that stages would have run."""
    called = []
    monkeypatch.setattr(
        experiment.Stages, "_call", staticmethod(lambda command, name: called.append(command))
    )
    return called


def test_stages_get_macros_but_not_the_experiments_own_settings(tmp_path, calls):
    """`train` and the others know no `experiment.eval_examples`."""
    given = ["experiment", "--gin.TRAIN_STEPS=4", "--gin.experiment.eval_examples=2"]
    absl_flags.FLAGS(rewrite_gin_flags(given))
    try:
        stages = experiment.Stages(tmp_path, "models/tiny.gin")
        stages.run("dense", "train", "runs/skills_gym_dense.gin", {"MODEL_DIR": "d"})
    finally:
        absl_flags.FLAGS.unparse_flags()
        absl_flags.FLAGS["gin_bindings"].unparse()
    bindings = [argument for argument in calls[0] if argument.startswith("--gin.")]
    assert bindings == ["--gin.TRAIN_STEPS=4", "--gin.MODEL_DIR=d"]
