"""Selections: route logits -> routes. Noise only in training; deterministic at evaluation.

A selection is one record. To add one, register it, also from outside the package:

    register(Selection("mine", lambda logits, temperature, noise, k: ..., hard=True))
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from moe_jax.model.config import RouterConfig

# (logits [T, N, E], temperature, standard Gumbel noise [T, N, E] or None, k) -> routes [T, N, E]:
# float32, non-negative, summing to one over E.
Route = Callable[[jax.Array, jax.Array | float, jax.Array | None, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Selection:
    """How route logits become a distribution over the experts of each layer.

    Attributes:
        route: see `Route`; None if routes are drawn at random.
        noisy: noise is drawn in training, once per task, so that a task takes one route in a batch.
        hard: one expert has all the weight.
        gathers: the route may have fewer than E non-zero weights, so that only k < E experts are
            computed.
        needs_k: `RouterConfig.experts_per_layer` must be given.
        learned: the router decides; otherwise this is a baseline.
        random: routes are drawn once per `task`, or per `group` in every step.
        settled: the name of the same selection without noise, used for a new task of a trained
            model. Empty means this one.
    """

    name: str
    route: Route | None
    noisy: bool = False
    hard: bool = False
    gathers: bool = False
    needs_k: bool = False
    learned: bool = True
    random: Literal["", "task", "group"] = ""
    settled: str = ""


SELECTIONS: dict[str, Selection] = {}  # by name


def register(selection: Selection) -> Selection:
    """Registers a selection by its name; replaces an earlier one of the same name."""
    SELECTIONS[selection.name] = selection
    return selection


def straight_through(soft: jax.Array) -> jax.Array:
    """The value is the one-hot vector of the largest entry; the gradient is that of `soft`."""
    hard = jax.nn.one_hot(jnp.argmax(soft, -1), soft.shape[-1], dtype=soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))  # in this order, the value is exactly `hard`


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Softmax over the k largest logits, zero elsewhere."""
    _, index = jax.lax.top_k(logits, k)
    kept = jax.nn.one_hot(index, logits.shape[-1], dtype=bool).any(-2)
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), -1)


def _softmax(logits, temperature, noise, k):
    del k
    return jax.nn.softmax((logits if noise is None else logits + noise) / temperature)


def _straight_through(logits, temperature, noise, k):
    return straight_through(_softmax(logits, temperature, noise, k))


def _top_k(logits, temperature, noise, k):
    del noise
    return top_k(logits / temperature, min(k, logits.shape[-1]))


def _average(logits, temperature, noise, k):
    del temperature, noise, k
    return jnp.full_like(logits, 1.0 / logits.shape[-1])


for _selection in (
    Selection("softmax", _softmax),
    Selection("gumbel_softmax", _softmax, noisy=True, settled="softmax"),
    Selection(
        "gumbel_softmax_st", _straight_through, noisy=True, hard=True, gathers=True,
        settled="argmax",
    ),
    Selection("argmax", _straight_through, hard=True, gathers=True),
    Selection("top_k", _top_k, gathers=True, needs_k=True),
    Selection("average", _average, learned=False),
    Selection("random_task", None, gathers=True, learned=False, random="task"),
    Selection("random_instance", None, gathers=True, learned=False, random="group"),
):  # fmt: skip
    register(_selection)


def temperature_at(config: "RouterConfig", step: jax.Array | int) -> jax.Array:
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


def select(
    logits_TxNxE: jax.Array,
    config: "RouterConfig",
    *,
    temperature: jax.Array | float,
    gumbel_TxNxE: jax.Array | None = None,
) -> jax.Array:
    """Turns logits into routes with the selection of `config`.

    Args:
        gumbel_TxNxE: standard Gumbel noise; None at evaluation.

    Returns:
        float32 [T, N, E], non-negative, summing to one over E.

    Raises:
        ValueError: the selection draws its routes at random.
    """
    selection = SELECTIONS[config.selection]
    if selection.route is None:
        raise ValueError(f"{selection.name} does not depend on route logits")
    noise_TxNxE = gumbel_TxNxE if selection.noisy else None
    return selection.route(logits_TxNxE, temperature, noise_TxNxE, config.experts_per_layer)


def explore(routes_TxNxE: jax.Array, config: "RouterConfig", key: jax.Array) -> jax.Array:
    """Replaces each task's route in each layer with probability `exploration_epsilon`.

    The replacement is a random one-hot vector or the uniform distribution, and has no gradient. The
    same rule applies in encoder and decoder. For training only.
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
