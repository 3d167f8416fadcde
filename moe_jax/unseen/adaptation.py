"""Few-shot adaptation of every starting point to every new task."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core import files, processes
from moe_jax.core.errors import UserError
from moe_jax.core.progress import progress
from moe_jax.core.sharding import MeshConfig, make_mesh, replicated
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import task_batches
from moe_jax.data.representations import read_representations
from moe_jax.evaluation import gains, paired
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.evaluation.scores import TaskScore
from moe_jax.model.experts import Params
from moe_jax.model.selection import temperature_at
from moe_jax.model.task_moe import TaskMoE, routes_of
from moe_jax.runs import directory
from moe_jax.runs.config import DataConfig, FewShotConfig, FinetuneConfig
from moe_jax.runs.initial import initial_params
from moe_jax.runs.load import Run, read_run
from moe_jax.runs.mixtures import check_vocabulary, prepare_mixtures
from moe_jax.training.grouped_loss import group_loss
from moe_jax.training.tuning import Tuner

RUNS = "runs.jsonl"
# The fields that identify a run in runs.jsonl.
KEY = ("task", "start", "seed", "learning_rate", "batch_size")
# The frozen parts of the mixture of experts, by `FinetuneConfig.tune`.
FROZEN = {
    "all": (),
    "frozen_router": ("router",),
    "route_only": ("backbone", "router"),
    "free_route": ("backbone", "router"),
}


class Start:
    """A starting point: its parameters, and which of them are trained."""

    def __init__(self, name: str, run: Run, config: FinetuneConfig, seed: int):
        self.name = name
        self.run = run
        self.config = config
        self.seed = seed
        # A dense start has no route to adapt, so all of it is trained.
        self.tune = config.tune if run.model.routed else "all"
        # One new task, routed as the trained model is at its last temperature, without noise.
        router = dataclasses.replace(
            run.model.router_config,
            selection=run.model.selection.settled or run.model.selection.name,
            exploration_epsilon=0.0,
            temperature=float(temperature_at(run.model.router_config, run.step)),
            temperature_schedule="constant",
        )
        self._trained = run.model.clone(router_config=router)
        if self.tune == "free_route":
            numbers = run.model.layers * run.model.config.experts
            router = dataclasses.replace(router, kind="free", representation_dim=numbers)
        self.model = run.model.clone(router_config=router, tasks=1)
        self._losses = jax.jit(self._losses_under)

    def params(self, task: str, batch: Mapping[str, np.ndarray]) -> Params:
        """Parameters for a new task; `batch` [1, R, L] holds its few examples.

        Raises:
            UserError: the file of representations has no such task.
        """
        params = self.run.params
        if not self.run.model.routed:
            return params
        table_TxK = np.asarray(params["representations"])
        dim = table_TxK.shape[1]
        match self.config.representation:
            case "mean":
                row_K = table_TxK.mean(0)
            case "nearest":
                tasks_C, routes_CxNxE = self._choices
                losses_C = self._losses(params["backbone"], routes_CxNxE, batch)
                row_K = table_TxK[tasks_C[int(np.argmin(losses_C))]]
            case "random":
                row_K = np.random.default_rng(self.seed).standard_normal(dim)
            case "file":
                row_K = read_representations(self.config.representations_path, [task], dim)[0]
        row_1xK = jnp.asarray(row_K[None], jnp.float32)
        if self.tune == "free_route":
            logits_1xNxE = self._trained.new_router().apply({"params": params["router"]}, row_1xK)
            return {**params, "router": {}, "representations": logits_1xNxE.reshape(1, -1)}
        return {**params, "representations": row_1xK}

    @functools.cached_property
    def _choices(self) -> tuple[np.ndarray, np.ndarray]:
        """(training tasks [C] whose routes differ, those routes [C, N, E])."""
        routes_TxNxE = np.asarray(jax.jit(partial(routes_of, self._trained))(self.run.params, 0))
        # Only one of several tasks with the same route (to a thousandth) is kept.
        _, tasks_C = np.unique(np.round(routes_TxNxE, 3), axis=0, return_index=True)
        return np.sort(tasks_C), routes_TxNxE[np.sort(tasks_C)]

    def _losses_under(
        self, backbone: Params, routes_CxNxE: jax.Array, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Loss [C] of the few examples under each route."""
        group = {name: array[0] for name, array in batch.items() if name != "task_id"}
        return jax.lax.map(
            lambda route: group_loss(self._trained, backbone, route, group, None), routes_CxNxE
        )


