"""The task-level mixture of experts: representations, router and backbone put together."""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core.errors import UserError
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.experts import Params
from moe_jax.model.router import Router
from moe_jax.model.selection import explore, random_route, select, temperature_at

RANDOM = ("random_task", "random_instance")


class Assignment(NamedTuple):
    """What each group computes: k experts per routed layer and their weights.

    `index_GxNxK` is None where all E experts are used.
    """

    index_GxNxK: jax.Array | None
    weights_GxNxK: jax.Array


@dataclasses.dataclass(frozen=True)
class TaskMoE:
    """Pure functions over a parameter tree `{"backbone", "router", "representations"}`.

    Attributes:
        tasks: T, the number of rows of the task table.
    """

    config: ModelConfig
    router_config: RouterConfig
    tasks: int

    def __post_init__(self) -> None:
        dim, numbers = self.router_config.representation_dim, self.layers * self.config.experts
        if self.routed and self.router_config.kind == "free" and dim != numbers:
            raise UserError(
                f"RouterConfig.representation_dim is {dim}, but the route logits of kind 'free' "
                f"are {self.layers} layers x {self.config.experts} experts = {numbers} numbers"
            )

    @property
    def routed(self) -> bool:
        """Whether there is anything to route; if not, this is the dense model."""
        return self.config.experts > 1 and bool(self.config.routed_layers)

    @property
    def experts_per_layer(self) -> int:
        """k, the experts computed per routed layer."""
        c = self.router_config
        default = 1 if c.selection in RANDOM else self.config.experts
        return min(c.experts_per_layer or default, self.config.experts)

    @property
    def layers(self) -> int:
        """N, the number of routed layers."""
        return len(self.config.routed_layers)

    @cached_property
    def router(self) -> Router:
        return Router(self.router_config, self.layers, self.config.experts)

    def backbone(self, experts: int) -> EncoderDecoder:
        """The backbone holding `experts` experts per routed layer."""
        return EncoderDecoder(self.config, experts)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, boxed with their logical axes (`nn.meta.unbox` takes them off)."""
        backbone_key, router_key, table_key = jax.random.split(key, 3)
        one = jnp.ones((1, 1), jnp.int32)
        batch = dict.fromkeys(
            ("inputs", "input_segments", "decoder_inputs", "target_segments"), one
        )
        batch |= dict.fromkeys(("input_positions", "target_positions"), 0 * one)
        weights = jnp.ones((self.layers, self.config.experts)) if self.routed else None
        params = {
            "backbone": self.backbone(self.config.experts).init(backbone_key, batch, weights)[
                "params"
            ]
        }
        if self.routed:
            dim = self.router_config.representation_dim
            table = nn.LogicallyPartitioned(
                jax.random.normal(table_key, (self.tasks, dim)), ("task", "representation")
            )
            params["representations"] = table
            params["router"] = self.router.init(router_key, table.value[:1]).get("params", {})
        return params

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter by name, without allocating any."""
        return parameter_shapes(nn.meta.unbox(jax.eval_shape(self.init, jax.random.key(0))))

    def routes(
        self, params: Params, step: jax.Array | int, key: jax.Array | None = None
    ) -> jax.Array:
        """The route of every task.

        Args:
            step: for the temperature.
            key: for the noise of training; None at evaluation.

        Returns:
            float32 [T, N, E].
        """
        c = self.router_config
        if c.selection in RANDOM:
            seed = jax.random.key(c.seed)
            keys_T = jax.vmap(lambda t: jax.random.fold_in(seed, t))(jnp.arange(self.tasks))
            return jax.vmap(self._random_route)(keys_T)
        logits = self.router.apply({"params": params["router"]}, params["representations"])
        temperature = temperature_at(c, step)
        if key is None:
            return select(logits, c, temperature=temperature)
        noise_key, explore_key = jax.random.split(key)
        noisy = c.selection.startswith("gumbel")
        gumbel = jax.random.gumbel(noise_key, logits.shape) if noisy else None
        routes = select(logits, c, temperature=temperature, gumbel_TxNxE=gumbel)
        return explore(routes, c, explore_key) if c.exploration_epsilon else routes

    def _random_route(self, key: jax.Array) -> jax.Array:
        return random_route(key, self.layers, self.config.experts, self.experts_per_layer)

    def assign(
        self, routes_TxNxE: jax.Array, task_id_G: jax.Array, key: jax.Array | None = None
    ) -> Assignment:
        """The experts and weights of every group.

        Args:
            task_id_G: int, the task of each group.
            key: draws the routes of `random_instance`.
        """
        weights_GxNxE = routes_TxNxE[task_id_G]
        if self.router_config.selection == "random_instance" and key is not None:
            keys = jax.random.split(key, task_id_G.shape[0])
            weights_GxNxE = jax.vmap(self._random_route)(keys)
        if self.experts_per_layer == self.config.experts:
            return Assignment(None, weights_GxNxE)
        _, index_GxNxK = jax.lax.top_k(jax.lax.stop_gradient(weights_GxNxE), self.experts_per_layer)
        return Assignment(index_GxNxK, jnp.take_along_axis(weights_GxNxE, index_GxNxK, -1))


def parameter_shapes(params: Params) -> dict[str, list[int]]:
    """`backbone/encoder/norm/scale` -> shape."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(p.key for p in path): list(leaf.shape) for path, leaf in leaves}
