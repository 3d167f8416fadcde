"""Batches with rows of many tasks: each expert is applied to the rows that use it.

For evaluation only (no gradients). In training, all rows of a group are of one task; here each row
may have its own task. In every layer the rows are sorted by expert, so that each expert runs only
over its rows. A mixed batch gives the same results as single-task batches.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moe_jax.data.batch import INPUTS, Batch
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import Params, routed
from moe_jax.model.routed_stack import layer_runs
from moe_jax.model.task_moe import TaskMoE

# Tokens per block when whole inputs of mixed rows are computed: the smallest number at which matrix
# products reach full speed. Small, because the last block of each expert is partly empty.
CPU_TOKENS, DEVICE_TOKENS = 128, 2048
# At a single position, reading the weights costs as much as computing this many rows. So a block
# should hold all rows of most experts, and all rows of the batch if there are at most this many.
CPU_ROWS, DEVICE_ROWS = 8, 256


def input_block(length: int) -> int:
    """Rows per block when whole inputs of mixed rows are computed."""
    return max(1, (CPU_TOKENS if jax.default_backend() == "cpu" else DEVICE_TOKENS) // length)


def step_block(rows: int, slots: int, beams: int) -> int:
    """Rows per block when single positions (of `beams` beams) of mixed rows are computed."""
    least = CPU_ROWS if jax.default_backend() == "cpu" else DEVICE_ROWS
    # The mean number of rows of an expert plus one standard deviation, if rows chose at random.
    expected = rows / slots + math.sqrt(rows / slots)
    tokens = 8 * math.ceil(max(least, expected * beams) / 8)
    return math.ceil(tokens / beams)


class RowRoutes(NamedTuple):
    """The routes of R rows in N routed layers.

    If S = K, every row uses all slots in order. Weights are zero only in padding.

    Attributes:
        experts_NxS: int32, the S experts of each layer that the batch uses ("slots"); None if the
            parameters hold only these experts.
        slots_NxRxK: int32 in [0, S), the K slots of each row.
        weights_NxRxK: float32.
    """

    experts_NxS: Any
    slots_NxRxK: Any
    weights_NxRxK: Any


def experts_per_row(model: TaskMoE) -> int:
    """K, the number of experts of a route at evaluation."""
    return 1 if model.selection.hard else model.experts_per_layer


def row_routes(routes_TxNxE: np.ndarray, task_id_R: np.ndarray, count: int) -> RowRoutes:
    """Makes the `RowRoutes` of a batch. In NumPy, because S is a shape.

    Args:
        task_id_R: the task of each row.
        count: K, the number of experts that a row uses: those with the largest weights.
    """
    tasks, row = np.unique(task_id_R, return_inverse=True)
    routes_TxNxE = np.asarray(routes_TxNxE)[tasks]
    largest = np.argsort(-routes_TxNxE, axis=-1, kind="stable")[..., :count]
    index_TxNxK = np.sort(largest, axis=-1)
    weights_TxNxK = np.take_along_axis(routes_TxNxE, index_TxNxK, -1)
    used = [np.unique(index_TxNxK[:, n]) for n in range(routes_TxNxE.shape[1])]
    slots = max(map(len, used))
    if slots > count:  # rounded up to a power of two, so that few shapes are compiled
        slots = min(1 << (slots - 1).bit_length(), routes_TxNxE.shape[2])
    experts_NxS = np.zeros((len(used), slots), np.int32)
    slots_TxNxK = np.zeros(index_TxNxK.shape, np.int32)
    for n, experts in enumerate(used):
        experts_NxS[n, : len(experts)] = experts
        slots_TxNxK[:, n] = np.searchsorted(experts, index_TxNxK[:, n])
    by_row = [a[row].swapaxes(0, 1) for a in (slots_TxNxK, weights_TxNxK.astype(np.float32))]
    return RowRoutes(experts_NxS, *by_row)


def one_task_routes(route_NxE: jax.Array, rows: int, count: int) -> RowRoutes:
    """`row_routes` of so many rows of one task, where the route is known on the device only."""
    _, index_NxK = jax.lax.top_k(route_NxE, count)
    index_NxK = jnp.sort(index_NxK, axis=-1)
    weights_NxK = jnp.take_along_axis(route_NxE, index_NxK, -1)
    shape = (route_NxE.shape[0], rows, count)
    slots_NxRxK = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), shape)
    weights_NxRxK = jnp.broadcast_to(weights_NxK[:, None].astype(jnp.float32), shape)
    return RowRoutes(index_NxK.astype(jnp.int32), slots_NxRxK, weights_NxRxK)


def traced_row_routes(routes_RxNxE: jax.Array, count: int) -> RowRoutes:
    """`row_routes` where the route of every row is known on the device only.

    The slots are all experts, so rows of few tasks cost more than with `row_routes`.
    """
    _, index_RxNxK = jax.lax.top_k(routes_RxNxE, count)
    index_RxNxK = jnp.sort(index_RxNxK, axis=-1).astype(jnp.int32)
    weights_RxNxK = jnp.take_along_axis(routes_RxNxE, index_RxNxK, -1).astype(jnp.float32)
    return RowRoutes(None, index_RxNxK.swapaxes(0, 1), weights_RxNxK.swapaxes(0, 1))


class Places(NamedTuple):
    """The order of the rows in one layer: V = K x R rows, sorted by slot.

    `order_V`, `inverse_V` and `starts` [S + 1] are None if the c-th expert of every row is slot c.
    `experts_S` is None if the parameters hold only the slots, or one expert. `weights_KxR` is None
    in layers that are not routed.
    """

    experts_S: jax.Array | None = None
    weights_KxR: jax.Array | None = None
    order_V: jax.Array | None = None
    inverse_V: jax.Array | None = None
    starts: jax.Array | None = None

    @property
    def slots(self) -> int:
        """S."""
        if self.starts is not None:
            return self.starts.shape[0] - 1
        return 1 if self.weights_KxR is None else self.weights_KxR.shape[0]

    def experts(self, params: Params) -> list[Params]:
        """The parameters of each slot, from one layer's [E, ...]."""
        if self.experts_S is not None:
            chosen = [self.experts_S[s] for s in range(self.experts_S.shape[0])]
            return [jax.tree.map(lambda p, e=e: p[e], params) for e in chosen]
        if self.slots == 1:
            return [params]
        return [jax.tree.map(lambda p, s=s: p[s], params) for s in range(self.slots)]

    def enter(self, x_Rx: jax.Array) -> jax.Array:
        """Puts rows into this layer's order: [R, ...] -> [V, ...]."""
        if self.order_V is not None:
            return x_Rx[self.order_V % x_Rx.shape[0]]
        copies = 1 if self.weights_KxR is None else self.weights_KxR.shape[0]
        return x_Rx if copies == 1 else jnp.concatenate([x_Rx] * copies)

    def leave(self, y_Vx: jax.Array) -> jax.Array:
        """The weighted sum over each row's experts: [V, ...] -> [R, ...]."""
        y_Vx = y_Vx if self.inverse_V is None else y_Vx[self.inverse_V]
        if self.weights_KxR is None:
            return y_Vx
        weights = self.weights_KxR.astype(y_Vx.dtype)
        y_KxRx = y_Vx.reshape(*weights.shape, *y_Vx.shape[1:])
        return jnp.einsum("kr,kr...->r...", weights, y_KxRx)


