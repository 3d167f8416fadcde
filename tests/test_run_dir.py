"""config.gin: what is written can be read back, and tells one run from another."""

import dataclasses

import pytest

from moe_jax.core.errors import UserError
from moe_jax.runs import directory as run_dir
from moe_jax.runs import flags as cli
from moe_jax.runs.configurables import RUN_CONFIGS

SETTINGS = [
    "MODEL_DIR = '/somewhere'",
    "MIXTURE_OR_TASK_NAME = 'a_mixture'",
    "TASK_MODULES = ('my tasks.py',)",
    "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 4}",
    "TRAIN_STEPS = 7",
    "DataConfig.environment = {'NAME': 'it\\'s \"quoted\" = %here'}",
    "VocabularyConfig.kind = 'bytes'",
    "VocabularyConfig.extra_ids = 9",
    "DataConfig.vocabulary = @VocabularyConfig()",
    "ModelConfig.encoder_vanilla_layers = (0, 2)",
    "OptimizerConfig.frozen = ('router',)",
    "OptimizerConfig.learning_rate = 3e-05",
    "RouterConfig.selection = 'gumbel_softmax_st'",
]


def configs(*lines, files=()):
    cli.parse_gin(files, lines, [])
    by_name = {c.__name__: c for c in RUN_CONFIGS}
    del by_name["VocabularyConfig"]  # within DataConfig
    return [c() for c in by_name.values()]


def test_what_a_run_writes_gives_the_same_configuration(tmp_path):
    written = configs(*SETTINGS)
    run_dir.write_config(tmp_path, written)
    assert configs(files=[str(tmp_path / "config.gin")]) == written
    read = run_dir.read_config(tmp_path)
    for config in written:
        assert read[type(config).__name__] == config
    # Every field is there, so that another default later changes nothing.
    text = (tmp_path / "config.gin").read_text()
    for config in written:
        for field in dataclasses.fields(config):
            name = f"{type(config).__name__}.{field.name}"
            assert f"{name} = " in text or name in run_dir._MACROS


def test_a_run_goes_on_under_its_own_configuration(tmp_path):
    run_dir.check_config(tmp_path, configs(*SETTINGS))  # nothing there yet
    run_dir.write_config(tmp_path, configs(*SETTINGS))
    run_dir.check_config(tmp_path, configs(*SETTINGS))
    free = ["CACHE_DIR = '/other'", "EVAL_PERIOD = 3", "CHECKPOINT_PERIOD = 4",
            "RunConfig.keep_checkpoints = 2", "MeshConfig.fsdp = 2"]  # fmt: skip
    run_dir.check_config(tmp_path, configs(*SETTINGS, *free))


@pytest.mark.parametrize(("line", "message"), [
    ("TRAIN_STEPS = 8", "there TRAIN_STEPS is 7, here 8"),
    ("MIXTURE_OR_TASK_NAME = 'b'", "there MIXTURE_OR_TASK_NAME is 'a_mixture', here 'b'"),
    ("VocabularyConfig.extra_ids = 8", "VocabularyConfig.extra_ids is 9, here 8"),
    ("ModelConfig.experts = 3", "ModelConfig.experts is 1, here 3"),
    ("RouterConfig.temperature = 0.5", "RouterConfig.temperature is 1.0, here 0.5"),
    ("OptimizerConfig.frozen = ()", r"OptimizerConfig.frozen is \('router',\), here \(\)"),
    ("StepConfig.label_smoothing = 0.2", "StepConfig.label_smoothing is 0.1, here 0.2"),
    ("SEED = 1", "SEED is 0, here 1"),
])  # fmt: skip
def test_another_configurations_run_is_refused(line, message, tmp_path):
    run_dir.write_config(tmp_path, configs(*SETTINGS))
    with pytest.raises(UserError, match=f"{tmp_path} holds another run: there .*{message[6:]}"):
        run_dir.check_config(tmp_path, configs(*SETTINGS, line))


def test_a_setting_newer_than_the_run_had_its_default(tmp_path):
    run_dir.write_config(tmp_path, configs(*SETTINGS))
    path = tmp_path / "config.gin"
    newer = ("DataConfig.row_shapes", "OptimizerConfig.lazy", "VocabularyConfig.size")
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(newer)]
    assert len(kept) == len(lines) - len(newer)
    path.write_text("".join(kept))
    run_dir.check_config(tmp_path, configs(*SETTINGS))
    with pytest.raises(UserError, match=r"there DataConfig\.row_shapes is 1, here 3"):
        run_dir.check_config(tmp_path, configs(*SETTINGS, "DataConfig.row_shapes = 3"))


def test_the_task_table_keeps_its_order(tmp_path):
    run_dir.write_task_table(tmp_path, ["b", "a", "c"])
    assert run_dir.read_task_table(tmp_path) == ["b", "a", "c"]
    with pytest.raises(UserError, match="cannot read"):
        run_dir.read_task_table(tmp_path / "nowhere")


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no run"):
        run_dir.read_config(tmp_path)
