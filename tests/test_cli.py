"""Flags and gin: what wins, and that bad input ends in one clear line."""

import dataclasses
import importlib
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
from toy_run import bindings, flags_of, start

from moe_jax.core.errors import UserError
from moe_jax.core.processes import lock
from moe_jax.model.config import ModelConfig
from moe_jax.runs import configurables, gin_files, help
from moe_jax.runs.config import BASE_BINDINGS, Config, DataConfig, FewShotConfig, RunConfig
from moe_jax.runs.configurables import build
from moe_jax.training.optimizer import OptimizerConfig

PROGRAMS = ("prepare", "train", "eval", "infer", "finetune")


def parse(*lines, files=(), paths=()):
    gin_files.parse(files, lines, [*map(str, paths), str(gin_files.GIN_CONFIGS)])


# ------------------------------------------------------------------------------ good input


def test_later_ones_win(tmp_path):
    (tmp_path / "a.gin").write_text("TRAIN_STEPS = 1\nBATCH_SIZE = 8\nSEED = 3\n")
    (tmp_path / "b.gin").write_text("BATCH_SIZE = 16\nSEED = 4\n")
    parse("SEED = 5", "TASK_FEATURE_LENGTHS = {'inputs': 4, 'targets': 4}",
          files=["a.gin", "b.gin"], paths=[tmp_path])  # fmt: skip
    run, data = build(RunConfig), build(DataConfig)
    assert (run.train_steps, data.batch_size, run.seed) == (1, 16, 5)


def test_values_need_no_quotes():
    arguments = ["train", "--gin.MODEL_DIR=/a/b c", "--gin.SEED=3", "--gin.A.b='x'", "--gin_file=f"]
    assert gin_files.rewrite_flags(arguments) == [
        "train",
        "--gin_bindings=MODEL_DIR = '/a/b c'",
        "--gin_bindings=SEED = 3",
        "--gin_bindings=A.b = 'x'",
        "--gin_file=f",
    ]
    parse("MODEL_DIR = '/a/b c'")
    assert build(RunConfig).model_dir == "/a/b c"


@pytest.mark.parametrize(
    "path", sorted(gin_files.GIN_CONFIGS.glob("[mr]*/*.gin")), ids=lambda p: p.stem
)
def test_every_gin_file_parses(path):
    parse("TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 16}", files=[str(path)])
    assert build(Config) and build(FewShotConfig)


def test_gin_files_that_import_built_in_tasks_by_their_former_name(tmp_path, monkeypatch):
    (tmp_path / "tasks.py").write_text("raise RuntimeError('imported the wrong tasks')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.gin").write_text(
        "import tasks.crossfit_data\ncrossfit.data_dir = '/gym'\n"
        "DataConfig.environment = @crossfit()\n"
        "TASK_FEATURE_LENGTHS = {'inputs': 4, 'targets': 4}\n"
    )
    parse(files=["a.gin"], paths=[tmp_path])
    assert build(DataConfig).environment == {"CROSSFIT_DIR": "/gym"}


@pytest.mark.parametrize("value", [
    "['{0}', '{1}']", "('{0}', '{1}')  # two", "(\n    '{0}',  # one\n    '{1}',\n)",
    "[\n    '{0}',\n    '{1}']",
])  # fmt: skip
def test_extensions_of_one_line_or_many(value, tmp_path):
    names = [tmp_path / f"{name}.py" for name in "ab"]
    for name in names:
        name.write_text("")
    text = f"EXTENSIONS = ('none.py',)\nEXTENSIONS = {value.format(*names)}\nSEED = 3\n"
    (tmp_path / "a.gin").write_text(text)
    parse(files=["a.gin"], paths=[tmp_path])
    run = build(RunConfig)
    assert list(run.extensions) == [str(name) for name in names]
    assert run.seed == 3


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("lines", "message"), [
    (["SEED = 1", "TRAIN_STEP = 3"], "^--gin.TRAIN_STEP: nothing reads the macro 'TRAIN_STEP'; did "
                                     "you mean 'TRAIN_STEPS'"),
    (["learning_rate = 3"], "nothing reads the macro 'learning_rate'; did you mean "
                            r"'OptimizerConfig.learning_rate'\?"),
    (["train_steps = 3"], r"'train_steps'; did you mean 'TRAIN_STEPS'\?"),
    (["SEED = 1", "ModelConfg.d_model = 3"], "^--gin.ModelConfg.d_model: No configurable matching "
                                             "'ModelConfg'; did you mean 'ModelConfig'"),
    (["ModelConfig.d_modle = 3"], "doesn't have a parameter named 'd_modle'; did you mean "
                                  "'d_model'"),
    (["SEED = = 3"], "^--gin.SEED: Unable to parse value$"),
    (["TASK_FEATURE_LENGTHS = {inputs: 64, targets: 8}"], "^--gin.TASK_FEATURE_LENGTHS: .*quotes"),
    (["ModelConfig.experts = true"], "^--gin.ModelConfig.experts: .*True"),
    (["SEED = %SEEDS"], "the macro 'SEEDS' is read but not set; did you mean 'SEED'"),
])  # fmt: skip
def test_names_that_nothing_knows(lines, message):
    with pytest.raises(UserError, match=message) as error:
        parse(*lines)
        build(RunConfig)
    assert "\n" not in str(error.value)