def all_places(routes: RowRoutes, experts: int) -> Places:
    """`Places` of all N layers, stacked, for parameters with `experts` experts per layer."""
    experts_NxS, slots_NxRxK, weights_NxRxK = jax.tree.map(jnp.asarray, routes)
    weights_NxKxR = weights_NxRxK.swapaxes(1, 2)
    layers = slots_NxRxK.shape[0]
    count = experts if experts_NxS is None else experts_NxS.shape[1]
    if count == slots_NxRxK.shape[2]:
        return Places(experts_NxS, weights_NxKxR)
    slots_NxV = slots_NxRxK.swapaxes(1, 2).reshape(layers, -1)
    order_NxV = jnp.argsort(slots_NxV, axis=1, stable=True)
    starts = jnp.sum(slots_NxV[:, :, None] < jnp.arange(count + 1), axis=1, dtype=jnp.int32)
    return Places(experts_NxS, weights_NxKxR, order_NxV, jnp.argsort(order_NxV, axis=1), starts)


def by_expert(
    apply: Callable[..., Any], params_S: Sequence[Params], places: Places, block: int, *xs_Vx: Any
) -> Any:
    """Applies each expert to its rows.

    Args:
        apply: (parameters of one layer, *rows) -> a tree of arrays with as many rows.
        block: number of rows computed at once, if rows are mixed.
        xs_Vx: arrays of V rows in the layer's order.
    """
    rows, slots = xs_Vx[0].shape[0], len(params_S)
    if slots == 1:
        return apply(params_S[0], *xs_Vx)
    if places.starts is None:
        parts = zip(*(jnp.split(x, slots) for x in xs_Vx), strict=True)
        ys = [apply(params, *part) for params, part in zip(params_S, parts, strict=True)]
        return jax.tree.map(lambda *y: jnp.concatenate(y), *ys)
    if rows <= block:
        # All rows at once: the time goes into reading the weights, whatever the number of rows.
        slot_V = jnp.sum(jnp.arange(rows)[:, None] >= places.starts[1:-1], axis=1)
        result = apply(params_S[0], *xs_Vx)
        for slot, params in enumerate(params_S[1:], start=1):
            here = slot_V == slot
            result = jax.tree.map(
                lambda y, old, here=here: jnp.where(here.reshape(-1, *[1] * (y.ndim - 1)), y, old),
                apply(params, *xs_Vx),
                result,
            )
        return result

    # The last block of an expert may extend into the rows of the next expert. Those are computed
    # later and overwrite the wrong values.
    def pad(x):
        return jnp.concatenate([x, jnp.zeros((block, *x.shape[1:]), x.dtype)])

    xs = [pad(x) for x in xs_Vx]
    shapes = jax.eval_shape(apply, params_S[0], *xs)
    ys = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)
    for slot, params in enumerate(params_S):
        start = places.starts[slot]

        def one_block(i, ys, start=start, params=params):
            at = start + i * block
            part = (jax.lax.dynamic_slice_in_dim(x, at, block) for x in xs)
            return jax.tree.map(
                lambda whole, y: jax.lax.dynamic_update_slice_in_dim(whole, y, at, 0),
                ys,
                apply(params, *part),
            )

        blocks = (places.starts[slot + 1] - start + block - 1) // block
        ys = jax.lax.fori_loop(0, blocks, one_block, ys)
    return jax.tree.map(lambda y: y[:rows], ys)


