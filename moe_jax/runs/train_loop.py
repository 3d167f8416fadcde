"""The training loop.

The order in every step: batch, update, metrics, dev scores, checkpoint.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import by_group, group_shards, make_mesh
from moe_jax.data.pipeline import train_batches
from moe_jax.evaluation.evaluator import Evaluator, tasks_with_split
from moe_jax.evaluation.scores import mean_score, write_routes
from moe_jax.kernels import memory
from moe_jax.runs import directory
from moe_jax.runs.config import Config
from moe_jax.runs.initial import initial_params
from moe_jax.runs.load import build_model
from moe_jax.runs.mixtures import prepare_mixtures
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.logs import MetricsLog, Window
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.step import init_state, make_train_step, state_shardings


def train(config: Config) -> None:
    """Trains; continues from the last checkpoint if there is one.

    Raises:
        UserError: the configuration does not fit the data, the devices or the run in the directory.
    """
    # ---------------------------------------------------------------- configuration
    run, data, optimizer_config = config.run, config.data, config.optimizer
    run.require("model_dir", "train_steps")
    model_dir = Path(run.model_dir)
    lead = jax.process_index() == 0
    directory.check_config(model_dir, config)

    # ---------------------------------------------------------------- data and model
    mixture = prepare_mixtures(data)[data.mixture_or_task_name]
    tasks = list(mixture.names)
    task_ids = {name: i for i, name in enumerate(tasks)}
    vocabulary = mixture.vocabulary
    model = build_model(config.model, config.router, vocabulary.size, len(tasks))
    mesh = make_mesh(config.mesh)
    if data.groups % group_shards(mesh):
        raise UserError(
            f"BATCH_SIZE {data.batch_size} is {data.groups} groups of {data.rows_per_group} rows: "
            f"not a multiple of the mesh's {group_shards(mesh)} data shards"
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
            directory.write_config(model_dir, config)
            directory.write_task_table(model_dir, tasks)
            directory.copy_vocabulary(model_dir, mixture.vocabulary_dir)

        # ------------------------------------------------------------ loop
        train_step = make_train_step(
            model, optimizer_config, config.step, mesh, run.train_steps, run.seed
        )
        rates = {k: jnp.float32(v) for k, v in optimizer_config.learning_rates.items()}
        evaluator = Evaluator(
            model, vocabulary, data.lengths, run.eval_batch_rows, mesh, config.decoding
        )
        log = MetricsLog(model_dir, start, enabled=lead)
        window = Window()
        bar = tqdm(
            total=run.train_steps, initial=start, desc=model_dir.name, unit="step", disable=not lead
        )
        for step in range(start + 1, run.train_steps + 1):
            # 1. The batch. It was made while the device was busy.
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
            # 3. A line of metrics. Also before each checkpoint, so that a resumed run writes the
            # same lines.
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


def _postfix(line: dict[str, float]) -> str:
    return (
        f"loss {line['loss']:.3f}, {1000 * line['time/step_s']:.0f} ms/step, "
        f"{line['time/target_tokens_per_s']:,.0f} target tokens/s"
    )
