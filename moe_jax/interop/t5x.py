"""Reads T5 1.1 (also Flan-T5, mT5) from a T5X checkpoint into a model directory.

T5X's published layout is a directory with a msgpack file of Flax, and with a zarr array for every
parameter that the file only refers to:

    checkpoint_1000000/checkpoint: {version, optimizer: {target: parameters, state: ...}}
    checkpoint_1000000/target.encoder.layers_0.attention.query.kernel/{.zarray,0.0}

Neither the optimizer's state nor a second parameter is in memory while one is read.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16
import msgpack
import numpy as np
import tensorstore
from flax import serialization

from moe_jax.core import files
from moe_jax.core.errors import UserError, nearest
from moe_jax.data import tokenizer_files, vocabulary
from moe_jax.data.vocabulary import TokenizersVocabulary
from moe_jax.interop import hf_config, hf_directory, hf_weights
from moe_jax.interop.hf_weights import Part
from moe_jax.interop.initial import check_parts, write_initial
from moe_jax.model.config import ModelConfig

FILE = "checkpoint"
_EMBEDDING = "token_embedder/embedding"
_HEAD = "decoder/logits_dense/kernel"
_RELATIVE = "relpos_bias/rel_embedding"
# What an array is called in its module; all else in `target` are modules.
_LEAVES = ("kernel", "scale", "embedding", "rel_embedding")
_REFERENCE = "PLACEHOLDER://"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def from_t5x(source: str, out: str | Path, sentencepiece: str | None = None) -> ModelConfig:
    """Writes a model directory from a T5X checkpoint, parameter by parameter.

    Sizes are those of the parameters. The rest is what T5X's own models have: distances up to
    128, gated GELU, and, where there is no output embedding, logits with the input's, scaled.

    Args:
        source: directory with a file `checkpoint`.
        sentencepiece: the model's tokenizer, which checkpoints do not hold; None: none is written.

    Raises:
        UserError: it is no T5 1.1, a file is missing or damaged, or `out` exists.
    """
    out = Path(out)
    files.check_new(out)
    own = None if sentencepiece is None else _read_vocabulary(Path(sentencepiece))
    checkpoint = Checkpoint(Path(source))
    config = read_config(checkpoint.shapes, checkpoint.directory)
    wanted = parts(config)
    check_parts(config, wanted, checkpoint.shapes, checkpoint.directory, "the others say")
    known = {part.name for part in wanted}
    others = sorted(checkpoint.shapes.keys() - known)
    if others:
        hint = nearest(others[0], known)
        raise UserError(f"{checkpoint.directory}: {others[0]} belongs to no T5 1.1{hint}")
    with files.new_directory(out) as new:
        write_initial(
            new, out, config, wanted, lambda part: checkpoint.read(part.name), own, Path(source)
        )
    return config


def _read_vocabulary(path: Path) -> TokenizersVocabulary:
    """What `transformers` makes of a T5's SentencePiece model."""
    plain = vocabulary.read_sentencepiece(path)
    # Files for T5X (`cc_all.32000.100extra`) have the sentinels, those for `transformers` do not.
    extra_ids = 0 if len(plain.encode("<extra_id_0>")) <= 2 else 100
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files.write_json(directory / hf_directory.CONFIG, {"model_type": "t5"})
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids}
        files.write_json(directory / tokenizer_files.SETTINGS, settings)
        files.write_bytes(directory / tokenizer_files.SENTENCEPIECE, path.read_bytes())
        return vocabulary.read_tokenizers(directory)


# ---- names and sizes ----

_NORMS = {
    "encoder": ["attention", "mlp"],
    "decoder": ["self_attention", "cross_attention", "mlp"],
}
_ATTENTIONS = {
    "encoder": ["attention"],
    "decoder": ["self_attention", "encoder_decoder_attention"],
}
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def parts(config: ModelConfig) -> list[Part]:
    """All tensors of a dense T5 1.1 as T5X names and orients them, grouped by parameter."""
    found = []
    for part in hf_weights.parts(config):
        name, form = _name(part.name), part.form
        if name == _HEAD:
            form = "table"
        elif name.endswith(_RELATIVE):
            form = "kernel"  # [heads, buckets] there
        elif form == "kernel":
            form = "matrix"
        found.append(part._replace(name=name, form=form))
    return found


