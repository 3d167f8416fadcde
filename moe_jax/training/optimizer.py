"""AdamW with one learning rate each for experts, router and task representations."""

import dataclasses
from typing import Any, Literal

import gin
import jax
import jax.numpy as jnp
import optax

from moe_jax.errors import check_fields

PARTS = ("backbone", "router", "representations")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates are peaks: linear warm-up, then linear decay to zero (or constant).

    A part in `frozen` gets no update, no weight decay, no momentum and no share in the gradient
    norm. Weight decay touches matrices of the backbone only: not norms, biases, the router or the
    task table, whose rows would otherwise shrink while their task is not in the batch.

    `lazy` leaves experts alone that no group of the batch uses, where groups gather experts: they
    neither go on by their momentum nor decay, and cost nothing (see `training.lazy`).
    """

    learning_rate: float = 1e-5
    router_learning_rate: float = 1e-3
    representation_learning_rate: float = 1e-2
    frozen: tuple[Literal["backbone", "router", "representations"], ...] = ()
    warmup_fraction: float = 0.06
    decay: Literal["linear", "constant"] = "linear"
    clip_norm: float = 0.1
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    lazy: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate per part."""
        rates = (self.learning_rate, self.router_learning_rate, self.representation_learning_rate)
        return dict(zip(PARTS, rates, strict=True))


def schedule(config: OptimizerConfig, step: jax.Array, total_steps: int) -> jax.Array:
    """Share of the peak learning rate at `step` (0-based), in (0, 1]."""
    warmup = max(1, round(config.warmup_fraction * total_steps))
    step = step.astype(jnp.float32)
    rising = (step + 1.0) / warmup
    if config.decay == "constant":
        return jnp.minimum(1.0, rising)
    falling = (total_steps - step) / max(1, total_steps - warmup)
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def _decayed(params: Any) -> Any:
    """True for matrices of the backbone: names of norms and biases tell the rest."""

    def is_matrix(path: tuple, _) -> bool:
        names = [getattr(p, "key", "") for p in path]
        return names[0] == "backbone" and not names[-1].endswith(("bias", "scale"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _labels(params: Any, config: OptimizerConfig) -> Any:
    return {
        part: jax.tree.map(lambda _, part=part: "frozen" if part in config.frozen else "free", tree)
        for part, tree in params.items()
    }


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW directions, to be scaled by `apply`. State is kept for parts that are not frozen.

    Gradients of frozen parts must be zero when they arrive (see `step.gradients`), so that
    clipping ignores them.
    """
    adamw = optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.multi_transform(
            {"free": adamw, "frozen": optax.set_to_zero()}, lambda p: _labels(p, config)
        ),
    )


def apply(params: Any, directions: Any, learning_rates: dict[str, jax.Array]) -> Any:
    """`params - learning_rate * direction`, with the learning rate of each part."""
    return {
        part: jax.tree.map(
            lambda p, d, part=part: p - jnp.asarray(learning_rates[part], p.dtype) * d,
            params[part],
            directions[part],
        )
        for part in params
    }