def read_starts(
    config: FinetuneConfig, vocabulary_size: int, seed: int, sharding: Any
) -> Iterator[Start]:
    """The starting points, one at a time, so that one model is in memory."""
    if config.dense_dir is None:
        raise UserError("FinetuneConfig.dense_dir is not set: give --gin.DENSE_DIR=...")
    dense = read_run(config.dense_dir, vocabulary_size)
    own = directory.read_config(directory.root(config.dense_dir))
    params = initial_params(dense.model, own.run, list(dense.task_ids), sharding)
    yield Start("untrained", dataclasses.replace(dense, params=params), config, seed)
    yield Start("dense", dense, config, seed)
    if config.moe_dir is not None:
        yield Start("moe", read_run(config.moe_dir, vocabulary_size), config, seed)


def check_file(config: FinetuneConfig, tasks: Sequence[str]) -> None:
    """Checks that the file of representations, if one is used, has every task.

    Raises:
        UserError: see `read_representations`.
    """
    if config.representation != "file" or config.moe_dir is None:
        return
    own = directory.read_config(directory.root(config.moe_dir))
    if TaskMoE(own.model, own.router, 1).routed:
        dim = own.router.representation_dim
        read_representations(config.representations_path, tasks, dim)


def few_shot_batches(
    mixture: PreparedMixture, task: str, seed: int, rows: int, steps: int, data: DataConfig
) -> list[dict[str, np.ndarray]]:
    """The batches [1, R, L] of one run; the same for every starting point."""
    split = f"fewshot_{seed}_train"
    dataset = task_batches(mixture, task, split, lengths=data.lengths, rows=rows, seed=seed)
    return list(itertools.islice(dataset, steps))


class Adapter:
    """Trains and scores runs; compiles once per batch size, whatever start of this form and task.

    Attributes:
        searched: the part whose learning rate is searched, the backbone if it is trained.
    """

    def __init__(
        self,
        model: TaskMoE,
        frozen: tuple[str, ...],
        mixture: PreparedMixture,
        whole: FewShotConfig,
        mesh: jax.sharding.Mesh,
    ):
        frozen = tuple(dict.fromkeys((*whole.optimizer.frozen, *frozen)))
        optimizer_config = dataclasses.replace(whole.optimizer, frozen=frozen)
        self.searched = "representations" if "backbone" in frozen else "backbone"
        self._rates = optimizer_config.learning_rates
        self._mixture = mixture
        self._tune = Tuner(model, optimizer_config, whole.step, mesh, whole.finetune.steps, seed=0)
        self._evaluator = Evaluator(
            model, mixture.vocabulary, whole.data.lengths, whole.run.eval_batch_rows, mesh,
            whole.decoding,
        )  # fmt: skip

    def train(self, params: Params, batches: list, learning_rate: float) -> Params:
        """Parameters after one step per batch."""
        return self._tune(params, batches, self._rates | {self.searched: learning_rate})

    def score(self, params: Params, task: str, split: str, limit: int | None = None) -> TaskScore:
        """Score of the task that `params` are adapted to."""
        evaluator = self._evaluator
        routes = evaluator.routes(params, jnp.int32(0)) if evaluator.model.routed else None
        return evaluator.task(params, routes, self._mixture, task, 0, split, limit)


