"""The stages of an experiment, without running them."""

from types import SimpleNamespace

import pytest
from absl import flags as absl_flags

from moe_jax import experiment
from moe_jax.report import build
from moe_jax.runs.config import RunConfig
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


@pytest.mark.parametrize("upcycle_step", [0, 7])
@pytest.mark.parametrize("stage2", ["", "runs/skills_gym_stage2.gin"])
def test_the_mixture_may_start_from_the_dense_model_and_have_one_stage(
    tmp_path, calls, monkeypatch, stage2, upcycle_step
):
    reports = []

    def report(directory, runs, few_shot, model):
        reports.append((list(runs), model))
        return SimpleNamespace(findings=[], page="")

    monkeypatch.setattr(build, "report", report)
    absl_flags.FLAGS(["experiment"])
    settings = experiment.ExperimentConfig(
        model="models/tiny.gin", dense="runs/skills_gym_dense.gin",
        stage1="runs/skills_gym_stage1.gin", stage2=stage2,
        finetune="runs/skills_gym_finetune.gin", unseen="skills_gym_unseen",
        upcycle_step=upcycle_step,
    )  # fmt: skip
    experiment.experiment(RunConfig(model_dir=str(tmp_path)), settings)

    commands = [" ".join(command) for command in calls]
    trained = [c for c in commands if "moe_jax.train" in c]
    mixture = "stage2" if stage2 else "stage1"
    assert len(trained) == (3 if stage2 else 2)
    start = f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path}/dense/checkpoints/7"
    assert [start in c for c in trained] == [False, upcycle_step > 0, False][: len(trained)]
    (finetune,) = (c for c in commands if "moe_jax.finetune" in c)
    assert f"--gin.MOE_DIR={tmp_path}/{mixture}" in finetune
    scored = [c for c in commands if "moe_jax.eval" in c]
    for name, command in zip(("dense", mixture), scored, strict=True):
        assert f"--gin.MODEL_DIR={tmp_path}/{name} " in command
    assert reports == [(list(dict.fromkeys(["dense", "stage1", mixture])), mixture)]
