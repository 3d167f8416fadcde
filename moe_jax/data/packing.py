"""Packing examples of one task into rows, and rows into arrays. NumPy only.

A row holds several examples of one task: their inputs in an array row of length L_in, their targets
in one of length L_out. The segment number (1, 2, ...; 0 is padding) gives each token's example.
Positions restart in every example.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.data.batch import INPUTS, Batch
from moe_jax.data.example import Example
from moe_jax.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples share a row, for one epoch of a task.

    Attributes:
        examples: int64 [N], every example once, in the order of the rows.
        offsets: int64 [rows + 1]; row r holds examples[offsets[r]:offsets[r + 1]].
        classes: int64 [N], the class of each example. Examples of one class can be exchanged.
    """

    examples: np.ndarray
    offsets: np.ndarray
    classes: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """int64 [n], the examples of a row."""
        return self.examples[self.offsets[row] : self.offsets[row + 1]]

    def shuffled(self, rng: np.random.Generator) -> tuple["Plan", np.ndarray]:
        """The plan with examples of equal lengths exchanged at random and its rows in random order.

        The number of rows stays the same, so that the n-th row of a task in any epoch is known
        without planning the epochs before it.
        """
        before = np.argsort(self.classes, kind="stable")
        after = np.lexsort((rng.random(len(before)), self.classes))
        replacement = np.empty_like(before)
        replacement[before] = after
        plan = dataclasses.replace(self, examples=replacement[self.examples])
        return plan, rng.permutation(self.rows)


def one_per_row(examples: int) -> Plan:
    """The plan without packing: row r holds example r."""
    return Plan(np.arange(examples), np.arange(examples + 1), np.zeros(examples, np.int64))


