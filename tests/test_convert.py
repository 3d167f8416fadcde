"""Weights in and out: bit-exact there and back, one task's plain model, refusals, memory."""

import dataclasses
import importlib.util
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

from moe_jax import convert, files, run_dir
from moe_jax.data import vocabulary
from moe_jax.data.vocabulary import read_tokenizers
from moe_jax.errors import UserError
from moe_jax.hf import directory
from moe_jax.hf.read import from_hf
from moe_jax.hf.streaming import Promise, save_params
from moe_jax.hf.write import squeeze, to_hf
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.moe import TaskMoE
from moe_jax.runs import read_run
from moe_jax.training.checkpoints import fit_backbone, split_layers

DATA = Path(__file__).with_name("data") / "hf"
WEIGHTS = "model.safetensors"
TASKS = ["count", "sort", "spell"]


def copy(name: str, out: Path, change=lambda tensors: tensors, **settings) -> Path:
    """The stored model `name` with changed tensors and config.json."""
    shutil.copytree(DATA / name, out)
    tensors = change(load_file(out / WEIGHTS))
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = files.read_json(out / "config.json") | settings
    files.write_json(out / "config.json", config)
    return out


def all_tensors(path: Path) -> dict[str, np.ndarray]:
    weights = directory.Weights(path)
    return {name: weights.read(name) for name in weights.shapes}


# ---- there and back ----


def plain(tensors):
    return tensors


def without_prefix(tensors):
    """As `BartModel` is saved, with the embedding repeated."""
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
    """As early T5 files are: a table that nothing reads; mixed dtypes."""
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
    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        assert before[key].tobytes() == after[key].tobytes(), key
    for file in source.iterdir():
        if file.suffix not in (".safetensors", ".npz") and "index" not in file.name:
            kept = tmp_path / "back" / file.name
            assert file.name == "ids.json" or kept.read_bytes() == file.read_bytes()


def test_shards_are_complete(tmp_path, monkeypatch):
    """As `transformers` reads them: every tensor in the shard that the index names."""
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


# ---- a routed model, written for each of its tasks ----


def routed_run(path: Path, architecture: str, selection: str):
    """A model directory with random parameters, vanilla layers on both sides; its `Run`."""
    sizes = {"d_model": 8, "d_ff": 12, "heads": 2, "encoder_layers": 3, "decoder_layers": 2}
    config = ModelConfig(
        architecture=architecture,
        max_positions=40,
        relative_buckets=8,
        relative_max_distance=12,
        tie_embeddings=architecture == "bart",
        experts=3,
        encoder_vanilla_layers=(1,),
        expert_noise=0.3,
        init_std=0.2,
        **sizes,
    )
    router = RouterConfig(selection=selection, hidden_dim=8, representation_dim=8, temperature=0.5)
    own = read_tokenizers(DATA / architecture)
    sized = dataclasses.replace(config, vocabulary_size=own.size)
    params = nn.meta.unbox(jax.jit(TaskMoE(sized, router, 3).init)(jax.random.key(1)))
    promises = jax.tree.map(lambda p: Promise(p.shape, lambda: np.asarray(p)), params)
    shapes = TaskMoE(sized, router, 3).shapes()
    save_params(path, 7, promises, {"tasks": TASKS, "step": 7, "shapes": shapes})
    lines = {
        "TASK_FEATURE_LENGTHS": {"inputs": 9, "targets": 7},
        **run_dir.config_lines([config, router]),
    }
    files.write_text(path / "config.gin", "".join(f"{k} = {v}\n" for k, v in lines.items()))
    vocabulary.write_vocabulary(path / "vocabulary", own.settings, own.contents)
    return read_run(str(path), own.size)


def batch(size: int) -> dict[str, np.ndarray]:
    """Inputs and targets of uneven length."""
    rng = np.random.default_rng(3)
    segments = (np.arange(9) < np.array([[9], [5], [2]])).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (3, 9))
    result = {}
    for side in ("input", "target"):
        result |= {f"{side}_segments": segments, f"{side}_positions": positions}
    ids = rng.integers(4, size, (2, 3, 9), dtype=np.int32) * segments
    return result | {"inputs": ids[0], "decoder_inputs": ids[1]}


