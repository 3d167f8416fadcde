"""Writes a task's plain model as Hugging Face files that `transformers` loads."""

import functools
import json
import operator
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from moe_jax.core import files
from moe_jax.data import vocabulary
from moe_jax.data.vocabulary import TokenizersVocabulary
from moe_jax.interop import hf_config, hf_directory, hf_families, hf_weights
from moe_jax.interop.hf_read import ORIGIN, TENSORS, UNUSED
from moe_jax.interop.hf_weights import Part
from moe_jax.interop.squeeze import plain_model
from moe_jax.model.config import ModelConfig
from moe_jax.model.experts import Params
from moe_jax.runs import directory
from moe_jax.runs.load import read_run


def to_hf(
    checkpoint: str | Path,
    out: str | Path,
    task: str | None = None,
    *,
    average: bool = False,
    approximate: bool = False,
) -> str:
    """Writes the Hugging Face directory of a plain model.

    Args:
        checkpoint: model directory, or one of its checkpoints.
        task: the task whose expert is taken in every routed layer.
        average: takes the mean of the experts' parameters instead, weighted by the task's route, or
            uniform without a task.
        approximate: if the route is soft, takes the expert with the largest weight.

    Returns:
        A line that describes what was written, with the measured error of an approximation.

    Raises:
        UserError: no such run, checkpoint or task; a soft route without `average` or
            `approximate`; a model that `transformers` does not support; or `out` exists.
    """
    files.check_new(out)
    root = directory.root(checkpoint)
    directory.read_run_lines(root)  # or says that there is no run
    own = vocabulary.load_vocabulary(root / vocabulary.DIRECTORY)
    run = read_run(str(checkpoint), own.size)
    dense, plain, how = plain_model(run, task, own, average=average, approximate=approximate)
    said = [f"{out}: {how}"]
    with files.new_directory(out) as new:
        origin = root / ORIGIN
        if origin.is_dir():
            hf_directory.copy_configs(origin, new)
            tensors = _as_they_came(origin, plain, dense)
        else:
            files.write_json(new / hf_directory.CONFIG, hf_config.write_config(dense, own))
            generation = hf_config.generation_config(own)
            files.write_json(new / hf_directory.GENERATION_CONFIG, generation)
            tensors = _tensors(plain, dense)
        hf_directory.write_weights(new, tensors)
        if isinstance(own, TokenizersVocabulary):
            for name, content in own.contents.items():
                files.write_bytes(new / name, content)
        else:
            said.append(
                "no tokenizer was written, since transformers cannot read"
                f" {root / vocabulary.DIRECTORY}"
            )
    return "; ".join(said)


def _tensor(plain: Params, part: Part) -> np.ndarray:
    return part.take(functools.reduce(operator.getitem, part.path.split("/"), plain))


def _tensors(plain: Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values in the form that `transformers` saves."""
    family = hf_families.of_architecture(config.architecture)
    if family.logits_bias:
        yield hf_weights.ZERO, np.zeros((1, config.vocabulary_size), np.float32)
    for part in hf_weights.parts(config):
        yield family.names.prefix + part.name, _tensor(plain, part)


def _as_they_came(
    origin: Path, plain: Params, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors with the names, copies and dtypes of the original Hugging Face directory."""
    parts = {part.name: part for part in hf_weights.parts(config)}
    unused = load_file(origin / UNUSED)
    for name, dtype in json.loads((origin / TENSORS).read_text()).items():
        if name in unused:
            yield name, unused[name]
        else:
            # A tensor without a part is a copy of the embedding.
            part = parts.get(name.removeprefix("model."), parts[hf_weights.EMBEDDING])
            yield name, _tensor(plain, part).astype(dtype)
