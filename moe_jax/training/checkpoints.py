"""Checkpoints of a run: parameters, optimizer, data position and what they belong to (Orbax)."""

import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moe_jax.core import checksums, errors, files
from moe_jax.core.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import Params, add_noise
from moe_jax.model.task_moe import parameter_shapes
from moe_jax.training.step import TrainState

DIRECTORY = "checkpoints"
SEALED = "sealed"  # of the meta data: there are checksums beside them
_DAMAGED = ".damaged"
_OLD = ".old"  # is being removed
_LEFT = re.compile(rf"\d+({re.escape(_OLD)}|\.orbax-checkpoint-tmp.*)")
# What Orbax writes to a checkpoint's directory after it is finalised; nothing reads it.
_CHANGING = ("_CHECKPOINT_METADATA", "commit_success.txt")


def _quiet() -> None:
    # Orbax logs the traceback of every thread; what went wrong is in the error that we raise.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


class _SealingHandler(ocp.CompositeCheckpointHandler):
    """Adds checksums when all processes have written, before the directory gets its name."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        checksums.seal(Path(directory), without=_CHANGING)


@ocp.args.register_with_handler(_SealingHandler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """What is saved and restored of a checkpoint."""


class Checkpoints:
    """The checkpoints of one model directory: the latest ones and the best by mean dev score.

    A checkpoint is whole or absent: Orbax writes to a temporary directory, the checksums of its
    files are added, and then it gets its name. One that is damaged later is set aside: it is
    called `STEP.damaged`, and the one before is taken.

    Args:
        keep: how many of the latest ones.

    Attributes:
        scores: step -> mean dev score.

    A context, which ends when everything is on disk.
    """

    def __init__(self, model_dir: str | Path, keep: int = 2):
        _quiet()
        self.directory = Path(model_dir).absolute() / DIRECTORY
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
                for left in self.directory.iterdir():  # by a run that was killed
                    if _LEFT.fullmatch(left.name):
                        shutil.rmtree(left)

    def latest(self) -> int | None:
        """Step of the latest checkpoint."""
        return max(steps(self.directory), default=None)

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
        meta = {**meta, "step": step, "shapes": parameter_shapes(state.params), SEALED: True}
        with _failing(f"cannot save to {self.directory}"):
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
        with _failing(f"cannot save to {self.directory}"):
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                self._tidy()

    def _tidy(self) -> None:
        """Removes all but the latest ones and the best."""
        found = sorted(steps(self.directory))
        scored = [step for step in found if step in self.scores]
        kept = {*found[-self._keep :], *sorted(scored, key=self.scores.get)[-1:]}
        for step in found:
            if step not in kept:
                old = self.directory / f"{step}{_OLD}"
                (self.directory / str(step)).rename(old)
                shutil.rmtree(old)

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the latest whole checkpoint; those that are damaged are set aside, and said.

        Args:
            like: a state of the wanted shapes and shardings.

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
                f"no checkpoint in {self.directory} is whole: they were set aside as *{_DAMAGED};"
                " give another MODEL_DIR, or remove them to begin anew"
            )
        return self.restore(step, like) if step else None

    def _whole(self) -> int | None:
        """The latest step whose checkpoint is whole; -1 where all are damaged."""
        for step in sorted(steps(self.directory), reverse=True):
            place = self.directory / str(step)
            problem = damage(place)
            if problem is None:
                return step
            aside = _free(place.with_name(f"{step}{_DAMAGED}"))
            with _failing(f"cannot rename {place}"):
                place.rename(aside)
            _say(f"damaged checkpoint set aside as {aside}: {problem}")
        return -1 if any(self.directory.glob(f"*{_DAMAGED}*")) else None

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores a state of the shapes and shardings of `like`, and its meta data.

        Raises:
            UserError: a parameter has another shape; the first one is named.
        """
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        check_shapes(meta["shapes"], parameter_shapes(like.params), self.directory)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(abstract.opt_state),
        )
        state = TrainState(like.step + step, items["params"], items["optimizer"])
        return state, meta

    def _restore(self, step: int, **items: Any) -> Any:
        place = self.directory / str(step)
        with _failing(f"cannot restore {place}"):
            return self._checkpointer.restore(place, args=_Items(**items))


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Context: whatever is raised becomes a UserError of one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # OSError, or whatever TensorStore makes of a full disk, a damaged file
        raise UserError(f"{what}: {_reason(e)}") from e


def _say(text: str) -> None:
    if jax.process_index() == 0:
        errors.say(text)


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory `checkpoints`, in no order."""
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if re.fullmatch(r"\d+", path.name)]


def damage(place: Path, parts: Sequence[str] = ("",)) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None where nothing is.

    One that was written before there were checksums is taken as it is, and that is said.

    Args:
        parts: what its files' names begin with that are to be read.
    """
    if checksums.is_sealed(place):
        return checksums.damage(place, parts)
    try:
        meta = files.read_json(place / "meta" / "metadata")
    except UserError as e:
        return str(e)
    if not isinstance(meta, dict) or SEALED in meta:
        return f"{place / checksums.FILE} is missing"
    _say(f"{place} has no checksums: it was written by an earlier version, and is read as it is")
    return None


def _free(path: Path) -> Path:
    """A path that is not taken: this one, or with a number after it."""
    names = itertools.chain([path.name], (f"{path.name}-{n}" for n in itertools.count(2)))
    return next(place for place in map(path.with_name, names) if not place.exists())


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", text)  # TensorStore's
    return os.strerror(int(code[1])) if code else text.splitlines()[0]


