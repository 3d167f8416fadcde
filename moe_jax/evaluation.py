"""Scores of a model on tasks: greedy decoding, then each task's own metric."""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from moe_jax import files
from moe_jax.data.cache import PreparedMixture, PreparedTask
from moe_jax.data.pipeline import eval_batches
from moe_jax.data.vocabulary import Vocabulary
from moe_jax.model.decoding import DecodingIds, greedy
from moe_jax.model.experts import Params, gather
from moe_jax.model.moe import TaskMoE
from moe_jax.parallel import GROUP_AXES, group_shards, replicated


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One task's score and what it was computed from."""

    task: PreparedTask
    split: str
    metric: str
    score: float
    metrics: dict[str, float]
    predictions: list[dict[str, Any]]


class Evaluator:
    """Decodes and scores; compiles once for all tasks.

    Args:
        lengths: {"inputs", "targets"}: longest input read and longest target decoded.
        rows: examples decoded together.
    """

    def __init__(
        self,
        model: TaskMoE,
        vocabulary: Vocabulary,
        lengths: Mapping[str, int],
        rows: int,
        mesh: Mesh,
    ):
        self.model = model
        self.vocabulary = vocabulary
        self.lengths = lengths
        self.rows = rows
        spread = P(GROUP_AXES) if rows % group_shards(mesh) == 0 else P()
        self._by_row = NamedSharding(mesh, spread)
        ids = DecodingIds(vocabulary.decoder_start_id, vocabulary.eos_id, vocabulary.pad_id)
        self.decode = jax.jit(
            partial(_decode, model, length=lengths["targets"], ids=ids),
            out_shardings=replicated(mesh),
        )
        self.routes = jax.jit(model.routes, out_shardings=replicated(mesh))

    def predict(
        self, params: Params, routes_TxNxE: jax.Array | None, task_id: int, arrays: Mapping
    ) -> list[str]:
        """Texts decoded for the rows [R, L] of one task."""
        names = ("inputs", "input_segments", "input_positions")
        rows = [_global(arrays[name], self._by_row) for name in names]
        tokens = self.decode(params, routes_TxNxE, jnp.int32(task_id), *rows)
        return [self.vocabulary.decode(row) for row in np.asarray(tokens).tolist()]

    def task(
        self,
        params: Params,
        routes_TxNxE: jax.Array | None,
        mixture: PreparedMixture,
        name: str,
        task_id: int,
        split: str,
        limit: int | None = None,
    ) -> TaskScore:
        """Scores one task on a split."""
        task = mixture.task(name)
        postprocess = task.postprocess_fn()
        route = None if routes_TxNxE is None else route_json(np.asarray(routes_TxNxE)[task_id])
        predictions, references, rows = [], [], []
        batches = eval_batches(
            mixture, name, split, lengths=self.lengths, rows=self.rows, limit=limit
        )
        for batch, examples in batches:
            arrays = {key: value[0] for key, value in batch.items()}
            texts = self.predict(params, routes_TxNxE, task_id, arrays)
            for (index, example), text in zip(examples, texts[: len(examples)], strict=True):
                prediction = postprocess(text, is_target=False) if postprocess else text
                predictions.append(prediction)
                references.append(example.references)
                rows.append(
                    {
                        "task": name,
                        "split": split,
                        "index": int(index),
                        "input": example.inputs_text,
                        "prediction": prediction,
                        "references": example.references,
                        "route": route,
                    }
                )
        metrics = {}
        for function in task.metric_fns().values():
            metrics |= {k: float(v) for k, v in function(references, predictions).items()}
        metric = next(iter(metrics))
        return TaskScore(task, split, metric, metrics[metric], metrics, rows)

    def tasks(
        self,
        params: Params,
        step: int,
        mixture: PreparedMixture,
        task_ids: Mapping[str, int],
        split: str,
        limit: int | None = None,
        show: bool = True,
    ) -> list[TaskScore]:
        """Scores every task of `mixture` that has the split."""
        routes = self.routes(params, jnp.int32(step)) if self.model.routed else None
        names = [name for name in mixture.names if split in mixture.task(name).splits]
        bar = tqdm(names, desc=f"evaluating {split}", unit="task", leave=False, disable=not show)
        return [
            self.task(params, routes, mixture, name, task_ids[name], split, limit) for name in bar
        ]


def _decode(
    model: TaskMoE, params, routes_TxNxE, task_id, inputs, segments, positions, *, length, ids
):
    backbone, weights = params["backbone"], None
    if model.routed:
        assignment = model.assign(routes_TxNxE, task_id[None])
        weights = assignment.weights_GxNxK[0]
        if assignment.index_GxNxK is not None:
            backbone = gather(backbone, assignment.index_GxNxK[0])
    module = model.backbone(model.experts_per_layer)
    return greedy(module, backbone, weights, inputs, segments, positions, length=length, ids=ids)


def _global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process holds, as one array over all devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def route_json(route_NxE: np.ndarray) -> list:
    """A route for JSON: N expert numbers where it is one-hot, else N x E weights."""
    if np.all(np.max(route_NxE, -1) == 1.0):
        return np.argmax(route_NxE, -1).tolist()
    return np.round(route_NxE.astype(float), 6).tolist()


def mean_score(scores: Iterable[TaskScore]) -> float:
    """Mean over tasks of each task's first metric."""
    return float(np.mean([score.score for score in scores]))


def write_scores(directory: str | Path, scores: list[TaskScore]) -> None:
    """Writes scores.jsonl and predictions.jsonl, the latter first: scores mean all is there."""
    directory = Path(directory)
    files.write_jsonl(
        directory / "predictions.jsonl", (row for score in scores for row in score.predictions)
    )
    rows = []
    for score in scores:
        route = score.predictions[0]["route"] if score.predictions else None
        experts = None if route is None else [int(np.argmax(r)) if np.ndim(r) else r for r in route]
        rows += [
            {
                "task": score.task.name,
                "split": score.split,
                "metric": metric,
                "score": value,
                "examples": len(score.predictions),
                "category": score.task.category,
                "subcategory": score.task.subcategory,
                "experts": experts,
            }
            for metric, value in score.metrics.items()
        ]
    files.write_jsonl(directory / "scores.jsonl", rows)


def write_routes(
    path: str | Path,
    model: TaskMoE,
    routes_TxNxE: np.ndarray,
    step: int,
    mixture: PreparedMixture,
    task_ids: Mapping[str, int],
) -> None:
    """Writes routes.json: every task's route with its human category."""
    files.write_json(
        path,
        {
            "step": step,
            "experts": model.config.experts,
            "layers": list(model.config.routed_layers),
            "tasks": {
                task.name: {
                    "route": np.round(routes_TxNxE[task_ids[task.name]].astype(float), 6).tolist(),
                    "category": task.category,
                    "subcategory": task.subcategory,
                }
                for task in mixture.tasks
            },
        },
    )
