"""Routers: task representation -> route logits, over the experts of every routed layer.

Ten kinds, as published (paper section 4.2): `linear`, `rnn`, `lstm`, `gru` and `transformer`,
each in a shared form and a `_layer_specific` form. Gates follow PyTorch's formulas, so that
published weights map one to one. No dropout. Two of our own: `free` has no network, and `centroid`
compares a representation with a centroid for every expert.

A router is a Flax module with the fields and the call of `Router`. To add one, register its class,
also from outside the package: `register("mine", MyRouter)`.
"""

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import UserError
from moe_jax.model.attention import attend

if TYPE_CHECKING:
    from moe_jax.model.config import RouterConfig

HEADS = 4  # of the transformer router's attention
ROUTER_MLP = 64  # hidden size of the transformer router's feed-forward block
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
ROUTERS: dict[str, type["Router"]] = {}  # by kind


def register(kind: str, router: type["Router"]) -> None:
    """Registers a router for `RouterConfig.kind`; replaces an earlier one of the same name."""
    ROUTERS[kind] = router


class Router(nn.Module):
    """A router: fields, call and checks.

    Attributes:
        layers: N, the number of routed layers.
        experts: E.
    """

    config: "RouterConfig"
    layers: int
    experts: int

    def __call__(self, representation_TxK: jax.Array) -> jax.Array:
        """float32 [T, K] -> route logits float32 [T, N, E]."""
        raise NotImplementedError

    @classmethod
    def fitted(cls, params: Any, representation_TxK: np.ndarray, seed: int) -> Any:
        """Parameters that fit representations given before the first step; most start fresh.

        Args:
            params: fresh ones.
        """
        del representation_TxK, seed
        return params

    @classmethod
    def check(cls, config: "RouterConfig") -> None:
        """Raises a UserError if the settings do not fit this kind."""

    @classmethod
    def check_model(cls, config: "RouterConfig", layers: int, experts: int) -> None:
        """Raises a UserError if the settings do not fit the model."""


class FreeRouter(Router):
    """No network: the representation [N * E] is the route logits."""

    def __call__(self, representation_TxK: jax.Array) -> jax.Array:
        return representation_TxK.reshape(-1, self.layers, self.experts)

    @classmethod
    def check_model(cls, config: "RouterConfig", layers: int, experts: int) -> None:
        if config.representation_dim != layers * experts:
            raise UserError(
                f"RouterConfig.representation_dim is {config.representation_dim}, but the route "
                f"logits of kind '{config.kind}' are {layers} layers x {experts} experts = "
                f"{layers * experts} numbers"
            )


class CentroidRouter(Router):
    """Every expert of a layer has a centroid, and its logit is the representation's cosine with it.

    Where representations are given, centroids start as those of k-means, each layer from draws of
    its own. So tasks of similar representations share experts from the first step, and a task that
    two layers group differently still has a route that is its own.
    """

    @nn.compact
    def __call__(self, representation_TxK: jax.Array) -> jax.Array:
        N, E, K = self.layers, self.experts, representation_TxK.shape[-1]
        axes = ("unit", "router_out", "router_in")
        centroid_NxExK = _param(self, "centroid", nn.initializers.normal(1.0), (N, E, K), axes)
        return jnp.einsum("tk,nek->tne", _unit(representation_TxK), _unit(centroid_NxExK))

    @classmethod
    def fitted(cls, params: Any, representation_TxK: np.ndarray, seed: int) -> Any:
        from sklearn.cluster import KMeans  # slow to import

        unit_TxK = np.asarray(_unit(representation_TxK))
        centroid_NxExK = np.array(params["centroid"])
        # Experts beyond the number of different tasks keep a random centroid.
        clusters = min(centroid_NxExK.shape[1], len(np.unique(unit_TxK, axis=0)))
        for layer, centroid_ExK in enumerate(centroid_NxExK):
            draws = np.random.RandomState([seed, layer])
            means = KMeans(clusters, n_init=10, random_state=draws).fit(unit_TxK)
            centroid_ExK[:clusters] = means.cluster_centers_
        return {"centroid": centroid_NxExK}


