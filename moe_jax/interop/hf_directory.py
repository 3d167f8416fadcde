"""Reads and writes the weights of a Hugging Face directory (safetensors), a tensor at a time."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError, first_line, shown
from moe_jax.data.tokenizer_files import CONFIG, GENERATION_CONFIG

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# The files that are downloaded from the Hub.
_WANTED = ["*.json", "*.safetensors", "*.model", "merges.txt"]


def find(name: str) -> Path:
    """The directory `name`, or that of the Hub's model `name`, downloaded if needed.

    Raises:
        UserError: there is neither a directory nor such a model.
    """
    path = paths.local(name)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is not a directory")
    import huggingface_hub  # importing it takes a second, and most calls do not need it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED))
    except Exception as e:  # many types, all for a failed download
        reason = first_line(e)
        raise UserError(f"{name} is not a directory, and the Hub gave none: {reason}") from e


def copy_configs(source: Path, target: Path) -> None:
    """Copies the files of settings that a directory has."""
    for name in (CONFIG, GENERATION_CONFIG):
        if (source / name).is_file():
            files.write_bytes(target / name, (source / name).read_bytes())


class Weights:
    """The tensors of a directory, by name.

    Attributes:
        dtypes: name -> dtype.
        shapes: name -> shape.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self._files: dict[str, Path] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(directory):
            try:
                with safe_open(path, framework="numpy") as f:
                    for name in f.keys():  # noqa: SIM118  it is not a mapping
                        part = f.get_slice(name)
                        self._files[name] = path
                        self.dtypes[name] = _dtype(part.get_dtype(), path, name)
                        self.shapes[name] = tuple(part.get_shape())
            except (SafetensorError, OSError) as e:
                raise UserError(f"cannot read {path}: {first_line(e)}") from e

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        The file is opened for each tensor. An open file stays mapped, and the parts read would
        count as this process's memory.
        """
        with safe_open(self._files[name], framework="numpy") as f:
            return f.get_tensor(name)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        weight_map = files.read_object(directory / INDEX).get("weight_map")
        values = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not values or not all(isinstance(name, str) for name in values):
            raise UserError(f'{directory / INDEX}: must be {{"weight_map": {{tensor: file}}}}')
        names, own = sorted(set(values)), {path.name for path in directory.iterdir()}
        missing = [name for name in names if name not in own]
        if missing:
            raise UserError(f"{directory} has no {shown(missing[0])}, which {INDEX} names")
        return [directory / name for name in names]
    if not (directory / SINGLE).is_file():
        raise UserError(
            f"{directory} has neither {SINGLE} nor {INDEX}; a model in PyTorch's own format is"
            " rewritten by transformers' save_pretrained"
        )
    return [directory / SINGLE]


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _dtype(code: str, path: Path, name: str) -> np.dtype:
    if code not in _DTYPES:
        raise UserError(f"{path}: {name} has dtype {code}, not one of {', '.join(_DTYPES)}")
    return np.dtype(_DTYPES[code])


def write_weights(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes tensors as `model.safetensors`, or as shards of SHARD_BYTES with an index.

    Args:
        tensors: (name, value); only the tensors of one shard are in memory at a time.
    """
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        save_file(waiting, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, value in tensors:
        value = np.ascontiguousarray(value)
        if waiting and sum(v.nbytes for v in waiting.values()) + value.nbytes > SHARD_BYTES:
            write()
        waiting[name] = value
        total += value.nbytes
    write()
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return
    weight_map: dict[str, Any] = {}
    for i, names in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}").rename(directory / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_json(directory / INDEX, index)