def test_a_bad_line_of_a_file_is_named(tmp_path):
    (tmp_path / "a.gin").write_text("SEED = 1\nModelConfig.experts 3\n")
    with pytest.raises(UserError, match=r"a\.gin:2: "):
        parse(files=["a.gin"], paths=[tmp_path])
    (tmp_path / "open.gin").write_text("SEED = 1\nModelConfig.experts = (3,\n")
    with pytest.raises(UserError, match=r"open\.gin:[12]: a bracket is not closed$"):
        parse(files=["open.gin"], paths=[tmp_path])
    # Also where another file is included before the line, or a line of that one is bad.
    for line, message in {
        "TRAIN_STEP = 1": "nothing reads the macro 'TRAIN_STEP'",
        "ModelConfg.experts = 1": "No configurable matching 'ModelConfg'",
        "ModelConfig.expers = 1": "Configurable 'ModelConfig' doesn't have a parameter",
        "import no_such_module": "No module named 'no_such_module'",
    }.items():
        (tmp_path / "bad.gin").write_text(f"# one\n{line}\n")
        for name, text in (("b", f"SEED = 1\ninclude 'a_good.gin'\n{line}\n"),
                           ("c", "SEED = 1\ninclude 'bad.gin'\n")):  # fmt: skip
            (tmp_path / "a_good.gin").write_text("SEED = 2\nBATCH_SIZE = 8\n")
            (tmp_path / f"{name}.gin").write_text(text)
            place = r"b\.gin:3" if name == "b" else r"bad\.gin:2"
            with pytest.raises(UserError, match=f"{place}: {message}"):
                parse(files=[f"{name}.gin"], paths=[tmp_path])


def test_a_missing_file_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"no gin file 'models/tiney.gin'.*'models/tiny.gin'"):
        parse(files=["models/tiney.gin"])


@pytest.mark.parametrize(("config", "line", "message"), [
    (DataConfig, "TASK_FEATURE_LENGTHS = 5", "DataConfig.lengths is 5; it is .*int from 2"),
    (DataConfig, "TASK_FEATURE_LENGTHS = {'inputs': 8}", "of 2 values"),
    (DataConfig, "TASK_FEATURE_LENGTHS = {'inputs': 8, 'target': 8}", "inputs, targets"),
    (DataConfig, "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 0}", "int from 2"),
    (DataConfig, "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': '8'}", "int from 2"),
    (DataConfig, "BATCH_SIZE = 30", "BATCH_SIZE 30 is not a multiple of .*rows_per_group 4"),
    (DataConfig, "BATCH_SIZE = 0", "DataConfig.batch_size is 0; it is int from 1"),
    (DataConfig, "DataConfig.mixing = 'exampels'", "did you mean 'examples'"),
    (RunConfig, "TRAIN_STEPS = 'many'", "RunConfig.train_steps is 'many'; it is int"),
    (RunConfig, "TRAIN_STEPS = 0", "RunConfig.train_steps is 0; it is int from 1"),
    (RunConfig, "CHECKPOINT_PERIOD = 0", "RunConfig.checkpoint_period is 0; it is int from 1"),
    (RunConfig, "EVAL_MIXTURES = 'some'", r"is 'some'; it is list .*; did you mean \('some',\)\?"),
    (ModelConfig, "ModelConfig.architecture = 'brat'", "t5_1_0, mt5; did you mean 'bart'"),
    (ModelConfig, "ModelConfig.d_model = 16.0", "ModelConfig.d_model is 16.0; it is int"),
    (ModelConfig, "ModelConfig.tie_embeddings = 'no'", "it is True or False or None"),
    (ModelConfig, "ModelConfig.heads = 7", "not a multiple of heads 7"),
    (ModelConfig, "ModelConfig.encoder_vanilla_layers = (9,)", "has layers 0 to 5"),
    (ModelConfig, "ModelConfig.experts = 0", "it is int from 1"),
    (OptimizerConfig, "OptimizerConfig.learning_rate = '1e-3x'", "it is float"),
    (OptimizerConfig, "OptimizerConfig.frozen = ('backbone', 'routers')",
     "frozen is .'backbone', 'routers'.; .*did you mean 'router'"),
])  # fmt: skip
def test_values_that_cannot_be(config, line, message):
    lengths = "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}"
    parse(lengths, line)
    with pytest.raises(UserError, match=message):
        build(config)


