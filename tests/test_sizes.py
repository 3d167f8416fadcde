"""Parameter counts of the published sizes, without allocating any; `transformers` counts along."""

import dataclasses
import math

import pytest

from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, shapes_of
from moe_jax.runs import flags as cli

# Published models: parameters, vocabulary, and what `transformers` calls the sizes.
SIZES = {
    "bart_base": (139_420_416, 50_265, (768, 3072, 12, 6)),
    "bart_large": (406_291_456, 50_265, (1024, 4096, 16, 12)),
    "t5_1_1_small": (76_961_152, 32_128, (512, 1024, 6, 8)),
    "t5_1_1_base": (247_577_856, 32_128, (768, 2048, 12, 12)),
    "t5_1_1_large": (783_150_080, 32_128, (1024, 2816, 16, 24)),
    "t5_1_1_xl": (2_849_757_184, 32_128, (2048, 5120, 32, 24)),
    "t5_1_1_xxl": (11_135_332_352, 32_128, (4096, 10240, 64, 24)),
}


def count(name: str, experts: int) -> int:
    """Parameters of the backbone that the gin file describes."""
    cli.parse_gin([f"models/{name}.gin"], [], [str(cli.GIN_CONFIGS)])
    config = ModelConfig()
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
    parameters, vocabulary, (width, inner, heads, layers) = SIZES[name]
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
            config = transformers.T5Config(
                vocab_size=vocabulary, d_model=width, d_kv=64, d_ff=inner, num_heads=heads,
                num_layers=layers, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )  # fmt: skip
            model = transformers.T5ForConditionalGeneration(config)
            # Version 5 ties all T5s until it reads files with both embeddings.
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_experts_multiply_routed_layers_alone():
    """Three experts add two more of every layer; embeddings and norms outside stay single."""
    one, three = count("bart_base", 1), count("bart_base", 3)
    outside = 50_265 * 768 + 2 * (1026 * 768 + 2 * 768)
    assert three - outside == 3 * (one - outside)
