"""Writes parameters that are too large to hold: leaf by leaf, as `load_params` reads them."""

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from moe_jax.core import checksums
from moe_jax.training.checkpoints import DIRECTORY

_FILE_BYTES = 1 << 27  # data waits in memory until it fills a file


@dataclasses.dataclass(frozen=True)
class Promise:
    """A float32 parameter that is computed when it is written.

    Attributes:
        shape: shape of the parameter.
        make: computes the parameter.
    """

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    dtype = np.dtype(np.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _PromiseHandler(type_handlers.NumpyHandler):
    """Orbax handler that computes and writes one promised array after another."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        # The largest first, so that smaller ones can reuse its memory.
        order = sorted(zip(values, infos, args, strict=True), key=lambda one: -one[0].nbytes)
        for value, info, arg in order:
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


def save_params(model_dir: Path, step: int, params: Any, meta: dict[str, Any]) -> None:
    """Writes a checkpoint without optimizer state.

    Args:
        params: tree of `Promise`s.
        meta: as in `Checkpoints.save`, including `step` and `shapes`.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    place = model_dir.absolute() / DIRECTORY / str(step)
    registry = type_handlers.create_type_handler_registry(
        (Promise, _PromiseHandler()), (jax.Array, type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=_FILE_BYTES)
        checkpointer.save(place / "params", args=args)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(place / "meta", args=ocp.args.JsonSave(meta))
    checksums.seal(place)