def test_what_is_not_set_is_named():
    parse()
    with pytest.raises(UserError, match=r"MODEL_DIR is not set: give --gin.MODEL_DIR=\.\.\."):
        build(RunConfig).require("model_dir")
    assert "MODEL_DIR = None" in BASE_BINDINGS


@pytest.mark.parametrize(("value", "shown"), [
    ("2026", "2026"), ("('a',)", r"\('a',\)"), ("''", "''"), (r"'runs/a\r'", r"'runs/a\\r'"),
])  # fmt: skip
def test_the_directory_of_a_run_is_a_path(value, shown):
    with pytest.raises(UserError, match=f"^MODEL_DIR is {shown}; it is str of ") as error:
        gin_files.parse([], [f"MODEL_DIR = {value}"], [], from_model_dir=True)
    assert ("""keeps its quotes in the shell: "'2026'\"""" in str(error.value)) == (value == "2026")


def one_error_line(code: int, _: str, err: str) -> str:
    assert code == 1, err[-2000:]
    assert "Traceback" not in err, err[-2000:]
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: "), err[-2000:]
    return last


def line_of(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    return one_error_line(process.returncode, out, err)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_ends_bad_input_in_one_line(program):
    line = one_error_line(*forked.run(program, ["--gin_file=missing.gin"]))
    assert line.startswith("error: no gin file 'missing.gin'")


@pytest.mark.parametrize(("flag", "message"), [
    ("--train_steps=5", "there is no flag --train_steps; did you mean '--gin.TRAIN_STEPS'?"),
    ("--dtype=bfloat16", "there is no flag --dtype; did you mean '--gin.ModelConfig.dtype'?"),
    ("--gin_fle=x", "there is no flag --gin_fle; did you mean '--gin_file' or"),
    ("--gin.TRAIN_STEPS", "--gin.TRAIN_STEPS has no value: give --gin.TRAIN_STEPS=VALUE"),
    ("--process_index=x", "flag --process_index=x: invalid literal"),
    ("--process_count=2", "--process_count is for --multiprocess_gpu, which is not given"),
])  # fmt: skip
def test_a_bad_flag(flag, message):
    assert one_error_line(*forked.run("train", [flag])).startswith(f"error: {message}")


def test_bad_settings_that_the_data_or_files_show(tmp_path):
    (tmp_path / "file").write_text("")
    lines = flags_of(bindings(tmp_path / "run", EVAL_PERIOD=5, RunConfig__eval_split="dev"))
    assert "EVAL_PERIOD=0 trains without" in one_error_line(*forked.run("train", lines))
    lines = flags_of(bindings(tmp_path / "file", TRAIN_STEPS=1))
    line = one_error_line(*forked.run("train", lines))
    assert f"{tmp_path / 'file'} is a file, not a dir" in line
    lines = flags_of(bindings(tmp_path / "run", MIXTURE_OR_TASK_NAME="toy_trian"))
    assert "'toy_trian'" in (line := line_of(start("train", lines))) and "'toy_train'" in line


def test_a_directory_in_which_another_process_works(tmp_path):
    names = ("train", "finetune", "experiment")
    settings = {
        "finetune": {"DENSE_DIR": "x"},
        "experiment": {
            f"experiment.{name}": name
            for name in ("model", "dense", "stage1", "stage2", "finetune", "unseen")
        },
    }
    in_use = f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}"

    def line(name: str) -> str:
        lines = flags_of(bindings(tmp_path, **settings.get(name, {})))
        return one_error_line(*forked.run(name, lines))

    # Each waits for a while.
    with lock(tmp_path), ThreadPoolExecutor() as pool:
        assert all(in_use in said for said in pool.map(line, names))


FAILING = """
import jax.numpy as jnp
from moe_jax.runs import flags
from moe_jax.runs.config import RunConfig


def main(run):
    {fails}


flags.run(main, RunConfig)
"""


