"""AdamW with separate learning rates for experts, router and task representations."""

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from moe_jax.core.configuration import Configuration, Period, Range, Rate, Share, Size
from moe_jax.core.errors import UserError

PARTS = ("backbone", "router", "representations")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Configuration):
    """AdamW with separate learning rates for experts, router and task representations.

    Learning rates are peaks: linear warm-up, then linear decay to zero (or constant). Weight decay
    applies only to matrices of the backbone: not to norms, biases, the router or the task table,
    whose rows would otherwise shrink while their task is not in the batch.

    Attributes:
        learning_rate: learning rate of the backbone.
        router_learning_rate: learning rate of the router.
        representation_learning_rate: learning rate of the task table.
        frozen: parts that are not updated (no weight decay, no momentum) and do not count in the
            gradient norm: any of backbone, router, representations.
        warmup_fraction: share of all steps in which the learning rate rises.
        decay: `linear` to zero at the last step, or `constant`.
        clip_norm: gradients longer than this are scaled down to it; 0 for no clipping.
        weight_decay: coefficient of AdamW's weight decay.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        epsilon: added to the root of the mean of squares.
        first_moment_dtype: dtype of the mean of gradients; bfloat16 halves its memory. The mean of
            squares, which changes in small steps, stays float32.
        lazy: if groups gather experts, unused experts keep their weights and moments and cost
            nothing (see `training.slots`).
        shared_gradient: how much every expert learns from all tasks: its gradient is (1 - share) *
            its own + share * the sum of all experts' of its layer. With 0 it learns from its own
            tasks alone; with 1, experts that start alike stay alike, as one dense layer.
        alternate_every: n trains the backbone alone for n steps, then router and representations
            alone for n steps, and so on; waiting parts keep their moments. 0 trains all parts
            together.
    """

    learning_rate: Rate = 1e-5
    router_learning_rate: Rate = 1e-3
    representation_learning_rate: Rate = 1e-2
    frozen: Annotated[
        tuple[Literal["backbone", "router", "representations"], ...], Size(0, len(PARTS))
    ] = ()
    warmup_fraction: Share = 0.06
    decay: Literal["linear", "constant"] = "linear"
    clip_norm: Annotated[float, Range(0, 1e6)] = 0.1
    weight_decay: Annotated[float, Range(0, 1000)] = 0.01
    b1: Annotated[float, Range(0, 1, below=True)] = 0.9
    b2: Annotated[float, Range(0, 1, below=True)] = 0.999
    epsilon: Annotated[float, Range(1e-20, 1)] = 1e-8
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    lazy: bool = False
    shared_gradient: Share = 0.0
    alternate_every: Period = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        frozen = set(self.frozen)
        if self.alternate_every and ("backbone" in frozen or frozen >= set(PARTS[1:])):
            raise UserError(
                f"OptimizerConfig.frozen is {self.frozen}: there is nothing left to alternate with "
                f"(alternate_every is {self.alternate_every})"
            )

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
    """True for matrices of the backbone; norms and biases are recognised by their names."""

    def is_matrix(path: tuple, _) -> bool:
        names = [getattr(p, "key", "") for p in path]
        return names[0] == "backbone" and not names[-1].endswith(("bias", "scale"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def part_labels(params: Any) -> Any:
    """Parameter -> the name of its part, in the containers of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


def _labels(params: Any, config: OptimizerConfig) -> Any:
    """Parameter -> the name of its transformation in `make_optimizer`."""
    return jax.tree.map(lambda p: "frozen" if p in config.frozen else p, part_labels(params))


def clip_scale(config: OptimizerConfig, grads: Any, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(factor that scales gradients down to a norm of at most `clip_norm`, their norm).

    Args:
        grads: gradients by part; zero for frozen parts (see `step.gradients`).
        step: training step; parts that wait in an alternation do not count in the norm.
    """
    squares = {part: optax.tree.norm(g, squared=True) for part, g in grads.items()}
    if config.alternate_every:
        squares = {p: jnp.where(_has_turn(config, p, step), s, 0.0) for p, s in squares.items()}
    norm = jnp.sqrt(sum(squares.values()))
    if not config.clip_norm:
        return jnp.ones_like(norm), norm
    return config.clip_norm / jnp.maximum(norm, config.clip_norm), norm


def _has_turn(config: OptimizerConfig, part: str, step: jax.Array) -> jax.Array:
    """Whether an alternation trains the part in this step."""
    return step // config.alternate_every % 2 == (0 if part == "backbone" else 1)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW without learning rates, which `apply` applies. Frozen parts have no state.

    The update is elementwise, so it can run on any subset of the parameters (see `slots`). Clip the
    gradients before.
    """
    adamw = optax.chain(
        optax.scale_by_adam(
            b1=config.b1, b2=config.b2, eps=config.epsilon, mu_dtype=config.first_moment_dtype
        ),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
    )
    transforms = {"frozen": optax.set_to_zero()}
    for part in PARTS:
        transforms[part] = adamw
        if config.alternate_every:
            turn = partial(_has_turn, config, part)
            transforms[part] = optax.conditionally_mask(adamw, turn)
    return optax.multi_transform(transforms, lambda params: _labels(params, config))


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
