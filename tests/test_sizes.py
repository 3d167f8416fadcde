"""Parameter counts of the published sizes, without allocating any; `transformers` counts along."""

import dataclasses
import math

import pytest

from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, shapes_of
from moe_jax.runs import gin_files
from moe_jax.runs.configurables import build

# Published models: parameters, vocabulary, and what `transformers` calls the sizes; heads of T5s
# have 64 numbers where the last size does not say otherwise.
SIZES = {
    "bart_base": (139_420_416, 50_265, (768, 3072, 12, 6)),
    "bart_large": (406_291_456, 50_265, (1024, 4096, 16, 12)),
    "t5_1_0_small": (60_506_624, 32_128, (512, 2048, 8, 6)),
    "t5_1_0_base": (222_903_552, 32_128, (768, 3072, 12, 12)),
    "t5_1_0_large": (737_668_096, 32_128, (1024, 4096, 16, 24)),
    "t5_1_0_3b": (2_851_598_336, 32_128, (1024, 16384, 32, 24, 128)),
    "t5_1_0_11b": (11_307_321_344, 32_128, (1024, 65536, 128, 24, 128)),
    "t5_1_1_small": (76_961_152, 32_128, (512, 1024, 6, 8)),
    "t5_1_1_base": (247_577_856, 32_128, (768, 2048, 12, 12)),
    "t5_1_1_large": (783_150_080, 32_128, (1024, 2816, 16, 24)),
    "t5_1_1_xl": (2_849_757_184, 32_128, (2048, 5120, 32, 24)),
    "t5_1_1_xxl": (11_135_332_352, 32_128, (4096, 10240, 64, 24)),
    "mt5_small": (300_176_768, 250_112, (512, 1024, 6, 8)),
    "mt5_base": (582_401_280, 250_112, (768, 2048, 12, 12)),
    "mt5_large": (1_229_581_312, 250_112, (1024, 2816, 16, 24)),
    "mt5_xl": (3_742_619_648, 250_112, (2048, 5120, 32, 24)),
    "mt5_xxl": (12_921_057_280, 250_112, (4096, 10240, 64, 24)),
}


def count(name: str, experts: int) -> int:
    """Parameters of the backbone that the gin file describes."""
    gin_files.parse([f"models/{name}.gin"], [], [str(gin_files.GIN_CONFIGS)])
    config = build(ModelConfig)
    assert config.experts == 3
    config = dataclasses.replace(config, experts=experts, vocabulary_size=SIZES[name][1])
    shapes = shapes_of(TaskMoE(config, RouterConfig(), tasks=1))
    return sum(math.prod(s) for path, s in shapes.items() if path.startswith("backbone/"))


@pytest.mark.parametrize("name", SIZES)
def test_one_expert_is_the_published_model(name):
    parameters, _, _ = SIZES[name]
    assert count(name, 1) == parameters


@pytest.mark.parametrize("name", SIZES)
def test_transformers_counts_as_many(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parameters, vocabulary, (width, inner, heads, layers, *head_dim) = SIZES[name]
    with torch.device("meta"):
        if name.startswith("bart"):
            sides = {
                f"{side}_{what}": value
                for side in ("encoder", "decoder")
                for what, value in (
                    ("layers", layers), ("ffn_dim", inner), ("attention_heads", heads)
                )
            }  # fmt: skip
            config = transformers.BartConfig(
                vocab_size=vocabulary, d_model=width, max_position_embeddings=1024, **sides
            )
            model = transformers.BartForConditionalGeneration(config)
        else:
            relu = name.startswith("t5_1_0")
            kind = "MT5" if name.startswith("mt5") else "T5"
            config = getattr(transformers, f"{kind}Config")(
                vocab_size=vocabulary, d_model=width, d_kv=(*head_dim, 64)[0], d_ff=inner,
                num_heads=heads, num_layers=layers,
                feed_forward_proj="relu" if relu else "gated-gelu", tie_word_embeddings=relu,
            )  # fmt: skip
            model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
            if not relu:
                # Version 5 of transformers ties all T5s, unless it reads files with both
                # embeddings.
                model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_experts_multiply_routed_layers_alone():
    """Three experts add two more of every layer; embeddings and norms outside stay single."""
    one, three = count("bart_base", 1), count("bart_base", 3)
    outside = 50_265 * 768 + 2 * (1026 * 768 + 2 * 768)
    assert three - outside == 3 * (one - outside)
