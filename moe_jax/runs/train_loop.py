"""The training loop.

In every step: the batch, the step, its metrics, routes, the checkpoint, dev scores, in this order.
"""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_jax.core import paths, processes
from moe_jax.core.errors import UserError, say
from moe_jax.core.progress import progress
from moe_jax.core.sharding import by_group, make_mesh, part_of_groups
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import train_batches
from moe_jax.evaluation.scores import write_routes
from moe_jax.kernels import memory
from moe_jax.model.task_moe import TaskMoE
from moe_jax.runs import directory, stopping
from moe_jax.runs.config import Config
from moe_jax.runs.dev_scores import DevScores
from moe_jax.runs.initial import initial_params
from moe_jax.runs.load import build_model
from moe_jax.runs.mixtures import check_vocabulary, prepare_mixtures, say_cut, say_ignored
from moe_jax.runs.profiling import Steps, Trace
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.logs import SCORE, MetricsLog, Window
from moe_jax.training.optimizer import make_optimizer, schedule
from moe_jax.training.step import TrainState, abstract_state, init_state, make_train_step

LONG_S = 10.0  # a step that compiles for longer is said


def train(config: Config, profile: Steps | None = None) -> None:
    """Trains; continues from the last checkpoint if there is one.

    Args:
        profile: steps to trace into MODEL_DIR/profile.

    Raises:
        UserError: what the configuration asks for does not fit the data, the devices or what the
            directory holds, or another process trains there.
        Stopped: a signal asked for it; the state after the step at hand is saved.
    """
    config.run.require("model_dir", "train_steps")
    lead = jax.process_index() == 0
    with processes.lock(config.run.model_dir) if lead else contextlib.nullcontext():
        _train(config, profile, lead)


