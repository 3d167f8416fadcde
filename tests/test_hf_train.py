"""A `transformers` model trained here and written per task gives the same texts on both sides."""

import json
from pathlib import Path

import pytest
from toy_run import SETTINGS, finish, flags_of, start

from moe_jax.interop.hf_read import from_hf
from moe_jax.interop.hf_write import to_hf

DATA = Path(__file__).with_name("data") / "hf"
TASKS = ["toy_copy", "toy_reverse", "toy_sum"]
MIXTURE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import seqio, toy_tasks
seqio.MixtureRegistry.add("toy_all", {TASKS}, default_rate=1.0)
"""
LENGTHS = {"inputs": 64, "targets": 20}
SHORTEST = 8


@pytest.mark.parametrize(
    "name", ["bart", *(pytest.param(t5, marks=pytest.mark.slow) for t5 in ("t5", "t5_1_0", "mt5"))]
)
def test_trained_here_served_there(name, tmp_path):
    """50 steps with two experts and one vanilla layer; greedy, through both tokenizers."""
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import hf_models
    import torch

    source = tmp_path / "source"
    if name == "bart":
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        model = hf_models.bart(max_position_embeddings=80, **sizes)
        hf_models.save(model, source, (DATA / "bart" / "tokenizer.json").read_text())
    else:
        model = hf_models.MODELS[name](d_model=32, d_kv=16, d_ff=64)
        model.save_pretrained(source)
        for file in ("spiece.model", "tokenizer_config.json"):
            (source / file).write_bytes((DATA / name / file).read_bytes())
    from_hf(str(source), tmp_path / "ours")

    (tmp_path / "three.py").write_text(MIXTURE)
    settings = {k: v for k, v in SETTINGS.items() if not k.startswith(("Model", "Vocab"))}
    settings |= {
        "MIXTURE_OR_TASK_NAME": "toy_all",
        "TASK_MODULES": (str(tmp_path / "three.py"),),
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "MODEL_DIR": str(tmp_path / "run"),
        "CACHE_DIR": str(tmp_path / "cache"),
        "INITIAL_CHECKPOINT_PATH": str(tmp_path / "ours"),
        "TRAIN_STEPS": 50,
        "OptimizerConfig.learning_rate": 1e-3,
        "RouterConfig.selection": "argmax",
        "RouterConfig.experts_per_layer": 1,
        "ModelConfig.experts": 2,
        "ModelConfig.encoder_vanilla_layers": (0,),
    }
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    finish(start("train", [f"--gin_file={tmp_path / 'ours' / 'config.gin'}", *flags_of(lines)]))
    # After such short training answers may be empty, so both must decode at least a few tokens.
    finish(start("eval", [
        f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.eval.examples=6",
        f"--gin.DecodingConfig.min_length={SHORTEST}",
    ]))  # fmt: skip

    rows = (tmp_path / "run" / "eval" / "toy_all_test" / "predictions.jsonl").read_text()
    rows = [json.loads(line) for line in rows.splitlines()]
    assert {row["task"] for row in rows} == set(TASKS)
    assert any(row["prediction"] for row in rows)
    for task in TASKS:
        to_hf(tmp_path / "run", tmp_path / task, task)
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / task)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / task)
        for row in (row for row in rows if row["task"] == task):
            ids = torch.tensor([tokenizer(row["input"]).input_ids])
            out = theirs.generate(
                ids, max_new_tokens=LENGTHS["targets"], min_new_tokens=SHORTEST, num_beams=1
            )[0]
            text = tokenizer.decode(out, skip_special_tokens=True)
            assert text.strip() == row["prediction"]
