"""The task-level mixture of experts: representations, router and backbone put together.

    model = TaskMoE(ModelConfig(...), RouterConfig(...), tasks=32)
    logits, out = model.apply({"params": params}, batch, train=False)

`out["routes"]` is the route that every group took.
"""

from functools import cache
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.core.sharding import shardings
from moe_jax.data.batch import Batch, of_rows
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.dispatch import Gather, Mix
from moe_jax.model.experts import Params
from moe_jax.model.router import ROUTERS, Router
from moe_jax.model.selection import (
    SELECTIONS,
    Selection,
    explore,
    random_route,
    select,
    temperature_at,
)


class Assignment(NamedTuple):
    """What each group computes: k experts per routed layer and their weights.

    `index_GxNxK` is None if all E experts are used.
    """

    index_GxNxK: jax.Array | None
    weights_GxNxK: jax.Array

    def dispatch(self) -> Mix | Gather:
        """The dispatch of G groups, or of one group after slicing."""
        if self.index_GxNxK is None:
            return Mix(self.weights_GxNxK)
        return Gather(self.index_GxNxK, self.weights_GxNxK)


class TaskMoE(nn.Module):
    """An encoder-decoder in which a router chooses the experts of each routed layer per task.

    Parameters are `{"backbone", "router", "representations"}`; a dense model has `backbone` alone.
    Random streams: `dropout`; `route` for the noise of selections, exploration and random routes.

    Attributes:
        tasks: T, the number of rows of the task table.
    """

    config: ModelConfig
    router_config: RouterConfig
    tasks: int

    def __post_init__(self) -> None:
        if self.routed:
            sizes = (self.layers, self.config.experts)
            ROUTERS[self.router_config.kind].check_model(self.router_config, *sizes)
        super().__post_init__()

    def setup(self) -> None:
        self.backbone = EncoderDecoder(self.config)
        if self.routed:
            self.router = self.new_router()
            init = nn.with_logical_partitioning(
                nn.initializers.normal(1.0), ("task", "representation")
            )
            shape = (self.tasks, self.router_config.representation_dim)
            self.representations = self.param("representations", init, shape)

    def __call__(
        self, batch: Batch, train: bool = False, step: jax.Array | int = 0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits of every target token, and the routes.

        Args:
            batch: [G, R, L] arrays and `task_id` [G].
            step: training step, which sets the temperature.

        Returns:
            (logits float32 [G, R, L_out, V], {"routes": float32 [G, N, E]}; no routes in a dense
            model).
        """
        dispatch, out = None, {}
        if self.routed:
            key = self.make_rng("route") if train else None
            routes_TxNxE = self.task_routes(step, key)
            assignment = self.assign(routes_TxNxE, batch["task_id"], key)
            dispatch, out = assignment.dispatch(), {"routes": self.used(assignment)}

        def one_group(backbone, _, group):
            return None, backbone(*group, train)

        scan = nn.scan(
            one_group, variable_broadcast="params", variable_axes={"intermediates": 0},
            split_rngs={"dropout": True},
        )  # fmt: skip
        if self.is_initializing():
            if self.routed:  # also if routes are random and the router is not used
                self.router(self.representations)
            first = jax.tree.map(lambda a: a[0], of_rows(batch))
            return self.backbone(first)[None], out
        return scan(self.backbone, None, (of_rows(batch), dispatch))[1], out

    def task_routes(self, step: jax.Array | int, key: jax.Array | None = None) -> jax.Array:
        """The route of every task: float32 [T, N, E]; see `routes_of`."""
        c, selection = self.router_config, self.selection
        if selection.random:
            return self.random_routes()
        logits_TxNxE = self.router(self.representations)
        temperature = temperature_at(c, step)
        if key is None:
            return select(logits_TxNxE, c, temperature=temperature)
        noise_key, explore_key = jax.random.split(key)
        gumbel = jax.random.gumbel(noise_key, logits_TxNxE.shape) if selection.noisy else None
        routes = select(logits_TxNxE, c, temperature=temperature, gumbel_TxNxE=gumbel)
        return explore(routes, c, explore_key) if c.exploration_epsilon else routes

    # ------------------------------------------------- functions of the settings

    @property
    def selection(self) -> Selection:
        """The selection, which turns route logits into routes."""
        return SELECTIONS[self.router_config.selection]

    @property
    def routed(self) -> bool:
        """Whether there is a router; if not, this is the dense model."""
        return self.config.experts > 1 and bool(self.config.routed_layers)

    @property
    def layers(self) -> int:
        """N, the number of routed layers."""
        return len(self.config.routed_layers)

    @property
    def experts_per_layer(self) -> int:
        """k, the experts computed per routed layer."""
        default = 1 if self.selection.random else self.config.experts
        return min(self.router_config.experts_per_layer or default, self.config.experts)

    @property
    def gathers(self) -> bool:
        """Whether a group takes some experts of each routed layer, not all."""
        return self.routed and self.experts_per_layer < self.config.experts

    @nn.nowrap
    def new_router(self) -> Router:
        """The router as a module of its own: `.apply({"params": params["router"]}, table)`."""
        sizes = (self.layers, self.config.experts)
        return ROUTERS[self.router_config.kind](self.router_config, *sizes)

    @nn.nowrap
    def assign(
        self, routes_TxNxE: jax.Array, task_id_G: jax.Array, key: jax.Array | None = None
    ) -> Assignment:
        """The experts and weights of every group.

        Args:
            task_id_G: int, the task of each group.
            key: key for routes that are random per group.
        """
        weights_GxNxE = routes_TxNxE[task_id_G]
        if self.selection.random == "group" and key is not None:
            keys = jax.random.split(key, task_id_G.shape[0])
            weights_GxNxE = jax.vmap(self._random_route)(keys)
        if not self.gathers:
            return Assignment(None, weights_GxNxE)
        _, index_GxNxK = jax.lax.top_k(jax.lax.stop_gradient(weights_GxNxE), self.experts_per_layer)
        return Assignment(index_GxNxK, jnp.take_along_axis(weights_GxNxE, index_GxNxK, -1))

    @nn.nowrap
    def used(self, assignment: Assignment) -> jax.Array:
        """The routes of an assignment over all experts: float32 [G, N, E]."""
        index, weights = assignment
        if index is None:
            return weights
        one_hot_GxNxKxE = jax.nn.one_hot(index, self.config.experts, dtype=weights.dtype)
        return jnp.einsum("gnk,gnke->gne", weights, one_hot_GxNxKxE)

    @nn.nowrap
    def random_routes(self) -> jax.Array:
        """The random route of every task, drawn from `RouterConfig.seed`: float32 [T, N, E]."""
        seed = jax.random.key(self.router_config.seed)
        keys_T = jax.vmap(lambda t: jax.random.fold_in(seed, t))(jnp.arange(self.tasks))
        return jax.vmap(self._random_route)(keys_T)

    @nn.nowrap
    def _random_route(self, key: jax.Array) -> jax.Array:
        return random_route(key, self.layers, self.config.experts, self.experts_per_layer)


# ------------------------------------------------------------------- functions of parameters


def init_params(model: TaskMoE, key: jax.Array) -> Params:
    """Fresh parameters, boxed with their logical axes (`nn.meta.unbox` takes them off)."""
    one = jnp.ones((1, 1, 1), jnp.int32)
    batch = dict.fromkeys(Batch.__annotations__, one) | {"task_id": jnp.zeros((1,), jnp.int32)}
    keys = jax.random.split(key, 3)
    rngs = dict(zip(("params", "experts", "route"), keys, strict=True))
    params = model.init(rngs, batch)["params"]
    if model.routed:
        params.setdefault("router", {})  # if it has no parameters
    return params


def routes_of(
    model: TaskMoE, params: Params, step: jax.Array | int, key: jax.Array | None = None
) -> jax.Array:
    """The route of every row of the task table.

    Args:
        params: at least `router` and `representations`, if routes are not random. The number of
            rows of the table may differ from the model's.
        step: for the temperature.
        key: key for training noise; None at evaluation.

    Returns:
        float32 [T, N, E].
    """
    if model.selection.random:
        return model.random_routes()
    model = model.clone(tasks=params["representations"].shape[0])
    return model.apply({"params": params}, step, key, method="task_routes")


def route_logits(model: TaskMoE, params: Params) -> jax.Array:
    """The router's logits of every row of the task table: float32 [T, N, E]."""
    router = {"params": params["router"]}
    return model.new_router().apply(router, params["representations"])


def soft_routes(model: TaskMoE, params: Params, step: jax.Array | int) -> jax.Array:
    """The softmax of `route_logits` at the temperature of `step`: no noise, no selection."""
    logits_TxNxE = route_logits(model, params)
    return jax.nn.softmax(logits_TxNxE / temperature_at(model.router_config, step))


@cache
def parameter_shardings(model: TaskMoE, mesh: Mesh) -> Params:
    """NamedSharding of every parameter."""
    return shardings(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), mesh)


def shapes_of(model: TaskMoE) -> dict[str, list[int]]:
    """Shape of every parameter by name, without allocating any."""
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return parameter_shapes(nn.meta.unbox(boxed))


def parameter_shapes(params: Params) -> dict[str, list[int]]:
    """`backbone/encoder/norm/scale` -> shape."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(p.key for p in path): list(leaf.shape) for path, leaf in leaves}