def logits(config: ModelConfig, params, weights, arrays) -> np.ndarray:
    apply = jax.jit(EncoderDecoder(config, config.experts).apply)
    return np.asarray(apply({"params": params}, arrays, weights))


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_a_tasks_plain_model_is_the_mixture(architecture, tmp_path):
    """Read back by `from_hf`, and, where it is installed, by `transformers`."""
    run = routed_run(tmp_path / "run", architecture, "argmax")
    config = run.model.config
    arrays = batch(config.vocabulary_size)
    routes = np.asarray(jax.jit(run.model.routes)(run.params, run.step))
    assert len(np.unique(routes.argmax(-1), axis=0)) > 1  # the tasks differ
    for task, index in run.task_ids.items():
        said = to_hf(tmp_path / "run" / "checkpoints" / "7", tmp_path / task, task)
        assert "differ" not in said and task in said
        wanted = logits(config, run.params["backbone"], jnp.asarray(routes[index]), arrays)
        real = arrays["target_segments"] > 0
        if task == TASKS[-1]:
            from_hf(str(tmp_path / task), tmp_path / "back")
            back = read_run(str(tmp_path / "back"), 0)
            ours = logits(back.model.config, back.params["backbone"], None, arrays)
            np.testing.assert_allclose(ours[real], wanted[real], atol=1e-5, rtol=0)
        if importlib.util.find_spec("transformers"):
            _check_transformers(tmp_path / task, run, routes[index], arrays, wanted, real)


