"""Checkpoints of a TaskMoE that T5X trains or evaluates, from and to a model directory.

T5X's checkpoints hold arrays alone. What belongs to them is beside them, in `MODEL_DIR/moe_jax/`:
the configuration, the task table and the vocabulary, in the files of a model directory.
"""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError
from moe_jax.data.vocabulary import DIRECTORY as VOCABULARY
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.interop.t5x_checkpoint import STATE, Checkpoint
from moe_jax.model.task_moe import TaskMoE, shapes_of
from moe_jax.runs import directory
from moe_jax.runs.config import Config
from moe_jax.training.checkpoints import load_params
from moe_jax.training.shapes import check_shapes

DESCRIPTION = "moe_jax"  # in T5X's MODEL_DIR
# The collection of variables that holds the training step inside T5X.
CLOCK = "clock"
_PREFIX = "checkpoint"  # of a step's directory


def describe(model_dir: str | Path, config: Config, tasks: list[str], vocabulary: Path) -> None:
    """Writes what a model directory holds beside checkpoints into T5X's.

    Args:
        model_dir: T5X's MODEL_DIR.
        vocabulary: directory of the prepared vocabulary.
    """
    directory.describe(Path(model_dir) / DESCRIPTION, config, tasks, vocabulary)


def is_run(checkpoint: Checkpoint) -> bool:
    """Whether the parameters are those of a TaskMoE, not of T5X's own models."""
    return any(name.startswith("backbone/") for name in checkpoint.shapes)


def read_run(checkpoint: Checkpoint, out: Path) -> Config:
    """Writes a model directory from a checkpoint of T5X, parameter by parameter.

    It can be evaluated, exported, adapted, and start other runs; it has no optimizer state.

    Raises:
        UserError: the description is missing or of another model, or a file is damaged.
    """
    source = checkpoint.directory.absolute()
    match = re.fullmatch(rf"{_PREFIX}_(\d+)", source.name)
    if match is None:
        raise UserError(f"{source}: a TaskMoE's checkpoint of T5X is called {_PREFIX}_STEP")
    place, step = source.parent / DESCRIPTION, int(match[1])
    config, tasks = directory.read_config(place), directory.read_task_table(place)
    rows = checkpoint.shapes.get("backbone/embedding", (config.model.vocabulary_size,))[0]
    model = dataclasses.replace(config.model, vocabulary_size=rows)
    shapes = shapes_of(TaskMoE(model, config.router, len(tasks)))
    check_shapes({k: list(v) for k, v in checkpoint.shapes.items()}, shapes, str(source))
    promises = {
        tuple(name.split("/")): Promise(
            shape, lambda name=name: checkpoint.read(name).astype(np.float32, copy=False)
        )
        for name, shape in checkpoint.shapes.items()
    }
    run = dataclasses.replace(config.run, model_dir=str(out))
    config = dataclasses.replace(config, run=run)
    with files.new_directory(out) as new:
        params = with_empty(traverse_util.unflatten_dict(promises))
        save_params(new, step, params, {"tasks": tasks, "step": step, "shapes": shapes})
        directory.describe(new, config, tasks, place / VOCABULARY)
    return config


def write_run(model_dir: str | Path, out: str | Path) -> str:
    """Writes the checkpoint of a model directory as T5X does: `OUT/checkpoint_STEP`.

    T5X's `eval.py` and `infer.py` read it. Its `train.py` starts from it with
    `RestoreCheckpointConfig.fallback_to_scratch = True`, because there is no optimizer state.

    Raises:
        UserError: there is no run, or OUT has this checkpoint.

    Returns:
        A line about it.
    """
    config = directory.read_config(directory.root(model_dir))
    params, meta = load_params(model_dir)
    out, step = paths.local(out).absolute(), meta["step"]
    files.check_new(out / f"{_PREFIX}_{step}")
    describe(out, config, meta["tasks"], directory.root(model_dir) / VOCABULARY)
    logging.getLogger("absl").setLevel(logging.ERROR)
    number = np.asarray(step, np.int32)
    tree = {
        "target": without_empty(params),
        "state": {"step": number},
        "flax_mutables": {CLOCK: {"step": number}},
    }
    handlers = {STATE: ocp.PyTreeCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(step_prefix=_PREFIX)
    with ocp.CheckpointManager(out, options=options, item_handlers=handlers) as manager:
        manager.save(step, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree)}))
        manager.wait_until_finished()
    return f"{out / f'{_PREFIX}_{step}'}: {len(meta['tasks'])} tasks"


def without_empty(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters without a router that has none, whose place T5X cannot keep."""
    return {part: tree for part, tree in params.items() if not isinstance(tree, dict) or tree}


def with_empty(params: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `without_empty`."""
    return {"router": {}, **params} if "representations" in params else params