def search(
    adapter: Adapter,
    params: Params,
    task: str,
    seed: int,
    points: Sequence[tuple[float, int]],
    mixture: PreparedMixture,
    data: DataConfig,
    config: FinetuneConfig,
) -> Iterator[dict[str, Any]]:
    """Trains from `params` with every (learning rate, batch size) of `points`.

    Yields:
        The line of each run in runs.jsonl. A run is yielded without a test score once another run
        has beaten it on dev; the best run is yielded last, with its test score. So an interrupted
        search loses only the best run so far, which is trained again.
    """

    @functools.lru_cache(1)  # consecutive grid points share a batch size
    def batches_of(rows: int) -> list[dict[str, np.ndarray]]:
        return few_shot_batches(mixture, task, seed, rows, config.steps, data)

    best: tuple[dict[str, Any], Params] | None = None
    for learning_rate, batch_size in points:
        trained = adapter.train(params, batches_of(batch_size), learning_rate)
        dev = adapter.score(trained, task, f"fewshot_{seed}_validation")
        row = {
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "metric": dev.metric,
            "dev_score": dev.score,
            "test_score": None,
        }
        if best is None:
            best = row, trained
        elif row["dev_score"] > best[0]["dev_score"]:
            yield best[0]
            best = row, trained
        else:
            yield row
    if best is not None:
        row, trained = best
        yield row | {"test_score": adapter.score(trained, task, "test", config.test_examples).score}


def adapt_all(whole: FewShotConfig) -> None:
    """Adapts every starting point to every task, and writes the average relative gain."""
    whole.run.require("model_dir")
    with processes.lock(whole.run.model_dir):
        _adapt_all(whole)


def _adapt_all(whole: FewShotConfig) -> None:
    run, data, config = whole.run, whole.data, whole.finetune
    model_dir = Path(run.model_dir)
    directory.check_config(model_dir, whole)
    mixture = prepare_mixtures(data, run=config.dense_dir)[data.mixture_or_task_name]
    if config.moe_dir is not None:
        check_vocabulary(config.moe_dir, mixture)
    check_file(config, mixture.names)  # before the work, not in the middle of it
    directory.write_config(model_dir, whole)
    directory.write_origin(model_dir)
    rows = _read_rows(model_dir / RUNS)
    done = {tuple(row[k] for k in KEY) for row in rows}
    grid = [(rate, size) for size in config.batch_sizes for rate in config.learning_rates]
    # Runs are small: one device each.
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    with jax.set_mesh(mesh), open(model_dir / RUNS, "a", encoding="utf-8") as log:
        adapters: dict[tuple, Adapter] = {}
        starts = read_starts(config, mixture.vocabulary.size, run.seed, replicated(mesh))
        samples = list(itertools.product(mixture.names, config.seeds))
        total = len(samples) * len(grid) * (2 + (config.moe_dir is not None))
        bar = progress(total=total, initial=len(done), desc="few-shot", unit="run")
        for start in starts:
            form = (start.model, FROZEN[start.tune])
            if form not in adapters:
                adapters[form] = Adapter(*form, mixture, whole, mesh)
            for task, seed in samples:
                points = [p for p in grid if (task, start.name, seed, *p) not in done]
                if not points:
                    continue
                bar.set_postfix_str(f"{start.name}, {task}", refresh=False)
                # The first 16 training examples as one group, whatever their number.
                examples = few_shot_batches(mixture, task, seed, 16, 1, data)[0]
                found = search(
                    adapters[form], start.params(task, examples), task, seed, points,
                    mixture, data, config,
                )  # fmt: skip
                for row in found:
                    row = {"task": task, "start": start.name, "seed": seed, **row}
                    rows.append(row)
                    log.write(files.json_line(row))
                    log.flush()
                    bar.update()
        bar.close()
    # ---------------------------------------------------------------- results
    found_gains = gains.relative_gains(rows)
    gains.write(model_dir, found_gains)
    print(gains.text_table(found_gains))
    over_dense = paired.compare(gains.score_rows(found_gains))
    files.write_json(model_dir / "gains.json", dataclasses.asdict(over_dense))
    print(paired.text_table(over_dense))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Finished runs. An incomplete last line of a killed run is removed from the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    files.write_bytes(path, b"".join(line for line in lines if line.endswith(b"}\n")))
    return list(files.read_jsonl(path))
