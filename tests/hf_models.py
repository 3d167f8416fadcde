"""Tiny BARTs and T5s made by `transformers`, and their outputs. Needs PyTorch."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 272


def bart(**settings) -> BartForConditionalGeneration:
    """A BART with different depths of encoder and decoder."""
    config = {
        "vocab_size": VOCABULARY,
        "d_model": 8,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 12,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 24,
        "dropout": 0.1,
        "forced_eos_token_id": None,
    }
    return _random(BartForConditionalGeneration(BartConfig(**config | settings)))


_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "d_kv": 6,
    "d_ff": 12,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}


def t5(*, tied: bool = False, **settings) -> T5ForConditionalGeneration:
    """T5 1.1; with `tied`, T5 1.0's output embedding and scaled logits."""
    config = T5Config(**_T5 | {"tie_word_embeddings": tied} | settings)
    return _random(_untied(T5ForConditionalGeneration(config), tied))


def t5_1_0(**settings) -> T5ForConditionalGeneration:
    """T5 1.0: ReLU without a gate, tied embeddings, scaled logits."""
    return t5(tied=True, **{"feed_forward_proj": "relu"} | settings)


def mt5(*, tied: bool = False, **settings) -> MT5ForConditionalGeneration:
    """mT5, whose logits are not scaled; with `tied`, they use the input embedding."""
    config = MT5Config(**_T5 | settings)
    return _random(_untied(MT5ForConditionalGeneration(config), tied))


def _untied(model, tied: bool):
    """Version 5 of transformers ties all T5s, unless it reads files with both embeddings."""
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        model.config.tie_word_embeddings = False
    return model


MODELS = {"bart": bart, "t5": t5, "t5_1_0": t5_1_0, "mt5": mt5}


def _random(model):
    """Draws every parameter from one normal distribution, because fresh biases are zero and would
    not be tested."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.dim() == 1 and "norm" in name else 0.0
            parameter.copy_(scale + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch(vocabulary: int = VOCABULARY, rows: int = 3, inputs: int = 9, targets: int = 7) -> dict:
    """Random ids with padding after the inputs and after the targets, as our model takes them."""
    rng = np.random.default_rng(0)
    result = {}
    for side, length in (("input", inputs), ("target", targets)):
        lengths = np.linspace(length, 2, rows).astype(int)
        segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
        ids = rng.integers(4, vocabulary, (rows, length), dtype=np.int32) * segments
        result |= {
            f"{side}s": ids,
            f"{side}_segments": segments,
            f"{side}_positions": np.arange(length, dtype=np.int32) * segments,
        }
    result["decoder_inputs"] = np.roll(result["targets"], 1, axis=1)
    result["decoder_inputs"][:, 0] = 2
    return result


def reference(model, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The results of `transformers`: `encoded`, `logits`, `loss` and `gradient/NAME`."""
    ids = {name: torch.tensor(array).long() for name, array in arrays.items()}
    labels = ids["targets"].masked_fill(ids["target_segments"] == 0, -100)
    model.zero_grad()
    out = model(
        input_ids=ids["inputs"],
        attention_mask=ids["input_segments"],
        decoder_input_ids=ids["decoder_inputs"],
        decoder_attention_mask=ids["target_segments"],
        labels=labels,
    )
    out.loss.backward()
    result = {"encoded": out.encoder_last_hidden_state, "logits": out.logits, "loss": out.loss}
    result |= {f"gradient/{name}": p.grad for name, p in model.named_parameters()}
    return {name: tensor.detach().numpy() for name, tensor in result.items()}


def save(model, directory: Path, tokenizer: str) -> Path:
    """Saves a model by `save_pretrained`, with a tokenizer."""
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tokenizer)
    return directory


def generate(directory: Path, arrays: dict[str, np.ndarray], length: int) -> np.ndarray:
    """int [R, length] greedy generations of a saved model, without the start, padded."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    ids = model.generate(
        input_ids=torch.tensor(arrays["inputs"]).long(),
        attention_mask=torch.tensor(arrays["input_segments"]).long(),
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
    ).numpy()[:, 1:]
    pad = json.loads((directory / "config.json").read_text())["pad_token_id"]
    return np.pad(ids, ((0, 0), (0, length - ids.shape[1])), constant_values=pad)
