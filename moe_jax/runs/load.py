"""Loads a trained run: configuration, task table, vocabulary and parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import UserError
from moe_jax.data.representations import read_representations
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import TaskMoE, parameter_shapes, shapes_of
from moe_jax.runs import directory
from moe_jax.training.checkpoints import load_params
from moe_jax.training.shapes import check_shapes


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint with everything needed to use it.

    Attributes:
        task_ids: task name -> row of the task table.
        step: step of the checkpoint, which sets the temperature.
    """

    model: TaskMoE
    params: Params
    task_ids: dict[str, int]
    step: int


def build_model(
    model_config: ModelConfig, router_config: RouterConfig, vocabulary_size: int, tasks: int
) -> TaskMoE:
    """The model for a vocabulary and a task table.

    Raises:
        UserError: the vocabulary has more ids than the model's embedding has rows.
    """
    if model_config.vocabulary_size == 0:
        model_config = dataclasses.replace(model_config, vocabulary_size=vocabulary_size)
    if model_config.vocabulary_size < vocabulary_size:
        raise UserError(
            f"ModelConfig.vocabulary_size is {model_config.vocabulary_size}, "
            f"but the vocabulary has {vocabulary_size} tokens"
        )
    return TaskMoE(model_config, router_config, tasks)


def load_run(
    model_dir: str, model_config: ModelConfig, router_config: RouterConfig, vocabulary_size: int
) -> Run:
    """Loads the latest checkpoint of `model_dir`, or the checkpoint that the path names.

    Raises:
        UserError: there is no checkpoint, or parameters have other shapes.
    """
    params, meta = load_params(model_dir)
    tasks = meta["tasks"]
    model = build_model(model_config, router_config, vocabulary_size, len(tasks))
    try:
        check_shapes(parameter_shapes(params), shapes_of(model), model_dir)
    except UserError as e:
        own = directory.config_lines(directory.read_config(directory.root(model_dir)))
        here = directory.config_lines(model_config) | directory.config_lines(router_config)
        others = [f"{name} = {own[name]!r}" for name in here if own[name] != here[name]]
        hint = f"; the run has {', '.join(others)}" if others else ""
        raise UserError(f"{e}{hint}") from e
    return Run(model, params, {name: i for i, name in enumerate(tasks)}, meta["step"])


def with_drawn_routes(run: Run) -> Run:
    """A run whose routes are drawn at random, as one whose representations are those routes.

    So a new task can take a training task's route. A draw of its own would be one that no task was
    trained with. Other runs stay as they are.
    """
    model = run.model
    if not (model.routed and model.selection.random):
        return run
    drawn_TxN_E = np.asarray(model.random_routes()).reshape(model.tasks, -1)
    router = dataclasses.replace(
        model.router_config, kind="free", representation_dim=drawn_TxN_E.shape[1],
        selection="top_k", experts_per_layer=model.experts_per_layer,
    )  # fmt: skip
    # Equal logits for the experts of a route, so equal weights.
    rows_TxK = jnp.asarray(drawn_TxN_E > 0, jnp.float32)
    params = {"backbone": run.params["backbone"], "router": {}, "representations": rows_TxK}
    return dataclasses.replace(run, model=model.clone(router_config=router), params=params)


def with_tasks(
    run: Run,
    names: Sequence[str],
    representations: str | None = None,
    nearest: Mapping[str, str] | None = None,
) -> Run:
    """Adds tasks to the table of a run.

    Args:
        representations: file with the rows of new tasks. A dense model does not use the rows, but
            the names are checked anyway.
        nearest: without a file, new task -> the trained task whose row it takes; tasks that are
            not in it get the mean of all rows.

    Raises:
        UserError: there is a file and no new task, or the file has no such row, see
            `read_representations`.
    """
    new = [name for name in dict.fromkeys(names) if name not in run.task_ids]
    if not new:
        if representations is not None:
            those = names[0] if len(names) == 1 else f"all {len(names)} tasks"
            raise UserError(
                f"{representations}: representations are for tasks that the model was not trained"
                f" on, but it was trained on {those}"
            )
        return run
    run = with_drawn_routes(run)
    ids = {**run.task_ids, **{name: len(run.task_ids) + i for i, name in enumerate(new)}}
    params: dict[str, Any] = {**run.params}
    if run.model.routed:
        table_TxK = np.asarray(params["representations"])
        if representations is None:
            nearest = nearest or {}
            mean_K = table_TxK.mean(0)
            new_NxK = np.stack([
                table_TxK[run.task_ids[nearest[name]]] if name in nearest else mean_K
                for name in new
            ])  # fmt: skip
        else:
            new_NxK = read_representations(representations, new, table_TxK.shape[1])
        params["representations"] = jnp.asarray(np.concatenate([table_TxK, new_NxK]))
    elif representations is not None:
        read_representations(representations, new, None)
    return Run(run.model.clone(tasks=len(ids)), params, ids, run.step)


def read_run(model_dir: str, vocabulary_size: int) -> Run:
    """`load_run` with the configuration that the directory itself holds."""
    config = directory.read_config(directory.root(model_dir))
    return load_run(model_dir, config.model, config.router, vocabulary_size)
