"""config.gin can be read back and distinguishes runs."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from moe_jax.core.errors import UserError
from moe_jax.runs import directory, gin_files, train_loop
from moe_jax.runs.config import Config
from moe_jax.runs.configurables import build

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
    gin_files.parse(files, lines, [])
    return build(Config)


def test_what_a_run_writes_gives_the_same_configuration(tmp_path):
    written = configs(*SETTINGS)
    directory.write_config(tmp_path, written)
    assert configs(files=[str(tmp_path / "config.gin")]) == written
    assert directory.read_config(tmp_path) == written
    # Every field is written, so that a later change of defaults has no effect.
    text = (tmp_path / "config.gin").read_text()
    for part in dataclasses.fields(written):
        config = getattr(written, part.name)
        for field in dataclasses.fields(config):
            name = f"{type(config).__name__}.{field.name}"
            if name != "DataConfig.vocabulary":  # whose own fields are there
                assert f"{name} = " in text or name in directory._MACROS


def test_a_run_goes_on_under_its_own_configuration(tmp_path):
    directory.check_config(tmp_path, configs(*SETTINGS))  # nothing there yet
    directory.write_config(tmp_path, configs(*SETTINGS))
    directory.check_config(tmp_path, configs(*SETTINGS))
    free = ["CACHE_DIR = '/other'", "EVAL_PERIOD = 3", "CHECKPOINT_PERIOD = 4",
            "RunConfig.keep_checkpoints = 3", "MeshConfig.fsdp = 2", "TRAIN_STEPS = 8",
            "BATCH_SIZE = 8", "StepConfig.groups_at_once = 2", "RunConfig.log_period = 1",
            "INITIAL_CHECKPOINT_PATH = 'moved'", "RunConfig.representations_path = 'moved.npz'",
            "ModelConfig.kept_activations = 'inputs'", "ModelConfig.attention_rows = 1",
            "ModelConfig.dtype = 'bfloat16'"]  # fmt: skip
    before = directory.check_config(tmp_path, configs(*SETTINGS, *free))
    assert before["RunConfig.train_steps"] == 7
    directory.check_config(tmp_path, configs(*SETTINGS, "ModelConfig.attention = 'fused'"))


def test_runs_that_call_the_built_in_tasks_by_their_former_names(tmp_path):
    full = "TASK_MODULES = ('moe_jax.builtin_tasks.skills_gym', 'mine')"
    former = "TASK_MODULES = ('tasks.skills_gym', 'mine')"
    assert configs(*SETTINGS, former) == configs(*SETTINGS, full)
    directory.write_config(tmp_path, configs(*SETTINGS, full))
    path = tmp_path / directory.CONFIG_JSON
    path.write_text(path.read_text().replace("moe_jax.builtin_tasks.", "tasks."))
    directory.check_config(tmp_path, configs(*SETTINGS, full))


@pytest.mark.parametrize(("line", "message"), [
    ("DataConfig.rows_per_group = 8", r"there DataConfig.rows_per_group is 4, here 8 "
     r"\(the examples to come would be others\)"),
    ("MIXTURE_OR_TASK_NAME = 'b'", "there MIXTURE_OR_TASK_NAME is 'a_mixture', here 'b'"),
    ("VocabularyConfig.extra_ids = 8", "VocabularyConfig.extra_ids is 9, here 8"),
    ("ModelConfig.experts = 3", "ModelConfig.experts is 1, here 3"),
    ("RouterConfig.temperature = 0.5", "RouterConfig.temperature is 1.0, here 0.5"),
    ("OptimizerConfig.frozen = ()", r"OptimizerConfig.frozen is \('router',\), here \(\)"),
    ("StepConfig.label_smoothing = 0.2", "StepConfig.label_smoothing is 0.1, here 0.2"),
    ("SEED = 1", "SEED is 0, here 1"),
])  # fmt: skip
def test_another_configurations_run_is_refused(line, message, tmp_path):
    directory.write_config(tmp_path, configs(*SETTINGS))
    with pytest.raises(UserError, match=f"{tmp_path} holds another run: there .*{message[6:]}"):
        directory.check_config(tmp_path, configs(*SETTINGS, line))


def test_a_setting_newer_than_the_run_had_its_default(tmp_path):
    directory.write_config(tmp_path, configs(*SETTINGS))
    path = tmp_path / directory.CONFIG_JSON
    lines = json.loads(path.read_text())
    for newer in ("DataConfig.row_shapes", "OptimizerConfig.lazy", "VocabularyConfig.size"):
        del lines[newer]
    path.write_text(json.dumps(lines))
    directory.check_config(tmp_path, configs(*SETTINGS))
    with pytest.raises(UserError, match=r"there DataConfig\.row_shapes is 1, here 3"):
        directory.check_config(tmp_path, configs(*SETTINGS, "DataConfig.row_shapes = 3"))


def test_the_task_table_keeps_its_order(tmp_path):
    directory.write_task_table(tmp_path, ["b", "a", "c"])
    assert directory.read_task_table(tmp_path) == ["b", "a", "c"]
    with pytest.raises(UserError, match="cannot read"):
        directory.read_task_table(tmp_path / "nowhere")


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no run: it has no config.json"):
        directory.read_config(tmp_path)
    with pytest.raises(UserError, match="absent holds no run: there is no such directory"):
        directory.read_config(tmp_path / "absent")


@pytest.mark.parametrize(("tasks", "data", "what"), [
    (["a", "b", "c"], "1", "task 'c' is new"),
    (["a"], "1", "task 'b' is gone"),
    (["b", "a"], "1", "its tasks have another order"),
    (["a", "b"], "2", "its examples, rates or vocabulary changed"),
])  # fmt: skip
def test_what_changed_in_the_data_of_a_run_is_said(tasks, data, what):
    meta = {"tasks": ["a", "b"], "data": "1"}
    train_loop._check_data(meta, ["a", "b"], SimpleNamespace(name="mine", fingerprint="1"), "run")
    with pytest.raises(UserError, match=f"^mine is not as it was .* run was trained.*: {what};"):
        train_loop._check_data(meta, tasks, SimpleNamespace(name="mine", fingerprint=data), "run")
