"""Conversion of weights: bit-exact round trips, refused models, memory."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax import convert
from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.interop import hf_directory as directory
from moe_jax.interop.hf_read import from_hf
from moe_jax.interop.hf_write import to_hf
from moe_jax.model.config import RouterConfig
from moe_jax.model.task_moe import TaskMoE, init_params, shapes_of
from moe_jax.runs.load import read_run
from moe_jax.training.shapes import fit_backbone, split_layers

DATA = Path(__file__).with_name("data") / "hf"
WEIGHTS = "model.safetensors"


def copy(name: str, out: Path, change=lambda tensors: tensors, **settings) -> Path:
    """The stored model `name` with changed tensors and config.json."""
    shutil.copytree(DATA / name, out)
    tensors = change(load_file(out / WEIGHTS))
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = files.read_json(out / "config.json") | settings
    files.write_json(out / "config.json", config)
    return out


# ---- there and back ----


def plain(tensors):
    return tensors


def without_prefix(tensors):
    """The layout in which `BartModel` is saved, with a copy of the embedding."""
    result = {k.removeprefix("model."): v for k, v in tensors.items() if k != "final_logits_bias"}
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return result | {name: result["shared.weight"].copy() for name in names}


def only_aliases(tensors):
    result = dict(tensors)
    result["lm_head.weight"] = result.pop("model.shared.weight")
    return result


def brain_floats(tensors):
    return {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}


def left_over(tensors):
    """The layout of early T5 files: an unused table; mixed dtypes."""
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    half = {k: v.astype(np.float16) if "wo" in k else v for k, v in tensors.items()}
    return half | {name: np.arange(16, dtype=np.float32).reshape(8, 2)}


@pytest.mark.parametrize(
    "name, change, sharded",
    [
        ("bart", plain, False),
        ("bart", without_prefix, True),
        ("bart", only_aliases, False),
        ("bart", brain_floats, True),
        ("t5", plain, True),
        ("t5", left_over, False),
        ("t5_1_0", plain, False),
        ("t5_1_0", left_over, True),
        ("mt5", brain_floats, True),
    ],
)
def test_there_and_back_is_bit_exact(name, change, sharded, tmp_path, monkeypatch):
    source = copy(name, tmp_path / "source", change)
    if sharded:
        tensors = load_file(source / WEIGHTS)
        (source / WEIGHTS).unlink()
        monkeypatch.setattr(directory, "SHARD_BYTES", 3_000)
        directory.write_weights(source, tensors.items())
        assert len(list(source.glob("model-*.safetensors"))) > 2
    from_hf(str(source), tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = directory.Weights(source), directory.Weights(tmp_path / "back")
    assert (before.shapes, before.dtypes) == (after.shapes, after.dtypes)
    for key in before.shapes:
        assert before.read(key).tobytes() == after.read(key).tobytes(), key
    for file in source.iterdir():
        if file.suffix not in (".safetensors", ".npz") and "index" not in file.name:
            kept = tmp_path / "back" / file.name
            assert file.name == "ids.json" or kept.read_bytes() == file.read_bytes()


def test_shards_are_complete(tmp_path, monkeypatch):
    """Every tensor is in the shard that the index names, as `transformers` requires."""
    monkeypatch.setattr(directory, "SHARD_BYTES", 10_000)
    tensors = load_file(DATA / "t5" / WEIGHTS)
    directory.write_weights(tmp_path, tensors.items())
    index = files.read_json(tmp_path / directory.INDEX)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for key, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[key], tensors[key])
    largest = max(p.stat().st_size for p in tmp_path.glob("model-*"))
    assert largest < 20_000
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="model-00002-of"):
        directory.Weights(tmp_path)


def test_every_expert_starts_from_the_converted_model(tmp_path):
    """With vanilla layers, which get the same weights without noise."""
    from_hf(str(DATA / "bart"), tmp_path / "ours")
    dense = read_run(str(tmp_path / "ours"), 0)
    config = dataclasses.replace(dense.model.config, experts=3, encoder_vanilla_layers=(0,))
    model = TaskMoE(config, RouterConfig(), 2)
    like = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    split = split_layers(dense.params["backbone"], config)
    like = nn.meta.unbox(like)["backbone"]
    filled = fit_backbone(split, like, 0.01, jax.random.key(0), "test")
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(lambda a: a.shape, like)
    kernel = dense.params["backbone"]["encoder"]["layers"]["routed"]["feed_forward"]["in_kernel"]
    layers = filled["encoder"]["layers"]
    np.testing.assert_array_equal(layers["vanilla"]["feed_forward"]["in_kernel"][0], kernel[0])
    noise = np.asarray(layers["routed"]["feed_forward"]["in_kernel"])[0] - kernel[1]
    assert noise.shape[0] == 3 and np.all(np.abs(noise.std((1, 2, 3)) - 0.01) < 0.002)
    assert np.abs(noise[0] - noise[1]).max() > 0.005


# ---- refusals ----


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    "name, change, settings, message",
    [
        ("bart", plain, {"model_type": "mbart"}, "model_type is 'mbart'"),
        ("bart", plain, {"scale_embedding": True}, "scale_embedding is True"),
        ("bart", plain, {"decoder_ffn_dim": 16}, "decoder_ffn_dim is 16"),
        ("t5", plain, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ("t5", plain, {"feed_forward_proj": "relu"}, "no decoder.*DenseReluDense.wi.weight"),
        ("mt5", plain, {"feed_forward_proj": "relu"}, "is 'relu'; only 'gated-gelu'"),
        ("t5", plain, {"scale_decoder_outputs": True}, "an output embedding of their own"),
        ("t5", plain, {"model_type": "m5"}, "did you mean 'mt5'"),
        ("t5", plain, {"num_heads": None}, "num_heads is missing"),
        ("bart", plain, {"d_model": 16}, "config.json says"),
        ("bart", plain, {"vocab_size": 200}, "config.json says"),
        ("t5", without("decoder.final_layer_norm.weight"), {}, "no decoder.final_layer_norm"),
        ("bart", without("model.shared.weight"), {}, "no shared.weight"),
        ("bart", lambda t: t | {"model.pooler.weight": np.ones(2)}, {}, "belongs to no BART"),
        ("bart", lambda t: t | {"final_logits_bias": np.ones((1, 272))}, {}, "is not zero"),
        (
            "bart",
            lambda t: t | {"model.encoder.embed_tokens.weight": t["model.shared.weight"] + 1},
            {},
            "differs from the shared embedding",
        ),
        ("bart", lambda t: t | {"model.shared.weight": np.ones((272, 8), np.int8)}, {}, "dtype I8"),
    ],
)
def test_other_models_are_refused_in_one_line(name, change, settings, message, tmp_path):
    source = copy(name, tmp_path / "source", change, **settings)
    with pytest.raises(UserError, match=message) as error:
        from_hf(str(source), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]  # no partial files


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "must be {name: value}"),
        ({}, 'must be {"weight_map": {tensor: file}}'),
        ({"weight_map": {"a": 3}}, 'must be {"weight_map": {tensor: file}}'),
        ({"weight_map": {"a": "../other.safetensors"}}, "has no '../other.safetensors'"),
        ({"weight_map": {"a": "x" * 5000}}, "has no 'xxx"),
    ],
)
def test_an_index_that_is_none(index, message, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "other.safetensors").touch()
    files.write_json(tmp_path / "hf" / directory.INDEX, index)
    with pytest.raises(UserError) as error:
        directory.Weights(tmp_path / "hf")
    assert message in str(error.value)


def test_command_line_errors_are_one_line(tmp_path, capsys):
    def fails(*argv) -> str:
        with pytest.raises(UserError) as error:
            convert.main([str(a) for a in argv])
        captured = capsys.readouterr()
        assert not [x for x in captured.err.splitlines() if not x.startswith("read ")]
        assert not captured.out and "\n" not in str(error.value)
        return str(error.value)

    assert "is not a directory" in fails("from-hf", tmp_path / "none", tmp_path / "out")
    shutil.copytree(DATA / "bart", tmp_path / "torch")
    (tmp_path / "torch" / WEIGHTS).rename(tmp_path / "torch" / "pytorch_model.bin")
    assert "save_pretrained" in fails("from-hf", tmp_path / "torch", tmp_path / "out")
    (tmp_path / "torch" / WEIGHTS).write_bytes(b"damaged")
    assert "cannot read" in fails("from-hf", tmp_path / "torch", tmp_path / "out")
    assert "config.json is no run's" in fails("to-hf", tmp_path / "torch", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "exists" in fails("from-hf", DATA / "bart", tmp_path / "full")
    convert.main(["from-hf", str(DATA / "t5"), str(tmp_path / "ours")])
    assert "t5" in capsys.readouterr().out
    assert "exists" in fails("to-hf", tmp_path / "ours", tmp_path / "full")
    assert "no 'sort'" in fails("to-hf", tmp_path / "ours", tmp_path / "out", "--task", "sort")


# ---- a process of its own ----

_CONVERT = """
import re, sys
from moe_jax.interop.hf_read import from_hf

