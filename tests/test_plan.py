"""`plan`: the needs of a step, advice if it does not fit, and the command."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from jax.experimental import topologies
from toy_run import tiny_model

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.planning import step_plan
from moe_jax.planning.chips import CHIPS, FRACTIONS, chip_of
from moe_jax.planning.devices import plan_devices
from moe_jax.planning.report import advice, table
from moe_jax.planning.step_plan import BatchShape, Plan, plan_step
from moe_jax.planning.traffic import Collectives
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

SHAPE = BatchShape(groups=8, rows=2, inputs=16, targets=8)

# ------------------------------------------------------------------------------ a whole step


@functools.cache
def planned(mesh_config=MeshConfig(), count=8, **settings):  # noqa: B008
    model = tiny_model(**{"selection": "gumbel_softmax_st", "experts_per_layer": 1} | settings)
    mesh = make_mesh(mesh_config, jax.devices()[:count])
    return model, mesh, plan_step(model, OptimizerConfig(), StepConfig(), mesh, SHAPE)


def test_state_falls_with_devices():
    _, _, one = planned(count=1)
    _, _, eight = planned(MeshConfig(data=1, fsdp=8))
    assert one.state_bytes == pytest.approx(12 * one.parameters, rel=0.01)
    assert one.collectives == {}
    assert eight.state_bytes < one.state_bytes / 4
    assert eight.flops == pytest.approx(one.flops / 8, rel=0.1)
    assert eight.fits
    assert eight.collectives


def test_matrix_products_of_a_step():
    """6 operations for each parameter of a layer and token, 12 for those that mix positions."""
    _, _, plan = planned(count=1, experts=1)
    tokens = SHAPE.groups * SHAPE.rows * (SHAPE.inputs + SHAPE.targets)
    assert 2 * tokens * plan.parameters < plan.flops < 12 * tokens * plan.parameters


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_products_are_divided_among_the_devices_of_a_layer(attention):
    _, _, one = planned(count=1, attention=attention)
    _, _, two = planned(MeshConfig(data=1, model=2), 2, attention=attention)
    assert two.flops == pytest.approx(one.flops / 2, rel=0.01)


@pytest.fixture
def default_memory(monkeypatch):
    """Without what the developer's environment says of a GPU's memory."""
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)


def some_plan(**changes):
    fields = {
        "device": "TPU v5 lite", "devices": 8, "parameters": 10**9, "memory_bytes": 16 * 2**30,
        "state_bytes": 12 * 2**30, "unpadded_state_bytes": 12 * 2**30,
        "temporary_bytes": 2 * 2**30, "compiled": True, "collectives": {}, "flops": 1e12,
        "bytes_accessed": 10**10, "seconds": {"computing": 0.01, "memory": 0.02, "sending": 0.0},
        "operations": 100, "unknown_loops": 0,
    }  # fmt: skip
    return Plan(**fields | changes)


def test_whether_it_fits():
    assert some_plan().fits
    assert not some_plan(temporary_bytes=5 * 2**30).fits
    assert not some_plan(compiled=False).fits
    assert some_plan().least_seconds == 0.02
    assert some_plan(seconds={}).least_seconds is None
    assert "14.00 GiB  of 16.00 GiB: fits" in table(some_plan(), make_mesh(MeshConfig()))


@pytest.mark.parametrize(("memory", "mesh_config", "first"), [
    ("little", MeshConfig(data=8), "MeshConfig.data=1, MeshConfig.fsdp=8"),
    ("little", MeshConfig(data=1, fsdp=8), "OptimizerConfig.first_moment_dtype='bfloat16'"),
    ("more", MeshConfig(data=1, fsdp=8), "ModelConfig.kept_activations='products'"),
])  # fmt: skip
def test_advice_starts_with_what_takes_the_memory(memory, mesh_config, first):
    model, mesh, plan = planned(mesh_config)
    room = plan.state_bytes // 2 if memory == "little" else plan.total_bytes // 2
    plan = dataclasses.replace(plan, memory_bytes=room)
    lines = advice(plan, model, OptimizerConfig(), mesh, SHAPE)
    assert lines[0].startswith(first)
    if memory == "little":
        assert "MiB of state, not" in lines[0]


def test_a_step_that_the_compiler_refuses(monkeypatch):
    """The compiler's error gives the memory; other figures are unknown."""

    def refuse(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (31.02G) exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    _, _, plan = planned.__wrapped__()
    assert not plan.fits
    assert plan.temporary_bytes == int(31.02 * 2**30)
    assert plan.memory_bytes == int(15.75 * 2**30)
    assert plan.bytes_accessed is None


def test_another_error_of_the_compiler():
    with pytest.raises(UserError, match="the step does not compile: INTERNAL: oh"):
        step_plan._read_error("INTERNAL: oh\nmore")


def test_chips():
    class Device:
        platform = "tpu"

        def __init__(self, kind):
            self.device_kind = kind

    assert chip_of([Device("TPU v5 lite")]).flops == 197e12
    assert chip_of([Device("TPU v5")]).flops == 459e12
    assert chip_of([Device("TPU v9")]) is None
    assert all(chip.source for chip in CHIPS)
    assert chip_of(jax.devices()).memory_bytes > 0


class Gpu:
    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def __init__(self, process_index=0):
        self.process_index = process_index


def test_the_share_of_a_gpus_memory_that_jax_takes(monkeypatch, default_memory):
    whole = 84_942_979_072
    assert chip_of([Gpu()]).memory_bytes == whole * 3 // 4
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):  # new and old name
        monkeypatch.setenv(name, ".5")
        assert chip_of([Gpu()]).memory_bytes == whole // 2
        monkeypatch.setenv(name, "half")
        with pytest.raises(UserError, match=f"{name} is 'half'"):
            chip_of([Gpu()])
        monkeypatch.delenv(name)
    for name in FRACTIONS:
        monkeypatch.setenv(name, ".5")
    with pytest.raises(UserError, match="are both set"):
        chip_of([Gpu()])


