"""Every benchmark runs, prints its table and writes its documented ratios."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.model.config import ModelConfig
from moe_jax.runs import gin_files
from moe_jax.runs.configurables import build

ROOT = Path(__file__).resolve().parent.parent
RATIOS = {
    "routing": {"routed_to_dense_E3", "routed_to_dense_E24", "routed_to_all_experts_E3"},
    "decoding": {"greedy_to_torch", "beam4_to_torch", "mixed_to_single"},
    "training": {
        "dense_to_torch", "all_experts_to_torch", "tokens_per_s_to_torch_all_experts",
        "padding_share", "padding_share_unpacked", "pipeline_to_repeated_batch",
    },
    "gpu": {
        "mfu_bart_base", "mfu_bart_large", "routed_to_dense_E3", "routed_to_dense_E24",
        "routed_to_dense_E24_4_groups", "cublas_to_all_bart_large", "fused_to_plain_attention",
        "fused_to_plain_error", "side_by_side_to_loop_tiny", "tiny_step_ms", "gib_1_rows",
        "compile_s_bart_base", "mfu_bart_large_unrolled",
    },
    "groups": {"side_by_side_to_loop_D32_T88_G2"},
    "memory": {"memory_E3_to_dense"},
    "fewshot": {"side_by_side_to_loop_E1", "side_by_side_to_loop_E3"},
    "residuals": {"residual_bytes_per_token_per_d", "decoder_residual_bytes_per_token_per_d"},
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_benchmark_can_be_imported(path):
    if path.stem == "torch_models":
        pytest.importorskip("torch")
    importlib.import_module(f"benchmarks.{path.stem}")


def test_the_gpu_benchmark_has_the_settings_of_the_gin_file():
    from benchmarks.gpu import FAST

    gin_files.parse(["devices/gpu.gin"], [], [str(gin_files.GIN_CONFIGS)])
    assert build(ModelConfig) == ModelConfig(**FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", RATIOS)
def test_benchmark(name, request, tmp_path):
    flags = ["--tiny", "--rounds=1", f"--json={tmp_path / 'result.json'}"]
    if name in ("decoding", "training"):
        pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    if name == "training":
        gym = request.getfixturevalue("gym")
        flags += [f"--crossfit_dir={gym / 'crossfit'}", f"--cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert RATIOS[name] <= result["ratios"].keys()
    assert all(value > 0 for value in result["ratios"].values())
    for ratio in result["ratios"]:
        assert ratio in done.stdout
