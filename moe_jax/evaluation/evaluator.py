"""Scores a model on tasks: predicts answers or scores targets, then applies each task's metrics.

A prediction is decoded. Where an example has answer choices, it is the most likely of them ("rank
classification"). A score is the log-likelihood of an example's target, summed over its tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.core.errors import UserError
from moe_jax.core.progress import progress
from moe_jax.core.sharding import GROUP_AXES, global_array, group_shards, over_groups, replicated
from moe_jax.data.batch import INPUTS, TARGETS, Batch
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.example import Example
from moe_jax.data.pipeline import eval_batches
from moe_jax.data.vocabulary import Vocabulary
from moe_jax.decoding.rows import RowModel, RowRoutes, experts_per_row, row_routes
from moe_jax.decoding.scoring import log_likelihoods
from moe_jax.decoding.search import DecodingConfig, DecodingIds, decode
from moe_jax.evaluation.choices import Score, choice_likelihoods, likelihoods, tokens_of
from moe_jax.evaluation.functions import apply_functions
from moe_jax.evaluation.scores import TaskScore, route_json
from moe_jax.model.experts import Params, gather
from moe_jax.model.placement import Placement
from moe_jax.model.task_moe import TaskMoE, parameter_shardings, routes_of

_WINDOW = 64  # batches whose examples are sorted by length


class ScoringError(UserError):
    """A function of a task fails on the model's answers.

    Attributes:
        predictions: the lines of all answers so far, as in `TaskScore`. The last task's are texts
            that may not have been postprocessed.
    """

    def __init__(self, message: str, predictions: list[dict[str, Any]]):
        super().__init__(message)
        self.predictions = predictions


class Evaluator:
    """Decodes and scores. Compiles once per bucket of lengths, for all tasks.

    Args:
        lengths: {"inputs", "targets"}: maximum length of inputs and of decoded targets.
        rows: examples decoded together.
        decoding: how answers are decoded; greedy if None.

    Raises:
        UserError: inputs or answers are longer than the model's positions, or a forced token is
            not in its vocabulary.
    """

    def __init__(
        self,
        model: TaskMoE,
        vocabulary: Vocabulary,
        lengths: Mapping[str, int],
        rows: int,
        mesh: Mesh,
        decoding: DecodingConfig | None = None,
    ):
        self.model = model
        self.vocabulary = vocabulary
        self.lengths = lengths
        self.rows = rows
        decoding = decoding or DecodingConfig()
        self.choice_length_penalty = decoding.choice_length_penalty
        self.length = length = decoding.max_length or lengths["targets"]
        model.config.check_lengths(**lengths, answers=length)
        for name in ("forced_bos_id", "forced_eos_id"):
            token, size = getattr(decoding, name), model.config.vocabulary_size
            if token is not None and token >= size:
                raise UserError(
                    f"DecodingConfig.{name} is {token}, but the vocabulary has {size} tokens"
                )
        self.ids = ids = DecodingIds(
            vocabulary.decoder_start_id, vocabulary.eos_id, vocabulary.pad_id
        )
        spread = rows % group_shards(mesh) == 0
        self._by_row = NamedSharding(mesh, P(GROUP_AXES) if spread else P())
        self._decode = self._by_rows(partial(decode, length=length, config=decoding, ids=ids))
        self._score = self._by_rows(lambda rows_model, batch, _: log_likelihoods(rows_model, batch))
        self.routes = jax.jit(partial(routes_of, model), out_shardings=replicated(mesh))

    def _by_rows(self, function: Callable[[RowModel, Batch, jax.Array], Any]) -> Callable[..., Any]:
        """`function`, compiled; each device computes its own rows."""
        mesh, rows = self._by_row.mesh, self._by_row.spec
        by_layer = P(None, *rows)
        spread_routes = RowRoutes(P(), by_layer, by_layer) if self.model.routed else None

        def local(backbone, routes, batch, row):
            return function(RowModel(self.model, backbone, routes), batch, row)

        spread = over_groups(local, mesh, (P(), spread_routes, rows, rows), rows)
        cut = Placement.of(parameter_shardings(self.model, mesh)["backbone"], "float32")

        def call(backbone, routes, batch, row):
            if routes is not None and cut is not None:
                # Only the experts that the batch uses are gathered on every device.
                backbone = gather(backbone, routes.experts_NxS)
                routes = routes._replace(experts_NxS=None)
            return spread(backbone, routes, batch, row)

        return jax.jit(call, out_shardings=replicated(mesh))

    def _arguments(self, params, routes_TxNxE, task_id, arrays, names) -> tuple:
        """The arguments of the compiled functions, with rows cut to their length buckets."""
        batch = {}
        for name in names:
            segments_RxL = arrays["input_segments" if name in INPUTS else "target_segments"]
            longest = int(np.count_nonzero(segments_RxL, 1).max())
            bucket = length_bucket(longest, segments_RxL.shape[1])
            batch[name] = global_array(arrays[name][:, :bucket], self._by_row)
        if not self.model.routed:
            return params["backbone"], None, batch
        tasks_R = np.broadcast_to(np.asarray(task_id), arrays["inputs"].shape[:1])
        count = experts_per_row(self.model)
        return params["backbone"], row_routes(np.asarray(routes_TxNxE), tasks_R, count), batch

    def tokens(
        self,
        params: Params,
        routes_TxNxE: jax.Array | np.ndarray | None,
        task_id: int | np.ndarray,
        arrays: Mapping[str, np.ndarray],
        row_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """Answers to the rows [R, L], which are of one task or of several: int32 [R, length].

        Args:
            task_id: one task for all rows, or int [R].
            row_ids: int [R], row numbers that seed sampling; 0, 1, ... if None.
        """
        row_ids = np.arange(self.rows) if row_ids is None else row_ids
        row_ids = global_array(np.asarray(row_ids, np.int32), self._by_row)
        arguments = self._arguments(params, routes_TxNxE, task_id, arrays, INPUTS)
        return np.asarray(self._decode(*arguments, row_ids))

    def predict(self, *arguments: Any) -> list[str]:
        """The texts of `tokens`, which takes the same arguments."""
        return [self.vocabulary.decode(row) for row in self.tokens(*arguments).tolist()]

    def log_likelihoods(
        self,
        params: Params,
        routes_TxNxE: jax.Array | np.ndarray | None,
        task_id: int | np.ndarray,
        arrays: Mapping[str, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """For the targets of rows [R, L]: (float32 [R] log-likelihoods, int32 [R] token counts)."""
        row_ids = global_array(np.zeros(self.rows, np.int32), self._by_row)
        arguments = self._arguments(params, routes_TxNxE, task_id, arrays, (*INPUTS, *TARGETS))
        return tuple(np.asarray(a) for a in self._score(*arguments, row_ids))

    def choices(self, score: Score, examples: Mapping[int, Example]) -> dict[int, list[float]]:
        """`choice_likelihoods` with the lengths and the vocabulary of this evaluator."""
        return choice_likelihoods(
            score, examples, self.lengths, self.rows, self.vocabulary, self.choice_length_penalty
        )

    def answer_likelihoods(
        self, score: Score, examples: Mapping[int, Example], tokens: Mapping[int, np.ndarray]
    ) -> dict[int, float]:
        """Index -> log-likelihood of the answer that a model gave, summed over its tokens.

        Args:
            tokens: of each answer; those after the end of sequence do not count.
        """
        ended = {index: row == self.ids.eos for index, row in tokens.items()}
        answers = [(i, row[np.cumsum(ended[i]) <= ended[i]]) for i, row in tokens.items()]
        # A decoded answer is scored whole, also one that did not come to its end.
        lengths = {**self.lengths, "targets": max(self.lengths["targets"], self.length)}
        found = likelihoods(score, examples, answers, lengths, self.rows, self.vocabulary)
        return {i: total for (i, _), (total, _) in zip(answers, found, strict=True)}

    def rows_of(
        self, task_id: int | np.ndarray, numbers: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(int [R], the rows of the route table that a batch's examples take; int32 [R], their
        numbers). Empty rows are as the first example's.

        Args:
            task_id: as in `task`.
        """
        numbers_R = np.array([*numbers, *[numbers[0]] * (self.rows - len(numbers))], np.int32)
        row = np.asarray(task_id)
        return row[numbers_R] if row.ndim else np.full(self.rows, row), numbers_R

    def scorer(
        self,
        params: Params,
        routes_TxNxE: jax.Array | np.ndarray | None,
        task_id: int | np.ndarray,
    ) -> Score:
        """Scores a batch of numbered examples, each under its route; `task_id` as in `task`."""

        def score(batch: Batch, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            rows_R, _ = self.rows_of(task_id, numbers)
            return self.log_likelihoods(params, routes_TxNxE, rows_R, batch)

        return score

    def task(
        self,
        params: Params,
        routes_TxNxE: jax.Array | np.ndarray | None,
        mixture: PreparedMixture,
        name: str,
        task_id: int | np.ndarray,
        split: str,
        limit: int | None = None,
        likelihoods: bool = False,
    ) -> TaskScore:
        """Scores one task on a split.

        Args:
            task_id: the row of `routes_TxNxE` that all examples take, or int [n], the row of each
                example of the split.
            limit: at most this many examples, evenly spaced.
            likelihoods: also give `log_likelihood` and `target_tokens` of each target, and the
                metric `log_likelihood_per_token` after the task's own.

        Raises:
            ScoringError: one of the task's functions fails.
        """
        task = mixture.task(name)
        routes = None if routes_TxNxE is None else np.asarray(routes_TxNxE)
        score = self.scorer(params, routes, task_id)
        decodes = not task.outputs.isdisjoint(("prediction", "prediction_with_aux"))
        lines: dict[int, dict[str, Any]] = {}
        found: dict[int, Example] = {}
        texts: dict[int, str] = {}
        tokens: dict[int, np.ndarray] = {}
        batches = eval_batches(
            mixture, name, split, lengths=self.lengths, rows=self.rows, limit=limit
        )
        for arrays, examples in _by_length(batches, self.rows):
            numbers = [index for index, _ in examples]
            rows_R, numbers_R = self.rows_of(task_id, numbers)
            for (index, example), row in zip(examples, rows_R, strict=False):
                lines[index] = {
                    "task": name,
                    "split": split,
                    "index": int(index),
                    "input": example.inputs_text,
                    "references": example.references,
                    "route": None if routes is None else route_json(routes[row]),
                }
            found |= dict(examples)
            if decodes and not all(example.choices for _, example in examples):
                answers = self.tokens(params, routes, rows_R, arrays, numbers_R)
                for (index, _), row in zip(examples, answers, strict=False):
                    tokens[index], texts[index] = row, self.vocabulary.decode(row.tolist())
            if likelihoods or "score" in task.outputs:
                sums_R, tokens_R = score(arrays, numbers)
                for index, total, count in zip(numbers, sums_R, tokens_R, strict=False):
                    lines[index] |= {"log_likelihood": float(total), "target_tokens": int(count)}
        ranked = {index: e for index, e in found.items() if decodes and e.choices}
        for index, likelihood_C in self.choices(score, ranked).items():
            choices = ranked[index].choices
            texts[index] = choices[int(np.argmax(likelihood_C))]
            tokens[index] = tokens_of(texts[index], self.vocabulary)
            lines[index]["choices"] = dict(zip(choices, likelihood_C, strict=True))
        if "prediction_with_aux" in task.outputs:
            for index, total in self.answer_likelihoods(score, found, tokens).items():
                lines[index]["aux"] = {"scores": total}
        rows = [lines[index] for index in sorted(lines)]
        try:
            metrics = apply_functions(task, self.vocabulary, found, lines, texts, tokens)
        except UserError as e:
            for index, text in texts.items():
                lines[index].setdefault("prediction", text)
            raise ScoringError(str(e), rows) from e
        metric = next(iter(metrics))
        if likelihoods:
            total, count = (
                sum(row[key] for row in rows) for key in ("log_likelihood", "target_tokens")
            )
            metrics["log_likelihood_per_token"] = total / max(1, count)
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
        likelihoods: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> list[TaskScore]:
        """Scores every task of `mixture` that has the split; see `tasks_with_split`.

        Args:
            given: routes of some tasks in place of the task table's: float [N, E], or [n, N, E] for
                every example of the split.

        Raises:
            ScoringError: a function of a task fails.
        """
        routes = np.asarray(self.routes(params, jnp.int32(step))) if self.model.routed else None
        tables = {name: (routes, task_id) for name, task_id in task_ids.items()}
        for name, route in (given or {}).items():
            each = route.ndim == 3
            tables[name] = (route, np.arange(len(route))) if each else (route[None], 0)
        names = tasks_with_split(mixture, split)
        bar = progress(
            names, desc=f"evaluating {split}", unit="task", leave=False, disable=not show
        )
        scores: list[TaskScore] = []
        for name in bar:
            table, row = tables[name]
            try:
                score = self.task(params, table, mixture, name, row, split, limit, likelihoods)
            except ScoringError as e:
                before = [line for score in scores for line in score.predictions]
                raise ScoringError(str(e), before + e.predictions) from e
            scores.append(score)
        return scores


def length_bucket(length: int, longest: int) -> int:
    """The padded length of a row: `longest`, halved while `length` fits, but at least 32."""
    bucket = longest
    while bucket % 2 == 0 and bucket // 2 >= max(length, 32):
        bucket //= 2
    return bucket


def _by_length(batches: Iterable[tuple[Batch, list]], rows: int) -> Iterator[tuple[Batch, list]]:
    """Batches [R, L] of examples of similar length, sorted within `_WINDOW` batches."""
    batches = iter(batches)
    while taken := list(islice(batches, _WINDOW)):
        examples = [example for _, of_batch in taken for example in of_batch]
        arrays = {k: np.concatenate([batch[k] for batch, _ in taken]) for k in taken[0][0]}
        order = np.argsort(np.count_nonzero(arrays["input_segments"], 1), kind="stable")
        # Empty rows come last and fill up the last batch.
        order = np.concatenate([order[-len(examples) :], order[: -len(examples)]])
        for start in range(0, len(examples), rows):
            chosen = order[start : start + rows]
            batch = {name: array[chosen] for name, array in arrays.items()}
            yield batch, [examples[i] for i in chosen if i < len(examples)]


def tasks_with_split(mixture: PreparedMixture, split: str) -> list[str]:
    """Names of the tasks that can be evaluated on `split`: they have it, and metrics.

    Raises:
        UserError: no task has both.
    """
    names = [task.name for task in mixture.with_split(split) if task.outputs]
    if not names:
        raise UserError(f"no task of {mixture.name} with a split {split!r} has metrics")
    return names
