"""Reads the files of a T5X checkpoint, one array at a time.

T5X's published layout is a directory with a msgpack file of Flax, and with a zarr array for every
parameter that the file only refers to:

    checkpoint_1000000/checkpoint: {version, optimizer: {target: parameters, state: ...}}
    checkpoint_1000000/target.encoder.layers_0.attention.query.kernel/{.zarray,0.0}

Today T5X writes all arrays by Orbax into one OCDBT database, under the same names:

    checkpoint_1000000/state/{manifest.ocdbt,d/,...}: target.encoder...kernel/{.zarray,0.0}

At most one parameter is in memory at a time, and never the optimizer's state.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16
import msgpack
import numpy as np
import tensorstore
from flax import serialization

from moe_jax.core.errors import UserError, nearest

FILE = "checkpoint"
# Where Orbax writes, and the file by which its database is known.
STATE, _DATABASE = "state", "manifest.ocdbt"
_TARGET, _METADATA = "target.", "/.zarray"
# Names of arrays in a module; all other entries of `target` are modules.
_LEAVES = ("kernel", "scale", "embedding", "rel_embedding")
_REFERENCE = "PLACEHOLDER://"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Checkpoint:
    """The parameters of a T5X checkpoint, by name: `encoder/encoder_norm/scale`.

    Attributes:
        directory: the directory of the checkpoint.
        shapes: name -> shape.

    Raises:
        UserError: there is no checkpoint, or one of its files is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        # For arrays in FILE, the first and last byte; for others, TensorStore's key-value store.
        self._places: dict[str, tuple[int, int] | dict[str, Any]] = {}
        if (directory / FILE).is_file():
            self._find_published()
        elif (directory / STATE / _DATABASE).is_file():
            self._find_orbax()
        else:
            steps = [path.name for path in directory.glob(f"{FILE}_*")]
            raise UserError(
                f"{directory} is not a T5X checkpoint: it has no file {FILE!r} nor"
                f" {STATE}/{_DATABASE}{nearest(FILE, steps)}"
            )

    def _find_published(self) -> None:
        try:
            with open(self.directory / FILE, "rb") as f:
                unpacker = msgpack.Unpacker(f, max_buffer_size=0, strict_map_key=False)
                places = list(_target(unpacker))
        except (ValueError, msgpack.UnpackException, OSError) as e:
            raise self._unreadable(FILE, e) from e
        if not places:
            raise UserError(f"{self.directory / FILE} holds no parameters: it has no 'target'")
        for name, place in places:
            value = self._value(name, place)
            if isinstance(value, np.ndarray):
                self._add(name, place, value.shape, value.dtype)
            else:
                path = self.directory / self._referred(name, value)
                self._add_stored(name, {"driver": "file", "path": str(path)})

    def _find_orbax(self) -> None:
        base = {"driver": "file", "path": f"{(self.directory / STATE).absolute()}/"}
        store = {"driver": "ocdbt", "base": base}
        try:
            keys = tensorstore.KvStore.open(store).result().list().result()
        except ValueError as e:
            raise self._unreadable(f"{STATE}/{_DATABASE}", e) from e
        for key in sorted(map(bytes.decode, keys)):
            if key.startswith(_TARGET) and key.endswith(_METADATA):
                path = key.removesuffix(_METADATA)
                name = path.removeprefix(_TARGET).replace(".", "/")
                self._add_stored(name, {**store, "path": f"{path}/"})
        if not self._places:
            raise UserError(f"{self.directory / STATE} holds no parameters: it has no 'target'")

    def _add_stored(self, name: str, store: dict[str, Any]) -> None:
        self._places[name] = store
        array = self._open(name)
        self._add(name, store, array.shape, array.dtype.numpy_dtype)

    def _add(self, name: str, place: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if dtype.name not in _DTYPES:
            raise UserError(
                f"{self.directory}: {name} has dtype {dtype.name}, not one of {', '.join(_DTYPES)}"
            )
        self._places[name] = place
        self.shapes[name] = tuple(shape)

    def read(self, name: str) -> np.ndarray:
        """One array, in its stored dtype."""
        place = self._places[name]
        if isinstance(place, tuple):
            return self._value(name, place)
        try:
            return self._open(name).read().result()
        except ValueError as e:
            raise self._unreadable(name, e) from e

    def _value(self, name: str, place: tuple[int, int]) -> Any:
        """The value that FILE holds at this place."""
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
            "kvstore": self._places[name],
            "fill_missing_data_reads": False,  # otherwise a missing chunk would be read as zeros
        }
        try:
            return tensorstore.open(spec, open=True, read=True).result()
        except ValueError as e:
            raise self._unreadable(name, e) from e

    def _referred(self, name: str, value: Any) -> PurePosixPath:
        """The directory, inside the checkpoint's, to which FILE refers for an array."""
        match value:
            case str() if value.startswith(_REFERENCE):
                path = value.removeprefix(_REFERENCE)
            # TensorStore's specification. Older ones have the path outside `kvstore`.
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
    """(name, first byte, end) of every array in the `target` of the next map."""
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
    """The same for a module whose header has been read."""
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
    """Number of entries of the next map; None if the next value is not a map (then nothing is
    read)."""
    try:
        return unpacker.read_map_header()
    except ValueError:
        return None
