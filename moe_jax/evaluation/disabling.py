"""What each expert is for: the loss of every task with that expert switched off.

Correlations of experts with tasks say who uses an expert; this says who needs it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import UserError, nearest
from moe_jax.core.progress import progress
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import eval_batches
from moe_jax.evaluation.evaluator import Evaluator, tasks_with_split
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import TaskMoE, soft_routes


def without(route_NxE: np.ndarray, preference_NxE: np.ndarray, off_NxE: np.ndarray) -> np.ndarray:
    """The route with some experts off.

    Their weights become 0 and the others' are scaled up to sum to 1. If nothing is left in a layer,
    the expert that the router likes next takes the weight.

    Args:
        route_NxE: float, the whole route.
        preference_NxE: float, the router's liking, such as its softmax.
        off_NxE: bool; not all experts of a layer.

    Returns:
        [N, E] of the route's dtype; a layer that does not use what is off stays as it is.
    """
    kept_NxE = np.where(off_NxE, 0, route_NxE)
    total_Nx1 = kept_NxE.sum(-1, keepdims=True)
    next_N = np.argmax(np.where(off_NxE, -np.inf, preference_NxE), -1)
    nothing_left = total_Nx1 < 1e-6
    others_NxE = np.where(
        nothing_left,
        np.eye(route_NxE.shape[1])[next_N],
        kept_NxE / np.where(nothing_left, 1, total_Nx1),
    )
    changes_Nx1 = np.any(kept_NxE != route_NxE, -1, keepdims=True)
    return np.where(changes_Nx1, others_NxE, route_NxE).astype(route_NxE.dtype)


def without_each(route_NxE: np.ndarray, preference_NxE: np.ndarray) -> np.ndarray:
    """The routes with one expert of one layer off: [N, E, N, E]; the first two axes say which."""
    shape = route_NxE.shape
    offs = np.eye(route_NxE.size, dtype=bool).reshape(-1, *shape)
    routes = [without(route_NxE, preference_NxE, off_NxE) for off_NxE in offs]
    return np.reshape(routes, (*shape, *shape))


def experts_named(model: TaskMoE, names: Sequence[str]) -> np.ndarray:
    """bool [N, E]: the experts that are named, `decoder.5.2` for expert 2 of layer `decoder.5`.

    Raises:
        UserError: there is no such expert, or a layer would have none left.
    """
    layers, experts = model.config.routed_layers, model.config.experts
    known = [f"{layer}.{expert}" for layer in layers for expert in range(experts)]
    for name in names:
        if name not in known:
            raise UserError(f"the model has no expert {name!r}{nearest(name, known)}")
    named_NxE = np.isin(known, names).reshape(len(layers), experts)
    for layer, named_E in zip(layers, named_NxE, strict=True):
        if named_E.all():
            raise UserError(f"all experts of {layer} are to be off; leave one of them on")
    return named_NxE


def preferences(model: TaskMoE, params: Params, step: int) -> np.ndarray:
    """The softmax of the router for every task, float32 [T, N, E]; uniform if routes are random."""
    shape = (params["representations"].shape[0], model.layers, model.config.experts)
    if not model.selection.learned:
        return np.full(shape, 1 / model.config.experts, np.float32)
    return np.asarray(soft_routes(model, params, step))


def disabling(
    evaluator: Evaluator,
    params: Params,
    step: int,
    mixture: PreparedMixture,
    task_ids: Mapping[str, int],
    split: str,
    limit: int | None = None,
) -> dict[str, Any]:
    """Teacher-forced loss of every task, whole and with each expert off in turn.

    Routes are arguments of the compiled function, so it is compiled as often as for `eval`. An
    expert that a task does not use is not computed again.

    Args:
        params: of a mixture of experts.
        limit: at most this many examples of each task, evenly spaced.

    Returns:
        The value of disabling.json: `step`, `split`, `experts`, `layers` and `tasks` {name:
        `category`, `subcategory`, `examples`, `loss` (nats per target token), `without` [N][E]
        (the loss with that expert off)}.

    Raises:
        UserError: no task has the split.
    """
    model = evaluator.model
    routes_TxNxE = np.asarray(evaluator.routes(params, jnp.int32(step)))
    preference_TxNxE = preferences(model, params, step)
    tasks = {}
    names = tasks_with_split(mixture, split)
    for name in progress(
        names, desc=f"disabling experts, {split}", unit="task", leave=False,
        disable=jax.process_index() != 0,
    ):  # fmt: skip
        route_NxE = routes_TxNxE[task_ids[name]]
        off_NxExNxE = without_each(route_NxE, preference_TxNxE[task_ids[name]])
        masked_MxNxE = np.concatenate([route_NxE[None], off_NxExNxE.reshape(-1, *route_NxE.shape)])
        distinct_UxNxE, where_M = np.unique(masked_MxNxE, axis=0, return_inverse=True)
        sums_U, tokens, count = np.zeros(len(distinct_UxNxE)), 0, 0
        for batch, examples in eval_batches(
            mixture, name, split, lengths=evaluator.lengths, rows=evaluator.rows, limit=limit
        ):
            count += len(examples)
            for u in range(len(distinct_UxNxE)):
                sum_R, tokens_R = evaluator.log_likelihoods(params, distinct_UxNxE, u, batch)
                sums_U[u] += sum_R.sum(dtype=np.float64)
            tokens += int(tokens_R.sum())
        loss, *without = (-sums_U[where_M] / max(1, tokens)).tolist()
        task = mixture.task(name)
        tasks[name] = {
            "category": task.category,
            "subcategory": task.subcategory,
            "examples": count,
            "loss": loss,
            "without": np.reshape(without, route_NxE.shape).tolist(),
        }
    return {
        "step": int(step),
        "split": split,
        "experts": model.config.experts,
        "layers": list(model.config.routed_layers),
        "tasks": tasks,
    }
