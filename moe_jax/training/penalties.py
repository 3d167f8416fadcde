"""Optional terms of the loss: distance between experts, entropy and load of routes.

Each is off by default; `StepConfig` holds their coefficients. They are functions of the whole
parameters, so their gradients are exact, whichever experts the groups of a batch gather.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.model.experts import Params, routed
from moe_jax.model.task_moe import TaskMoE, soft_routes

# How the names of arrays begin that join several matrices, along the last axis but one.
_JOINED = ("q_", "kv_", "qkv_", "in_")


def expert_distance(backbone: Params) -> jax.Array:
    """The distance between the experts of a layer, summed over routed layers; 0 with one expert.

    The distance of two experts is the sum over their matrices and vectors of the Euclidean norm
    of the difference (queries, keys and values each count by themselves, as in the published
    code); of a layer, the mean over pairs of experts. If two experts are equal, the gradient is 0.
    """
    total = jnp.float32(0)
    for _, stack in routed(backbone):
        for path, array_LxEx in jax.tree_util.tree_leaves_with_path(stack):
            if array_LxEx.shape[1] > 1:
                total += _mean_distance(array_LxEx.astype(jnp.float32), path[-1].key)
    return total


def _mean_distance(array_LxEx: jax.Array, name: str) -> jax.Array:
    """Mean over pairs of experts, summed over layers and over the matrices joined in the array."""
    experts = array_LxEx.shape[1]
    kept = array_LxEx.ndim - 2 if name.startswith(_JOINED) else None
    summed = tuple(axis for axis in range(2, array_LxEx.ndim) if axis != kept)

    # Pairs each expert with the one `offset` later in a ring. Every pair occurs once, except that
    # opposite experts (`twice`) occur twice. Each offset is computed again for the gradient, to
    # save memory.
    @jax.checkpoint
    def add(total, offset):
        other = jnp.take(array_LxEx, (jnp.arange(experts) + offset) % experts, axis=1)
        squares = jnp.sum(jnp.square(array_LxEx - other), summed)
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        twice = 2 * offset == experts
        distance = jnp.sum(jnp.where(squares > 0, norms, 0.0))
        return total + jnp.where(twice, 0.5, 1.0) * distance, None

    total, _ = jax.lax.scan(add, jnp.float32(0), jnp.arange(1, experts // 2 + 1))
    return total / (experts * (experts - 1) / 2)


def route_entropy(routes_xNxE: jax.Array) -> jax.Array:
    """Entropy in nats, mean over layers, and over groups or tasks."""
    # A weight of 0 adds nothing, also to the gradient, which would be infinite.
    weights_xNxE = jnp.where(routes_xNxE > 0, routes_xNxE, 1.0)
    return jnp.mean(-jnp.sum(weights_xNxE * jnp.log(weights_xNxE), -1))


def route_load(probabilities_GxNxE: jax.Array) -> jax.Array:
    """Squared coefficient of variation of the experts' loads, mean over layers; 0 for even loads.

    The load of an expert is its mean probability over the groups of a batch (the importance loss
    of Shazeer et al. 2017, arXiv 1701.06538, with tasks for tokens).
    """
    load_NxE = jnp.mean(probabilities_GxNxE, 0)
    return jnp.mean(jnp.var(load_NxE, -1) / jnp.square(jnp.mean(load_NxE, -1)))


def penalty(
    model: TaskMoE, params: Params, task_id_G: jax.Array, step: jax.Array, config: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the terms of `config` (a `StepConfig`), and each term without its weight.

    Terms of routes use the router's softmax at the temperature of `step`, without noise and before
    experts are selected, because the entropy of a hard route is constant.
    """
    terms = {}
    if config.expert_distance:
        terms["expert_distance"] = expert_distance(params["backbone"])
    if config.route_entropy or config.route_load:
        soft_GxNxE = soft_routes(model, params, step)[task_id_G]
        if config.route_entropy:
            terms["route_entropy"] = route_entropy(soft_GxNxE)
        if config.route_load:
            terms["route_load"] = route_load(soft_GxNxE)
    total = sum((getattr(config, name) * term for name, term in terms.items()), jnp.float32(0))
    return total, {f"regularisation/{name}": term for name, term in terms.items()}