def check_shapes(found: dict[str, list[int]], wanted: dict[str, list[int]], source: Any) -> None:
    """Raises a UserError naming the first parameter that differs."""
    for name in sorted(wanted | found):
        if found.get(name) != wanted.get(name):
            has = f"has shape {found[name]}" if name in found else "is absent"
            needs = f"needs shape {wanted[name]}" if name in wanted else "has no such parameter"
            raise UserError(f"{source}: {name} {has}, the model {needs}")


def load_params(path: str | Path, step: int | None = None) -> tuple[Params, dict[str, Any]]:
    """Parameters (NumPy) and meta data of a model directory or one of its checkpoints.

    Says which step it reads. A damaged checkpoint is left where it is (a run may be at work), and
    the one before is read, unless the path or `step` names it.

    Args:
        path: MODEL_DIR, MODEL_DIR/checkpoints or MODEL_DIR/checkpoints/STEP.
        step: which checkpoint; the latest when None and `path` names none.

    Raises:
        UserError: there is no checkpoint that is whole, or it cannot be read.
    """
    _quiet()
    path = Path(path).absolute()
    if path.name.isdigit() and (path / "params").is_dir():
        directory, step = path.parent, int(path.name)
    else:
        directory = path if path.name == DIRECTORY else path / DIRECTORY
    found = sorted(steps(directory), reverse=True) if step is None else [step]
    for step in found:
        place = directory / str(step)
        problem = damage(place, ("params/", "meta/"))
        if problem is None:
            break
        if step == found[-1]:
            raise UserError(f"cannot restore {place}: {problem}")
        _say(f"checkpoint {step} is damaged: {problem}")
    else:
        raise UserError(f"no checkpoint in {path}")
    with _failing(f"cannot restore {place}"):
        meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(place / "meta")
        checkpointer = ocp.PyTreeCheckpointer()
        tree = checkpointer.metadata(place / "params").item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        params = merge_heads(checkpointer.restore(place / "params", restore_args=args))
    _say(f"read {place}")
    return params, meta


def merge_heads(params: Params) -> Params:
    """Parameters with heads and their width as one axis, as 0.1's first checkpoints did not."""

    def merged(path, p):
        *_, block, name = (key.key for key in path) if len(path) > 1 else ("", "")
        if not block.endswith("_attention"):
            return p
        if name == "out_kernel":  # [layer, expert, H, K, D]
            return p.reshape(*p.shape[:2], -1, p.shape[-1])
        own = {"out_bias": 3}.get(name, 5 if name.endswith("_kernel") else 4)
        return p.reshape(*p.shape[: own - 1], -1) if p.ndim > own else p

    return jax.tree_util.tree_map_with_path(merged, params)


def split_layers(backbone: Params, config: ModelConfig) -> Params:
    """A dense backbone without vanilla layers, those of `config` put apart."""
    result = {**backbone}
    for side in ("encoder", "decoder"):
        layers = backbone[side]["layers"]
        vanilla = list(getattr(config, f"{side}_vanilla_layers"))
        depth, experts = jax.tree.leaves(layers)[0].shape[:2]
        same_depth = depth == getattr(config, f"{side}_layers")
        if vanilla and list(layers) == ["routed"] and experts == 1 and same_depth:
            places = {"routed": [i for i in range(depth) if i not in vanilla], "vanilla": vanilla}
            layers = {
                kind: jax.tree.map(lambda p, at=at: p[at], layers["routed"])
                for kind, at in places.items()
                if at
            }
        result[side] = {**backbone[side], "layers": layers}
    return result


def fit_backbone(
    backbone: Params, like: Params, noise: float, key: jax.Array, source: Any
) -> Params:
    """A loaded backbone in the shape of `like`: one expert fills all of a layer's, plus noise.

    Raises:
        UserError: it has another architecture, or neither one nor E experts.
    """
    filled = False

    def fill(path, leaf, wanted):
        nonlocal filled
        # [layer, expert, ...]: only the number of experts may differ.
        routed = "routed" in (p.key for p in path)
        if routed and leaf.shape[1] == 1 < wanted.shape[1]:
            filled = True
            return np.broadcast_to(leaf, (leaf.shape[0], wanted.shape[1], *leaf.shape[2:]))
        return leaf

    if jax.tree.structure(backbone) == jax.tree.structure(like):
        backbone = jax.tree_util.tree_map_with_path(fill, backbone, like)
    check_shapes(parameter_shapes(backbone), parameter_shapes(like), source)
    if filled and noise:
        for side in ("encoder", "decoder"):
            key = jax.random.fold_in(key, 0)
            layers = backbone[side]["layers"]
            if "routed" in layers:
                layers["routed"] = add_noise(
                    jax.tree.map(jax.numpy.asarray, layers["routed"]), key, noise
                )
    return backbone


def fit_table(params: Params, like: Params, found: list[str], tasks: list[str], source: Any):
    """Router and representations of another run, rows matched by task name.

    Raises:
        UserError: the router has another shape, or a task has no row.
    """
    missing = [task for task in tasks if task not in found]
    if missing:
        raise UserError(f"{source}: its task table has no {missing[0]!r}")
    rows = np.array([found.index(task) for task in tasks])
    result = {
        "router": params["router"],
        "representations": np.asarray(params["representations"])[rows],
    }
    check_shapes(parameter_shapes(result), parameter_shapes({k: like[k] for k in result}), source)
    return result
