"""Checkpoints of a run (Orbax): parameters, optimizer state, data position and meta data."""

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moe_jax.core import errors, paths
from moe_jax.core.errors import UserError
from moe_jax.model.experts import Params
from moe_jax.model.task_moe import parameter_shapes
from moe_jax.training import checkpoint_files
from moe_jax.training.checkpoint_files import DAMAGED, damage, steps
from moe_jax.training.shapes import check_shapes
from moe_jax.training.step import TrainState

DIRECTORY = "checkpoints"


@functools.cache  # once
def _quiet() -> None:
    # Orbax logs the traceback of every thread; the error that we raise is enough.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def show(unraisable: Any) -> None:
        # TensorStore's threads, which go on after a failed save, find no one to tell.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = show


class _SealingHandler(ocp.CompositeCheckpointHandler):
    """Adds checksums when all processes have written, before the directory gets its name."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        checkpoint_files.seal(paths.parse(directory))


@ocp.args.register_with_handler(_SealingHandler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """What is saved and restored of a checkpoint."""


class Checkpoints:
    """The checkpoints of one model directory: the latest ones and the best by mean dev score.

    A checkpoint is whole or absent: Orbax writes to a temporary directory, the checksums of its
    files are added, and then it gets its name (in a bucket: its commit file). One that is damaged
    later is set aside: it is called `STEP.damaged`, and the one before is taken.

    Args:
        keep: how many of the latest ones.

    Attributes:
        scores: step -> mean dev score.

    A context, which ends when everything is on disk.
    """

    def __init__(self, model_dir: str | Path, keep: int = 2):
        _quiet()
        self.directory = paths.absolute(model_dir) / DIRECTORY
        self._keep = keep
        self.scores: dict[int, float] = {}
        self._checkpointer = ocp.AsyncCheckpointer(
            _SealingHandler(
                params=ocp.StandardCheckpointHandler(),
                optimizer=ocp.StandardCheckpointHandler(),
                meta=ocp.JsonCheckpointHandler(),
            )
        )
        if jax.process_index() == 0:
            with _failing(f"cannot write {self.directory}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                checkpoint_files.clear(self.directory)  # what a run that was killed has left

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Args:
            meta: JSON; the data iterator's state and what the parameters belong to.

        Raises:
            UserError: this one, or the one before, cannot be written.
        """
        self.wait()
        step = int(state.step)
        meta = {**meta, "step": step, "shapes": parameter_shapes(state.params)}
        with self._saving():
            self._checkpointer.save(
                self.directory / str(step),
                args=_Items(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def wait(self) -> None:
        """Returns when everything is on disk, and what is not kept is gone.

        Raises:
            UserError: it cannot be written.
        """
        with self._saving():
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                self._tidy()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            with _failing(f"cannot save to {self.directory}"):
                yield
        except UserError:
            if jax.process_index() == 0:
                self._clear_until_quiet()
            raise

    def _clear_until_quiet(self) -> None:
        """Removes what a failed save has left. Its other writes may still be under way, and each
        makes its directory anew: so until none has appeared for half a second."""
        quiet = 0
        for _ in range(100):
            try:
                quiet = 0 if checkpoint_files.clear(self.directory) else quiet + 1
            except OSError:  # written to meanwhile
                quiet = 0
            if quiet == 5:
                break
            time.sleep(0.1)

    def _tidy(self) -> None:
        """Removes all but the latest ones and the best."""
        found = sorted(steps(self.directory))
        scored = [step for step in found if step in self.scores]
        kept = {*found[-self._keep :], *sorted(scored, key=self.scores.get)[-1:]}
        for step in found:
            if step not in kept:
                checkpoint_files.remove(self.directory / str(step))

    def restore_latest(
        self, like: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the latest whole checkpoint; those that are damaged are set aside, and said.

        Args:
            like: a state of the wanted shapes and shardings; its values, if any, are not read.
            check: is called with the meta data, before shapes are compared.

        Returns:
            (state, meta data); None where there is no checkpoint.

        Raises:
            UserError: a parameter has another shape (the first one is named), or no checkpoint is
                whole.
        """
        step = 0
        if jax.process_index() == 0:
            step = self._whole() or 0
        if jax.process_count() > 1:  # all processes take the same one
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step < 0:
            raise UserError(
                f"no checkpoint in {self.directory} is whole: they were set aside as *{DAMAGED};"
                " give another MODEL_DIR, or remove them to begin anew"
            )
        return self.restore(step, like, check) if step else None

    def _whole(self) -> int | None:
        """The latest step whose checkpoint is whole; -1 where all are damaged."""
        for step in sorted(steps(self.directory), reverse=True):
            place = self.directory / str(step)
            problem = damage(place)
            if problem is None:
                return step
            with _failing(f"cannot rename {place}"):
                aside = checkpoint_files.set_aside(place)
            _say(f"damaged checkpoint set aside as {aside}: {problem}")
        return -1 if any(self.directory.glob(f"*{DAMAGED}*")) else None

    def restore(
        self,
        step: int,
        like: TrainState,
        check: Callable[[dict[str, Any]], None] = lambda meta: None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restores a state of the shapes and shardings of `like`, and its meta data.

        Raises:
            UserError: a parameter has another shape; the message names the first one.
        """
        place = self.directory / str(step)
        meta = checkpoint_files.read_meta(place)
        check(meta)
        check_shapes(meta["shapes"], parameter_shapes(like.params), self.directory)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        wanted = _Items(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(abstract.opt_state),
        )
        with _failing(f"cannot restore {place}"):
            items = self._checkpointer.restore(place, args=wanted)
        done = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(done, items["params"], items["optimizer"]), meta


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Context: whatever is raised becomes a UserError of one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # OSError, or whatever TensorStore makes of a full disk, a damaged file
        reason = errors.system_reason(e) or errors.first_line(e) or type(e).__name__
        raise UserError(f"{what}: {reason}") from e


def _say(text: str) -> None:
    if jax.process_index() == 0:
        errors.say(text)


def load_params(path: str | Path) -> tuple[Params, dict[str, Any]]:
    """Parameters (NumPy) and meta data of a model directory or one of its checkpoints.

    Says which step it reads. A damaged checkpoint is left where it is (a run may be at work), and
    the one before is read, unless the path names it.

    Args:
        path: MODEL_DIR or MODEL_DIR/checkpoints, for the latest, or MODEL_DIR/checkpoints/STEP.

    Raises:
        UserError: there is no checkpoint that is whole, or it cannot be read.
    """
    _quiet()
    path = paths.absolute(path)
    if path.name.isdigit() and (path / "params").is_dir():
        directory, found = path.parent, [int(path.name)]
    else:
        directory = path if path.name == DIRECTORY else path / DIRECTORY
        found = sorted(steps(directory), reverse=True)
    for step in found:
        place = directory / str(step)
        problem = damage(place, ("params/", "meta/"))
        if problem is None:
            break
        if step == found[-1]:
            raise UserError(f"cannot restore {place}: {problem}")
        _say(f"checkpoint {step} is damaged: {problem}")
    else:
        why = "" if path.exists() else ": there is no such directory"
        raise UserError(f"no checkpoint in {path}{why}")
    with _failing(f"cannot restore {place}"):
        meta = checkpoint_files.read_meta(place)
        checkpointer = ocp.PyTreeCheckpointer()
        tree = checkpointer.metadata(place / "params").item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        params = checkpointer.restore(place / "params", restore_args=args)
    _say(f"read {place}")
    return params, meta
