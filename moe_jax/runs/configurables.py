"""Every gin configurable of the package, so that gin files and flags can name any of them."""

import dataclasses

from moe_jax.core.sharding import MeshConfig
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.decoding.search import DecodingConfig
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.runs.config import DataConfig, FinetuneConfig, RunConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

# What a run's config.gin holds, in this order.
RUN_CONFIGS = (
    RunConfig,
    DataConfig,
    VocabularyConfig,
    ModelConfig,
    RouterConfig,
    OptimizerConfig,
    StepConfig,
    MeshConfig,
)

# configurable -> its parameters, for hints
CONFIGURABLES = {
    c.__name__: [f.name for f in dataclasses.fields(c)]
    for c in (*RUN_CONFIGS, FinetuneConfig, DecodingConfig)
}
