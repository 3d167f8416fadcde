"""The batch: what the pipeline makes and the model takes."""

from typing import Any, TypedDict

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Batch(TypedDict, total=False):
    """Packed rows. Every array is int32, [G, R, L] in a batch of groups, [R, L] in one group.

    All examples of a group are of one task. Within a row, examples are numbered from 1
    (`segments`); padding has segment 0.

    Attributes:
        inputs, input_segments, input_positions: [..., L_in]; positions count from 0 in each
            example.
        decoder_inputs: [..., L_out], `targets` shifted by one, the start token first.
        targets, target_segments, target_positions: [..., L_out].
        task_id: [G], the row of the task table; in a batch of groups only.
    """

    inputs: Array
    input_segments: Array
    input_positions: Array
    decoder_inputs: Array
    targets: Array
    target_segments: Array
    target_positions: Array
    task_id: Array


INPUTS = ("inputs", "input_segments", "input_positions")
TARGETS = ("decoder_inputs", "targets", "target_segments", "target_positions")


def of_rows(batch: Any) -> Any:
    """The arrays of a batch that have rows: all but `task_id`."""
    return {name: array for name, array in batch.items() if name != "task_id"}
