"""Baselines of docs/method.md differ from stage 1 as documented; the paper's runs are as
published."""

import re
import shlex
from pathlib import Path

import pytest

from moe_jax.runs import gin_files
from moe_jax.runs.config import Config, FinetuneConfig
from moe_jax.runs.configurables import build
from moe_jax.runs.directory import config_lines
from moe_jax.runs.load import build_model

ROOT = Path(__file__).resolve().parent.parent
STAGE1 = ["models/tiny.gin", "runs/skills_gym_stage1.gin"]
SECTION = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SECTION = SECTION.partition("## Baselines by gin")[2].partition("\n## ")[0]
ROWS = {
    re.sub("[,`].*", "", name): flags.replace("=n", "=2")
    for name, flags in re.findall(r"^\| ([^|]+) \| `(--gin[^`]+)` \|$", SECTION, re.M)
}
EXPERTS = {
    "dense": 1,
    "average routing": 4,
    "random per task": 2,
    "random per instance": 1,
    "alternating": 1,
}


def settings(words):
    """Every setting of a run, and the model."""
    arguments = gin_files.rewrite_flags(shlex.split(words))
    bindings = [argument.partition("=")[2] for argument in arguments]
    gin_files.parse(STAGE1, bindings, [str(gin_files.GIN_CONFIGS)])
    config = build(Config)
    return texts(config), build_model(config.model, config.router, 1024, 32)


def texts(config):
    """Every setting as Python writes it."""
    return {name: repr(value) for name, value in config_lines(config).items()}


def test_all_baselines_are_documented():
    assert set(ROWS) == set(EXPERTS)


@pytest.mark.parametrize("name", EXPERTS)
def test_baseline(name):
    stage1, _ = settings("")
    actual, model = settings(ROWS[name])
    changed = {key for key in actual if actual[key] != stage1[key]}
    named = set(re.findall(r"--gin\.([\w.]+)=", ROWS[name]))
    assert changed <= named and changed
    assert model.experts_per_layer == EXPERTS[name]
    assert model.routed == (name != "dense")


PAPER = {  # settings that both stages share, and each one's own
    "OptimizerConfig.learning_rate": "1e-05",
    "OptimizerConfig.clip_norm": "0.1",
    "OptimizerConfig.warmup_fraction": "0.06",
    "StepConfig.label_smoothing": "0.1",
    "DataConfig.batch_size": "32",
    "ModelConfig.experts": "3",
    "ModelConfig.expert_noise": "1e-08",
    "ModelConfig.d_model": "768",
    "RouterConfig.kind": "'linear_layer_specific'",
    "RouterConfig.hidden_dim": "64",
    "RouterConfig.representation_dim": "128",
    "OptimizerConfig.weight_decay": "0.01",
    "OptimizerConfig.epsilon": "1e-08",
    "DataConfig.lengths": "{'inputs': 512, 'targets': 64}",
}
STAGES = {
    "stage1": {
        "RunConfig.train_steps": "30000",
        "OptimizerConfig.router_learning_rate": "0.001",
        "OptimizerConfig.representation_learning_rate": "0.01",
        "RouterConfig.selection": "'gumbel_softmax_st'",
        "RouterConfig.temperature": "2.0",
        "RouterConfig.temperature_rate": "0.0003",
        "RouterConfig.temperature_floor": "0.1",
    },
    "stage2": {
        "RunConfig.train_steps": "60000",
        "OptimizerConfig.frozen": "('router', 'representations')",
        "RouterConfig.selection": "'softmax'",
        "RouterConfig.temperature": "300.0",
        "RouterConfig.temperature_rate": "0.0001",
        "RouterConfig.temperature_floor": "1.0",
    },
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_stages(stage):
    files = ["models/bart_base.gin", f"runs/paper_{stage}.gin"]
    gin_files.parse(files, [], [str(gin_files.GIN_CONFIGS)])
    actual = texts(build(Config))
    wanted = PAPER | STAGES[stage]
    assert {key: actual[key] for key in wanted} == wanted


def test_the_papers_few_shot_grid():
    gin_files.parse(["runs/paper_finetune.gin"], [], [str(gin_files.GIN_CONFIGS)])
    config = build(FinetuneConfig)
    assert (config.steps, config.eval_period, config.learning_rates) == (
        1000, 100, (1e-5, 2e-5, 5e-5)
    )  # fmt: skip
    assert (config.batch_sizes, config.seeds) == ((2, 4, 8), (13, 21, 42, 87, 100))