def _name(name: str) -> str:
    """T5X's name of what `transformers` calls `name`."""
    match name.split("."):
        case ["shared", _]:
            return _EMBEDDING
        case ["lm_head", _]:
            return _HEAD
        case [side, "final_layer_norm", _]:
            return f"{side}/{side}_norm/scale"
        case [side, *_, "relative_attention_bias", _]:
            return f"{side}/{_RELATIVE}"
        case [side, _, layer, _, i, "layer_norm", _]:
            return f"{side}/layers_{layer}/pre_{_NORMS[side][int(i)]}_layer_norm/scale"
        case [side, _, layer, _, _, "DenseReluDense", which, _]:
            return f"{side}/layers_{layer}/mlp/{which}/kernel"
        case [side, _, layer, _, i, _, which, _]:
            attention = _ATTENTIONS[side][int(i)]
            return f"{side}/layers_{layer}/{attention}/{_PROJECTIONS[which]}/kernel"
    raise ValueError(name)


def read_config(shapes: dict[str, tuple[int, ...]], source: Path) -> ModelConfig:
    """The dense model that has parameters of these shapes.

    Args:
        shapes: name -> shape.
        source: named in errors.

    Raises:
        UserError: a parameter is missing that tells a size, or it is a known other model.
    """
    if any(name.startswith(("encoder/encoder/", "decoder/decoder/")) for name in shapes):
        raise UserError(
            f"{source}: its layers are stacked (scan_layers); such models have position biases of"
            " their own in every layer, unlike T5 1.1, and cannot be read"
        )
    if "encoder/layers_0/mlp/wi/kernel" in shapes:
        raise UserError(
            f"{source}: its feed-forward is not gated, as in T5 1.0; only T5 1.1 can be read"
        )

    def sizes(name: str) -> tuple[int, int]:
        shape = shapes.get(name)
        if shape is None:
            raise UserError(f"{source}: the weights have no {name}{nearest(name, shapes)}")
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{source}: {name} has shape {list(shape)}, it is no matrix")
        return shape

    def depth(side: str) -> int:
        layers = (re.match(rf"{side}/layers_(\d+)/", name) for name in shapes)
        return len({layer[1] for layer in layers if layer})

    vocabulary_size, d_model = sizes(_EMBEDDING)
    heads, buckets = sizes(f"encoder/{_RELATIVE}")
    tied = _HEAD not in shapes
    settings = {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": vocabulary_size,
        "d_model": d_model,
        "d_kv": sizes("encoder/layers_0/attention/query/kernel")[1] // heads,
        "d_ff": sizes("encoder/layers_0/mlp/wi_0/kernel")[1],
        "num_heads": heads,
        "num_layers": depth("encoder"),
        "num_decoder_layers": depth("decoder"),
        "relative_attention_num_buckets": buckets,
        "scale_decoder_outputs": tied,
    }
    return hf_config.read_config(settings, tied, source)


# ---- files ----


