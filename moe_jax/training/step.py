"""One training step: gradients group by group, then the optimizer.

Each group reads one task's route, gathers the experts it names and runs a dense model
(DESIGN: route the weights, not the tokens). Groups run one after the other in a scan, so that
activations of one group at a time are alive, and gradients are added in place into the full tree.
Under a mesh, each device scans the groups it holds.
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

from moe_jax.data.packing import padding_share
from moe_jax.errors import UserError, check_fields
from moe_jax.model.experts import Params, gather, scatter_add
from moe_jax.model.moe import Assignment, TaskMoE
from moe_jax.model.selection import temperature_at
from moe_jax.parallel import GROUP_AXES, group_shards, replicated, shardings
from moe_jax.training.loss import token_losses
from moe_jax.training.optimizer import OptimizerConfig, apply, make_optimizer, schedule

Batch = dict[str, jax.Array]
# The hardware's generator: dropout masks cost and compile several times less than threefry's.
PRNG = "rbg"


@gin.configurable
@dataclasses.dataclass(frozen=True)
class StepConfig:
    """`groups_at_once` groups run side by side in one scan step (on every device).

    It is gradient accumulation: the optimizer steps once per batch, whatever it is.
    """

    label_smoothing: float = 0.1
    groups_at_once: int = 1

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


def group_loss(
    model: TaskMoE,
    backbone: Params,
    weights_NxK: jax.Array | None,
    group: Batch,
    key: jax.Array | None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Summed loss of one group under its route; `key` drives dropout (None: none)."""
    logits = model.backbone(model.experts_per_layer).apply(
        {"params": backbone}, group, weights_NxK, key is None,
        rngs=None if key is None else {"dropout": key},
    )  # fmt: skip
    losses = token_losses(logits, group["targets"], label_smoothing)
    return jnp.sum(jnp.where(group["target_segments"] > 0, losses, 0.0))


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
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of the mean loss per target token, and metrics.

    Args:
        batch: a batch of the pipeline, [G, R, L] arrays; groups sharded over the data axes.
        step: for the temperature.
        key: of this step; dropout, Gumbel noise and random routes are drawn from it.
        frozen: parts of the parameters whose gradient is left zero (and not computed).

    Returns:
        (gradients like `params`, {"loss", "target_tokens", ...} scalars).
    """
    route_key, dropout_key = jax.random.split(key)
    free_router = model.routed and not {"router", "representations"} <= set(frozen)
    routing_params = {k: v for k, v in params.items() if k != "backbone"}

    def assign(routing_params: Params) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
        routes_TxNxE = model.routes(routing_params, step, route_key)
        assignment = model.assign(routes_TxNxE, batch["task_id"], route_key)
        return assignment.weights_GxNxK, (assignment.index_GxNxK, routes_TxNxE)

    metrics = {}
    assignment = None
    pull_back = None
    if model.routed:
        if free_router:
            weights, pull_back, (index, routes) = jax.vjp(assign, routing_params, has_aux=True)
        else:
            weights, (index, routes) = assign(routing_params)
        assignment = Assignment(index, weights)
        entropy = -jnp.sum(jnp.where(routes > 0, routes * jnp.log(routes + 1e-20), 0.0), -1)
        metrics["route_entropy"] = jnp.mean(entropy)
        metrics["temperature"] = temperature_at(model.router_config, step)

    target_tokens = jnp.sum(batch["target_segments"] > 0).astype(jnp.float32)
    local = partial(
        _local_gradients, model, config=config, shards=group_shards(mesh), weighted=free_router
    )
    loss, backbone_grads, weight_grads = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(GROUP_AXES), P(GROUP_AXES), P()),
        out_specs=(P(), P(), P(GROUP_AXES)),
        axis_names=set(GROUP_AXES),
        check_vma=False,
    )(params["backbone"], batch, assignment, dropout_key)

    scale = 1.0 / jnp.maximum(target_tokens, 1.0)
    grads = jax.tree.map(jnp.zeros_like, routing_params)
    if pull_back is not None:
        grads = pull_back(weight_grads * scale)[0]
    grads = {"backbone": jax.tree.map(lambda g: g * scale, backbone_grads), **grads}
    for part in frozen:
        if part in grads:
            grads[part] = jax.tree.map(jnp.zeros_like, grads[part])
    return grads, {"loss": loss * scale, "target_tokens": target_tokens, **metrics}


def _local_gradients(
    model: TaskMoE,
    backbone: Params,
    batch: Batch,
    assignment: Assignment | None,
    key: jax.Array,
    *,
    config: StepConfig,
    shards: int,
    weighted: bool,
):
    """Sums of loss and gradients over the groups of this device, then over devices."""
    groups = batch["task_id"].shape[0]
    at_once = min(config.groups_at_once, groups)
    if groups % at_once:
        raise UserError(
            f"StepConfig.groups_at_once {at_once} does not divide the {groups} groups per device"
        )
    first = jax.lax.axis_index(GROUP_AXES) * groups if shards > 1 else 0
    keys_G = jax.vmap(lambda g: jax.random.fold_in(key, g))(first + jnp.arange(groups))
    index = None if assignment is None else assignment.index_GxNxK
    weights = None if assignment is None else assignment.weights_GxNxK

    def one_group(group, index_NxK, weights_NxK, group_key):
        chosen = backbone if index_NxK is None else gather(backbone, index_NxK)
        loss = partial(group_loss, model)
        args = (chosen, weights_NxK, group, group_key, config.label_smoothing)
        if weighted:
            value, (d_backbone, d_weights) = jax.value_and_grad(loss, argnums=(0, 1))(*args)
        else:
            value, d_backbone = jax.value_and_grad(loss)(*args)
            d_weights = jnp.zeros(()) if weights_NxK is None else jnp.zeros_like(weights_NxK)
        return value, d_backbone, d_weights

    def body(carry, xs):
        total_loss, total = carry
        index_WxNxK = xs[1]
        if at_once == 1:
            first_of = partial(jax.tree.map, lambda a: a[0])
            value, grads, d_weights = one_group(*map(first_of, xs))
            index_NxK = first_of(index_WxNxK)
            d_weights = d_weights[None]
        else:
            values, grads_W, d_weights = jax.vmap(one_group)(*xs)
            value = values.sum()
            if index_WxNxK is None:
                grads = jax.tree.map(lambda g: g.sum(0), grads_W)
            else:
                grads = jax.tree.map(jnp.zeros_like, backbone)
                for w in range(at_once):
                    one = jax.tree.map(lambda g, w=w: g[w], grads_W)
                    grads = scatter_add(grads, one, index_WxNxK[w])
            index_NxK = None
        if index_NxK is None:
            total = jax.tree.map(jnp.add, total, grads)
        else:
            total = scatter_add(total, grads, index_NxK)
        return (total_loss + value, total), d_weights

    xs = (batch, index, weights, keys_G)
    if groups == at_once == 1 and index is None:
        value, total, d_weights = one_group(*jax.tree.map(lambda a: a[0], xs))
        d_weights = d_weights[None]
    else:
        xs = jax.tree.map(lambda a: a.reshape(-1, at_once, *a.shape[1:]), xs)
        zeros = jax.tree.map(jnp.zeros_like, backbone)
        (value, total), d_weights = jax.lax.scan(body, (jnp.float32(0), zeros), xs)
        d_weights = d_weights.reshape(groups, *d_weights.shape[2:])
    if shards > 1:
        value, total = jax.lax.psum((value, total), GROUP_AXES)
    return value, total, d_weights


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
    """
    optimizer = make_optimizer(optimizer_config)

    def train_step(state: TrainState, batch: Batch, learning_rates: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), state.step)
        grads, metrics = gradients(
            model, state.params, batch, step=state.step, key=key, config=config, mesh=mesh,
            frozen=optimizer_config.frozen,
        )  # fmt: skip
        metrics["gradient_norm"] = optax.tree.norm(grads)
        share = padding_share(batch)  # of the whole batch, whichever process holds which part
        metrics |= {f"padding/{name}": share[name] for name in ("all", "unpacked")}
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to int32 powers
            directions, opt_state = optimizer.update(grads, state.opt_state, state.params)
        height = schedule(optimizer_config, state.step, total_steps)
        rates = {part: height * rate for part, rate in learning_rates.items()}
        metrics["learning_rate"] = rates["backbone"]
        params = apply(state.params, directions, rates)
        return TrainState(state.step + 1, params, opt_state), metrics

    placed = (state_shardings(model, optimizer, mesh), replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=placed)