def test_a_device_whose_memory_is_too_small_is_one_line():
    """More bytes than a process can address."""
    line = line_of(start("", [], code=FAILING.format(fails="jnp.zeros(1 << 60, jnp.int8)")))
    assert line.startswith("error: out of device memory (RESOURCE_EXHAUSTED: ")
    assert "StepConfig.groups_at_once=1" in line and "`moe_jax plan`" in line


# ------------------------------------------------------------------------------ help

COMMANDS = {
    "prepare": ["prepare.mixtures", "DataConfig.batch_size"],
    "train": ["ModelConfig.experts", "RunConfig.seed", "DecodingConfig.num_beams"],
    "eval": ["eval.split"],
    "infer": ["infer.task"],
    "finetune": ["FinetuneConfig.tune"],
    "represent": ["represent.kind"],
    "experiment": ["experiment.model"],
    "plan": ["--topology", "MeshConfig.fsdp"],
}


def configuration_classes():
    """Every dataclass that gin can bind, those of the commands included."""
    for command in COMMANDS:
        importlib.import_module(f"moe_jax.{command}")
    return configurables.CLASSES


def test_every_setting_is_documented():
    for name, cls in configuration_classes().items():
        for field in dataclasses.fields(cls):
            assert field.name in help.field_docs(cls), f"{name}.{field.name} has no documentation"
    macros = set(re.findall(r"^([A-Z_]+) = ", BASE_BINDINGS, re.MULTILINE))
    assert set(help.MACROS) == macros


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_settings_and_ends_well(command):
    code, out, err = forked.run(command, ["--help"])
    assert code == 0, err[-2000:]
    for setting in [*COMMANDS[command], "--gin.MODEL_DIR", "--gin_file"]:
        assert setting in out
    # What is given most comes first.
    order = ["\nMacros", "BATCH_SIZE", "(default: 32)", "\nFlags", "\n  --gin_file\n",
             "\n  --compilation_cache_dir\n", "\nSettings"]  # fmt: skip
    assert sorted(order, key=out.index) == order
    # Commands are shown as a shell takes them.
    example = out[: out.index("\n\n", out.index("    "))]
    assert all(line.endswith("\\") for line in re.findall(r".+(?=\n {8})", example)), example


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_arguments_says_what_it_needs(command):
    one_error_line(*forked.run(command, []))


# ------------------------------------------------------------------------------ values and files


@pytest.mark.parametrize("value", [
    "7b-moe", "2024-06-01/run", "3.5/run", "None/x", "100%", "a=b", "it's", "путь/к", "x y",
    "@home",
])  # fmt: skip
def test_a_plain_string_needs_no_quotes(value):
    (flag,) = gin_files.rewrite_flags([f"--gin.MODEL_DIR={value}"])
    if value == "@home":  # a reference, as in gin; quotes make it a string
        (flag,) = gin_files.rewrite_flags(["--gin.MODEL_DIR='@home'"])
    parse(flag.partition("=")[2])
    assert build(RunConfig).model_dir == value


def test_included_files_are_found_and_their_macros_read(tmp_path):
    (tmp_path / "base.gin").write_text("MINE = 3\nRunConfig.log_period = %MINE\n")
    (tmp_path / "run.gin").write_text(
        "include 'base.gin'\ninclude 'models/tiny.gin'\nMINE = 4\nSEED = 2\n"
    )
    parse(files=["run.gin"], paths=[tmp_path])
    assert build(RunConfig).log_period == 4 and build(RunConfig).seed == 2
    assert build(ModelConfig).d_model == 64
    (tmp_path / "bad.gin").write_text("include 'models/tiney.gin'\n")
    with pytest.raises(UserError, match=r"bad\.gin:1: include: no gin file 'models/tiney.gin'"):
        parse(files=["bad.gin"], paths=[tmp_path])
    (tmp_path / "self.gin").write_text("include 'self.gin'\n")
    with pytest.raises(UserError, match=r"self\.gin includes itself"):
        parse(files=["self.gin"], paths=[tmp_path])


def test_a_gpu_that_jax_does_not_use_is_said():
    script = (
        "import jax\n"
        "from jax._src import hardware_utils\n"
        "from moe_jax.runs import flags\n"
        "from moe_jax.runs.config import Config\n"
        "hardware_utils.has_visible_nvidia_gpu = lambda: True\n"
        "flags.run(lambda config: print(jax.devices()), Config)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("JAX_PLATFORMS", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Cpu" in done.stdout
    assert "CUDA" in done.stderr
