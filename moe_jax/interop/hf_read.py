"""Reads a model of `transformers` from its files into a model directory, without PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError, nearest
from moe_jax.data import vocabulary
from moe_jax.interop import hf_config, hf_directory, hf_families, hf_weights
from moe_jax.interop.hf_directory import Weights
from moe_jax.interop.hf_weights import Part
from moe_jax.interop.model_directory import check_parts, write_initial
from moe_jax.model.config import ModelConfig

# In a converted model directory: further content of the Hugging Face directory, for `to-hf`.
ORIGIN = "huggingface"
TENSORS = "tensors.json"  # name -> dtype
UNUSED = "unused.safetensors"


def from_hf(source: str, out: str | Path) -> ModelConfig:
    """Writes a model directory from a Hugging Face directory (or a model's name on the Hub).

    Parameter by parameter: at most one parameter and one tensor are in memory.

    Raises:
        UserError: it is of no family in `hf_families`, a file is missing or damaged, or `out`
            exists.
    """
    out = paths.local(out)
    files.check_new(out)
    directory = hf_directory.find(source)
    config_json = files.read_object(directory / hf_directory.CONFIG)
    weights = Weights(directory)
    names = _names(weights)
    tied = _is_tied(weights, names)
    config = hf_config.read_config(config_json, tied, directory / hf_directory.CONFIG)
    parts = hf_weights.parts(config)
    _check_names(config, weights, names, parts, directory)
    own = vocabulary.read_tokenizers(directory)
    with files.new_directory(out) as new:
        write_initial(
            new, out, config, parts, lambda part: weights.read(names[part.name]), own, directory
        )
        _write_origin(new / ORIGIN, directory, weights, names)
    return config


def _names(weights: Weights) -> dict[str, str]:
    """Canonical name -> name in the files. Some are written with the prefix, some without."""
    return {name.removeprefix("model."): name for name in weights.shapes}


def _is_tied(weights: Weights, names: dict[str, str]) -> bool:
    """Whether embeddings are tied. The files may still contain HEAD, equal to the embedding."""
    for alias in (*hf_weights.ALIASES, hf_weights.HEAD):
        if hf_weights.EMBEDDING not in names and alias in names:
            names[hf_weights.EMBEDDING] = names[alias]
    if hf_weights.EMBEDDING not in names or hf_weights.HEAD not in names:
        return True
    return _equal(weights, names[hf_weights.HEAD], names[hf_weights.EMBEDDING])


def _equal(weights: Weights, name: str, other: str) -> bool:
    return name == other or np.array_equal(weights.read(name), weights.read(other))


def _check_names(
    config: ModelConfig,
    weights: Weights,
    names: dict[str, str],
    parts: Sequence[Part],
    directory: Path,
) -> None:
    """Checks that every tensor exists and has its shape, and that no other tensor has an effect."""
    shapes = {name: weights.shapes[file_name] for name, file_name in names.items()}
    check_parts(config, parts, shapes, directory, "config.json says")
    known = {part.name for part in parts}
    for name in sorted(set(names) - known):
        if name in hf_weights.ALIASES or name == hf_weights.HEAD:
            if not _equal(weights, names[name], names[hf_weights.EMBEDDING]):
                raise UserError(f"{directory}: {names[name]} differs from the shared embedding")
        elif name == hf_weights.ZERO:
            if np.any(weights.read(names[name])):
                raise UserError(f"{directory}: {names[name]} is not zero; our logits have no bias")
        elif name != hf_weights.UNUSED:
            title = hf_families.of_architecture(config.architecture).title
            hint = nearest(name, known)
            raise UserError(f"{directory}: {names[name]} belongs to no {title}{hint}")


def _write_origin(path: Path, directory: Path, weights: Weights, names: dict[str, str]) -> None:
    hf_directory.copy_configs(directory, path)
    files.write_json(path / TENSORS, {name: str(d) for name, d in weights.dtypes.items()})
    unused = [names[n] for n in (hf_weights.ZERO, hf_weights.UNUSED) if n in names]
    save_file({name: weights.read(name) for name in unused}, path / UNUSED)
