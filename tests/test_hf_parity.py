"""All families against `transformers`: states, logits, loss, gradients, buckets.

The numbers come from tests/data/hf (see make_hf_fixture.py) and, if `transformers` is installed,
from newly made models.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.interop import hf_weights as weights
from moe_jax.interop.hf_read import from_hf
from moe_jax.model.attention import relative_buckets
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig
from moe_jax.runs.load import read_run
from moe_jax.training.loss import token_losses

DATA = Path(__file__).with_name("data") / "hf"


def load(source, out):
    """(ModelConfig, backbone) of a Hugging Face directory, through `from_hf`."""
    from_hf(str(source), out)
    run = read_run(str(out), 0)
    return run.model.config, run.params["backbone"]


def compute(config: ModelConfig, backbone, batch) -> dict[str, np.ndarray]:
    """The results of `hf_models.reference`, computed by our model."""
    module = EncoderDecoder(config)

    def loss(params):
        encoded = module.apply(
            {"params": params}, batch["inputs"], batch["input_segments"], batch["input_positions"],
            None, method="encode",
        )  # fmt: skip
        logits = module.apply({"params": params}, batch, None)
        real = batch["target_segments"] > 0
        mean = jnp.mean(token_losses(logits, batch["targets"], 0.0), where=real)
        return mean, (encoded, logits)

    (mean, (encoded, logits)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(backbone)
    result = {"encoded": encoded, "logits": logits, "loss": mean}
    prefix = "model." if config.architecture == "bart" else ""
    for part in weights.parts(config):
        leaf = gradients
        for key in part.path.split("/"):
            leaf = leaf[key]
        result[f"gradient/{prefix}{part.name}"] = part.take(np.asarray(leaf))
    return {name: np.asarray(value) for name, value in result.items()}


def check(name, ours, theirs, batch) -> None:
    """Checks the limits of parity; prints the measured errors."""
    inputs, targets = batch["input_segments"] > 0, batch["target_segments"] > 0
    encoded = np.abs(ours["encoded"] - theirs["encoded"])[inputs].max()
    logits = np.abs(ours["logits"] - theirs["logits"])[targets].max()
    logits /= max(1.0, np.abs(theirs["logits"][targets]).max())  # a family's may be large
    loss = abs(ours["loss"] / theirs["loss"] - 1)
    gradients = {k for k in theirs if k.startswith("gradient/")}
    assert gradients == {k for k in ours if k.startswith("gradient/")}
    # Errors are relative to a tensor's largest entry, but at least this. Gradients of BART's key
    # biases are zero up to rounding, because softmax ignores them.
    least = 1e-2 * max(np.abs(theirs[k]).max() for k in gradients)
    errors = {
        k: np.abs(ours[k] - theirs[k]).max() / max(np.abs(theirs[k]).max(), least)
        for k in gradients
    }
    worst = max(errors, key=errors.get)
    print(f"{name}: encoder states {encoded:.1e}, logits {logits:.1e}, loss {loss:.1e},"
          f" gradients {errors[worst]:.1e} ({worst})")  # fmt: skip
    assert encoded < 1e-5 and logits < 1e-5
    assert loss < 1e-6
    assert errors[worst] < 1e-4


@pytest.mark.parametrize("name", ["bart", "t5", "t5_1_0", "mt5"])
def test_stored_numbers(name, tmp_path):
    config, backbone = load(DATA / name, tmp_path / "out")
    assert config.architecture == name
    assert config.tie_embeddings == (name in ("bart", "t5_1_0"))
    arrays = np.load(DATA / name / "reference.npz")
    batch = {k.removeprefix("batch/"): arrays[k] for k in arrays if k.startswith("batch/")}
    theirs = {k: arrays[k] for k in arrays if not k.startswith("batch/")}
    check(name, compute(config, backbone, batch), theirs, batch)


# name -> (architecture, settings of the model of `transformers`)
VARIANTS = {
    "bart": (
        "bart",
        {"decoder_layers": 3, "d_model": 12, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20},
    ),
    "t5 tied and scaled": ("t5", {"tied": True, "num_decoder_layers": 3}),
    # As in t5-3b and t5-11b, heads are wider than the model.
    "t5 1.0": ("t5_1_0", {"num_decoder_layers": 3, "d_kv": 16, "d_ff": 40}),
    "mt5": ("mt5", {"num_decoder_layers": 3}),
    "mt5 tied": ("mt5", {"tied": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers(name, tmp_path):
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import hf_models

    architecture, settings = VARIANTS[name]
    model = hf_models.MODELS[architecture](**settings)
    tokenizer = (DATA / "bart" / "tokenizer.json").read_text()
    config, backbone = load(hf_models.save(model, tmp_path / "hf", tokenizer), tmp_path / "out")
    assert config.architecture == architecture
    assert config.tie_embeddings == (name != "mt5")
    assert config.scale_tied_logits == name.startswith("t5")
    # Longer than 12 positions, the largest distance that this T5 distinguishes.
    batch = hf_models.batch(inputs=20, targets=18)
    check(name, compute(config, backbone, batch), hf_models.reference(model, batch), batch)


@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 12), (64, 200)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets(buckets, distance, bidirectional):
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    ours = relative_buckets(
        jnp.arange(0, 2)[:, None] - jnp.arange(-700, 700), bidirectional=bidirectional,
        buckets=buckets, max_distance=distance,
    )  # fmt: skip
    memory_minus_query = torch.arange(-700, 700)[None, :] - torch.arange(0, 2)[:, None]
    theirs = T5Attention._relative_position_bucket(
        memory_minus_query, bidirectional, buckets, distance
    )
    np.testing.assert_array_equal(ours, theirs.numpy())
