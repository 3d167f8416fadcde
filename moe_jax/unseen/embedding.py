"""Embeds one task: a vector that a dense model computes from the task's examples."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import (
    GROUP_AXES,
    by_group,
    global_array,
    group_shards,
    over_groups,
    replicated,
)
from moe_jax.data.batch import INPUTS, TARGETS, Batch
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.pipeline import eval_batches, task_batches
from moe_jax.evaluation.evaluator import length_bucket
from moe_jax.model.backbone import EncoderDecoder
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import TaskMoE
from moe_jax.runs.config import Config
from moe_jax.training.grouped_loss import group_loss
from moe_jax.training.tuning import Tuner

Numbered = tuple[Batch, list[int]]  # and the numbers of the examples in the batch's first rows


def text_embeddings(
    model: TaskMoE, backbone: Params, batch: Batch, route_NxE: jax.Array | None = None
) -> jax.Array:
    """The encoder's last states, averaged over the tokens of each example.

    Args:
        batch: arrays [R, L], one example to a row.
        route_NxE: of a mixture of experts.

    Returns:
        float32 [R, d_model]; zero for an empty row.
    """
    segments_RxL = batch["input_segments"]
    states_RxLxD = EncoderDecoder(model.config).apply(
        {"params": backbone}, batch["inputs"], segments_RxL, batch["input_positions"],
        route_NxE, method="encode",
    )  # fmt: skip
    real_RxL = (segments_RxL > 0).astype(jnp.float32)
    weights_RxL = real_RxL / jnp.maximum(real_RxL.sum(-1, keepdims=True), 1.0)
    return jnp.einsum("rl,rld->rd", weights_RxL, states_RxLxD.astype(jnp.float32))


def text_sum(model: TaskMoE, backbone: Params, batch: Batch) -> jax.Array:
    """The sum of `text_embeddings` over the rows: float32 [d_model]."""
    return text_embeddings(model, backbone, batch).sum(0)


def example_sum(model: TaskMoE, backbone: Params, batch: Batch) -> jax.Array:
    """`text_sum` of inputs, and of targets as if they were inputs: float32 [2 * d_model]."""
    targets = {name: batch[name.replace("input", "target")] for name in INPUTS}
    return jnp.concatenate([text_sum(model, backbone, rows) for rows in (batch, targets)])


def fisher_sum(model: TaskMoE, backbone: Params, batch: Batch) -> jax.Array:
    """Sum over examples of the squared gradient of the log-likelihood of their targets.

    Divided by the number of examples: the diagonal of the empirical Fisher information (Vu et al.
    2020, arXiv 2005.00770), averaged over the inputs of every unit as Task2Vec averages over a
    filter (Achille et al. 2019, arXiv 1902.03545), because the weights of a unit depend on each
    other. Of the layers' matrices only: both architectures have them, and the embedding would tell
    which words a task uses rather than what is done with them.

    Args:
        batch: arrays [R, L], one example to a row; an empty row adds nothing.

    Returns:
        float32 [D], one number per unit: see `unit_means`.
    """
    layers = {side: backbone[side]["layers"] for side in ("encoder", "decoder")}

    def log_likelihood(layers, example):
        sides = {side: {**backbone[side], "layers": tree} for side, tree in layers.items()}
        return -group_loss(model, {**backbone, **sides}, None, example, None)

    def add_one(total, row):
        example = {name: array[None] for name, array in row.items()}
        gradient = jax.grad(log_likelihood)(layers, example)
        return total + unit_means(jax.tree.map(jnp.square, gradient)), None

    # One by one, so that only the gradients of one example are in memory.
    zero = jnp.zeros(jax.eval_shape(unit_means, layers).shape)
    return jax.lax.scan(add_one, zero, batch)[0]


def unit_means(layers: Params) -> jax.Array:
    """Every matrix of {side: {"routed" | "vanilla": stack}} averaged over its units' inputs.

    Returns:
        float32 [D], in the order of the tree's leaves; of each [layer, expert, unit].
    """
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        if path[-1].key == "out_kernel":  # [layer, expert, inputs..., output]
            parts.append(leaf.mean(tuple(range(2, leaf.ndim - 1))).ravel())
        elif path[-1].key.endswith("_kernel"):  # [layer, expert, input, outputs...]
            parts.append(leaf.mean(2).ravel())
    return jnp.concatenate(parts)


class Embedder:
    """One task's embedding; compiles once per bucket of input lengths, whatever the task.

    Each device computes its own rows. Empty rows are added, without effect, so that the number of
    devices divides the number of rows.
    """

    def __init__(
        self,
        model: TaskMoE,
        params: Params,
        config: Config,
        settings: dict[str, Any],
        rows: int,
        mesh: Mesh,
    ):
        self._params, self._data, self._settings = params, config.data, settings
        self._rates = config.optimizer.learning_rates
        self._shards = group_shards(mesh)
        self._rows = rows + -rows % self._shards
        self._place = partial(global_array, sharding=by_group(mesh))
        self._tune: Tuner | None = None
        sums = {"text": text_sum, "example": example_sum, "fisher": fisher_sum}
        self._sum = _over_devices(partial(sums[settings["kind"]], model), mesh)
        if settings["kind"] == "fisher":
            steps, seed = max(1, settings["steps"]), settings["seed"]
            self._tune = Tuner(model, config.optimizer, config.step, mesh, steps, seed)

    def __call__(self, mixture: PreparedMixture, task: str) -> np.ndarray:
        """float32 [D].

        Raises:
            UserError: the embedding is not finite.
        """
        s, data = self._settings, self._data
        backbone = self._params["backbone"]
        if self._tune is not None:
            batches = task_batches(
                mixture, task, s["split"], lengths=data.lengths, rows=s["batch_size"],
                seed=s["seed"],
            )  # fmt: skip
            few = (
                jax.tree.map(self._place, _split(batch, self._shards))
                for batch in itertools.islice(batches, s["steps"])
            )
            backbone = self._tune(self._params, few, self._rates)["backbone"]
        raw_D = mean_over_examples(
            lambda rows: self._sum(backbone, jax.tree.map(self._place, rows)),
            example_batches(mixture, task, s["split"], data.lengths, self._rows, s["examples"]),
        )
        if not np.isfinite(raw_D).all():
            raise UserError(f"the embedding of {task!r} is not finite; lower the learning rate")
        return raw_D


def mean_over_examples(
    sum_of: Callable[[Batch], jax.Array], batches: Iterable[Numbered]
) -> np.ndarray:
    """Mean over examples of `sum_of`, which adds up the rows of a batch [R, L]."""
    total, count = 0.0, 0
    for batch, indices in batches:
        total = total + sum_of(batch)
        count += len(indices)
    return np.asarray(total) / np.float32(count)


def example_embeddings(
    embed: Callable[[Batch], jax.Array], batches: Iterable[Numbered]
) -> tuple[np.ndarray, np.ndarray]:
    """What `embed` makes of each example, a row [R, D] of a batch [R, L].

    Returns:
        (int [n], the examples' numbers in the split; float32 [n, D]).
    """
    numbers, found = [], []
    for batch, indices in batches:
        numbers += indices
        found.append(np.asarray(embed(batch))[: len(indices)])
    return np.array(numbers), np.concatenate(found)


def example_batches(
    mixture: PreparedMixture,
    task: str,
    split: str,
    lengths: Mapping[str, int],
    rows: int,
    limit: int | None,
) -> Iterator[Numbered]:
    """A task's examples in batches [R, L].

    Args:
        rows: R; the last batch is filled up with empty rows.
        limit: at most this many examples, evenly spaced; None for all.
    """
    for batch, examples in eval_batches(
        mixture, task, split, lengths=lengths, rows=rows, limit=limit
    ):
        yield _cut(batch), [index for index, _ in examples]


def _over_devices(
    function: Callable[[Params, Batch], jax.Array], mesh: Mesh
) -> Callable[[Params, Batch], jax.Array]:
    """A sum over the rows of a batch, compiled; each device sums its own rows."""

    def local(backbone, batch):
        return jax.lax.psum(function(backbone, batch), GROUP_AXES)

    spread = over_groups(local, mesh, (P(), P(GROUP_AXES)), P())
    return jax.jit(spread, out_shardings=replicated(mesh))


def _cut(batch: Batch) -> Batch:
    """The batch [R, L], inputs no longer than the bucket that holds them."""
    longest = int(np.count_nonzero(batch["input_segments"], -1).max())
    bucket = length_bucket(longest, batch["inputs"].shape[-1])
    return batch | {name: batch[name][:, :bucket] for name in INPUTS}


def _split(batch: Batch, groups: int) -> Batch:
    """[1, R, L] -> [G, R / G, L], after empty rows that make R a multiple of G."""
    empty = -batch["inputs"].shape[1] % groups
    split = {"task_id": np.zeros(groups, np.int32)}
    for name in (*INPUTS, *TARGETS):
        filled_RxL = np.pad(batch[name][0], ((0, empty), (0, 0)))
        split[name] = filled_RxL.reshape(groups, -1, filled_RxL.shape[1])
    return split
