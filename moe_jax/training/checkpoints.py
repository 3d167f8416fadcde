"""Checkpoints of a run (Orbax): parameters, optimizer state, data position and meta data."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe_jax.core.errors import UserError
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import Params, add_noise
from moe_jax.model.task_moe import parameter_shapes
from moe_jax.training.step import TrainState

DIRECTORY = "checkpoints"
SCORE = "mean_score"


def _quiet() -> None:
    # Orbax logs the traceback of every thread; the error that we raise is enough.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one model directory: the latest ones and the best by dev score.

    A checkpoint is complete or absent: Orbax writes to a temporary directory and renames it.
    """

    def __init__(self, model_dir: str | Path, keep: int = 1):
        _quiet()
        self.directory = Path(model_dir).absolute() / DIRECTORY
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[SCORE],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Temporary directories are incomplete checkpoints of killed runs.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, cleanup_tmp_directories=True
            ),
            item_names=("params", "optimizer", "meta"),
        )

    def latest(self) -> int | None:
        """Step of the latest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any], score: float | None) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Args:
            meta: JSON; among others the data iterator's state and the task table.
            score: mean dev score, if it was measured at this step.
        """
        step = int(state.step)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave(
                        {**meta, "step": step, "shapes": parameter_shapes(state.params)}
                    ),
                ),
                metrics=None if score is None else {SCORE: score},
            )
        except Exception as e:  # OSError, or TensorStore's error for a full disk
            raise UserError(f"cannot save to {self.directory}: {_reason(e)}") from e

    def wait(self) -> None:
        """Waits until everything is on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:  # OSError, or TensorStore's error for a full disk
            raise UserError(f"cannot save to {self.directory}: {_reason(e)}") from e

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores a state of the shapes and shardings of `like`, and its meta data.

        Raises:
            UserError: a parameter has another shape; the message names the first one.
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
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # Orbax's error for a damaged file
            raise UserError(f"cannot restore {self.directory}/{step}: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    """The error in one line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", text)  # TensorStore's
    return os.strerror(int(code[1])) if code else text.splitlines()[0]


def check_shapes(found: dict[str, list[int]], wanted: dict[str, list[int]], source: Any) -> None:
    """Raises a UserError that names the first parameter with another shape."""
    for name in sorted(wanted | found):
        if found.get(name) != wanted.get(name):
            has = f"has shape {found[name]}" if name in found else "is absent"
            needs = f"needs shape {wanted[name]}" if name in wanted else "has no such parameter"
            raise UserError(f"{source}: {name} {has}, the model {needs}")


def load_params(path: str | Path, step: int | None = None) -> tuple[Params, dict[str, Any]]:
    """Parameters (NumPy) and meta data of a model directory or one of its checkpoints.

    Args:
        path: MODEL_DIR, MODEL_DIR/checkpoints or MODEL_DIR/checkpoints/STEP.
        step: which checkpoint; None for the one that `path` names, or the latest.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    _quiet()
    path = Path(path).absolute()
    if path.name.isdigit() and (path / "params").is_dir():
        step, directory = int(path.name), path.parent
    else:
        directory = path if path.name == DIRECTORY else path / DIRECTORY
        found = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
        if not found:
            raise UserError(f"no checkpoint in {path}")
        step = max(found) if step is None else step
    try:
        meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(directory / str(step) / "meta")
        checkpointer = ocp.PyTreeCheckpointer()
        place = directory / str(step) / "params"
        tree = checkpointer.metadata(place).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return merge_heads(checkpointer.restore(place, restore_args=args)), meta
    except Exception as e:  # see `Checkpoints._restore`
        raise UserError(f"cannot restore {directory}/{step}: {_reason(e)}") from e


def merge_heads(params: Params) -> Params:
    """Merges the axes of heads and head width, which were separate in early checkpoints of 0.1."""

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
    """Moves the vanilla layers of `config` out of a dense backbone's routed layers."""
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
    """A loaded backbone in the shape of `like`. A single expert is copied to all experts, plus
    noise.

    Raises:
        UserError: the architecture differs, or the number of experts is neither one nor E.
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
