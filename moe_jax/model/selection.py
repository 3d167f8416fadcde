"""Selections: route logits -> routes. Noise only in training; deterministic at evaluation."""

import jax
import jax.numpy as jnp

from moe_jax.model.config import RouterConfig


def temperature_at(config: RouterConfig, step: jax.Array | int) -> jax.Array:
    """Temperature of the softmax after `step` steps (paper appendix; Jang et al. 2017).

    `exponential`: max(floor, temperature * exp(-rate * step)); `linear`: max(floor, temperature
    - rate * step); `constant`: temperature.
    """
    step = jnp.float32(step)
    match config.temperature_schedule:
        case "exponential":
            decayed = config.temperature * jnp.exp(-config.temperature_rate * step)
        case "linear":
            decayed = config.temperature - config.temperature_rate * step
        case "constant":
            return jnp.float32(config.temperature)
    return jnp.maximum(decayed, config.temperature_floor)


def straight_through(soft: jax.Array) -> jax.Array:
    """One-hot of the largest entry in value; the gradient of `soft`."""
    hard = jax.nn.one_hot(jnp.argmax(soft, -1), soft.shape[-1], dtype=soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))  # so that the value is exactly `hard`


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Softmax over the k largest logits, zero elsewhere."""
    _, index = jax.lax.top_k(logits, k)
    kept = jax.nn.one_hot(index, logits.shape[-1], dtype=bool).any(-2)
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), -1)


def select(
    logits_TxNxE: jax.Array,
    config: RouterConfig,
    *,
    temperature: jax.Array | float,
    gumbel_TxNxE: jax.Array | None = None,
) -> jax.Array:
    """Turns logits into routes.

    Args:
        gumbel_TxNxE: standard Gumbel noise, one draw per task, so that a task takes one route
            in a whole batch; None at evaluation.

    Returns:
        float32 [T, N, E], non-negative, summing to one over E.
    """
    scaled = logits_TxNxE / temperature
    match config.selection:
        case "softmax":
            return jax.nn.softmax(scaled)
        case "gumbel_softmax" | "gumbel_softmax_st":
            if gumbel_TxNxE is not None:
                scaled = (logits_TxNxE + gumbel_TxNxE) / temperature
            soft = jax.nn.softmax(scaled)
            return soft if config.selection == "gumbel_softmax" else straight_through(soft)
        case "argmax":
            return straight_through(jax.nn.softmax(scaled))
        case "top_k":
            return top_k(scaled, min(config.experts_per_layer, logits_TxNxE.shape[-1]))
        case "average":
            return jnp.full_like(logits_TxNxE, 1.0 / logits_TxNxE.shape[-1])
    raise ValueError(f"{config.selection} does not depend on route logits")


def explore(routes_TxNxE: jax.Array, config: RouterConfig, key: jax.Array) -> jax.Array:
    """Replaces each task's route in each layer with probability `exploration_epsilon`.

    By a random one-hot or by the uniform distribution; a replaced route has no gradient. One
    rule for encoder and decoder. For training only.
    """
    *shape, experts = routes_TxNxE.shape
    replaced_key, expert_key = jax.random.split(key)
    if config.exploration_route == "one_hot":
        other = jax.nn.one_hot(jax.random.randint(expert_key, shape, 0, experts), experts)
    else:
        other = jnp.full_like(routes_TxNxE, 1.0 / experts)
    replaced_TxN = jax.random.bernoulli(replaced_key, config.exploration_epsilon, shape)
    return jnp.where(replaced_TxN[..., None], other, routes_TxNxE)


def random_route(key: jax.Array, layers: int, experts: int, count: int = 1) -> jax.Array:
    """`count` different random experts in every layer, equally weighted: [N, E]."""
    _, index_NxC = jax.lax.top_k(jax.random.uniform(key, (layers, experts)), count)
    return jax.nn.one_hot(index_NxC, experts).sum(1) / count
