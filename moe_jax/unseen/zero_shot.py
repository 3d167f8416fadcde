"""Routes of tasks that were never trained on, from their unlabelled inputs or descriptions.

A new task, or each of its inputs, is routed as the training tasks that resemble it. No
label is read. The mean of all representations is a poor substitute: the router maps it to a route
that no task was trained with.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import replicated
from moe_jax.data.batch import Batch
from moe_jax.data.cache import PreparedMixture, PreparedTask
from moe_jax.data.representations import unit_length
from moe_jax.decoding.rows import experts_per_row
from moe_jax.model.task_moe import parameter_shardings, routes_of
from moe_jax.runs.config import Config
from moe_jax.runs.load import Run
from moe_jax.runs.mixtures import trained_mixture
from moe_jax.unseen.descriptions import Descriptions
from moe_jax.unseen.embedding import example_batches, example_embeddings, text_embeddings

# How a task that was not trained on finds its route.
Unseen = Literal["nearest", "description", "weighted", "input", "mean"]
_EXAMPLES = 64  # of each task, evenly spaced, whose mean stands for the task
_SOFTNESS = 0.1  # cosines are divided by it before their softmax


def trained_on(run: Run, mixture: PreparedMixture) -> list[PreparedTask]:
    """The tasks of a mixture that the run was trained on.

    Raises:
        UserError: there is none.
    """
    tasks = [t for t in mixture.tasks if t.name in run.task_ids and "train" in t.splits]
    if not tasks:
        raise UserError(f"the run was trained on no task of {mixture.name}")
    return tasks


def new_tasks(
    known: Container[str], mixtures: Iterable[PreparedMixture], split: str
) -> dict[str, PreparedMixture]:
    """The tasks that have the split and are not known -> a mixture that has them."""
    return {
        task.name: mixture
        for mixture in mixtures
        for task in mixture.tasks
        if task.name not in known and split in task.splits
    }


def routes_of_new(
    run: Run,
    new: Mapping[str, PreparedMixture],
    unseen: Unseen,
    config: Config,
    split: str,
    mesh: Mesh,
    limit: int | None = None,
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """How tasks are routed that the run was not trained on; none in a dense model.

    Args:
        run: before new tasks are added.
        new: each of them -> a mixture that has it.
        config: of the run; its cache has what the run was trained on.
        split: whose inputs are looked at.
        limit: of the examples that get routes; see `Resemblance.by_input`.

    Returns:
        (task -> the training task whose route it takes; task -> its own route [N, E], or that of
        each example, [examples, N, E]). A task in neither takes that of the mean representation.
    """
    if not (new and run.model.routed) or unseen == "mean":
        return {}, {}
    trained = trained_mixture(config.run.model_dir, config.data)
    if unseen == "description":
        tasks = [mixture.task(name) for name, mixture in new.items()]
        return Descriptions(trained_on(run, trained)).nearest_of(tasks), {}
    rows = config.run.eval_batch_rows
    resemblance = Resemblance(run, trained, config.data.lengths, rows, mesh)
    match unseen:
        case "nearest":
            return resemblance.nearest(new, split), {}
        case "weighted":
            return {}, resemblance.weighted(new, split)
        case "input":
            return {}, resemblance.by_input(new, split, limit)


class Resemblance:
    """How much inputs resemble those of the training tasks, and the routes that follow.

    Inputs are embedded by the trained encoder, under the mean of all training routes: see
    `text_embeddings`.

    Args:
        run: a mixture of experts, before new tasks are added.
        trained: the mixture that the run was trained on; its training inputs are read.
        lengths: {"inputs", "targets"}.
        rows: examples computed together.

    Raises:
        UserError: none of the tasks of `trained` was trained on.
    """

    def __init__(
        self,
        run: Run,
        trained: PreparedMixture,
        lengths: Mapping[str, int],
        rows: int,
        mesh: Mesh,
    ):
        self._tasks = [task.name for task in trained_on(run, trained)]
        self._lengths, self._rows = lengths, rows
        params = jax.device_put(run.params, parameter_shardings(run.model, mesh))
        routes_TxNxE = jax.jit(partial(routes_of, run.model))(params, jnp.int32(run.step))
        embed = jax.jit(partial(text_embeddings, run.model), out_shardings=replicated(mesh))
        mean_NxE = routes_TxNxE.mean(0)
        self._embed = lambda batch: embed(params["backbone"], batch, mean_NxE)
        self._count = experts_per_row(run.model)
        rows_T = [run.task_ids[name] for name in self._tasks]
        self._routes_TxNxE = np.asarray(routes_TxNxE)[rows_T]
        self._seen_TxD = np.stack([self._of_task(trained, t, "train") for t in self._tasks])

    def nearest(self, new: Mapping[str, PreparedMixture], split: str) -> dict[str, str]:
        """New task -> the training task with the most similar inputs.

        Args:
            new: each new task -> a mixture that has it.
        """
        return {
            task: self._tasks[int(np.argmax(similarity_T))]
            for task, similarity_T in self._of_new(new, split)
        }

    def weighted(self, new: Mapping[str, PreparedMixture], split: str) -> dict[str, np.ndarray]:
        """New task -> the mean of all training tasks' routes, weighted by similarity: [N, E]."""
        return {
            task: weighted_route(similarity_T, self._routes_TxNxE, self._count)
            for task, similarity_T in self._of_new(new, split)
        }

    def by_input(
        self, new: Mapping[str, PreparedMixture], split: str, limit: int | None = None
    ) -> dict[str, np.ndarray]:
        """New task -> for every example of the split the route of the task it resembles most.

        Args:
            limit: as `eval_batches` has it: the routes of other examples are those of no task.

        Returns:
            float32 [examples, N, E] by task.
        """
        result = {}
        for task, mixture in new.items():
            indices, states_nxD = self._examples(mixture, task, split, limit)
            shape = (mixture.task(task).examples(split), *self._routes_TxNxE.shape[1:])
            routes = np.zeros(shape, np.float32)
            routes[indices] = self.routes(states_nxD)
            result[task] = routes
        return result

    def of_rows(self, batch: Batch) -> np.ndarray:
        """The route of the task that each row [R, L] of inputs resembles most: [R, N, E]."""
        return self.routes(np.asarray(self._embed(batch)))

    def routes(self, states_nxD: np.ndarray) -> np.ndarray:
        """The route of the training task that each embedding resembles most: [n, N, E]."""
        return self._routes_TxNxE[np.argmax(similarities(self._seen_TxD, states_nxD), 1)]

    def _of_new(
        self, new: Mapping[str, PreparedMixture], split: str
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(task, its similarity [T] to every training task) of each new task."""
        for task, mixture in new.items():
            state_D = self._of_task(mixture, task, split)
            yield task, similarities(self._seen_TxD, state_D[None])[0]

    def _of_task(self, mixture: PreparedMixture, task: str, split: str) -> np.ndarray:
        return self._examples(mixture, task, split, _EXAMPLES)[1].mean(0)

    def _examples(
        self, mixture: PreparedMixture, task: str, split: str, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        batches = example_batches(mixture, task, split, self._lengths, self._rows, limit)
        return example_embeddings(self._embed, batches)


def similarities(seen_TxD: np.ndarray, new_NxD: np.ndarray) -> np.ndarray:
    """Cosine of each of N embeddings with each of T, after the mean of the T is subtracted.

    Returns:
        [N, T].
    """
    center_D = unit_length(seen_TxD).mean(0)
    seen_TxD, new_NxD = (unit_length(unit_length(x) - center_D) for x in (seen_TxD, new_NxD))
    return new_NxD @ seen_TxD.T


def weighted_route(similarity_T: np.ndarray, routes_TxNxE: np.ndarray, count: int) -> np.ndarray:
    """The mean of routes, weighted by the softmax of `similarity_T` / 0.1.

    Args:
        count: only so many experts of each layer are kept, those with the largest weights.

    Returns:
        float32 [N, E], each layer's weights sum to 1.
    """
    weight_T = np.exp((similarity_T - similarity_T.max()) / _SOFTNESS)
    mean_NxE = np.einsum("t,tne->ne", weight_T, routes_TxNxE)
    largest_NxK = np.argsort(-mean_NxE, axis=-1, kind="stable")[:, :count]
    kept_NxE = np.zeros_like(mean_NxE)
    np.put_along_axis(kept_NxE, largest_NxK, np.take_along_axis(mean_NxE, largest_NxK, -1), -1)
    return (kept_NxE / kept_NxE.sum(-1, keepdims=True)).astype(np.float32)