def _check_transformers(path, run, route_NxE, arrays, wanted, real) -> None:
    import hf_models
    import torch
    from transformers import AutoModelForSeq2SeqLM

    ids = {k: torch.tensor(v).long() for k, v in arrays.items()}
    with torch.no_grad():
        theirs = AutoModelForSeq2SeqLM.from_pretrained(path)(
            input_ids=ids["inputs"],
            attention_mask=ids["input_segments"],
            decoder_input_ids=ids["decoder_inputs"],
        ).logits.numpy()
    print(f"{path.name}: logits of transformers within {np.abs(theirs - wanted)[real].max():.1e}")
    np.testing.assert_allclose(theirs[real], wanted[real], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(
        hf_models.generate(path, arrays, 12), generate(run, route_NxE, arrays, 12)
    )


def generate(run, route_NxE, arrays, length) -> np.ndarray:
    """Greedy decoding of the mixture without a cache: the whole target again at every step."""
    config = run.model.config
    start, eos, pad = {"bart": (2, 2, 1), "t5": (0, 1, 0)}[config.architecture]
    rows = len(arrays["inputs"])
    apply = jax.jit(EncoderDecoder(config, config.experts).apply)
    tokens = np.full((rows, length + 1), pad, np.int32)
    tokens[:, 0] = start
    ended = np.zeros(rows, bool)
    for i in range(length):
        full = arrays | {
            "decoder_inputs": tokens[:, :length],
            "target_segments": np.ones((rows, length), np.int32),
            "target_positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        }
        found = apply({"params": run.params["backbone"]}, full, jnp.asarray(route_NxE))
        best = np.asarray(found)[:, i].argmax(-1)
        tokens[:, i + 1] = np.where(ended, pad, best)
        ended |= best == eos
    return tokens[:, 1:]


def test_soft_routes_are_refused_or_measured(tmp_path):
    run = routed_run(tmp_path / "run", "bart", "softmax")
    with pytest.raises(UserError, match=r"(?s)soft: .*coder\.\d.*--approximate.*--average"):
        to_hf(tmp_path / "run", tmp_path / "out", "sort")
    assert not (tmp_path / "out").exists()
    route = np.asarray(jax.jit(run.model.routes)(run.params, run.step))[run.task_ids["sort"]]
    config, backbone = run.model.config, run.params["backbone"]
    dense = dataclasses.replace(config, experts=1, encoder_vanilla_layers=())
    said = {
        flag: to_hf(tmp_path / "run", tmp_path / flag, "sort", **{flag: True})
        for flag in ("approximate", "average")
    }
    one_hot = np.eye(3, dtype=np.float32)[route.argmax(-1)]
    for flag, weights in (("approximate", one_hot), ("average", route)):
        # The same by hand: the weighted mean of the experts of each layer.
        written = all_tensors(tmp_path / flag)
        kernel = backbone["decoder"]["layers"]["routed"]["feed_forward"]["out_kernel"]
        mean = np.einsum("ne,neij->nij", weights[-2:], kernel)
        for i in range(2):
            name = f"model.decoder.layers.{i}.fc2.weight"
            np.testing.assert_allclose(written[name], mean[i].T, atol=1e-6)
        # The error that it says, measured again on the same tokens.
        rng = np.random.default_rng(0)
        inputs, targets = rng.integers(0, config.vocabulary_size, (2, 8, 32), dtype=np.int32)
        targets[:, 0] = 2
        ones = np.ones((8, 32), np.int32)
        places = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
        arrays = {"inputs": inputs, "decoder_inputs": targets, "input_segments": ones}
        arrays |= {"target_segments": ones, "input_positions": places, "target_positions": places}
        squeezed = squeeze(backbone, config, weights)
        mixed = logits(config, backbone, jnp.asarray(route), arrays)
        error = mixed - logits(dense, squeezed, None, arrays)
        assert f"by {np.abs(error).max():.3g} at most" in said[flag]


def test_averages_without_a_task_and_hard_routes(tmp_path):
    run = routed_run(tmp_path / "run", "t5", "argmax")
    with pytest.raises(UserError, match="which task"):
        to_hf(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="no 'srt'; did you mean 'sort'"):
        to_hf(tmp_path / "run", tmp_path / "out", "srt")
    assert "mean of all experts" in to_hf(tmp_path / "run", tmp_path / "mean", average=True)
    kernel = run.params["backbone"]["encoder"]["layers"]["routed"]["feed_forward"]["in_kernel"]
    written = all_tensors(tmp_path / "mean")
    # Layer 1 is vanilla, so layer 2 is the second routed one.
    name = "encoder.block.2.layer.1.DenseReluDense.wi_1.weight"
    np.testing.assert_allclose(written[name], kernel[1].mean(0)[:, 1].T, atol=1e-6)
    to_hf(tmp_path / "run", tmp_path / "hard", "sort")
    assert "differ" not in to_hf(tmp_path / "run", tmp_path / "same", "sort", average=True)
    assert all_tensors(tmp_path / "same").keys() == all_tensors(tmp_path / "hard").keys()
    for name, tensor in all_tensors(tmp_path / "hard").items():
        np.testing.assert_array_equal(all_tensors(tmp_path / "same")[name], tensor)


def test_every_expert_starts_from_the_converted_model(tmp_path):
    """With vanilla layers, which get the same weights without noise."""
    from_hf(str(DATA / "bart"), tmp_path / "ours")
    dense = read_run(str(tmp_path / "ours"), 0)
    config = dataclasses.replace(dense.model.config, experts=3, encoder_vanilla_layers=(0,))
    like = jax.eval_shape(TaskMoE(config, RouterConfig(), 2).init, jax.random.key(0))
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
        ("t5", plain, {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
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
    assert [p.name for p in tmp_path.iterdir()] == ["source"]  # nothing is left behind


def test_command_line_errors_are_one_line(tmp_path, capsys):
    def fails(*argv) -> str:
        assert convert.main([str(a) for a in argv]) == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and not captured.out
        return captured.err

    assert "is no directory" in fails("from-hf", tmp_path / "none", tmp_path / "out")
    shutil.copytree(DATA / "bart", tmp_path / "torch")
    (tmp_path / "torch" / WEIGHTS).rename(tmp_path / "torch" / "pytorch_model.bin")
    assert "save_pretrained" in fails("from-hf", tmp_path / "torch", tmp_path / "out")
    (tmp_path / "torch" / WEIGHTS).write_bytes(b"damaged")
    assert "cannot read" in fails("from-hf", tmp_path / "torch", tmp_path / "out")
    assert "vocabulary.json" in fails("to-hf", tmp_path / "torch", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "exists" in fails("from-hf", DATA / "bart", tmp_path / "full")
    assert convert.main(["from-hf", str(DATA / "t5"), str(tmp_path / "ours")]) == 0
    assert "t5" in capsys.readouterr().out
    assert "exists" in fails("to-hf", tmp_path / "ours", tmp_path / "full")
    assert "no 'sort'" in fails("to-hf", tmp_path / "ours", tmp_path / "out", "--task", "sort")


# ---- a process of its own ----

_CONVERT = """
import re, sys
from moe_jax.hf.read import from_hf

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
    """Of 200 MB: what it takes beside Python and its libraries, less than 1.3 times as much.

    For models that dwarf the libraries, as all published ones do, that is the peak.
    """
    sizes = {"encoder_layers": 12, "decoder_layers": 6, "d_model": 512, "encoder_ffn_dim": 2048}
    sizes |= {"decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    shutil.copytree(DATA / "bart", tmp_path / "source")
    config = files.read_json(DATA / "bart" / "config.json") | sizes
    files.write_json(tmp_path / "source" / "config.json", config)
    from moe_jax.hf import config as hf_config
    from moe_jax.hf import weights

    ours = hf_config.read_config(config, True, "test")
    shapes = TaskMoE(ours, RouterConfig(), 0).shapes()
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
    """In the Hub's own cache, which is all that there is offline."""
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc"
    shutil.copytree(DATA / "t5", snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    _convert(
        "someone/tiny", tmp_path / "out", HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
    )
    assert read_run(str(tmp_path / "out"), 0).model.config.architecture == "t5"
