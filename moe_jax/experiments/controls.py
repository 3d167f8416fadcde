"""Controls: routes that are not learned, and models made from a trained one without training."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data import vocabulary
from moe_jax.data.cache import PreparedMixture, PreparedTask
from moe_jax.interop.squeeze import plain_model
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import parameter_shapes
from moe_jax.runs import directory
from moe_jax.runs.config import Config
from moe_jax.runs.load import Run, read_run
from moe_jax.training.checkpoints import DIRECTORY

Level = Literal["category", "subcategory"]
# Routes of an arm whose router does not learn them: {task: representation}.
GIVEN = "given_routes.json"
Rows = Mapping[str, list[float]]


def planted_experts(
    trained: PreparedMixture, unseen: PreparedMixture, level: Level
) -> tuple[dict[str, int], int]:
    """The expert that the ontology gives each task, and how many experts that takes.

    Every category (or subcategory) of the training tasks has an expert. An unseen task of none of
    them, such as one of two skills, 'place+capital', takes the expert of the last skill that some
    training task has: the one that gives the answer.

    Raises:
        UserError: a training task has no category.
    """
    for task in trained.tasks:
        if not getattr(task, level):
            raise UserError(
                f"the arm 'oracle' needs every task's {level}: {task.name!r} has none in the"
                " ontology of its module"
            )
    groups = sorted({getattr(task, level) for task in trained.tasks})
    of_skill = {task.subcategory: groups.index(getattr(task, level)) for task in trained.tasks}

    def expert(task: PreparedTask) -> int:
        if getattr(task, level) in groups:
            return groups.index(getattr(task, level))
        skills = reversed(task.subcategory.split("+"))
        return next((of_skill[skill] for skill in skills if skill in of_skill), 0)

    return {task.name: expert(task) for task in (*trained.tasks, *unseen.tasks)}, len(groups)


def planted_routes(experts: Mapping[str, int], layers: int, count: int) -> Rows:
    """The route logits [N * E] of tasks that take one expert in all layers."""
    rows = {task: np.tile(np.eye(count)[expert], layers) for task, expert in experts.items()}
    return {task: row.tolist() for task, row in rows.items()}


def drawn_routes(trained: PreparedMixture, layers: int, count: int, seed: int) -> Rows:
    """The route logits [N * E] of training tasks that take a random expert in every layer."""
    rng = np.random.default_rng(seed)
    drawn_TxN = rng.integers(0, count, (len(trained.names), layers))
    rows_TxNxE = np.eye(count)[drawn_TxN]
    return {task: row.ravel().tolist() for task, row in zip(trained.names, rows_TxNxE, strict=True)}


def exchanged(tasks: int, new: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of T tasks' routes each of them, and each new task, takes in place of its own.

    Returns:
        (int [T], no task its own where there are two or more; int [new]).
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(tasks)
    substitute_T = np.empty(tasks, np.int64)
    substitute_T[order] = np.roll(order, 1)
    return substitute_T, rng.integers(0, tasks, new)


def write_average(source: Path, out: Path) -> None:
    """Writes a dense run whose layers are the means of a mixture's experts.

    Raises:
        UserError: the source holds no run.
    """
    config, run, own = _read(source)
    dense, backbone, _ = plain_model(run, None, own, average=True, approximate=False)
    config = dataclasses.replace(config, model=dense)
    _write(source, out, config, run, {"backbone": backbone})


def write_shuffled(source: Path, out: Path, unseen: PreparedMixture, seed: int) -> None:
    """Writes a mixture in which every task takes the route of another one, drawn at random.

    `GIVEN` in it has the representations of new tasks.

    Raises:
        UserError: the source holds no run.
    """
    config, run, _ = _read(source)
    table_TxK = np.asarray(run.params["representations"])
    new = [name for name in unseen.names if name not in run.task_ids]
    substitute_T, of_new = exchanged(len(table_TxK), len(new), seed)
    rows = dict(zip(new, table_TxK[of_new].tolist(), strict=True))
    files.write_json(out / GIVEN, rows)
    _write(source, out, config, run, {**run.params, "representations": table_TxK[substitute_T]})


def _read(source: Path) -> tuple[Config, Run, vocabulary.Vocabulary]:
    own = vocabulary.load_vocabulary(source / vocabulary.DIRECTORY)
    return directory.read_config(source), read_run(str(source), own.size), own


def _write(source: Path, out: Path, config: Config, run: Run, params: Params) -> None:
    """Writes a run without its history."""
    tasks = list(run.task_ids)
    meta = {"tasks": tasks, "step": run.step, "shapes": parameter_shapes(params)}
    promises = jax.tree.map(lambda a: Promise(a.shape, lambda: np.asarray(a, np.float32)), params)
    shutil.rmtree(out / DIRECTORY, ignore_errors=True)  # of an attempt that was interrupted
    save_params(out, run.step, promises, meta)
    own = dataclasses.replace(config.run, model_dir=str(out))
    config = dataclasses.replace(config, run=own)
    directory.describe(out, config, tasks, source / vocabulary.DIRECTORY)
