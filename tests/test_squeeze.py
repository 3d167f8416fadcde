"""A routed model written as a plain Hugging Face model of one of its tasks, or of none."""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core.errors import UserError
from moe_jax.data import vocabulary
from moe_jax.data.vocabulary import read_tokenizers
from moe_jax.interop import hf_directory
from moe_jax.interop.hf_read import from_hf
from moe_jax.interop.hf_write import to_hf
from moe_jax.interop.squeeze import squeeze
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, init_params, routes_of, shapes_of
from moe_jax.runs import directory
from moe_jax.runs.config import Config, DataConfig, RunConfig
from moe_jax.runs.load import read_run

DATA = Path(__file__).with_name("data") / "hf"
TASKS = ["count", "sort", "spell"]


def all_tensors(path: Path) -> dict[str, np.ndarray]:
    weights = hf_directory.Weights(path)
    return {name: weights.read(name) for name in weights.shapes}


def routed_run(path: Path, architecture: str, selection: str):
    """A model directory with random parameters, vanilla layers on both sides; its `Run`."""
    sizes = {"d_model": 8, "d_ff": 12, "heads": 2, "encoder_layers": 3, "decoder_layers": 2}
    config = ModelConfig(
        architecture=architecture,
        max_positions=40,
        relative_buckets=8,
        relative_max_distance=12,
        experts=3,
        encoder_vanilla_layers=(1,),
        expert_noise=0.3,
        init_std=0.2,
        **sizes,
    )
    router = RouterConfig(selection=selection, hidden_dim=8, representation_dim=8, temperature=0.5)
    own = read_tokenizers(DATA / architecture)
    sized = dataclasses.replace(config, vocabulary_size=own.size)
    params = nn.meta.unbox(
        jax.jit(partial(init_params, TaskMoE(sized, router, 3)))(jax.random.key(1))
    )
    promises = jax.tree.map(lambda p: Promise(p.shape, lambda: np.asarray(p)), params)
    shapes = shapes_of(TaskMoE(sized, router, 3))
    save_params(path, 7, promises, {"tasks": TASKS, "step": 7, "shapes": shapes})
    data = DataConfig(lengths={"inputs": 9, "targets": 7})
    directory.write_config(path, Config(RunConfig(), data, config, router))
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
    apply = jax.jit(EncoderDecoder(config).apply)
    return np.asarray(apply({"params": params}, arrays, weights))


@pytest.mark.parametrize("architecture", ["bart", "t5", "t5_1_0", "mt5"])
def test_a_tasks_plain_model_is_the_mixture(architecture, tmp_path):
    """Read back by `from_hf` and, if installed, by `transformers`."""
    run = routed_run(tmp_path / "run", architecture, "argmax")
    config = run.model.config
    arrays = batch(config.vocabulary_size)
    routes = np.asarray(jax.jit(partial(routes_of, run.model))(run.params, run.step))
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
    """Greedy decoding of the mixture without a cache: the whole target is read at every step."""
    config = run.model.config
    start, eos, pad = (2, 2, 1) if config.architecture == "bart" else (0, 1, 0)
    rows = len(arrays["inputs"])
    apply = jax.jit(EncoderDecoder(config).apply)
    tokens = np.full((rows, length + 1), pad, np.int32)
    tokens[:, 0] = start
    ended = np.zeros(rows, bool)
    for i in range(length):
        full = arrays | {
            "decoder_inputs": tokens[:, :length],
            "target_segments": np.ones((rows, length), np.int32),
            "target_positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        }
        actual = apply({"params": run.params["backbone"]}, full, jnp.asarray(route_NxE))
        best = np.asarray(actual)[:, i].argmax(-1)
        tokens[:, i + 1] = np.where(ended, pad, best)
        ended |= best == eos
    return tokens[:, 1:]


def test_soft_routes_are_refused_or_measured(tmp_path):
    run = routed_run(tmp_path / "run", "bart", "softmax")
    with pytest.raises(UserError, match=r"(?s)soft: .*coder\.\d.*--approximate.*--average"):
        to_hf(tmp_path / "run", tmp_path / "out", "sort")
    assert not (tmp_path / "out").exists()
    routes = jax.jit(partial(routes_of, run.model))(run.params, run.step)
    route = np.asarray(routes)[run.task_ids["sort"]]
    config, backbone = run.model.config, run.params["backbone"]
    dense = dataclasses.replace(config, experts=1, encoder_vanilla_layers=())
    said = {
        flag: to_hf(tmp_path / "run", tmp_path / flag, "sort", **{flag: True})
        for flag in ("approximate", "average")
    }
    one_hot = np.eye(3, dtype=np.float32)[route.argmax(-1)]
    # The tokens on which the error is measured.
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, config.vocabulary_size, (2, 8, 32), dtype=np.int32)
    targets[:, 0] = 2
    ones = np.ones((8, 32), np.int32)
    places = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    arrays = {"inputs": inputs, "decoder_inputs": targets, "input_segments": ones}
    arrays |= {"target_segments": ones, "input_positions": places, "target_positions": places}
    mixed = logits(config, backbone, jnp.asarray(route), arrays)
    for flag, weights in (("approximate", one_hot), ("average", route)):
        # The same by hand: the weighted mean of the experts of each layer.
        written = all_tensors(tmp_path / flag)
        kernel = backbone["decoder"]["layers"]["routed"]["feed_forward"]["out_kernel"]
        mean = np.einsum("ne,neij->nij", weights[-2:], kernel)
        for i in range(2):
            name = f"model.decoder.layers.{i}.fc2.weight"
            np.testing.assert_allclose(written[name], mean[i].T, atol=1e-6)
        squeezed = squeeze(backbone, config, weights)
        error = mixed - logits(dense, squeezed, None, arrays)
        assert f"by {np.abs(error).max():.3g} at most" in said[flag]


def test_a_run_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match=r"absent holds no run: there is no such directory$"):
        to_hf(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run: it has no config\.json$"):
        to_hf(tmp_path / "empty", tmp_path / "out")


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
