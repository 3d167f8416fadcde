"""Writes a model directory from the weights of another library, parameter by parameter."""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_jax.core.errors import UserError
from moe_jax.core.progress import progress
from moe_jax.data import vocabulary
from moe_jax.data.vocabulary import TokenizersVocabulary, VocabularyConfig
from moe_jax.interop.hf_weights import Part
from moe_jax.interop.streamed_checkpoint import Promise, save_params
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.task_moe import TaskMoE, shapes_of
from moe_jax.runs import directory
from moe_jax.runs.config import Config, DataConfig, RunConfig

_LENGTHS = {"inputs": 512, "targets": 64}  # a run may choose others


def check_parts(
    config: ModelConfig,
    parts: Sequence[Part],
    shapes: Mapping[str, tuple[int, ...]],
    source: Path,
    says: str,
) -> None:
    """Checks that every tensor of a dense model exists and has its shape.

    Args:
        shapes: name -> shape.
        source: named in errors.
        says: the source of the expected shapes, in words such as `config.json says`.

    Raises:
        UserError: names the first tensor that is missing or has another shape.
    """
    expected = _shapes(config)
    for part in parts:
        if part.name not in shapes:
            raise UserError(f"{source}: the weights have no {part.name}")
        wanted = part.shape(tuple(expected[f"backbone/{part.path}"]))
        if shapes[part.name] != wanted:
            raise UserError(
                f"{source}: {part.name} has shape {list(shapes[part.name])}, {says} {list(wanted)}"
            )


@functools.cache
def _shapes(config: ModelConfig) -> dict[str, list[int]]:
    return shapes_of(TaskMoE(config, RouterConfig(), 0))


def write_initial(
    new: Path,
    out: Path,
    config: ModelConfig,
    parts: Sequence[Part],
    read: Callable[[Part], np.ndarray],
    own: TokenizersVocabulary | None,
    source: Path,
) -> None:
    """Writes checkpoint 0, a task table without tasks, the tokenizer and config.gin.

    Args:
        new: directory to write to.
        out: its final name, once it is complete.
        config: of a dense model.
        parts: all its tensors, grouped by parameter.
        read: returns the tensor of a part. Called one part at a time, so that at most one tensor
            and one parameter are in memory.
        own: its tokenizer; if None, config.gin does not set the vocabulary.
        source: where the weights come from; named by the progress bar and in errors.

    Raises:
        UserError: the tokenizer has more tokens than the model; and what `read` raises.
    """
    if own is not None and own.size > config.vocabulary_size:
        raise UserError(
            f"{source}: the tokenizer has {own.size} tokens, the model {config.vocabulary_size}"
        )
    shapes = _shapes(config)
    params: dict[str, Any] = {}
    title = f"read {source.name}"
    with progress(total=len(parts), desc=title, unit=" tensors") as bar:
        for path, group in itertools.groupby(parts, lambda part: part.path):
            *parents, leaf = f"backbone/{path}".split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            shape = tuple(shapes[f"backbone/{path}"])
            node[leaf] = Promise(shape, _maker(list(group), shape, read, bar))
        save_params(new, 0, params, {"tasks": [], "step": 0, "shapes": shapes})
    directory.write_task_table(new, [])
    vocabulary_config = VocabularyConfig()
    only: list[type] = [ModelConfig]
    if own is not None:
        vocabulary.write_vocabulary(new / vocabulary.DIRECTORY, own.settings, own.contents)
        vocabulary_config = VocabularyConfig(kind="tokenizers", path=os.path.abspath(out))
        only.append(VocabularyConfig)
    lengths = _LENGTHS
    if config.family.positions == "learned":
        lengths = {name: min(n, config.max_positions) for name, n in _LENGTHS.items()}
    data = DataConfig(lengths=lengths, vocabulary=vocabulary_config)
    # The rest is left to the run that starts from here.
    directory.write_config(new, Config(RunConfig(), data, config), only, ["DataConfig.lengths"])


def _maker(
    parts: Sequence[Part],
    shape: tuple[int, ...],
    read: Callable[[Part], np.ndarray],
    bar: tqdm,
) -> Callable[[], np.ndarray]:
    """Makes one parameter from its tensors."""

    def make() -> np.ndarray:
        bar.update(len(parts))
        if parts[0].form == "table":  # the largest parameter, so it is not copied
            return read(parts[0]).astype(np.float32, copy=False)
        parameter = np.empty(shape, np.float32)
        for part in parts:
            part.put(parameter, read(part))
        return parameter

    return make
