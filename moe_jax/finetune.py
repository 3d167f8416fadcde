"""Few-shot adaptation to unseen tasks from several starting points; average relative gain.

    python -m moe_jax.finetune --gin_file=runs/skills_gym_finetune.gin \
        --gin.MODEL_DIR=/tmp/few_shot --gin.DENSE_DIR=/tmp/dense --gin.MOE_DIR=/tmp/stage2

For every task of the mixture, seed, starting point, learning rate and batch size: trains on the
task's few examples, scores dev and test. The best dev score chooses learning rate and batch size.
Writes MODEL_DIR/runs.jsonl (started again, it goes on after the last line) and arg.{json,csv,txt}.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax import cli, files, run_dir
from moe_jax.config import DataConfig, FinetuneConfig, RunConfig
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import train_batches
from moe_jax.errors import UserError
from moe_jax.evaluation import Evaluator
from moe_jax.model.experts import Params
from moe_jax.model.moe import TaskMoE
from moe_jax.model.selection import temperature_at
from moe_jax.parallel import MeshConfig, make_mesh, replicated
from moe_jax.report import gain
from moe_jax.runs import Run, read_run
from moe_jax.train import initial_params, prepare_mixtures
from moe_jax.training.groups import group_loss
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import StepConfig, init_state, make_train_step

RUNS = "runs.jsonl"


class Start:
    """A starting point: parameters, and what every run from it shares (compiled once)."""

    def __init__(self, name: str, run: Run, config: FinetuneConfig, seed: int):
        self.name = name
        self.run = run
        self.config = config
        self.seed = seed
        model = run.model
        # One new task, routed as the trained model is at its last temperature, without noise.
        router = dataclasses.replace(
            model.router_config,
            selection={"gumbel_softmax_st": "argmax", "gumbel_softmax": "softmax"}.get(
                model.router_config.selection, model.router_config.selection
            ),
            temperature=float(temperature_at(model.router_config, run.step)),
            temperature_rate=0.0,
            temperature_floor=0.0,
        )
        self.model = dataclasses.replace(model, router_config=router, tasks=1)
        self._losses = jax.jit(self._losses_of_tasks)

    def params(self, batch: Mapping[str, np.ndarray]) -> Params:
        """Parameters for a new task; `batch` [1, R, L] holds its few examples."""
        if not self.run.model.routed:
            return self.run.params
        table_TxK = np.asarray(self.run.params["representations"])
        match self.config.representation:
            case "mean":
                row_K = table_TxK.mean(0)
            case "nearest":
                row_K = table_TxK[int(np.argmin(self._losses(self.run.params, batch)))]
            case "random":
                row_K = np.random.default_rng(self.seed).standard_normal(table_TxK.shape[1])
        return {**self.run.params, "representations": jnp.asarray(row_K[None], jnp.float32)}

    def _losses_of_tasks(self, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Loss [T] of the few examples under the route of every training task."""
        model = dataclasses.replace(self.model, tasks=self.run.model.tasks)
        routes_TxNxE = model.routes(params, 0)
        group = {name: array[0] for name, array in batch.items() if name != "task_id"}
        everything = dataclasses.replace(
            model, router_config=dataclasses.replace(model.router_config, experts_per_layer=0)
        )
        return jax.lax.map(
            lambda route: group_loss(everything, params["backbone"], route, group, None),
            routes_TxNxE,
        )


def read_starts(
    config: FinetuneConfig, vocabulary_size: int, seed: int, sharding: Any
) -> Iterator[Start]:
    """The starting points, one at a time, so that one model is in memory."""
    if config.dense_dir is None:
        raise UserError("FinetuneConfig.dense_dir is not set: give --gin.DENSE_DIR=...")
    dense = read_run(config.dense_dir, vocabulary_size)
    configs = run_dir.read_config(config.dense_dir)
    params = initial_params(dense.model, configs["RunConfig"], list(dense.task_ids), sharding)
    yield Start("untrained", dataclasses.replace(dense, params=params), config, seed)
    yield Start("dense", dense, config, seed)
    if config.moe_dir is not None:
        yield Start("moe", read_run(config.moe_dir, vocabulary_size), config, seed)


def few_shot_batches(
    mixture: PreparedMixture, task: str, seed: int, rows: int, steps: int, data: DataConfig
) -> list[dict[str, np.ndarray]]:
    """The batches [1, R, L] of one run; the same for every starting point."""
    dataset = train_batches(
        mixture,
        lengths=data.lengths,
        groups=1,
        rows=rows,
        pack=False,
        seed=seed,
        mixing="equal",
        split=f"fewshot_{seed}_train",
        tasks=[task],
        task_ids={task: 0},
        threads=0,
    )
    return list(itertools.islice(dataset, steps))