def _unit(x: jax.Array) -> jax.Array:
    """Divided by its length along the last axis; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


class PublishedRouter(Router):
    """The ten published routers.

    Shared form: `linear` is a two-layer perceptron with one output for all layers; the others
    read the representation plus an embedding of the layer's position, as a sequence over layers.
    Layer-specific form: every routed layer has its own projection (`linear`: its own perceptron).
    """

    @classmethod
    def check(cls, config: "RouterConfig") -> None:
        specific = config.kind.endswith("_layer_specific")
        name = "hidden_dim" if specific else "representation_dim"
        if config.kind.startswith("transformer") and getattr(config, name) % HEADS:
            raise UserError(
                f"RouterConfig.{name} {getattr(config, name)} is not a multiple of the "
                f"{HEADS} heads of kind '{config.kind}'"
            )

    @nn.compact
    def __call__(self, representation_TxK: jax.Array) -> jax.Array:
        c, N, E = self.config, self.layers, self.experts
        T, K = representation_TxK.shape
        family = c.kind.removesuffix("_layer_specific")
        own = c.kind != family  # each layer has weights of its own
        units = (N,) if own else ()
        x = representation_TxK
        if own:
            x = jnp.broadcast_to(x[:, None], (T, N, K))
        if family == "linear":
            x = nn.gelu(Affine(c.hidden_dim, units, name="hidden")(x), approximate=False)
            return Affine(E if own else N * E, units, name="output")(x).reshape(T, N, E)
        if own:
            x_TxNxI = Affine(c.hidden_dim, units, name="hidden")(x)
        else:
            # The same scale as the task table, so that layers differ from the start.
            init = nn.initializers.normal(1.0)
            x_TxNxI = x[:, None] + _param(self, "position", init, (N, K), ("unit", "router_in"))
        if family == "transformer":
            y_TxNxI = Transformer(name="transformer")(x_TxNxI)
        else:
            y_TxNxI = Bidirectional(family, c.hidden_dim, name="recurrent")(x_TxNxI)
        return Affine(E, name="output")(y_TxNxI)


class Affine(nn.Module):
    """[T, ..., I] -> [T, ..., O]; with `units` (U,), x is [T, U, I] and every unit has its own
    weights."""

    features: int
    units: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = ("unit",)[: len(self.units)]
        init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(self.units))))
        shape = (*self.units, x.shape[-1], self.features)
        kernel = _param(self, "kernel", init, shape, (*axes, "router_in", "router_out"))
        shape = (*self.units, self.features)
        bias = _param(self, "bias", nn.initializers.zeros, shape, (*axes, "router_out"))
        return jnp.einsum("t...i,...io->t...o", x, kernel) + bias


class Bidirectional(nn.Module):
    """A bidirectional recurrent network over layer positions."""

    family: str  # "rnn", "gru" or "lstm"
    hidden_dim: int

    @nn.compact
    def __call__(self, x_TxNxI: jax.Array) -> jax.Array:
        """[T, N, I] -> [T, N, 2 H], the forward state first."""
        T, _, I = x_TxNxI.shape  # noqa: E741
        H, Q = self.hidden_dim, GATES[self.family]
        # Both directions (C) share one array. As in PyTorch, there are two biases.
        axes = ("direction", "router_in", "router_gate", "router_out")
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", 1, (2, 3), 0)
        input_kernel = _param(self, "input_kernel", uniform, (2, I, Q, H), axes)
        hidden_kernel = _param(self, "hidden_kernel", uniform, (2, H, Q, H), axes)
        zeros, axes = nn.initializers.zeros, ("direction", "router_gate", "router_out")
        input_bias = _param(self, "input_bias", zeros, (2, Q, H), axes)[:, None, None]
        hidden_bias = _param(self, "hidden_bias", zeros, (2, Q, H), axes)[:, None]

        x_CxTxNxI = jnp.stack([x_TxNxI, x_TxNxI[:, ::-1]])
        gates = jnp.einsum("ctni,ciqh->ctnqh", x_CxTxNxI, input_kernel) + input_bias
        gates_NxCxTxQxH = jnp.moveaxis(gates, 2, 0)

        def step(state, gates_CxTxQxH):
            recurrent = jnp.einsum("cti,ciqh->ctqh", state[0], hidden_kernel) + hidden_bias
            state = _cell(self.family, gates_CxTxQxH, recurrent, state)
            return state, state[0]

        zero = jnp.zeros((2, T, H), x_TxNxI.dtype)
        _, h_NxCxTxH = jax.lax.scan(step, (zero, zero), gates_NxCxTxQxH)
        forward, backward = h_NxCxTxH[:, 0], h_NxCxTxH[::-1, 1]
        return jnp.concatenate([forward, backward], axis=-1).swapaxes(0, 1)


def _cell(family: str, x: jax.Array, r: jax.Array, state: tuple) -> tuple[jax.Array, jax.Array]:
    """(hidden, cell) after one step; `x` and `r` [..., gates, H] come from input and state.

    Gate order as in PyTorch: GRU reset, update, new; LSTM input, forget, cell, output.
    """
    h, c = state
    if family == "rnn":
        return jnp.tanh(x + r)[..., 0, :], c
    if family == "gru":
        reset, update = (jax.nn.sigmoid(x[..., i, :] + r[..., i, :]) for i in (0, 1))
        new = jnp.tanh(x[..., 2, :] + reset * r[..., 2, :])
        return (1.0 - update) * new + update * h, c
    gates = x + r
    into, forget, out = (jax.nn.sigmoid(gates[..., i, :]) for i in (0, 1, 3))
    c = forget * c + into * jnp.tanh(gates[..., 2, :])
    return out * jnp.tanh(c), c


class Transformer(nn.Module):
    """One post-norm transformer layer over layer positions: [T, N, D] -> [T, N, D]."""

    @nn.compact
    def __call__(self, x_TxNxD: jax.Array) -> jax.Array:
        T, N, D = x_TxNxD.shape
        qkv = Affine(3 * D, name="qkv")(x_TxNxD).reshape(T, N, 3, HEADS, D // HEADS)
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask=None).reshape(T, N, D)
        x = _norm("attention_norm")(x_TxNxD + Affine(D, name="out")(y))
        y = nn.relu(Affine(ROUTER_MLP, name="mlp_in")(x))
        return _norm("mlp_norm")(x + Affine(D, name="mlp_out")(y))


def _norm(name: str) -> nn.LayerNorm:
    """LayerNorm with PyTorch's formula."""
    return nn.LayerNorm(
        epsilon=1e-5,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


def _param(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]):
    return module.param(name, nn.with_logical_partitioning(init, axes), shape)


for _family in ("linear", "rnn", "lstm", "gru", "transformer"):
    for _form in ("", "_layer_specific"):
        register(_family + _form, PublishedRouter)
register("free", FreeRouter)
register("centroid", CentroidRouter)
