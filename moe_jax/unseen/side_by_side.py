"""Many short trainings of one shape side by side, and the answers of what they trained.

A run is small: alone, it leaves a device idle between its steps. Here one compiled call trains a
whole batch of runs, with their few examples on the device: the runs are spread over devices, and on
each of them an accelerator computes all at once (`vmap`), a CPU one after the other, because small
products of many matrices are slower there than as many of two.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.core.sharding import GROUP_AXES, MeshConfig, make_mesh, over_groups
from moe_jax.decoding.rows import RowModel, experts_per_row, one_task_routes
from moe_jax.decoding.search import DecodingConfig, DecodingIds, decode
from moe_jax.model.experts import Params, merge
from moe_jax.model.task_moe import TaskMoE, routes_of
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import StepConfig, TrainState, init_state, step_function

CPU_RUNS = 8  # one after the other, of each device: more would make the progress bar jump


class SideBySide:
    """Trains and decodes U runs a call; compiles once for each shape of examples.

    Attributes:
        runs: U, over all devices; each has as many.
        rows: examples decoded together.
    """

    def __init__(
        self,
        model: TaskMoE,
        optimizer_config: OptimizerConfig,
        step_config: StepConfig,
        mesh: Mesh,
        *,
        steps: int,
        runs: int,
        rows: int,
        length: int,
        decoding: DecodingConfig,
        ids: DecodingIds,
    ):
        """
        Args:
            mesh: runs are spread over all its devices.
            steps: of every run.
            runs: U, a multiple of the devices.
            length: most tokens decoded.
        """
        self.runs, self.rows = runs, rows
        self._model, self._length, self._decoding, self._ids = model, length, decoding, ids
        self._devices = mesh.devices.size
        self._frozen = optimizer_config.frozen
        self._optimizer = make_optimizer(optimizer_config)
        device = mesh.devices.flat[0]
        # Every run is alone on its device.
        alone = make_mesh(MeshConfig(data=1), [device])
        self._step = step_function(model, optimizer_config, step_config, alone, steps, seed=0)
        self._map = jax.lax.map if device.platform == "cpu" else _at_once
        self._by_run = NamedSharding(mesh, P(GROUP_AXES))
        self._begin = self._spread(self._begin_one)
        self._carry = self._spread(self._carry_one)
        self._train = self._spread(self._train_one)
        self._decode = self._spread(self._decode_one)

    def train(
        self,
        shared: Params,
        own: Params,
        examples: Mapping[str, np.ndarray],
        order: np.ndarray,
        learning_rates: Mapping[str, np.ndarray],
        period: int = 0,
    ) -> Iterator[Params]:
        """What each run has made of its parameters after every `period` steps, and at its end.

        Args:
            shared: the parameters that all start from.
            own: parts in which the runs start apart, [U, ...] each; see `starting_params`.
            examples: arrays [U, n, L], one example to a row.
            order: int32 [U, steps, R], the examples of every batch; all below 0 where there is no
                run to do.
            learning_rates: float32 [U], the peaks of each part.
            period: 0 for the end alone.

        Yields:
            The parts that are trained or the run's own, [U, ...], on the devices.
        """
        # Starts of every kind begin in small programs of their own, and share the large one.
        begun = self._begin(shared, {}, self._put({"own": own, "place": np.arange(self.runs)}))
        rest, steps = self._rest(shared, begun), order.shape[1]
        period = period or steps
        carried = self._carry(rest, {}, begun) if period < steps else None
        runs = {"examples": examples, "rates": learning_rates}
        for at in range(0, steps, period):
            part = {"begun": begun, "carried": carried, "order": order[:, at : at + period]}
            begun, carried = self._train(rest, {}, self._put(runs | part))
            yield begun

    def decode(
        self, shared: Params, trained: Params, jobs: Mapping[int, list[Mapping[str, np.ndarray]]]
    ) -> dict[int, list[np.ndarray]]:
        """The answers of trained runs.

        Args:
            shared, trained: as for and from `train`.
            jobs: run -> blocks of examples, arrays `inputs`, `input_segments`, `input_positions`
                [rows, L] and `row` [rows], numbers that samples are drawn from.

        Returns:
            run -> int32 [rows, length] for each of its blocks.
        """
        each = self.runs // self._devices
        # A run's answers are decoded on the device that holds it: U places a call, its own ones.
        queues: list[list[tuple[int, int]]] = [[] for _ in range(self._devices)]
        for run, blocks in jobs.items():
            queues[run // each] += [(run, number) for number in range(len(blocks))]
        found: dict[int, list[Any]] = {run: [None] * len(blocks) for run, blocks in jobs.items()}
        example = next(block for blocks in jobs.values() for block in blocks)
        empty = {name: np.zeros_like(array) for name, array in example.items()}
        rest = self._rest(shared, trained)
        for start in range(0, max(map(len, queues)), each):
            places = [[*queue[start : start + each]] for queue in queues]
            places = [place + [None] * (each - len(place)) for place in places]
            flat = [at for place in places for at in place]
            blocks = [empty if at is None else jobs[at[0]][at[1]] for at in flat]
            call = {name: np.stack([block[name] for block in blocks]) for name in empty}
            call["run"] = np.array([0 if at is None else at[0] % each for at in flat], np.int32)
            tokens = np.asarray(self._decode(rest, trained, self._put(call)))
            for at, block in zip(flat, tokens, strict=True):
                if at is not None:
                    found[at[0]][at[1]] = block
        return found

    # ------------------------------------------------------------------------------ on the device

    def _rest(self, shared: Params, own: Params) -> Params:
        """The parts of the model's parameters that the runs share."""
        parts = set(shared) if self._model.routed else {"backbone"}
        return {part: shared[part] for part in shared if part in parts - set(own)}

    def _begin_one(self, shared: Params, _: Params, run: Any) -> Params:
        """The parts that are trained or the run's own, before the first step."""
        own = run["own"]
        params = starting_params(shared, own)
        apart = {"backbone"} if "route" in own else set(own)
        moved = (set(params) - set(self._frozen)) | apart
        return {part: tree for part, tree in params.items() if part in moved}

    def _carry_one(self, shared: Params, _: Params, begun: Params) -> tuple[jax.Array, Any]:
        """What one part of a training leaves to the next beside parameters: steps and moments."""
        state = init_state({**shared, **begun}, self._optimizer)
        return state.step, state.opt_state

    def _train_one(self, shared: Params, _: Params, run: Any) -> tuple[Params, Any]:
        begun, carried = run["begun"], run["carried"]

        def step(state, order_R):
            batch = {name: array[order_R][None] for name, array in run["examples"].items()}
            batch["task_id"] = jnp.zeros(1, jnp.int32)
            return self._step(state, batch, run["rates"])[0], None

        def trained():
            number, moments = carried or self._carry_one(shared, {}, begun)
            state = TrainState(number, {**shared, **begun}, moments)
            state, _ = jax.lax.scan(step, state, run["order"])
            return {part: state.params[part] for part in begun}, (
                carried and (state.step, state.opt_state)
            )

        return jax.lax.cond(run["order"][0, 0] >= 0, trained, lambda: (begun, carried))

    def _decode_one(self, shared: Params, trained: Params, job: Any) -> jax.Array:
        def answers():
            params = {**shared, **jax.tree.map(lambda a: a[job["run"]], trained)}
            routes = None
            if self._model.routed:
                route_NxE = routes_of(self._model, params, 0)[0]
                routes = one_task_routes(route_NxE, self.rows, experts_per_row(self._model))
            return decode(
                RowModel(self._model, params["backbone"], routes), job, job["row"],
                length=self._length, config=self._decoding, ids=self._ids,
            )  # fmt: skip

        def nothing():
            return jnp.full((self.rows, self._length), self._ids.pad, jnp.int32)

        return jax.lax.cond(jnp.any(job["input_segments"] > 0), answers, nothing)

    def _spread(self, one):
        """`one(shared, trained, run)` for many runs, compiled; each device does its own."""

        def local(shared, trained, runs):
            return self._map(partial(one, shared, trained), runs)

        runs = self._by_run.spec
        return jax.jit(over_groups(local, self._by_run.mesh, (P(), runs, runs), runs))

    def _put(self, runs: Any) -> Any:
        return jax.device_put(runs, self._by_run)


def starting_params(shared: Params, own: Params) -> Params:
    """The parameters that one run starts from.

    Args:
        own: goes before `shared`; or {"route": [N, E]}, by which the experts of the shared backbone
            are merged into a dense model.
    """
    if "route" in own:
        return {"backbone": merge(shared["backbone"], own["route"])}
    return {**shared, **own}


def _at_once(function, xs):
    return jax.vmap(function)(xs)


def runs_per_device(params: Params, tokens: int, width: int, kept: int, device: jax.Device) -> int:
    """How many runs a device trains side by side.

    On an accelerator, as many as fit: a run takes its parameters, gradients, two moments, what the
    optimizer makes of them, and `kept` results; and activations.

    Args:
        tokens: of a run's batch, inputs and targets.
        width: numbers that are kept for each token.
        kept: results of other batches that stay in memory beside this one's.
    """
    if device.platform == "cpu":
        return CPU_RUNS
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    each = (6 + kept) * size + 4 * tokens * width
    limit = (device.memory_stats() or {}).get("bytes_limit", 16 * 2**30)
    return max(1, int(0.6 * (limit - size)) // each)
