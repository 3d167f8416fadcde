"""One training step: the gradient of the loss of all groups, the optimizer, the update."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from moe_jax.core.configuration import Configuration, Range
from moe_jax.core.errors import UserError
from moe_jax.core.sharding import SHARD_AXES, replicated, shardings, size_of
from moe_jax.data.batch import Batch
from moe_jax.data.packing import padding_share
from moe_jax.model.experts import Params, share
from moe_jax.model.selection import temperature_at
from moe_jax.model.task_moe import Assignment, TaskMoE, init_params, routes_of
from moe_jax.training.grouped_loss import Grouping, grouped_loss
from moe_jax.training.optimizer import OptimizerConfig, apply, clip_scale, make_optimizer, schedule
from moe_jax.training.penalties import penalty, route_entropy
from moe_jax.training.slots import Slots, find_slots, slot_count, update_in_slots, with_slots

# Drawing with these keys compiles faster than with threefry keys.
PRNG = "rbg"
Coefficient = Annotated[float, Range(-1e6, 1e6)]  # of a term of the loss


@dataclasses.dataclass(frozen=True)
class StepConfig(Configuration):
    """How the gradient of a batch is computed.

    Attributes:
        label_smoothing: probability mass spread evenly over the vocabulary.
        groups_at_once: number of groups computed together on every device; the optimizer steps once
            per batch in any case. 0 means as many as are faster together: if all groups share the
            same weights, as many as have 2,048 tokens (CPU) or 8,192 tokens (other devices); if
            they gather their own experts, as many as have tokens * d_model ** 2 of 2 ** 26 (CPU)
            or 2 ** 28 (other devices); if parameters are sharded, one.
        expert_distance: coefficient of a term that pulls experts together (below 0: apart).
        route_entropy: coefficient of a term that makes routes sharper (below 0: softer).
        route_load: coefficient of a term that spreads the tasks of a batch evenly over the experts.
            See `penalties` for all three terms, which are added to the mean loss per target token.
    """

    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.1
    groups_at_once: Annotated[int, Range(0, 2**20)] = 0
    expert_distance: Coefficient = 0.0
    route_entropy: Coefficient = 0.0
    route_load: Coefficient = 0.0


class TrainState(struct.PyTreeNode):
    """Everything a step changes."""

    step: jax.Array  # int32 scalar, steps done
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def abstract_state(
    model: TaskMoE, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A state of shapes with shardings, without values. Moments have the shardings of their
    parameters.

    A state must always have these shardings, so that the step is compiled only once.
    """
    boxed = jax.eval_shape(
        lambda: init_state(init_params(model, jax.random.key(0, impl=PRNG)), optimizer)
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.meta.unbox(boxed), shardings(boxed, mesh),
    )  # fmt: skip


def state_shardings(
    model: TaskMoE, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The sharding of every array of a state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))


def loss_and_metrics(
    free: Params,
    model: TaskMoE,
    params: Params,
    batch: Batch,
    *,
    step: jax.Array,
    key: jax.Array,
    config: StepConfig,
    mesh: Mesh,
    in_slots: bool = False,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Slots | None]]:
    """Returns the mean loss per target token plus penalties; metrics; slots, if they are used.

    Args:
        free: the trained parts of `params`, by which the loss is differentiated. With `in_slots`,
            the backbone has slots in place of experts (see `slots`).
        params: all parts.
        batch: a batch of the pipeline, [G, R, L] arrays; groups over `GROUP_AXES`.
        step: training step, which sets the temperature.
        key: key of this step, for dropout, Gumbel noise and random routes.
    """
    route_key, dropout_key = jax.random.split(key)
    trained = {part: tree for part, tree in free.items() if part != "backbone" or not in_slots}
    whole = params | trained
    assignment, slots, metrics = Assignment(None, None), None, {}
    if model.routed:
        routes_TxNxE = routes_of(model, whole, step, route_key)
        assignment = model.assign(routes_TxNxE, batch["task_id"], route_key)
        metrics["route_entropy"] = route_entropy(routes_TxNxE)
        metrics["temperature"] = temperature_at(model.router_config, step)
    if in_slots:
        slots = find_slots(assignment.index_GxNxK, model.config.experts)

    target_tokens = jnp.sum(batch["target_segments"] > 0).astype(jnp.float32)
    grouping = Grouping(
        model, mesh, config.label_smoothing, config.groups_at_once, "backbone" in free,
        routes_free=bool(free.keys() & {"router", "representations"}),
    )  # fmt: skip
    loss = grouped_loss(
        grouping, free.get("backbone", params["backbone"]), assignment.weights_GxNxK,
        jax.lax.stop_gradient(params["backbone"]), batch, assignment.index_GxNxK, slots,
        1.0 / jnp.maximum(target_tokens, 1.0), dropout_key,
    )  # fmt: skip
    terms = jnp.float32(0)
    if model.routed and (config.expert_distance or config.route_entropy or config.route_load):
        terms, by_name = penalty(model, whole, batch["task_id"], step, config)
        metrics |= by_name
    metrics = {"loss": loss, "target_tokens": target_tokens, **metrics}
    return loss + terms, (metrics, slots)