class ByExpert(struct.PyTreeNode):
    """The dispatch for rows with different routes (see `model.dispatch`). Has no gradients.

    Attributes:
        places: `Places` of all N routed layers, stacked.
    """

    places: Places

    def __call__(self, layer, x, rows, shared, placement, prefix) -> jax.Array:
        del placement, prefix  # parameters are not sharded here
        apart = layer.clone(parent=None)

        def apply(params, x, *rows):
            return apart.apply({"params": params}, x, *rows, *shared)

        params_S = self.places.experts(layer.variables["params"])
        entered = [self.places.enter(a) for a in (x, *rows)]
        block = input_block(x.shape[1])
        return self.places.leave(by_expert(apply, params_S, self.places, block, *entered))


@dataclasses.dataclass(frozen=True)
class RowModel:
    """A model together with the routes of one batch.

    Attributes:
        params: the backbone with all its experts.
        routes: None for a dense model.
    """

    model: TaskMoE
    params: Params
    routes: RowRoutes | None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def call(self, method: Callable[..., Any] | str, *args: Any) -> Any:
        """`method(backbone, *args)` with the parameters bound."""
        return EncoderDecoder(self.config).apply({"params": self.params}, *args, method=method)

    @property
    def _dispatch(self) -> ByExpert | None:
        return None if self.routes is None else ByExpert(self._places)

    @property
    def _places(self) -> Places:
        experts = 1
        for _, stack, *_ in routed(self.params):
            experts = jax.tree.leaves(stack)[0].shape[1]
        return all_places(self.routes, experts)

    def encode(self, batch: Batch) -> jax.Array:
        """The encoder's states of a batch's inputs: [R, L_in, D]."""
        return self.call("encode", *(batch[name] for name in INPUTS), self._dispatch)

    def hidden(self, batch: Batch) -> jax.Array:
        """The decoder's states of whole targets (teacher forcing): [R, L_out, D]."""
        return self.call("hidden", batch, self._dispatch)

    def decoder_layers(self) -> list[tuple[list[Params], Places]]:
        """For every decoder layer in order, each slot's parameters and the rows' places.

        Parameters are separate arrays, in the dtype of the computation.
        """
        all_layers = None if self.routes is None else self._places
        first = self.config.encoder_routed_layers
        result = []
        for kind, at in layer_runs(self.config, "decoder"):
            stack = self.params["decoder"]["layers"][kind]
            for layer in range(at.start, at.stop):
                if kind == "vanilla" or all_layers is None:
                    params, places = jax.tree.map(lambda p, i=layer: p[i, 0], stack), Places()
                else:
                    params = jax.tree.map(lambda p, i=layer: p[i], stack)
                    places = jax.tree.map(lambda a, n=first + layer: a[n], all_layers)
                    if places.experts_S is None and places.slots == 1:
                        params = jax.tree.map(lambda p: p[0], params)
                cast = [as_computed(p, self.config.dtype) for p in places.experts(params)]
                result.append((cast, places))
        return result


def as_computed(params: Params, dtype: str) -> Params:
    """A layer's parameters in `dtype`, except norms, which stay float32."""

    def cast(path, p):
        norm = any(key.key.endswith("_norm") for key in path)
        return p if norm else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
