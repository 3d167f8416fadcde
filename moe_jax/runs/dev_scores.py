"""The scores on dev splits that are computed while a run trains."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import replicated
from moe_jax.data.cache import PreparedMixture
from moe_jax.evaluation.evaluator import Evaluator, tasks_with_split
from moe_jax.evaluation.functions import try_functions
from moe_jax.evaluation.scores import mean_score
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import TaskMoE, routes_of
from moe_jax.runs.config import Config
from moe_jax.training.logs import SCORE


class DevScores:
    """Evaluates mixtures during training, and computes the routes of the tasks trained on.

    A task that is not trained on takes the mean of all representations.

    Args:
        mixtures: what is evaluated, all in one vocabulary.
        task_ids: name -> row of the task table, of the tasks trained on.

    Raises:
        UserError: with RunConfig.eval_period, no task of a mixture can be evaluated, or a task's
            own functions fail.
    """

    def __init__(
        self,
        config: Config,
        mixtures: Sequence[PreparedMixture],
        model: TaskMoE,
        task_ids: Mapping[str, int],
        mesh: Mesh,
    ):
        self._run, self._mixtures = config.run, mixtures
        if config.run.eval_period:
            for mixture in mixtures:
                try:
                    names = tasks_with_split(mixture, config.run.eval_split)
                except UserError as e:
                    raise UserError(
                        f"{e}; RunConfig.eval_split names the split, EVAL_PERIOD=0 trains without"
                        " scores"
                    ) from e
                try_functions(mixture, names, config.run.eval_split)
        new = [name for m in mixtures for name in m.names if name not in task_ids]
        self._task_ids = {name: i for i, name in enumerate(dict.fromkeys([*task_ids, *new]))}
        self._more = len(self._task_ids) - len(task_ids)
        self._routes = jax.jit(partial(routes_of, model), out_shardings=replicated(mesh))
        self._with_means = jax.jit(self._extended, out_shardings=replicated(mesh))
        self._evaluator = Evaluator(
            model.clone(tasks=len(self._task_ids)), mixtures[0].vocabulary, config.data.lengths,
            config.run.eval_batch_rows, mesh, config.decoding,
        )  # fmt: skip

    def _extended(self, table_TxK: jax.Array) -> jax.Array:
        more_MxK = jnp.broadcast_to(table_TxK.mean(0), (self._more, table_TxK.shape[1]))
        return jnp.concatenate([table_TxK, more_MxK])

    def routes(self, params: Params, step: int) -> np.ndarray:
        """Routes [T, N, E] of the tasks trained on."""
        return np.asarray(self._routes(params, jnp.int32(step)))

    def compute(self, params: Params, step: int, show: bool) -> dict[str, Any]:
        """The mean score over all tasks, each task's, and, of several mixtures, each one's mean."""
        if self._more and self._evaluator.model.routed:
            params = {**params, "representations": self._with_means(params["representations"])}
        found = {
            mixture.name: self._evaluator.tasks(
                params, step, mixture, self._task_ids, self._run.eval_split,
                self._run.eval_examples, show,
            )
            for mixture in self._mixtures
        }  # fmt: skip
        scores = {score.task.name: score for of_one in found.values() for score in of_one}
        means = {f"{SCORE}/{name}": mean_score(of_one) for name, of_one in found.items()}
        return {
            SCORE: mean_score(scores.values()),
            **(means if len(means) > 1 else {}),
            **{f"score/{name}": score.score for name, score in scores.items()},
        }