def finetune() -> None:
    """Adapts every starting point to every task, and writes the average relative gain."""
    # ---------------------------------------------------------------- configuration
    run, data, config = RunConfig(), DataConfig(), FinetuneConfig()
    optimizer_config, step_config = OptimizerConfig(), StepConfig()
    run.require("model_dir")
    directory = Path(run.model_dir)
    configs = [run, data, config, optimizer_config, step_config]
    run_dir.check_config(directory, configs)
    mixture = prepare_mixtures(data)[data.mixture_or_task_name]
    run_dir.write_config(directory, configs)
    done = _read_rows(directory / RUNS)
    grid = list(itertools.product(config.seeds, config.batch_sizes, config.learning_rates))
    # Runs are small: one device each.
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    rows = list(done.values())
    with jax.set_mesh(mesh), open(directory / RUNS, "a", encoding="utf-8") as log:
        starts = read_starts(config, mixture.vocabulary.size, run.seed, replicated(mesh))
        total = len(mixture.names) * len(grid) * (2 + (config.moe_dir is not None))
        bar = tqdm(total=total, desc="few-shot", unit="run")
        for start in starts:
            adapt = Adapter(start.model, mixture, data, config, optimizer_config, step_config, mesh)
            few_shot_params = functools.lru_cache(1)(
                lambda task, seed, s=start: s.params(_few_examples(mixture, task, seed, data))
            )
            for task, (seed, batch_size, learning_rate) in itertools.product(mixture.names, grid):
                key = (task, start.name, seed, learning_rate, batch_size)
                if key not in done:
                    batches = few_shot_batches(mixture, task, seed, batch_size, config.steps, data)
                    params = few_shot_params(task, seed)
                    dev, test, metric = adapt(params, batches, task, seed, learning_rate)
                    row = dict(zip(KEY, key, strict=True))
                    row |= {"metric": metric, "dev_score": dev, "test_score": test}
                    rows.append(row)
                    log.write(files.json_line(row))
                    log.flush()
                bar.set_postfix_str(f"{start.name}, {task}", refresh=False)
                bar.update()
        bar.close()
    # ---------------------------------------------------------------- results
    gains = gain.relative_gains(rows)
    gain.write(directory, gains)
    print(gain.text_table(gains))


KEY = ("task", "start", "seed", "learning_rate", "batch_size")


def _read_rows(path: Path) -> dict[tuple, dict[str, Any]]:
    """Finished runs; a line that a kill cut short is dropped from the file."""
    rows = []
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        files.write_text(path, "".join(whole))
        rows = list(files.read_jsonl(path))
    return {tuple(row[k] for k in KEY): row for row in rows}


def _few_examples(
    mixture: PreparedMixture, task: str, seed: int, data: DataConfig
) -> dict[str, np.ndarray]:
    """The first 16 training examples of a few-shot sample as one group, whatever their number."""
    return few_shot_batches(mixture, task, seed, 16, 1, data)[0]


class Adapter:
    """Trains and scores one run; compiles once per batch size, whatever the task."""

    def __init__(
        self,
        model: TaskMoE,
        mixture: PreparedMixture,
        data: DataConfig,
        config: FinetuneConfig,
        optimizer_config: OptimizerConfig,
        step_config: StepConfig,
        mesh: jax.sharding.Mesh,
    ):
        self._mixture = mixture
        self._config = config
        self._rates = optimizer_config.learning_rates
        optimizer = make_optimizer(optimizer_config)
        # The step donates its state: every run starts from a copy.
        self._init = jax.jit(lambda p: init_state(jax.tree.map(jnp.copy, p), optimizer))
        self._step = make_train_step(
            model, optimizer_config, step_config, mesh, config.steps, seed=0
        )
        rows = RunConfig().eval_batch_rows
        self._evaluator = Evaluator(model, mixture.vocabulary, data.lengths, rows, mesh)

    def __call__(
        self, params: Params, batches: list, task: str, seed: int, learning_rate: float
    ) -> tuple[float, float, str]:
        """Dev score, test score and metric after training on `batches`."""
        state = self._init(params)
        rates = {k: jnp.float32(v) for k, v in self._rates.items()}
        rates["backbone"] = jnp.float32(learning_rate)
        for batch in batches:
            state, _ = self._step(state, batch, rates)
        evaluator = self._evaluator
        routes = evaluator.routes(state.params, jnp.int32(0)) if evaluator.model.routed else None

        def score(split, limit=None):
            return evaluator.task(state.params, routes, self._mixture, task, 0, split, limit)

        dev = score(f"fewshot_{seed}_validation")
        test = score("test", self._config.test_examples)
        return dev.score, test.score, test.metric


if __name__ == "__main__":
    cli.run(finetune)