def gradients(
    model: TaskMoE,
    params: Params,
    batch: Batch,
    *,
    frozen: tuple[str, ...] = (),
    in_slots: bool = False,
    **settings: Any,
) -> tuple[Params, dict[str, jax.Array], Slots | None]:
    """Gradient of `loss_and_metrics`, which takes the same arguments.

    Args:
        frozen: parts of the parameters whose gradient is zero and not computed.
        in_slots: computes gradients only of used experts, if groups gather experts.

    Returns:
        (gradients like `params`, metrics, None); with `in_slots`, (gradients with only the slots
        of every routed layer, metrics, slots).
    """
    free = {part: tree for part, tree in params.items() if part not in frozen}
    if in_slots:
        count = slot_count(model, batch["task_id"].shape[0])
        free["backbone"] = with_slots(params["backbone"], count)
    differentiate = jax.value_and_grad(loss_and_metrics, has_aux=True)
    settings |= {"in_slots": in_slots}
    (_, (metrics, slots)), grads = differentiate(free, model, params, batch, **settings)
    zeros = {part: jax.tree.map(jnp.zeros_like, params[part]) for part in params if part in frozen}
    return {**grads, **zeros}, metrics, slots


def check_step(model: TaskMoE, optimizer_config: OptimizerConfig, config: StepConfig) -> None:
    """Raises a UserError for settings that contradict one another: alternation without a router,
    lazy experts with a setting that moves all of them, a term of routes that no router chooses."""
    if optimizer_config.alternate_every and not model.routed:
        raise UserError("OptimizerConfig.alternate_every is set, but the model has no router")
    lazy = _gathers(model, optimizer_config) and optimizer_config.lazy
    for name, value in _moving_all(optimizer_config, config).items():
        if lazy and value:
            raise UserError(
                f"{name} moves every expert, OptimizerConfig.lazy only those in use: take one of"
                " them"
            )
    for name in ("route_entropy", "route_load"):
        if getattr(config, name) and model.routed and not model.selection.learned:
            raise UserError(
                f"StepConfig.{name} is for routes that the router chooses, not for selection "
                f"'{model.selection.name}'"
            )


def _gathers(model: TaskMoE, optimizer_config: OptimizerConfig) -> bool:
    """Whether groups take some experts each, and these are trained."""
    return model.gathers and "backbone" not in optimizer_config.frozen


def _moving_all(optimizer_config: OptimizerConfig, config: StepConfig) -> dict[str, float]:
    """Settings that, if they are not 0, move experts that no group uses."""
    return {
        "StepConfig.expert_distance": config.expert_distance,
        "OptimizerConfig.shared_gradient": optimizer_config.shared_gradient,
    }


def step_function(
    model: TaskMoE,
    optimizer_config: OptimizerConfig,
    config: StepConfig,
    mesh: Mesh,
    total_steps: int,
    seed: int,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The step `(state, batch, learning_rates) -> (state, metrics)`, to be compiled.

    `learning_rates` are the peak values per part. They are traced, so that a new value does not
    compile the step again. All randomness comes from `seed` and the step, so resuming is exact.

    Raises:
        UserError: see `check_step`.
    """
    check_step(model, optimizer_config, config)
    gathers = _gathers(model, optimizer_config)
    lazy, shared = gathers and optimizer_config.lazy, optimizer_config.shared_gradient
    moves_all = any(_moving_all(optimizer_config, config).values())
    optimizer = make_optimizer(optimizer_config)

    def train_step(state: TrainState, batch: Batch, learning_rates: dict[str, jax.Array]):
        # 1. The gradient.
        key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), state.step)
        few = slot_count(model, batch["task_id"].shape[0]) < model.config.experts
        grads, metrics, slots = gradients(
            model, state.params, batch, step=state.step, key=key, config=config, mesh=mesh,
            frozen=optimizer_config.frozen,
            in_slots=lazy or (gathers and few and not moves_all),
        )  # fmt: skip
        if shared:
            grads = share(grads, shared)
        clip, metrics["gradient_norm"] = clip_scale(optimizer_config, grads, state.step)
        padding = padding_share(batch)  # of the whole batch over all processes
        metrics |= {f"padding/{name}": padding[name] for name in ("all", "unpacked")}
        # 2. The update.
        height = schedule(optimizer_config, state.step, total_steps)
        rates = {part: height * rate for part, rate in learning_rates.items()}
        metrics["learning_rate"] = rates["backbone"]

        def update(params, opt_state, grads):
            # Scaled here, because scaling before would read and write all gradients once more.
            grads = jax.tree.map(lambda g: g * clip.astype(g.dtype), grads)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to int32 powers
                directions, opt_state = optimizer.update(grads, opt_state, params)
            return apply(params, directions, rates), opt_state

        # 3. Applied, in place.
        old = (state.params, state.opt_state, grads)
        if slots is None:
            params, opt_state = update(*old)
        else:
            sharded = size_of(mesh, SHARD_AXES) > 1
            params, opt_state = update_in_slots(update, *old, slots, lazy, sharded)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_train_step(
    model: TaskMoE,
    optimizer_config: OptimizerConfig,
    config: StepConfig,
    mesh: Mesh,
    total_steps: int,
    seed: int,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """`step_function` compiled; it donates the state."""
    train_step = step_function(model, optimizer_config, config, mesh, total_steps, seed)
    optimizer = make_optimizer(optimizer_config)
    placed = (state_shardings(model, optimizer, mesh), replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=placed)
