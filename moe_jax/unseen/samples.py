"""Samples of new tasks: a few examples to train on, a few to choose by, and the test split."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data.batch import INPUTS
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.example import Example
from moe_jax.data.pipeline import eval_batches, example_order
from moe_jax.evaluation.functions import apply_functions
from moe_jax.runs.config import FewShotConfig


class Sample(NamedTuple):
    """A new task and the seed of its few examples."""

    task: str
    seed: int

    @property
    def train(self) -> str:
        return f"fewshot_{self.seed}_train"

    @property
    def dev(self) -> str:
        return f"fewshot_{self.seed}_validation"


class FewShotData:
    """The examples of all samples, as arrays of few shapes."""

    def __init__(self, mixture: PreparedMixture, samples: Sequence[Sample], config: FewShotConfig):
        self.mixture = mixture
        self._lengths = dict(config.data.lengths)
        self._steps = config.finetune.steps
        self.widths = few_widths(self._needed(samples))
        self._most = max(mixture.task(s.task).examples(s.train) for s in samples)
        self.read = functools.lru_cache(1024)(self._read)
        self.order = functools.lru_cache(1024)(self._order)

    def _needed(self, samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
        """Of each task, its longest inputs, and longest targets to train on."""
        limits = (self._lengths["inputs"], self._lengths["targets"])
        longest: dict[str, tuple[int, int]] = {}
        for s in samples:
            task, old = self.mixture.task(s.task), longest.get(s.task, (1, 1))
            trained = task.lengths(s.train).max(0)
            inputs = max(task.lengths(split)[:, 0].max(initial=0) for split in (s.dev, "test"))
            new = np.minimum(np.maximum(trained, (inputs, 0)), limits)
            longest[s.task] = tuple(np.maximum(old, new).tolist())
        return longest

    def _read(
        self, task: str, split: str, limit: int | None = None
    ) -> tuple[dict[str, np.ndarray], list[tuple[int, Example]]]:
        """Arrays [n, L] of a split, one example to a row, and the examples with their numbers."""
        count = self.mixture.task(task).examples(split)
        rows = count if limit is None else min(limit, count)
        batches = eval_batches(
            self.mixture, task, split, lengths=self._lengths, rows=max(1, rows), limit=limit
        )
        # More than one where a question has several examples.
        found, parts = zip(*batches, strict=True)
        examples = [example for part in parts for example in part]
        width, target_width = self.widths[task]
        arrays = {}
        for name in found[0]:
            array_nxL = np.concatenate([batch[name] for batch in found])[: len(examples)]
            arrays[name] = array_nxL[:, : width if name in INPUTS else target_width]
        return arrays, examples

    def _order(self, sample: Sample, rows: int) -> np.ndarray:
        """int32 [steps, rows]: the same for every starting point."""
        return example_order(
            self.mixture, sample.task, sample.train, rows=rows, steps=self._steps,
            seed=sample.seed,
        )  # fmt: skip

    def training(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Training examples [S, n, L] of tasks of one width, filled up with empty rows."""

        def filled(array):
            return np.pad(array, ((0, self._most - len(array)), (0, 0)))

        found = [self.read(sample.task, sample.train)[0] for sample in samples]
        return {name: np.stack([filled(arrays[name]) for arrays in found]) for name in found[0]}

    def first_batch(self, sample: Sample, rows: int) -> dict[str, np.ndarray]:
        """The first batch [rows, L] of so many examples."""
        arrays, _ = self.read(sample.task, sample.train)
        order_R = self.order(sample, rows)[0]
        return {name: array[order_R] for name, array in arrays.items()}

    def blocks(
        self, task: str, split: str, limit: int | None, rows: int
    ) -> list[dict[str, np.ndarray]]:
        """Inputs of a split in blocks [rows, L] with their numbers `row` [rows]; 0 if empty."""
        arrays, examples = self.read(task, split, limit)
        arrays = {name: arrays[name] for name in INPUTS}
        arrays["row"] = np.array([number for number, _ in examples], np.int32)
        more = -len(examples) % rows
        filled = {
            name: np.pad(array, ((0, more), *[(0, 0)] * (array.ndim - 1)))
            for name, array in arrays.items()
        }
        return [
            {name: array[start : start + rows] for name, array in filled.items()}
            for start in range(0, len(examples), rows)
        ]

    def all_decoded(self, task: str, split: str, limit: int | None) -> bool:
        """Whether a task's metrics need decoded answers alone: no choices, no likelihoods."""
        _, examples = self.read(task, split, limit)
        ranked = any(example.choices for _, example in examples)
        prepared = self.mixture.task(task)
        return not ranked and not prepared.score_metrics and prepared.seqio is None

    def score(
        self, task: str, split: str, limit: int | None, tokens_xL: np.ndarray
    ) -> tuple[str, float]:
        """(name, value) of a task's first metric for the decoded answers to a split."""
        vocabulary, examples = self.mixture.vocabulary, dict(self.read(task, split, limit)[1])
        lines = {index: {"references": example.references} for index, example in examples.items()}
        tokens = dict(zip(examples, tokens_xL, strict=False))
        texts = {index: vocabulary.decode(row.tolist()) for index, row in tokens.items()}
        metrics = apply_functions(
            self.mixture.task(task), vocabulary, examples, lines, texts, tokens
        )
        return next(iter(metrics.items()))


def few_widths(needed: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Widths (inputs, targets) that hold what each task needs, few of them, since each compiles.
    What a task needs is at least half of its widths."""
    classes: list[tuple[tuple[int, int], list[str]]] = []
    for task in sorted(needed, key=lambda task: -sum(needed[task])):  # the least of a class is last
        joined = [(tuple(map(max, width, needed[task])), n) for n, (width, _) in enumerate(classes)]
        fit = [(width, n) for width, n in joined if sum(width) <= 2 * sum(needed[task])]
        if fit:
            width, n = min(fit, key=lambda found: sum(found[0]))
            classes[n] = (width, [*classes[n][1], task])
        else:
            classes.append((needed[task], [task]))
    return {task: width for width, tasks in classes for task in tasks}
