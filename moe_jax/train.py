"""Trains a model on a mixture of tasks.

    python -m moe_jax.train --gin_file=models/tiny.gin --gin_file=runs/skills_gym_stage1.gin \
        --gin.MODEL_DIR=/tmp/stage1

Started again, the same command goes on from the last checkpoint, exactly.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, by_group, group_shards, make_mesh
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import train_batches
from moe_jax.evaluation.evaluator import Evaluator, mean_score, tasks_with_split, write_routes
from moe_jax.kernels import memory
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, init_params
from moe_jax.prepare import ensure_prepared
from moe_jax.runs import directory as run_dir
from moe_jax.runs import flags as cli
from moe_jax.runs.config import DataConfig, RunConfig
from moe_jax.runs.load import build_model
from moe_jax.training.checkpoints import (
    Checkpoints,
    fit_backbone,
    fit_table,
    load_params,
    split_layers,
)
from moe_jax.training.logs import MetricsLog, Window
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import PRNG, StepConfig, init_state, make_train_step, state_shardings
from moe_jax.unseen.representations import read_representations


def initial_params(model: TaskMoE, run: RunConfig, tasks: list[str], sharding: Any) -> Any:
    """Parameters before the first step.

    1. Fresh from the seed.
    2. The backbone from INITIAL_CHECKPOINT_PATH, if given.
    3. Router and representations from ROUTER_CHECKPOINT_PATH, if given.
    4. Representations from RunConfig.representations_path, if given.
    """
    key = jax.random.key(run.seed, impl=PRNG)
    params = jax.jit(lambda k: nn.meta.unbox(init_params(model, k)), out_shardings=sharding)(key)
    if run.initial_checkpoint_path:
        loaded, _ = load_params(run.initial_checkpoint_path)
        params["backbone"] = fit_backbone(
            split_layers(loaded["backbone"], model.config), params["backbone"],
            model.config.expert_noise, jax.random.fold_in(key, 1), run.initial_checkpoint_path,
        )  # fmt: skip
    if run.router_checkpoint_path and model.routed:
        loaded, meta = load_params(run.router_checkpoint_path)
        params |= fit_table(loaded, params, meta["tasks"], tasks, run.router_checkpoint_path)
    if run.representations_path and model.routed:
        dim = model.router_config.representation_dim
        params["representations"] = read_representations(run.representations_path, tasks, dim)
    return jax.device_put(params, sharding)


def train() -> None:
    """Trains as the gin configuration says."""
    # ---------------------------------------------------------------- configuration
    run, data, mesh_config = RunConfig(), DataConfig(), MeshConfig()
    optimizer_config, step_config = OptimizerConfig(), StepConfig()
    configs = [run, data, ModelConfig(), RouterConfig(), optimizer_config, step_config, mesh_config]
    run.require("model_dir", "train_steps")
    model_dir = Path(run.model_dir)
    lead = jax.process_index() == 0
    run_dir.check_config(model_dir, configs)

    # ---------------------------------------------------------------- data and model
    mixture = prepare_mixtures(data)[data.mixture_or_task_name]
    tasks = list(mixture.names)
    task_ids = {name: i for i, name in enumerate(tasks)}
    vocabulary = mixture.vocabulary
    model = build_model(ModelConfig(), RouterConfig(), vocabulary.size, len(tasks))
    mesh = make_mesh(mesh_config)
    if data.groups % group_shards(mesh):
        raise UserError(
            f"BATCH_SIZE {data.batch_size} is {data.groups} groups of {data.rows_per_group} rows: "
            f"no multiple of the mesh's {group_shards(mesh)} data shards"
        )
    if run.eval_period:
        tasks_with_split(mixture, run.eval_split)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(optimizer_config)
        sharding = state_shardings(model, optimizer, mesh)
        batches = iter(
            train_batches(
                mixture,
                lengths=data.lengths,
                groups=data.groups,
                rows=data.rows_per_group,
                pack=data.pack,
                shapes=data.row_shapes,
                seed=run.seed,
                mixing=data.mixing,
                cap=data.cap,
                temperature=data.mixing_temperature,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )

        # ------------------------------------------------------------ state: own checkpoint first
        params = initial_params(model, run, tasks, sharding.params)
        checkpoints = Checkpoints(model_dir, run.keep_checkpoints)
        state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=sharding)(params)
        start = checkpoints.latest() or 0
        if start:
            state, meta = checkpoints.restore(start, state)
            if meta["tasks"] != tasks:
                raise UserError(f"{model_dir} was trained on another task table")
            if meta["data"] != mixture.fingerprint:
                raise UserError(f"the data changed since {model_dir} was trained on it")
            batches.set_state(meta["iterator"])
        if lead:
            run_dir.write_config(model_dir, configs)
            run_dir.write_task_table(model_dir, tasks)
            run_dir.copy_vocabulary(model_dir, mixture.vocabulary_dir)

        # ------------------------------------------------------------ loop
        train_step = make_train_step(
            model, optimizer_config, step_config, mesh, run.train_steps, run.seed
        )
        rates = {k: jnp.float32(v) for k, v in optimizer_config.learning_rates.items()}
        evaluator = Evaluator(model, vocabulary, data.lengths, run.eval_batch_rows, mesh)
        log = MetricsLog(model_dir, start, enabled=lead)
        window = Window()
        bar = tqdm(
            total=run.train_steps, initial=start, desc=model_dir.name, unit="step", disable=not lead
        )
        for step in range(start + 1, run.train_steps + 1):
            # 1. The batch, made while the device was busy.
            batch = next(batches)
            arrays = jax.tree.map(
                lambda a: jax.make_array_from_process_local_data(by_group(mesh), a), batch
            )
            # 2. The step is dispatched; its metrics are read while the next one runs.
            state, metrics = train_step(state, arrays, rates)
            if step == start + 1:
                memory.keep_freed()
            window.add(metrics)
            bar.update()
            last = step == run.train_steps
            evaluate = run.eval_period and (step % run.eval_period == 0 or last)
            save = step % run.checkpoint_period == 0 or last
            # 3. A line of metrics; also where a resumed run would start, so that its lines match.
            if step % run.log_period == 0 or save or evaluate:
                line = window.close()
                log.write(step, "train", line)
                bar.set_postfix_str(_postfix(line), refresh=False)
            # 4. Scores on the dev split.
            score = None
            if evaluate:
                scores = evaluator.tasks(
                    state.params, step, mixture, task_ids, run.eval_split, run.eval_examples, lead
                )
                score = mean_score(scores)
                per_task = {f"score/{s.task.name}": s.score for s in scores}
                log.write(step, "eval", {"mean_score": score, **per_task})
            # 5. The checkpoint, with the position in the data.
            if save:
                meta = {
                    "tasks": tasks,
                    "data": mixture.fingerprint,
                    "iterator": batches.get_state(),
                }
                checkpoints.save(state, meta, score)
            if save or evaluate:
                window = Window()
        bar.close()

        # ------------------------------------------------------------ results
        checkpoints.wait()
        if model.routed:
            routes = np.asarray(evaluator.routes(state.params, jnp.int32(run.train_steps)))
            if lead:
                write_routes(
                    model_dir / "routes.json", model, routes, run.train_steps, mixture, task_ids
                )
        log.close()


def prepare_mixtures(data: DataConfig, *more: str) -> dict[str, PreparedMixture]:
    """The mixture of `data` first, then `more` in the same vocabulary; by name."""
    if data.mixture_or_task_name is None:
        raise UserError("MIXTURE_OR_TASK_NAME is not set: give --gin.MIXTURE_OR_TASK_NAME=...")
    names = list(dict.fromkeys([data.mixture_or_task_name, *more]))
    return ensure_prepared(
        data.cache_dir, names, data.task_modules, data.vocabulary, environment=data.environment
    )


def _postfix(line: dict[str, float]) -> str:
    return (
        f"loss {line['loss']:.3f}, {1000 * line['time/step_s']:.0f} ms/step, "
        f"{line['time/target_tokens_per_s']:,.0f} target tokens/s"
    )


if __name__ == "__main__":
    cli.run(train)