def peak():  # getrusage's would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
from_hf(sys.argv[1], sys.argv[2])
print(peak() - before, *sys.modules)
"""


def _convert(source, out, **environment) -> tuple[int, set[str]]:
    """(bytes of memory that `from_hf` took, names of the modules it loaded)."""
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), str(out)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kilobytes, *modules = done.stdout.split()
    return int(kilobytes) * 1024, set(modules)


def test_conversion_streams_and_needs_no_torch(tmp_path):
    """A model of 200 MB takes less than 1.3 times its size, beside Python and its libraries.

    For published models, which are much larger than the libraries, that is the peak.
    """
    sizes = {"encoder_layers": 12, "decoder_layers": 6, "d_model": 512, "encoder_ffn_dim": 2048}
    sizes |= {"decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    shutil.copytree(DATA / "bart", tmp_path / "source")
    config = files.read_json(DATA / "bart" / "config.json") | sizes
    files.write_json(tmp_path / "source" / "config.json", config)
    from moe_jax.interop import hf_config
    from moe_jax.interop import hf_weights as weights

    ours = hf_config.read_config(config, True, "test")
    shapes = shapes_of(TaskMoE(ours, RouterConfig(), 0))
    rng = np.random.default_rng(0)
    tensors = {
        part.name: rng.random(part.shape(tuple(shapes[f"backbone/{part.path}"])), np.float32)
        for part in weights.parts(ours)
    }
    save_file(tensors, tmp_path / "source" / WEIGHTS)
    model = sum(t.nbytes for t in tensors.values())
    assert model > 200e6
    took, modules = _convert(tmp_path / "source", tmp_path / "out")
    print(f"{took / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB")
    assert took < 1.3 * model
    assert not {"torch", "transformers", "tensorflow", "seqio"} & modules
    back = read_run(str(tmp_path / "out"), 0).params["backbone"]
    for part in weights.parts(ours)[::40]:
        leaf = back
        for key in part.path.split("/"):
            leaf = leaf[key]
        np.testing.assert_array_equal(part.take(leaf), tensors[part.name])


def test_names_on_the_hub_are_looked_up(tmp_path):
    """A name is looked up in the Hub's local cache, the only source when offline."""
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc"
    shutil.copytree(DATA / "t5", snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    _convert(
        "someone/tiny", tmp_path / "out", HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
    )
    assert read_run(str(tmp_path / "out"), 0).model.config.architecture == "t5"
