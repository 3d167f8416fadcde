"""One training step: routes, gradients of the groups (`groups`), then the optimizer.

Under a mesh, each device computes the groups it holds.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.core.errors import UserError, check_fields
from moe_jax.core.sharding import GROUP_AXES, group_shards, replicated, shardings
from moe_jax.data.packing import padding_share
from moe_jax.model.experts import Params
from moe_jax.model.moe import Assignment, TaskMoE
from moe_jax.model.selection import temperature_at
from moe_jax.training.grouped_loss import Batch, local_gradients
from moe_jax.training.lazy import Slots, find_slots, update_used
from moe_jax.training.optimizer import OptimizerConfig, apply, clip_scale, make_optimizer, schedule
from moe_jax.training.penalties import penalty, route_entropy

# Drawing with these keys compiles faster than with threefry's.
PRNG = "rbg"


@gin.configurable
@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How the gradient of a batch is computed.

    Attributes:
        label_smoothing: share of the target's probability spread over the vocabulary.
        groups_at_once: groups that run side by side (on every device); the optimizer steps once
            per batch, whatever it is. 0 takes one at a time where groups gather experts of their
            own; where all share the same weights, as many as make 2,048 tokens on CPU, or 8,192.
        expert_distance: coefficient of a term that pulls experts together (below 0: apart).
        route_entropy: of one that makes routes sharper (below 0: softer).
        route_load: of one that spreads the tasks of a batch evenly over the experts. See
            `regularisation` for all three; they are added to the mean loss per target token.
    """

    label_smoothing: float = 0.1
    groups_at_once: int = 0
    expert_distance: float = 0.0
    route_entropy: float = 0.0
    route_load: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