class Checkpoint:
    """The parameters of a T5X checkpoint, by name: `encoder/encoder_norm/scale`.

    Attributes:
        directory: that holds it.
        shapes: name -> shape.

    Raises:
        UserError: there is none, or one of its files is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Of arrays in FILE, the bytes from and to; of others, the zarr array's directory.
        self._places: dict[str, tuple[int, int] | Path] = {}
        if not (directory / FILE).is_file():
            steps = [path.name for path in directory.glob(f"{FILE}_*")]
            raise UserError(
                f"{directory} is no T5X checkpoint: it has no file {FILE!r}{nearest(FILE, steps)}"
            )
        try:
            with open(directory / FILE, "rb") as f:
                unpacker = msgpack.Unpacker(f, max_buffer_size=0, strict_map_key=False)
                places = list(_target(unpacker))
        except (ValueError, msgpack.UnpackException, OSError) as e:
            raise self._unreadable(FILE, e) from e
        if not places:
            raise UserError(f"{directory / FILE} holds no parameters: it has no 'target'")
        for name, place in places:
            value = self._value(name, place)
            if isinstance(value, np.ndarray):
                self._places[name] = place
                shape, dtype = value.shape, value.dtype
            else:
                self._places[name] = self.directory / self._referred(name, value)
                store = self._open(name)
                shape, dtype = store.shape, store.dtype.numpy_dtype
            if dtype.name not in _DTYPES:
                raise UserError(
                    f"{directory}: {name} has dtype {dtype.name}, not one of {', '.join(_DTYPES)}"
                )
            self.shapes[name] = tuple(shape)

    def read(self, name: str) -> np.ndarray:
        """One array, in the dtype that it has there."""
        place = self._places[name]
        if isinstance(place, tuple):
            return self._value(name, place)
        try:
            return self._open(name).read().result()
        except ValueError as e:
            raise self._unreadable(name, e) from e

    def _value(self, name: str, place: tuple[int, int]) -> Any:
        """What FILE holds there."""
        start, end = place
        with open(self.directory / FILE, "rb") as f:
            f.seek(start)
            try:
                return serialization.msgpack_restore(f.read(end - start))
            except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
                raise self._unreadable(name, e) from e

    def _open(self, name: str) -> tensorstore.TensorStore:
        """The zarr array. Its metadata is read from its own file, which the reference repeats."""
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(self._places[name])},
            "fill_missing_data_reads": False,  # a chunk that is missing would read as zeros
        }
        try:
            return tensorstore.open(spec, open=True, read=True).result()
        except ValueError as e:
            raise self._unreadable(name, e) from e

    def _referred(self, name: str, value: Any) -> PurePosixPath:
        """The directory, within the checkpoint's, that stands in place of an array."""
        match value:
            case str() if value.startswith(_REFERENCE):
                path = value.removeprefix(_REFERENCE)
            # TensorStore's specification; older ones have the path outside `kvstore`.
            case {"driver": "zarr", "kvstore": {"path": str(path)}}:
                pass
            case {"driver": "zarr", "path": str(path)}:
                pass
            case _:
                raise UserError(
                    f"{self.directory / FILE}: {name} is neither an array nor refers to one"
                )
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(
                f"{self.directory / FILE}: {name} refers to {path}, out of the directory"
            )
        return relative

    def _unreadable(self, name: str, error: Exception) -> UserError:
        # TensorStore: 'NOT_FOUND: Error ... [tensorstore_spec=...]'.
        reason = str(error).strip().partition(" [")[0] or type(error).__name__
        return UserError(f"{self.directory}: cannot read {name}: {reason.splitlines()[0]}")


def _target(unpacker: msgpack.Unpacker) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, and first byte and end, of every array in the `target` of the map that comes next."""
    for _ in range(unpacker.read_map_header()):
        match unpacker.unpack():
            case "target":
                yield from _arrays(unpacker, unpacker.read_map_header(), ())
            case "optimizer":
                yield from _target(unpacker)
            case _:
                unpacker.skip()


def _arrays(
    unpacker: msgpack.Unpacker, entries: int, parents: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """The same of a module, of which the header has been read."""
    for _ in range(entries):
        path = (*parents, str(unpacker.unpack()))
        start = unpacker.tell()
        inner = None if path[-1] in _LEAVES else _header(unpacker)
        if inner is None:
            unpacker.skip()
            yield "/".join(path), (start, unpacker.tell())
        else:
            yield from _arrays(unpacker, inner, path)


def _header(unpacker: msgpack.Unpacker) -> int | None:
    """Number of entries of the map that comes next; None, and nothing read, if it is no map."""
    try:
        return unpacker.read_map_header()
    except ValueError:
        return None