def _train(config: Config, profile: Steps | None, lead: bool) -> None:
    # ---------------------------------------------------------------- configuration
    run, data, optimizer_config = config.run, config.data, config.optimizer
    model_dir = paths.parse(run.model_dir)
    before = directory.check_config(model_dir, config)

    # ---------------------------------------------------------------- data and model
    mixtures = prepare_mixtures(data, *run.eval_mixtures)
    mixture = mixtures[data.mixture_or_task_name]
    # As SeqIO does; tasks without a train split are for evaluation.
    tasks = [task.name for task in mixture.with_split("train")]
    if lead:
        say_ignored(data, mixture)
        say_cut(mixture, "train", data.lengths)
    task_ids = {name: i for i, name in enumerate(tasks)}
    model = build_model(config.model, config.router, mixture.vocabulary.size, len(tasks))
    mesh = make_mesh(config.mesh)
    config.check_groups(mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as scope:
        names = run.eval_mixtures or (mixture.name,)
        dev = DevScores(config, [mixtures[name] for name in names], model, task_ids, mesh)

        # ------------------------------------------------------------ state, and place in the data
        checkpoints = scope.enter_context(Checkpoints(model_dir, run.keep_checkpoints))
        state, meta = _begin(config, before, mixture, tasks, model, mesh, checkpoints)
        start, parts = meta.get("step", 0), meta.get("parts", [])
        # Batches of another size than now.
        earlier = parts[:-1] if parts and parts[-1][1] == data.groups else parts
        batches = iter(
            train_batches(
                mixture, **data.batching, earlier=earlier, seed=run.seed,
                part=part_of_groups(mesh), tasks=tasks, task_ids=task_ids,
            )
        )  # fmt: skip
        if meta:
            batches.set_state(meta["iterator"])
        if lead:
            directory.describe(model_dir, config, tasks, mixture.vocabulary_dir)

        # ------------------------------------------------------------ loop
        train_step = make_train_step(
            model, optimizer_config, config.step, mesh, run.train_steps, run.seed
        )
        rates = {k: jnp.float32(v) for k, v in optimizer_config.learning_rates.items()}
        log = MetricsLog(model_dir, start, enabled=lead)
        checkpoints.scores = log.scores
        stop = scope.enter_context(stopping.after_a_step(mesh))
        trace = Trace(model_dir / "profile", profile, start + 1, run.train_steps)
        scope.enter_context(trace)
        bar = scope.enter_context(
            progress(
                total=run.train_steps, initial=start, desc=model_dir.name, unit="step",
                disable=not lead,
            )
        )  # fmt: skip

        def is_due(period: int, step: int) -> bool:
            return bool(period) and (step % period == 0 or step == run.train_steps)

        def evaluate(step: int) -> None:
            with stop.at_once():
                scores = dev.compute(state.params, step, lead)
            log.write(step, "eval", scores)
            if lead:
                say(f"step {step}: mean score {scores[SCORE]:.4f} on {run.eval_split}")

        def keep_routes(path: Path, step: int) -> None:
            if model.routed:
                routes = dev.routes(state.params, step)
                if lead:
                    write_routes(path, model, routes, step, mixture, task_ids)

        # A run that was stopped or killed while it evaluated has saved before.
        if start and is_due(run.eval_period, start) and _lead_says(start not in log.scores):
            evaluate(start)
        window, shapes, line = Window(meta.get("window", ())), set(), None
        for step in range(start + 1, run.train_steps + 1):
            # 1. The batch. It was made while the device was busy.
            batch = next(batches)
            arrays = jax.tree.map(
                lambda a: jax.make_array_from_process_local_data(by_group(mesh), a), batch
            )
            # 2. The step is dispatched; its metrics are read while the next one runs. It compiles
            #    for each shape of rows.
            shape = tuple(batch[name].shape[-1] for name in ("inputs", "targets"))
            if compiles := shape not in shapes:
                bar.set_postfix_str("compiling")
                begin = time.perf_counter()
            with trace.step(step):
                state, metrics = train_step(state, arrays, rates)
            if compiles:
                _say_compiled(time.perf_counter() - begin, shape, lead)
                if not shapes:
                    memory.keep_freed()
                shapes.add(shape)
            trace.after(step, metrics)
            window.add(metrics)
            if compiles:
                window.compiled()
            bar.update()
            evaluates = is_due(run.eval_period, step)
            save = evaluates or is_due(run.checkpoint_period, step)
            stops = stop.agreed()
            # 3. A line of metrics; also where a resumed run would start, so that its lines match.
            if step % run.log_period == 0 or save:
                line = window.close()
                log.write(step, "train", line)
                bar.set_postfix_str(_postfix(line), refresh=False)
            # 4. The routes, then the checkpoint, with the position in the data.
            if save:
                keep_routes(model_dir / "routes" / f"{step}.json", step)
            if save or stops:
                meta = {
                    "tasks": tasks,
                    "data": mixture.fingerprint,
                    "iterator": batches.get_state(),
                    "window": window.rows(),
                    "parts": [*earlier, [step - sum(n for n, _ in earlier), data.groups]],
                }
                log.publish()  # no checkpoint without the lines before it
                checkpoints.save(state, meta)
            if stops:
                checkpoints.wait()
                raise stop.stopped(step)
            # 5. Scores on the dev split.
            if evaluates:
                evaluate(step)
            if save:
                window = Window()
        checkpoints.wait()

        # ------------------------------------------------------------ results
        keep_routes(model_dir / "routes.json", run.train_steps)
        log.close()
        if lead and line:
            say(f"{model_dir} is trained for {run.train_steps} steps: {_postfix(line)}")


def _begin(
    config: Config,
    before: directory.Lines,
    mixture: PreparedMixture,
    tasks: list[str],
    model: TaskMoE,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the latest checkpoint and its meta data; {} and a fresh state without one.

    Args:
        before: the settings that the run had.
    """
    run, optimizer = config.run, make_optimizer(config.optimizer)
    like = abstract_state(model, optimizer, mesh)
    found = checkpoints.restore_latest(
        like, lambda meta: _check_data(meta, tasks, mixture, run.model_dir)
    )
    if found is None:
        if run.initial_checkpoint_path and jax.process_index() == 0:
            check_vocabulary(run.initial_checkpoint_path, mixture)
        sharding = jax.tree.map(lambda leaf: leaf.sharding, like)
        begin = jax.jit(
            lambda params: init_state(params, optimizer), out_shardings=sharding, donate_argnums=0
        )
        return begin(initial_params(model, run, tasks, sharding.params)), {}
    state, meta = found
    _announce(config, before, meta["step"])
    return state, meta


def _check_data(
    meta: Mapping[str, Any], tasks: list[str], mixture: PreparedMixture, model_dir: str
) -> None:
    """Checks that a run goes on with the data of its checkpoint, whose meta data is given."""
    what, names = "", meta["tasks"]
    if changed := sorted({*tasks} ^ {*names}):
        what = f"task {changed[0]!r} is {'new' if changed[0] in tasks else 'gone'}"
    elif names != tasks:
        what = "its tasks have another order"
    elif meta["data"] != mixture.fingerprint:
        what = "its examples, rates or vocabulary changed"
    if what:
        raise UserError(
            f"{mixture.name} is not as it was when {model_dir} was trained on it: {what}; undo"
            " that, or give another MODEL_DIR"
        )


def _lead_says(yes: bool) -> bool:
    """What process 0 says, on all processes."""
    if jax.process_count() == 1:
        return yes
    return bool(multihost_utils.broadcast_one_to_all(np.int32(yes)))


def _announce(config: Config, before: directory.Lines, step: int) -> None:
    """Says what another length or batch size means for a run that goes on after `step`.

    Raises:
        UserError: the run is already longer.
    """
    run, rows = config.run, config.data.batch_size
    steps, old_steps = run.train_steps, before["RunConfig.train_steps"]
    if step > steps:
        raise UserError(
            f"{run.model_dir} is at step {step}, beyond TRAIN_STEPS {steps}: the steps cannot be "
            "taken back; give at least as many, or another MODEL_DIR"
        )
    if jax.process_index():
        return
    if step == steps:
        say(f"{run.model_dir} has taken all its {steps} steps; with more TRAIN_STEPS it goes on")
    if steps != old_steps:
        new, old = (
            float(schedule(config.optimizer, jnp.int32(step), total))
            for total in (steps, old_steps)
        )
        say(
            f"TRAIN_STEPS was {old_steps}, now is {steps}: from step {step + 1} on, the learning "
            f"rate is that of {steps} steps, {new:.1%} of its peak in place of {old:.1%}"
        )
    if rows != before["DataConfig.batch_size"]:
        say(
            f"BATCH_SIZE was {before['DataConfig.batch_size']}, now is {rows}: the data goes on "
            "where it was, and the learning rate stays as it is"
        )


def _say_compiled(seconds: float, shape: tuple[int, ...], lead: bool) -> None:
    """Says how long the first step of rows of a shape took, where it is worth a line."""
    if lead and seconds >= LONG_S:
        lengths = " + ".join(map(str, shape))
        say(f"compiled, and took the first step of rows of {lengths} tokens, in {seconds:.0f} s")


def _postfix(line: dict[str, float]) -> str:
    return (
        f"loss {line['loss']:.3f}, {1000 * line['time/step_s']:.0f} ms/step, "
        f"{line['time/target_tokens_per_s']:,.0f} target tokens/s"
    )
