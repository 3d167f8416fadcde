"""Parameters before the first step."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.core.errors import UserError
from moe_jax.data.representations import read_representations
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import Params
from moe_jax.model.router import ROUTERS
from moe_jax.model.task_moe import TaskMoE, init_params
from moe_jax.runs import directory
from moe_jax.runs.config import RunConfig
from moe_jax.training.checkpoints import load_params
from moe_jax.training.shapes import fit_backbone, fit_table, split_layers
from moe_jax.training.step import PRNG

# The settings on which the shapes of a backbone depend, whatever its experts.
_SHAPES = (
    "architecture", "vocabulary_size", "d_model", "d_ff", "heads", "head_dim", "encoder_layers",
    "decoder_layers", "max_positions", "relative_buckets", "tie_embeddings",
)  # fmt: skip


def initial_params(model: TaskMoE, run: RunConfig, tasks: list[str], sharding: Any) -> Any:
    """Parameters before the first step.

    1. Fresh from the seed.
    2. The backbone from INITIAL_CHECKPOINT_PATH, if given.
    3. Router and representations from ROUTER_CHECKPOINT_PATH, if given.
    4. Representations from RunConfig.representations_path, if given, and a router that fits them.

    Args:
        sharding: of all parameters, or a prefix of their tree.
    """
    key = jax.random.key(run.seed, impl=PRNG)
    shapes = nn.meta.unbox(jax.eval_shape(partial(init_params, model), key))
    sharding = jax.tree.broadcast(sharding, shapes)
    parts = set(shapes) - ({"backbone"} if run.initial_checkpoint_path else set())

    def fresh(key: jax.Array) -> Params:
        params = nn.meta.unbox(init_params(model, key))
        return {part: params[part] for part in parts}

    params = jax.jit(fresh, out_shardings={part: sharding[part] for part in parts})(key)
    if run.initial_checkpoint_path:
        loaded, _ = load_params(run.initial_checkpoint_path)
        try:
            params["backbone"] = fit_backbone(
                split_layers(loaded["backbone"], model.config), shapes["backbone"],
                model.config.expert_noise, jax.random.fold_in(key, 1), run.initial_checkpoint_path,
                sharding["backbone"],
            )  # fmt: skip
        except UserError as e:
            raise UserError(f"{e}{_differences(model.config, run.initial_checkpoint_path)}") from e
    if run.router_checkpoint_path and model.routed:
        loaded, meta = load_params(run.router_checkpoint_path)
        params |= fit_table(loaded, params, meta["tasks"], tasks, run.router_checkpoint_path)
    if run.representations_path and model.routed:
        dim = model.router_config.representation_dim
        table_TxK = read_representations(run.representations_path, tasks, dim)
        params["representations"] = table_TxK
        if not run.router_checkpoint_path:
            router = ROUTERS[model.router_config.kind]
            drawn = jax.tree.map(np.asarray, params["router"])
            # Hosts may round differently, and all must start alike.
            params["router"] = multihost_utils.broadcast_one_to_all(
                router.fitted(drawn, table_TxK, run.seed)
            )
    return jax.device_put(params, sharding)


def _differences(own: ModelConfig, path: str) -> str:
    """The settings in which the model of another run differs, for an error; '' if none is known."""
    try:
        other = directory.read_config(directory.root(path)).model
    except UserError:  # the error at hand says enough
        return ""
    pairs = [(name, getattr(other, name), getattr(own, name)) for name in _SHAPES]
    differ = [
        f"ModelConfig.{name} is {there} there, {here} here"
        for name, there, here in pairs
        if there != here and there != 0  # 0 is the vocabulary's size
    ]
    return "".join(f"; {text}" for text in differ)
