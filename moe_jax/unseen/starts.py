"""Starting points of few-shot adaptation: their parameters, and which of them are trained."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import GROUP_AXES, over_groups, replicated
from moe_jax.data.representations import read_representations
from moe_jax.data.schedule import seed_of
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.experts import Params, gather, merge
from moe_jax.model.selection import temperature_at
from moe_jax.model.task_moe import TaskMoE, route_logits, routes_of
from moe_jax.runs import directory
from moe_jax.runs.config import FinetuneConfig
from moe_jax.runs.initial import initial_params
from moe_jax.runs.load import Run, read_run, with_drawn_routes
from moe_jax.training.grouped_loss import group_loss

Group = Mapping[str, np.ndarray]
# A model of at most so many layers a side, this wide, is small.
SHALLOW, NARROW = 4, 256
# The frozen parts of the mixture of experts, by `FinetuneConfig.tune`.
FROZEN = {
    "all": (),
    "frozen_router": ("router",),
    "route_only": ("backbone", "router"),
    "free_route": ("backbone", "router"),
    "merged": (),
}
# What trains a route even if it was drawn at random.
ROUTE_ALONE = ("route_only", "free_route")
MIN_ROUTE_WEIGHT = 1e-3  # the weight that a route's fit starts from where a training task has none


class Start:
    """A starting point: its parameters, and which of them are trained.

    Attributes:
        model: of one new task.
        frozen: the parts that are not trained.
        shared: the parameters that all runs start from; of a mixture, without the representation.
    """

    def __init__(self, name: str, run: Run, config: FinetuneConfig, seed: int, mesh: Mesh):
        drawn = run.model.routed and run.model.selection.random
        run = with_drawn_routes(run)
        self.name = name
        self.run = run
        self.config = config
        self.seed = seed
        self._mesh = mesh
        # A dense start has no route to adapt, so all of it is trained.
        self.tune = config.tune if run.model.routed else "all"
        self.frozen = FROZEN[self.tune]
        if drawn and self.tune not in ROUTE_ALONE:
            self.frozen += ("representations",)
        # One new task, routed as the trained model is at its last temperature, without noise.
        router = dataclasses.replace(
            run.model.router_config,
            selection=run.model.selection.settled or run.model.selection.name,
            exploration_epsilon=0.0,
            temperature=float(temperature_at(run.model.router_config, run.step)),
            temperature_schedule="constant",
        )
        model = run.model.clone(config=for_few_rows(run.model.config))
        self._trained = model.clone(router_config=router)
        if self.tune == "free_route":
            numbers = model.layers * model.config.experts
            router = dataclasses.replace(router, kind="free", representation_dim=numbers)
        if self.tune == "merged":
            model = model.clone(config=dataclasses.replace(model.config, experts=1))
        if not model.routed:
            router = RouterConfig()  # plain models of one shape train in one compiled call
        self.model = model.clone(router_config=router, tasks=1)
        shared = {part: tree for part, tree in run.params.items() if part != "representations"}
        if self.tune == "free_route":
            shared["router"] = {}
        self.shared = jax.device_put(shared, replicated(mesh))

    def own(self, tasks: Sequence[str], examples: Sequence[Group]) -> Params:
        """The parts in which the runs of S new tasks start apart, [S, ...] each.

        Args:
            tasks: S names; one that has several samples comes several times.
            examples: the few examples of each, arrays [R, L].

        Raises:
            UserError: the file of representations has no such task.
        """
        if not self.run.model.routed:
            return {}
        if self.tune == "merged" and self.config.representation == "mean":
            route_NxE = self._routes(self.run.params["representations"]).mean(0)
            routes_SxNxE = np.broadcast_to(route_NxE, (len(tasks), *route_NxE.shape))
            return {"route": self.fitted(routes_SxNxE, examples)}
        rows_SxK = self._representations(tasks, examples)
        if self.tune == "merged":
            return {"route": self.fitted(self._routes(rows_SxK), examples)}
        if self.tune == "free_route":
            params = {**self.run.params, "representations": jnp.asarray(rows_SxK)}
            logits_SxNxE = route_logits(self._trained, params)
            rows_SxK = np.asarray(logits_SxNxE).reshape(len(tasks), -1)
        return {"representations": rows_SxK[:, None]}

    def _representations(self, tasks: Sequence[str], examples: Sequence[Group]) -> np.ndarray:
        """The representation that each of S new tasks starts from: float32 [S, K]."""
        table_TxK = np.asarray(self.run.params["representations"])
        shape = (len(tasks), table_TxK.shape[1])
        match self.config.representation:
            case "mean":
                rows_SxK = np.broadcast_to(table_TxK.mean(0), shape)
            case "nearest":
                nearest_S = np.argmin(self.losses(examples), axis=-1)
                rows_SxK = table_TxK[self.choices[0][nearest_S]]
            case "random":
                # By its name, so that a task starts alike in all samples, and apart from others.
                draws = [np.random.default_rng([self.seed, seed_of(task)]) for task in tasks]
                rows_SxK = np.stack([rng.standard_normal(shape[1]) for rng in draws])
            case "file":
                path = self.config.representations_path
                rows_SxK = read_representations(path, tasks, shape[1])
        return np.asarray(rows_SxK, np.float32)

    def _routes(self, rows_TxK: np.ndarray) -> np.ndarray:
        """The routes of representations, at the last temperature: [T, N, E]."""
        model = self._trained.clone(tasks=len(rows_TxK))
        params = {**self.run.params, "representations": jnp.asarray(rows_TxK)}
        return np.asarray(jax.jit(partial(routes_of, model))(params, 0))

    @functools.cached_property
    def choices(self) -> tuple[np.ndarray, np.ndarray]:
        """(training tasks [C] whose routes differ, those routes [C, N, E])."""
        routes_TxNxE = self._routes(self.run.params["representations"])
        # Only one of several tasks with the same route (to a thousandth) is kept.
        _, tasks_C = np.unique(np.round(routes_TxNxE, 3), axis=0, return_index=True)
        return np.sort(tasks_C), routes_TxNxE[np.sort(tasks_C)]

    def losses(self, examples: Sequence[Group]) -> np.ndarray:
        """Loss float32 [S, C] of each of S groups [R, L] of few examples under each route."""
        routes_SxCxNxE = np.broadcast_to(self.choices[1], (len(examples), *self.choices[1].shape))
        return self._of_samples(self._losses, examples, routes_SxCxNxE)

    def fitted(self, routes_SxNxE: np.ndarray, examples: Sequence[Group]) -> np.ndarray:
        """Routes [S, N, E] of merged experts, fitted to each of S groups [R, L] of few examples.

        Adam lowers the mean loss per target token of the merged model by the route's logits alone,
        which start from the given routes. Without `route_steps`, it is these.
        """
        if not self.config.route_steps:
            return routes_SxNxE
        return self._of_samples(self._fitted, examples, routes_SxNxE)

    def _of_samples(self, function, examples: Sequence[Group], routes_Sx: np.ndarray) -> np.ndarray:
        """`function(shared, route, group)` for each of S samples; those of one shape in one call,
        spread over devices."""
        found: list[Any] = [None] * len(examples)
        shapes = [group["inputs"].shape + group["targets"].shape for group in examples]
        for shape in dict.fromkeys(shapes):
            at = [i for i, other in enumerate(shapes) if other == shape]
            filled = at + [at[0]] * (-len(at) % self._mesh.devices.size)
            groups = jax.tree.map(lambda *a: np.stack(a), *(examples[i] for i in filled))
            results = np.asarray(function(self.shared, routes_Sx[filled], groups))
            for i, result in zip(at, results, strict=False):
                found[i] = result
        return np.stack(found)

    def _spread(self, one):
        """`one(backbone, route, group)` for many samples, compiled; each device does its own."""

        def local(shared, routes, groups):
            return jax.lax.map(lambda x: one(shared["backbone"], *x), (routes, groups))

        by_sample = P(GROUP_AXES)
        return jax.jit(over_groups(local, self._mesh, (P(), by_sample, by_sample), by_sample))

    @functools.cached_property
    def _losses(self):
        model = self._trained

        def one(backbone, group, route_NxE):
            weights, index = route_NxE, None
            if model.gathers:
                index, weights = (
                    a[0] for a in model.assign(route_NxE[None], jnp.zeros(1, jnp.int32))
                )
                backbone = gather(backbone, index, model.config.unroll_layers)
            return group_loss(model, backbone, weights, group, None)

        def of_sample(backbone, routes_CxNxE, group):
            return jax.lax.map(partial(one, backbone, group), routes_CxNxE)

        return self._spread(of_sample)

    @functools.cached_property
    def _fitted(self):
        optimizer = optax.adam(self.config.route_learning_rate)

        def of_sample(backbone, route_NxE, group):
            tokens = jnp.maximum(jnp.sum(group["target_segments"] > 0, dtype=jnp.float32), 1)

            def loss(logits_NxE):
                merged = merge(backbone, jax.nn.softmax(logits_NxE))
                return group_loss(self.model, merged, None, group, None, scale=1.0 / tokens)

            def step(state, _):
                logits_NxE, moments = state
                with jax.numpy_dtype_promotion("standard"):  # optax raises floats to int32 powers
                    updates, moments = optimizer.update(jax.grad(loss)(logits_NxE), moments)
                return (optax.apply_updates(logits_NxE, updates), moments), None

            logits_NxE = jnp.log(route_NxE + MIN_ROUTE_WEIGHT)
            first = (logits_NxE, optimizer.init(logits_NxE))
            (logits_NxE, _), _ = jax.lax.scan(step, first, None, self.config.route_steps)
            return jax.nn.softmax(logits_NxE)

        return self._spread(of_sample)


def for_few_rows(config: ModelConfig) -> ModelConfig:
    """A small model as it trains fastest on a few short examples, whose activations fit a cache."""
    depth = max(config.encoder_layers, config.decoder_layers)
    if depth > SHALLOW or config.d_model > NARROW:
        return config
    return dataclasses.replace(config, kept_activations="all", unroll_layers=depth)


def read_starts(
    config: FinetuneConfig, vocabulary_size: int, seed: int, mesh: Mesh
) -> Iterator[Start]:
    """The starting points, one at a time, so that one model is in memory."""
    for name, place in config.adapted.items():
        run = read_run(place, vocabulary_size)
        if name == "untrained":
            own = directory.read_config(directory.root(place))
            params = initial_params(run.model, own.run, list(run.task_ids), replicated(mesh))
            run = dataclasses.replace(run, params=params)
        yield Start(name, run, config, seed, mesh)


def check_starts(config: FinetuneConfig) -> None:
    """Checks that the directories of the starts hold runs, and that the dense ones are dense.

    Raises:
        UserError: one does not.
    """
    for name, place in config.adapted.items():
        own = directory.read_config(directory.root(place))
        if name != "moe" and own.model.experts > 1:
            raise UserError(
                f"DENSE_DIR {place} holds a mixture of {own.model.experts} experts, not a dense "
                "model: MOE_DIR takes it"
            )


def check_file(config: FinetuneConfig, tasks: Sequence[str]) -> None:
    """Checks that the file of representations, if one is used, has every task.

    Raises:
        UserError: see `read_representations`.
    """
    if config.representation != "file" or "moe" not in config.adapted:
        return
    own = directory.read_config(directory.root(config.adapted["moe"]))
    model = TaskMoE(own.model, own.router, 1)
    if model.routed:
        numbers = model.layers * own.model.experts
        dim = numbers if model.selection.random else own.router.representation_dim
        read_representations(config.representations_path, tasks, dim)