def test_advice_to_take_more_of_a_gpus_memory(default_memory):
    """Where it is enough: 64 GiB are 81 % of an H100's memory, 72 GiB are 91 %."""
    model, mesh, _ = planned(MeshConfig(data=1, fsdp=8))
    plan = some_plan(device=Gpu.device_kind, memory_bytes=chip_of([Gpu()]).memory_bytes)
    for temporaries, helps in ((52, True), (60, False)):
        plan = dataclasses.replace(plan, temporary_bytes=temporaries * 2**30)
        lines = advice(plan, model, OptimizerConfig(), mesh, SHAPE)
        assert lines[0].startswith("XLA_CLIENT_MEM_FRACTION=0.9") == helps


def test_the_rate_between_hosts_is_not_known():
    assert chip_of([Gpu(), Gpu()]).link_rate == 450e9
    assert chip_of([Gpu(), Gpu(process_index=1)]).link_rate == 0
    sent = {"all-reduce": Collectives(1, 2**20, 2**20, 2**20)}
    plan = some_plan(collectives=sent, seconds={"computing": 0.01, "memory": 0.02})
    assert "1.00 MiB  the peak rate is not known" in table(plan, make_mesh(MeshConfig()))


# ------------------------------------------------------------------------------ the command


def command(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "moe_jax.plan", "--gin_file=models/tiny.gin",
         "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}", *arguments],
        capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, check=False,
    )  # fmt: skip
    assert "Traceback" not in result.stderr, result.stderr
    return result


VOCABULARY = "--gin.ModelConfig.vocabulary_size=512"


def test_the_command(tmp_path):
    path = tmp_path / "plan.json"
    result = command("--devices=8", VOCABULARY, "--gin.MeshConfig.fsdp=8", f"--json={path}")
    assert result.returncode == 0, result.stderr
    assert "compiling" in result.stderr
    assert "8 x cpu, mesh data=1, fsdp=8" in result.stdout
    actual = json.loads(path.read_text())
    assert {
        "fits", "memory_bytes", "state_bytes", "temporary_bytes", "collectives", "flops",
        "bytes_accessed", "least_seconds",
    } <= actual.keys()  # fmt: skip
    assert actual["fits"] is True
    for collective in actual["collectives"].values():
        assert collective.keys() == {"count", "bytes", "largest_bytes"}


def test_the_command_where_it_does_not_fit(tmp_path):
    path = tmp_path / "plan.json"
    result = command("--devices=2", "--gin.ModelConfig.vocabulary_size=2000000000",
                     f"--json={path}")  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert "What would help:\n- MeshConfig.data=1, MeshConfig.fsdp=2" in result.stdout
    assert json.loads(path.read_text())["fits"] is False


