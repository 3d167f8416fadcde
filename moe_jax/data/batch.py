"""The batch: the pipeline's output and the model's input."""

from typing import Any, TypedDict

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Batch(TypedDict, total=False):
    """Packed rows. Every array is int32: [G, R, L] in a batch of groups, [R, L] in one group.

    All examples of a group belong to one task. Within a row, examples are numbered from 1
    (`segments`); padding has segment 0.

    Attributes:
        inputs, input_segments, input_positions: [..., L_in]; positions count from 0 in each
            example.
        decoder_inputs: [..., L_out], `targets` shifted right by one, with the start token in front.
        targets, target_segments, target_positions: [..., L_out].
        task_id: [G], row of the task table; only in a batch of groups.
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
    """The arrays of a batch that have a row axis: all except `task_id`."""
    return {name: array for name, array in batch.items() if name != "task_id"}