def pack(lengths_Nx2: np.ndarray, limits: tuple[int, int], window: int = 8192) -> Plan:
    """Assigns every example to exactly one row, inputs and targets together.

    Best-fit decreasing. The size of an example is the sum of its two lengths as shares of a row,
    weighted by the task's total need on each side, so that the scarcer side counts more. Takes
    about 10 us per example.

    Args:
        lengths_Nx2: integers [N, 2], tokens of inputs and targets; longer ones count as the limit.
        limits: (L_in, L_out), the row's lengths.
        window: at most this many examples are packed at a time, for speed; each window is an even
            sample of all lengths.
    """
    lengths_Nx2 = np.minimum(lengths_Nx2, limits).astype(np.int64)
    shares_Nx2 = lengths_Nx2 / np.array(limits)
    weights_2 = shares_Nx2.sum(0) / shares_Nx2.sum()
    order = np.lexsort((-lengths_Nx2[:, 1], -lengths_Nx2[:, 0], -(shares_Nx2 @ weights_2)))
    windows = max(1, -(-len(order) // window))
    rows = []
    for start in range(windows):
        part = order[start::windows]
        for row in _best_fit(lengths_Nx2[part], limits, weights_2 / limits):
            rows.append(part[row])
    _, classes = np.unique(lengths_Nx2, axis=0, return_inverse=True)
    offsets = np.cumsum([0, *map(len, rows)])
    return Plan(np.concatenate(rows), offsets, classes.reshape(-1))


def _best_fit(
    lengths_Nx2: np.ndarray, limits: tuple[int, int], weights_2: np.ndarray
) -> list[list[int]]:
    """Puts each example, in order, into the open row that it fills best."""
    # Only open rows are searched. A row is closed when not even the smallest remaining example
    # fits.
    free_2xM = np.empty((2, len(lengths_Nx2)), np.int64)
    room_M = np.empty(len(lengths_Nx2))
    ids_M = np.empty(len(lengths_Nx2), np.int64)
    least_Nx2 = np.minimum.accumulate(lengths_Nx2[::-1])[::-1]
    rows: list[list[int]] = []
    count = 0
    for example, (inputs, targets) in enumerate(lengths_Nx2.tolist()):
        if example % 256 == 0:
            least = least_Nx2[example]
            kept = np.flatnonzero((free_2xM[:, :count] >= least[:, None]).all(0))
            count = len(kept)
            for array in (free_2xM, room_M, ids_M):
                array[..., :count] = array[..., kept]
        fits = (free_2xM[0, :count] >= inputs) & (free_2xM[1, :count] >= targets)
        room = np.where(fits, room_M[:count], np.inf)
        best = int(room.argmin()) if count else 0
        if not count or room[best] == np.inf:
            best = count
            free_2xM[:, best] = limits
            ids_M[best] = len(rows)
            rows.append([])
            count += 1
        free_2xM[0, best] -= inputs
        free_2xM[1, best] -= targets
        room_M[best] = free_2xM[:, best] @ weights_2
        rows[ids_M[best]].append(example)
    return rows


def choose_shapes(
    lengths_by_task: Sequence[np.ndarray],
    weights: Sequence[float],
    limits: tuple[int, int],
    count: int,
) -> list[tuple[int, int]]:
    """Chooses a row shape (L_in, L_out) for each task, from few shapes, to reduce padding.

    One shape for all tasks wastes space: short targets of classification leave half of the
    decoder's rows empty, long targets leave the encoder's rows empty. The shapes come from a grid
    of fractions of the limits. They are chosen greedily, then each is chosen again given the
    others. Input rows never get longer than the limit, because the cost of attention grows with the
    square of the length.

    Args:
        lengths_by_task: for each task, integers [N, 2], tokens of inputs and targets.
        weights: for each task, its share of the examples drawn.
        limits: lengths at which examples are truncated.
        count: maximum number of shapes; with 1 it is `limits`.
    """
    if count == 1:
        return [limits] * len(lengths_by_task)
    shares = itertools.product((1, 0.75, 0.5, 0.375, 0.25), (3, 2, 1.5, 1, 0.75, 0.5, 0.25, 0.125))
    shapes_Sx2 = 8 * np.ceil(np.array([*shares]) * limits / 8).astype(int)
    shapes_Sx2[:, 0] = np.minimum(shapes_Sx2[:, 0], limits[0])
    costs_TxS = np.empty((len(lengths_by_task), len(shapes_Sx2)))
    for costs_S, lengths_Nx2, weight in zip(costs_TxS, lengths_by_task, weights, strict=True):
        lengths_Nx2 = np.minimum(lengths_Nx2, limits)
        mean_2 = lengths_Nx2.mean(0)
        # Packed rows were measured to leave about a quarter of an example empty at their end.
        rows_S = (mean_2 / np.maximum(shapes_Sx2 - mean_2 / 4, 1)).max(1)
        fits_S = (shapes_Sx2 >= lengths_Nx2.max(0)).all(1)
        costs_S[:] = np.where(fits_S, weight * rows_S * shapes_Sx2.sum(1), np.inf)

    def best_beside(chosen: list[int]) -> int:
        beside_TxS = np.minimum(costs_TxS[:, chosen].min(1, initial=np.inf)[:, None], costs_TxS)
        unfit_TxS = np.isinf(beside_TxS)
        # First, every task must fit into one of them; then the cost decides.
        return int(np.lexsort((np.where(unfit_TxS, 0, beside_TxS).sum(0), unfit_TxS.sum(0)))[0])

    chosen: list[int] = []
    for _ in range(count):
        chosen.append(best_beside(chosen))
    for place in range(count):
        chosen[place] = best_beside(chosen[:place] + chosen[place + 1 :])
    return [tuple(shapes_Sx2[chosen[c]].tolist()) for c in costs_TxS[:, chosen].argmin(1)]


def truncate(ids: np.ndarray, length: int, eos_id: int) -> np.ndarray:
    """The first `length` ids; if the last id is EOS, EOS stays last."""
    if len(ids) <= length:
        return ids
    cut = ids[:length].copy()
    if ids[-1] == eos_id:
        cut[-1] = eos_id
    return cut


def build(
    rows: Sequence[Sequence[Example]],
    lengths: Mapping[str, int],
    vocabulary: Vocabulary,
    shape: tuple[int, int] | None = None,
) -> Batch:
    """Makes the arrays of a batch from examples.

    Args:
        rows: R lists of examples; an empty list is a row of padding.
        lengths: {"inputs": length, "targets": length}; longer examples are truncated, EOS kept.
        vocabulary: gives the special ids.
        shape: (L_in, L_out) of the rows; None for `lengths`.

    Returns:
        int32 arrays: inputs, input_segments, input_positions [R, L_in]; decoder_inputs, targets,
        target_segments, target_positions [R, L_out]. decoder_inputs are the targets of each
        segment moved right by one, `decoder_start_id` first.

    Raises:
        ValueError: a row's examples do not fit.
    """
    limits = (lengths["inputs"], lengths["targets"])
    pad, eos = vocabulary.pad_id, (vocabulary.inputs.eos_id, vocabulary.eos_id)
    inputs = [[truncate(e.inputs, limits[0], eos[0]) for e in row] for row in rows]
    targets = [[truncate(e.targets, limits[1], eos[1]) for e in row] for row in rows]
    l_in, l_out = shape or limits
    inputs_RxL, input_segments_RxL, input_positions_RxL = _lay_out(inputs, l_in, pad)
    targets_RxL, target_segments_RxL, target_positions_RxL = _lay_out(targets, l_out, pad)
    decoder_inputs_RxL = np.roll(targets_RxL, 1, axis=1)
    decoder_inputs_RxL[target_positions_RxL == 0] = vocabulary.decoder_start_id
    decoder_inputs_RxL[target_segments_RxL == 0] = pad
    return {
        "inputs": inputs_RxL,
        "input_segments": input_segments_RxL,
        "input_positions": input_positions_RxL,
        "decoder_inputs": decoder_inputs_RxL,
        "targets": targets_RxL,
        "target_segments": target_segments_RxL,
        "target_positions": target_positions_RxL,
    }


def _lay_out(
    rows: Sequence[Sequence[np.ndarray]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, segments and positions, int32 [R, length]."""
    ids_RxL = np.full((len(rows), length), pad_id, np.int32)
    segments_RxL = np.zeros_like(ids_RxL)
    positions_RxL = np.zeros_like(ids_RxL)
    for r, row in enumerate(rows):
        if (tokens := sum(map(len, row))) > length:
            raise ValueError(f"{tokens} tokens in a row of {length}")
        start = 0
        for segment, ids in enumerate(row, 1):
            here = np.s_[r, start : start + len(ids)]
            ids_RxL[here] = ids
            segments_RxL[here] = segment
            positions_RxL[here] = np.arange(len(ids))
            start += len(ids)
    return ids_RxL, segments_RxL, positions_RxL


def encode_inputs(vocabulary: Vocabulary, texts: Sequence[str], length: int) -> Batch:
    """Encodes texts: `inputs`, `input_segments`, `input_positions`, each int32 [n, length].

    One text per row, truncated with EOS kept, as in training.
    """
    vocabulary = vocabulary.inputs
    rows = [[np.array([*vocabulary.encode(text), vocabulary.eos_id], np.int32)] for text in texts]
    rows = [[truncate(row[0], length, vocabulary.eos_id)] for row in rows]
    arrays = _lay_out(rows, length, vocabulary.pad_id)
    return dict(zip(INPUTS, arrays, strict=True))


def padding_share(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Share of a batch's tokens that are padding, 0..1. Takes NumPy arrays and JAX arrays.

    Returns:
        `inputs`, `targets`, `all` (both together), and `unpacked`: the value of `all` if each row
        held one example.
    """
    inputs, targets = batch["input_segments"], batch["target_segments"]
    input_tokens, target_tokens = (inputs > 0).sum(), (targets > 0).sum()
    tokens = input_tokens + target_tokens
    examples = targets.max(-1, initial=0).sum().clip(1)
    return {
        "inputs": 1 - input_tokens / inputs.size,
        "targets": 1 - target_tokens / targets.size,
        "all": 1 - tokens / (inputs.size + targets.size),
        "unpacked": 1 - tokens / (examples * (inputs.shape[-1] + targets.shape[-1])),
    }