@pytest.mark.parametrize(("arguments", "message"), [
    (["--devices=8"], "ModelConfig.vocabulary_size is 0"),
    (
        ["--devices=8", VOCABULARY, "--gin.BATCH_SIZE=4"],
        "not a multiple of the mesh's 8 data shards",
    ),
])  # fmt: skip
def test_bad_input_ends_in_one_line(arguments, message):
    result = command(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_it_imports_no_tensorflow():
    code = (
        "import sys, moe_jax.plan; assert not {'tensorflow', 'seqio', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_which_devices():
    with pytest.raises(UserError, match="not both"):
        plan_devices("v5e:4x4", 8)
    with pytest.raises(UserError, match="--devices is 0"):
        plan_devices(None, 0)


@pytest.mark.parametrize(("name", "message"), [
    ("h10:8", "there is no 'h10'; did you mean 'h100'"),
    ("h100", "give the GPUs of one host, 1 to 8, such as h100:8"),
    ("h100:16", "and the GPUs of each, such as h100:2x8"),
    ("a100:0x8", "and the GPUs of each, such as a100:2x8"),
])  # fmt: skip
def test_names_of_topologies(name, message):
    result = command(f"--topology={name}", VOCABULARY)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_no_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[plan\]'"):
        plan_devices("v5e:4x4", None)


def test_no_plugin_for_cuda(monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[gpu\]'"):
        plan_devices("h100:8", None)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
def test_an_unknown_topology():
    result = command("--topology=v5e:3x5", VOCABULARY)
    assert result.returncode == 1
    assert "libtpu knows no topology 'v5e:3x5'; names are such as v5e:4x4" in result.stderr


@needs_libtpu
def test_a_topology(tmp_path):
    path = tmp_path / "plan.json"
    result = command(
        "--topology=v5e:2x2", VOCABULARY, "--gin.MeshConfig.fsdp=4", f"--json={path}",
        "--gin.ModelConfig.experts=3",
        "--gin.RouterConfig.selection=gumbel_softmax_st", "--gin.RouterConfig.experts_per_layer=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    actual = json.loads(path.read_text())
    assert actual["memory_bytes"] == int(15.75 * 2**30)
    # Every layer fetches its expert, forward and backward, in as many loops as there are layers.
    assert actual["collectives"]["all-to-all"]["count"] > 0
    assert actual["least_seconds"] > 0


needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's plugin for CUDA is not installed",
)


@needs_cuda
def test_gpus_that_do_not_exist(tmp_path, default_memory):
    """Weights are exchanged and gathered as between as many CPU devices."""
    plans = {}
    for where in ("--topology=h100:4", "--devices=4"):
        path = tmp_path / "plan.json"
        result = command(
            where, VOCABULARY, "--gin.MeshConfig.fsdp=4", f"--json={path}",
            "--gin.ModelConfig.experts=3", "--gin.RouterConfig.selection=gumbel_softmax_st",
            "--gin.RouterConfig.experts_per_layer=1",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        plans[where] = json.loads(path.read_text())
    gpus, cpus = plans.values()
    assert gpus["device"] == "NVIDIA H100 80GB HBM3"
    assert gpus["memory_bytes"] == 84_942_979_072 * 3 // 4
    assert gpus["state_bytes"] == cpus["state_bytes"]
    assert gpus["collectives"]["all-to-all"] == cpus["collectives"]["all-to-all"]
    for kind in ("all-gather", "reduce-scatter"):  # fewer and larger ones on GPUs
        expected = cpus["collectives"][kind]["bytes"]
        assert gpus["collectives"][kind]["bytes"] == pytest.approx(expected, rel=0.01)
    assert gpus["seconds"].keys() == {"computing", "memory", "sending"}
    assert gpus["unknown_loops"] == 0


@needs_cuda
def test_products_for_which_xla_has_no_tiles(tmp_path):
    """48 tokens by a width of 64: an error of the compiler, with Triton's products."""
    path = tmp_path / "plan.json"
    result = command(
        "--topology=h100:1", VOCABULARY, f"--json={path}", "--gin.ModelConfig.dtype=bfloat16",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 24}", "--gin.BATCH_SIZE=16",
        "--gin.DataConfig.rows_per_group=2", "--gin.StepConfig.groups_at_once=1",
        "--gin.ModelConfig.experts=4", "--gin.RouterConfig.selection=gumbel_softmax_st",
        "--gin.RouterConfig.experts_per_layer=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(path.read_text())["operations"] > 1000