class TrainState(struct.PyTreeNode):
    """Everything a step changes."""

    step: jax.Array  # int32 scalar, steps done
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def state_shardings(
    model: TaskMoE, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where every array of a state lives: the optimizer's beside their parameters.

    Whatever makes a state places it so, and the step keeps it so: it is compiled once.
    """
    boxed = jax.eval_shape(
        lambda key: init_state(model.init(key), optimizer), jax.random.key(0, impl=PRNG)
    )
    return shardings(boxed, mesh)


def gradients(
    model: TaskMoE,
    params: Params,
    batch: Batch,
    *,
    step: jax.Array,
    key: jax.Array,
    config: StepConfig,
    mesh: Mesh,
    frozen: tuple[str, ...] = (),
    lazy: bool = False,
) -> tuple[Params, dict[str, jax.Array], Slots | None]:
    """Gradient of the mean loss per target token, and metrics.

    Args:
        batch: a batch of the pipeline, [G, R, L] arrays; groups sharded over the data axes.
        step: for the temperature.
        key: of this step; dropout, Gumbel noise and random routes are drawn from it.
        frozen: parts of the parameters whose gradient is left zero (and not computed).
        lazy: where groups gather experts, only those in use are differentiated (see `lazy`).

    Returns:
        (gradients like `params`, {"loss", "target_tokens", ...} scalars, None); with `lazy`,
        (gradients with only the slots of every routed layer, scalars, slots).
    """
    route_key, dropout_key = jax.random.split(key)
    free_router = model.routed and not {"router", "representations"} <= set(frozen)
    routing_params = {k: v for k, v in params.items() if k != "backbone"}

    def assign(routing_params: Params) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
        routes_TxNxE = model.routes(routing_params, step, route_key)
        assignment = model.assign(routes_TxNxE, batch["task_id"], route_key)
        return assignment.weights_GxNxK, (assignment.index_GxNxK, routes_TxNxE)

    metrics = {}
    assignment = index = pull_back = None
    if model.routed:
        if free_router:
            weights, pull_back, (index, routes) = jax.vjp(assign, routing_params, has_aux=True)
        else:
            weights, (index, routes) = assign(routing_params)
        assignment = Assignment(index, weights)
        metrics["route_entropy"] = route_entropy(routes)
        metrics["temperature"] = temperature_at(model.router_config, step)

    target_tokens = jnp.sum(batch["target_segments"] > 0).astype(jnp.float32)
    scale = 1.0 / jnp.maximum(target_tokens, 1.0)
    local = partial(
        local_gradients, model, label_smoothing=config.label_smoothing,
        groups_at_once=config.groups_at_once, shards=group_shards(mesh), weighted=free_router,
    )  # fmt: skip
    slots = None
    if lazy and index is not None and "backbone" not in frozen:
        slots = find_slots(index, model.config.experts)
    loss, backbone_grads, weight_grads = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            P(),
            P(GROUP_AXES),
            P(GROUP_AXES),
            Slots(P(), P(), P(GROUP_AXES)) if slots else P(),
            P(),
            P(),
        ),
        out_specs=(P(), P(), P(GROUP_AXES)),
        axis_names=set(GROUP_AXES),
        check_vma=False,
    )(params["backbone"], batch, assignment, slots, scale, dropout_key)

    grads = jax.tree.map(jnp.zeros_like, routing_params)
    if pull_back is not None:
        grads = pull_back(weight_grads)[0]
    grads = {"backbone": backbone_grads, **grads}
    if model.routed and (config.expert_distance or config.route_entropy or config.route_load):
        if slots is not None and config.expert_distance:
            raise UserError(
                "StepConfig.expert_distance moves every expert, OptimizerConfig.lazy only those "
                "in use: take one of them"
            )
        add_grads, terms = jax.grad(
            lambda p: penalty(model, p, batch["task_id"], step, config), has_aux=True
        )(params)
        if slots is not None:  # no term depends on the experts
            add_grads["backbone"] = jax.tree.map(jnp.zeros_like, grads["backbone"])
        grads = jax.tree.map(jnp.add, grads, add_grads)
        metrics |= terms
    for part in frozen:
        if part in grads:
            grads[part] = jax.tree.map(jnp.zeros_like, grads[part])
    return grads, {"loss": loss, "target_tokens": target_tokens, **metrics}, slots


def make_train_step(
    model: TaskMoE,
    optimizer_config: OptimizerConfig,
    config: StepConfig,
    mesh: Mesh,
    total_steps: int,
    seed: int,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The jitted step `(state, batch, learning_rates) -> (state, metrics)`; donates the state.

    `learning_rates` are the peaks per part, traced, so that another learning rate does not
    compile again. All randomness is folded from `seed` and the step: resuming is exact.

    Raises:
        UserError: router and experts are to alternate, but there is no router.
    """
    if optimizer_config.alternate_every and not model.routed:
        raise UserError("OptimizerConfig.alternate_every is set, but the model has no router")
    optimizer = make_optimizer(optimizer_config)

    def train_step(state: TrainState, batch: Batch, learning_rates: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), state.step)
        grads, metrics, slots = gradients(
            model, state.params, batch, step=state.step, key=key, config=config, mesh=mesh,
            frozen=optimizer_config.frozen, lazy=optimizer_config.lazy,
        )  # fmt: skip
        clip, metrics["gradient_norm"] = clip_scale(optimizer_config, grads, state.step)
        share = padding_share(batch)  # of the whole batch, whichever process holds which part
        metrics |= {f"padding/{name}": share[name] for name in ("all", "unpacked")}
        height = schedule(optimizer_config, state.step, total_steps)
        rates = {part: height * rate for part, rate in learning_rates.items()}
        metrics["learning_rate"] = rates["backbone"]

        def update(params, opt_state, grads):
            # Here, not before: all gradients would be read and written once more.
            grads = jax.tree.map(lambda g: g * clip.astype(g.dtype), grads)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to int32 powers
                directions, opt_state = optimizer.update(grads, opt_state, params)
            return apply(params, directions, rates), opt_state

        old = (state.params, state.opt_state, grads)
        params, opt_state = update(*old) if slots is None else update_used(update, *old, slots)
        return TrainState(state.step + 1, params, opt_state), metrics

    placed = (state_shardings(model, optimizer, mesh), replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=placed)
