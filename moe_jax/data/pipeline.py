"""Batches from the prepared cache, through Grain.

Training batch b is a pure function of the arguments and b. A schedule gives the task of each group
and the number of earlier groups of that task. The task's epoch plans give the examples of its rows.
So any batch can be read directly, the saved state is an index, resuming is exact, and P processes
together read the same batches as one.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from moe_jax.core.errors import UserError, nearest
from moe_jax.data import packing
from moe_jax.data.batch import Batch
from moe_jax.data.cache import PreparedMixture, PreparedTask, Records
from moe_jax.data.example import Example
from moe_jax.data.packing import Plan
from moe_jax.data.schedule import Schedule, seed_of
from moe_jax.data.vocabulary import Vocabulary

MIXING = ("examples", "equal", "temperature", "seqio")


class TaskRows:
    """The endless stream of a task's rows. Every epoch is shuffled differently."""

    def __init__(
        self,
        task: PreparedTask,
        split: str,
        *,
        lengths: Mapping[str, int],
        shape: tuple[int, int],
        vocabulary: Vocabulary,
        pack: bool,
        seed: int,
    ):
        sizes_Nx2 = np.minimum(task.lengths(split), (lengths["inputs"], lengths["targets"]))
        self.plan = packing.pack(sizes_Nx2, shape) if pack else packing.one_per_row(len(sizes_Nx2))
        self._records: Records = task.records(split)
        self._lengths, self._shape = lengths, shape
        self._vocabulary = vocabulary
        self._seed = (seed, seed_of(f"{task.name}/{split}"))
        self._epoch = functools.lru_cache(2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[Plan, np.ndarray]:
        return self.plan.shuffled(np.random.default_rng([*self._seed, epoch]))

    def examples(self, row: int) -> np.ndarray:
        """int64 [n], indices of the examples in row number `row`, counted from the start of
        training."""
        epoch, row = divmod(row, self.plan.rows)
        plan, order = self._epoch(epoch)
        return plan[order[row]]

    def group(self, number: int, rows: int) -> Batch:
        """Arrays [rows, L] of group `number` of this task. It may extend into the next epoch."""
        indices = [self.examples(row) for row in range(number * rows, (number + 1) * rows)]
        examples = iter(self._records.take(np.concatenate(indices)))
        grouped = [[next(examples) for _ in row] for row in indices]
        return packing.build(grouped, self._lengths, self._vocabulary, self._shape)


@dataclasses.dataclass(frozen=True)
class Lane:
    """The tasks that share a row shape. All groups of a batch come from one lane.

    Attributes:
        streams: one per task.
        task_ids: one per task.
        schedule: the order of the lane's groups.
        rows: R, rows in a group.
    """

    streams: Sequence[TaskRows]
    task_ids: Sequence[int]
    schedule: Schedule
    rows: int


class TrainBatches:
    """Random access to the training batches, or a part of each; see `train_batches`."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        schedule: Schedule,
        *,
        groups: int,
        earlier: Sequence[tuple[int, int]],
        part: tuple[int, int],
    ):
        self._lanes = lanes
        self._schedule = schedule
        self._groups = groups
        index, count = part
        mine = groups // count
        self._mine = range(index * mine, (index + 1) * mine)
        # Per lane: its batches before the first one of this size, and their groups.
        self._first = sum(batches for batches, _ in earlier)
        self._batches_L, self._groups_L = [0] * len(lanes), [0] * len(lanes)
        end = 0
        for batches, size in earlier:
            end += batches
            before_L = schedule.before(end).tolist()
            for lane, before in enumerate(before_L):
                self._groups_L[lane] += (before - self._batches_L[lane]) * size
            self._batches_L = before_L

    def __len__(self) -> int:
        return 1 << 62  # endless

    def __getitem__(self, index: int) -> Batch:
        if index < self._first:
            raise ValueError(f"batch {index} is of an earlier part of the run")
        which, number = self._schedule(int(index))
        lane = self._lanes[which]
        first = self._groups_L[which] + (number - self._batches_L[which]) * self._groups
        scheduled = [lane.schedule(first + g) for g in self._mine]
        groups = [lane.streams[task].group(number, lane.rows) for task, number in scheduled]
        batch = {name: np.stack([group[name] for group in groups]) for name in groups[0]}
        batch["task_id"] = np.array([lane.task_ids[task] for task, _ in scheduled], np.int32)
        return batch


def train_batches(
    mixture: PreparedMixture,
    *,
    lengths: Mapping[str, int],
    groups: int,
    rows: int,
    earlier: Sequence[tuple[int, int]] = (),
    pack: bool = True,
    shapes: int = 1,
    seed: int = 0,
    mixing: str = "examples",
    cap: float | None = None,
    temperature: float = 1.0,
    split: str = "train",
    part: tuple[int, int] = (0, 1),
    task_ids: Mapping[str, int] | None = None,
    tasks: Sequence[str] | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset:
    """Endless training batches of single-task groups.

    Args:
        mixture: the prepared tasks.
        lengths: {"inputs": L_in, "targets": L_out}.
        groups: G, groups per batch over all processes.
        rows: R, rows in a group.
        earlier: (number of batches, their G) of each earlier part of a run whose G has changed.
            This part, which starts after them, goes on with the next group of each row shape.
        pack: put several examples into a row; if not, one.
        shapes: maximum number of row shapes. With more than one, `lengths` only truncates, each
            task gets the shape that fits it best, a batch holds tasks of one shape, and R is chosen
            so that groups have about as many tokens as with `lengths`.
        seed: determines the order of tasks and examples.
        mixing: the rate of each task, in examples: `examples`, its number of examples, at most
            `cap`; `equal`; `temperature`, `examples` to the power 1 / temperature (T5, arXiv
            1910.10683); `seqio`, the mixture's own rates. A task with more examples per row gets
            correspondingly fewer groups.
        split: the split of every task.
        part: (index, count); the batches have this one of so many equal parts of their G groups.
        task_ids: name -> id; None for the index in `mixture.names`.
        tasks: only these tasks of the mixture.
        threads, prefetch: number of threads that make batches, and of batches kept ready; 0 threads
            for none.

    Returns:
        A Grain data set of dictionaries of int32 arrays: those of `packing.build` as [G, R, L], and
        task_id [G], with G of this part. Its iterator's state is a small JSON value, valid for
        any number of parts.

    Raises:
        UserError: an argument out of range, a task without the split or without an id, a damaged
            cache.
    """
    names = mixture.names if tasks is None else tuple(tasks)
    used = [mixture.task(name) for name in names]
    if task_ids is None:
        task_ids = {name: number for number, name in enumerate(mixture.names)}
    for name in names:
        if name not in task_ids:
            raise UserError(f"task {name!r} is not in the task table{nearest(name, task_ids)}")
    if min(groups, rows, *lengths.values()) < 1:
        raise UserError(f"groups={groups}, rows={rows} and lengths={lengths} must be at least 1")
    if shapes < 1:
        raise UserError(f"shapes={shapes} must be at least 1")
    if groups % part[1]:
        raise UserError(f"{groups} groups cannot be shared equally by {part[1]} processes")
    rates = [_rate(task, split, mixing, cap, temperature) for task in used]
    if not all(rate >= 0 for rate in rates) or not any(rates):
        raise UserError(f"mixing rates must not be negative, nor all 0: {rates}")
    used, rates = zip(*((t, r) for t, r in zip(used, rates, strict=True) if r > 0), strict=True)
    limits = (lengths["inputs"], lengths["targets"])
    shape_of_task = packing.choose_shapes(
        [task.lengths(split) for task in used], rates, limits, shapes if pack else 1
    )
    lanes, weights = [], []
    for shape in dict.fromkeys(shape_of_task):
        mine = [i for i, other in enumerate(shape_of_task) if other == shape]
        streams = [
            TaskRows(
                used[i], split, lengths=lengths, shape=shape, vocabulary=mixture.vocabulary,
                pack=pack, seed=seed,
            )
            for i in mine
        ]  # fmt: skip
        # Rates count examples, but the schedule draws groups.
        shares = [
            rates[i] * s.plan.rows / len(s.plan.examples)
            for i, s in zip(mine, streams, strict=True)
        ]
        in_group = max(1, round(rows * sum(limits) / sum(shape)))
        ids = [task_ids[used[i].name] for i in mine]
        lanes.append(Lane(streams, ids, Schedule(shares, seed), in_group))
        weights.append(sum(shares) / in_group)
    source = TrainBatches(lanes, Schedule(weights, seed), groups=groups, earlier=earlier, part=part)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    return grain.MapDataset.source(source).to_iter_dataset(options)


def task_batches(
    mixture: PreparedMixture,
    task: str,
    split: str,
    *,
    lengths: Mapping[str, int],
    rows: int,
    seed: int,
) -> grain.IterDataset:
    """Endless batches [1, R, L] of one task with id 0, one example per row: see `train_batches`."""
    return train_batches(
        mixture, lengths=lengths, groups=1, rows=rows, pack=False, seed=seed, mixing="equal",
        split=split, tasks=[task], task_ids={task: 0}, threads=0,
    )  # fmt: skip


def example_order(
    mixture: PreparedMixture, task: str, split: str, *, rows: int, steps: int, seed: int
) -> np.ndarray:
    """Which examples the first batches of `task_batches` hold: int32 [steps, rows]."""
    stream = TaskRows(
        mixture.task(task), split, lengths={"inputs": 1, "targets": 1}, shape=(1, 1),
        vocabulary=mixture.vocabulary, pack=False, seed=seed,
    )  # fmt: skip
    found = [stream.examples(row) for row in range(steps * rows)]
    return np.concatenate(found).astype(np.int32).reshape(steps, rows)


def _rate(
    task: PreparedTask, split: str, mixing: str, cap: float | None, temperature: float
) -> float:
    if mixing not in MIXING:
        raise UserError(f"mixing={mixing!r} is not one of {MIXING}{nearest(mixing, MIXING)}")
    if temperature <= 0:
        raise UserError(f"mixing temperature={temperature} must be above 0")
    examples = task.examples(split)  # raises if there is no such split
    if mixing == "equal":
        return 1.0
    if mixing == "seqio":
        return task.rate
    capped = examples if cap is None else min(examples, cap)
    return capped ** (1 / temperature) if mixing == "temperature" else capped


def eval_batches(
    mixture: PreparedMixture,
    task: str,
    split: str,
    *,
    lengths: Mapping[str, int],
    rows: int,
    limit: int | None = None,
) -> Iterator[tuple[Batch, list[tuple[int, Example]]]]:
    """One pass over a split in order, one example per row.

    Args:
        mixture, task, split: what to read.
        lengths: {"inputs": L_in, "targets": L_out}.
        rows: R; the last batch is filled up with empty rows (all segments 0).
        limit: at most this many questions (see `PreparedTask.questions`), evenly spaced over the
            split.

    Yields:
        (batch, examples): arrays [R, L] as `packing.build` makes them; and for each row that is not
        empty its index in the split and the example, untruncated.

    Raises:
        UserError: unknown task or split, a damaged cache, rows or limit below 1.
    """
    if rows < 1 or (limit is not None and limit < 1):
        raise UserError(f"rows={rows} and limit={limit} must be at least 1")
    prepared = mixture.task(task)
    records, indices = prepared.records(split), evenly_spaced(prepared, split, limit)
    for start in range(0, len(indices), rows):
        part = indices[start : start + rows]
        examples = records.take(part)
        padded = [[example] for example in examples] + [[]] * (rows - len(examples))
        batch = packing.build(padded, lengths, mixture.vocabulary)
        yield batch, list(zip(part, examples, strict=True))


def evenly_spaced(task: PreparedTask, split: str, limit: int | None) -> list[int]:
    """The numbers of a split's examples of at most `limit` questions (see
    `PreparedTask.questions`), evenly spaced; None for all."""
    questions, question_N = np.unique(task.questions(split), return_inverse=True)
    count = len(questions) if limit is None else min(limit, len(questions))
    chosen = np.arange(count) * len(questions) // count
    return np.flatnonzero(np.isin(question_N, chosen)).tolist()
