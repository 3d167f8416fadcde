"""Reads BART or T5 1.1 from Hugging Face files into a model directory, without PyTorch."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from moe_jax import files, run_dir
from moe_jax.data import vocabulary
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.errors import UserError, nearest
from moe_jax.hf import config as hf_config
from moe_jax.hf import directory as hf_directory
from moe_jax.hf import weights as hf_weights
from moe_jax.hf.directory import Weights
from moe_jax.hf.streaming import Promise, save_params
from moe_jax.hf.weights import Part
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.moe import TaskMoE

# Of a converted model directory: what a Hugging Face directory holds besides, for the way back.
ORIGIN = "huggingface"
TENSORS = "tensors.json"  # name -> dtype
UNUSED = "unused.safetensors"
_LENGTHS = {"inputs": 512, "targets": 64}  # a run may choose others


def from_hf(source: str, out: str | Path) -> ModelConfig:
    """Writes a model directory from a Hugging Face directory (or a model's name on the Hub).

    Parameter by parameter: at most one of ours and one tensor of theirs are in memory.

    Raises:
        UserError: it is neither BART nor T5 1.1, a file is missing or damaged, or `out` exists.
    """
    out = Path(out)
    files.check_new(out)
    directory = hf_directory.find(source)
    config_json = files.read_json(directory / hf_directory.CONFIG)
    weights = Weights(directory)
    names = _names(weights)
    tied = _is_tied(weights, names)
    config = hf_config.read_config(config_json, tied, directory / hf_directory.CONFIG)
    parts = hf_weights.parts(config)
    shapes = TaskMoE(config, RouterConfig(), 0).shapes()
    _check_names(weights, names, parts, shapes, directory)
    own = vocabulary.read_tokenizers(directory)
    if own.size > config.vocabulary_size:
        raise UserError(
            f"{directory}: the tokenizer has {own.size} tokens, the model {config.vocabulary_size}"
        )
    with files.new_directory(out) as new:
        bar = tqdm(total=len(parts), desc=f"read {directory.name}", unit=" tensors", disable=None)
        params: dict[str, Any] = {}
        for path, group in itertools.groupby(parts, lambda part: part.path):
            *parents, leaf = f"backbone/{path}".split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            shape = tuple(shapes[f"backbone/{path}"])
            node[leaf] = Promise(shape, _reader(weights, names, list(group), shape, bar))
        meta = {"tasks": [], "step": 0, "shapes": shapes}
        save_params(new, 0, params, meta)
        bar.close()
        run_dir.write_task_table(new, [])
        vocabulary.write_vocabulary(new / vocabulary.DIRECTORY, own.settings, own.contents)
        _write_config(new, config, VocabularyConfig(kind="tokenizers", path=os.path.abspath(out)))
        _write_origin(new / ORIGIN, directory, weights, names)
    return config


def _names(weights: Weights) -> dict[str, str]:
    """Canonical name -> name in the files. Some are written with the prefix, some without."""
    return {name.removeprefix("model."): name for name in weights.shapes}


def _is_tied(weights: Weights, names: dict[str, str]) -> bool:
    """Whether logits are made with the input embedding, which HEAD may repeat."""
    for alias in (*hf_weights.ALIASES, hf_weights.HEAD):
        if hf_weights.EMBEDDING not in names and alias in names:
            names[hf_weights.EMBEDDING] = names[alias]
    if hf_weights.EMBEDDING not in names or hf_weights.HEAD not in names:
        return True
    return _equal(weights, names[hf_weights.HEAD], names[hf_weights.EMBEDDING])


def _equal(weights: Weights, name: str, other: str) -> bool:
    return name == other or np.array_equal(weights.read(name), weights.read(other))


def _check_names(
    weights: Weights,
    names: dict[str, str],
    parts: Sequence[Part],
    shapes: dict[str, list[int]],
    directory: Path,
) -> None:
    """Every tensor is there, has its shape, and none is left over that does something."""
    for part in parts:
        if part.name not in names:
            raise UserError(f"{directory}: the weights have no {part.name}")
        wanted = part.shape(tuple(shapes[f"backbone/{part.path}"]))
        if weights.shapes[names[part.name]] != wanted:
            raise UserError(
                f"{directory}: {names[part.name]} has shape"
                f" {list(weights.shapes[names[part.name]])}, config.json says {list(wanted)}"
            )
    known = {part.name for part in parts}
    for name in sorted(set(names) - known):
        if name in hf_weights.ALIASES or name == hf_weights.HEAD:
            if not _equal(weights, names[name], names[hf_weights.EMBEDDING]):
                raise UserError(f"{directory}: {names[name]} differs from the shared embedding")
        elif name == hf_weights.ZERO:
            if np.any(weights.read(names[name])):
                raise UserError(f"{directory}: {names[name]} is not zero; our logits have no bias")
        elif name != hf_weights.UNUSED:
            hint = nearest(name, known)
            raise UserError(f"{directory}: {names[name]} belongs to no BART or T5 1.1{hint}")


def _reader(
    weights: Weights, names: dict[str, str], parts: list[Part], shape: tuple[int, ...], bar: tqdm
) -> Callable[[], np.ndarray]:
    """Makes one parameter from its tensors."""

    def make() -> np.ndarray:
        bar.update(len(parts))
        if parts[0].form == "table":  # the largest of all: not copied
            return weights.read(names[parts[0].name]).astype(np.float32, copy=False)
        parameter = np.empty(shape, np.float32)
        for part in parts:
            part.put(parameter, weights.read(names[part.name]))
        return parameter

    return make


def _write_config(path: Path, config: ModelConfig, own: VocabularyConfig) -> None:
    """A config.gin that says the model and its tokenizer, to be given to `train` as --gin_file."""
    lines = {
        "TASK_FEATURE_LENGTHS": _LENGTHS,
        "DataConfig.vocabulary": f"@{VocabularyConfig.__name__}()",
        **run_dir.config_lines([own, config]),
    }
    text = "".join(f"{name} = {value}\n" for name, value in lines.items())
    files.write_text(path / run_dir.CONFIG, text)


def _write_origin(path: Path, directory: Path, weights: Weights, names: dict[str, str]) -> None:
    for name in hf_directory.CONFIGS:
        if (directory / name).is_file():
            files.write_bytes(path / name, (directory / name).read_bytes())
    files.write_json(path / TENSORS, {name: str(d) for name, d in weights.dtypes.items()})
    unused = [names[n] for n in (hf_weights.ZERO, hf_weights.UNUSED) if n in names]
    save_file({name: weights.read(name) for name in unused}, path / UNUSED)
