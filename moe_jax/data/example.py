"""One prepared example, and its bytes in the cache."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from moe_jax.core.errors import shown


@dataclasses.dataclass(frozen=True)
class Example:
    """One prepared example, not truncated.

    Attributes:
        inputs: int32 [n] token ids, EOS last where the task adds one.
        targets: int32 [m] token ids, EOS last.
        inputs_text: text of the inputs.
        references: the post-processed target, as the task's metrics expect it: usually the list of
            valid outputs.
        choices: texts that the answer is one of; () where any text may be.
        targets_text: text of the targets.
        features: the other features of the row as NumPy values, where SeqIO scores the task.
    """

    inputs: np.ndarray
    targets: np.ndarray
    inputs_text: str
    references: Any
    choices: tuple[str, ...] = ()
    targets_text: str = ""
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The bytes of the example. Raises an OverflowError for an integer beyond 64 bits."""
        record = {
            "inputs": self.inputs.astype("<i4").tobytes(),
            "targets": self.targets.astype("<i4").tobytes(),
            "inputs_text": self.inputs_text,
            "references": self.references,
            "choices": self.choices,
            "targets_text": self.targets_text,
            "features": self.features,
        }
        return msgpack.packb(record, default=_pack_array)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Example":
        record = msgpack.unpackb(data, strict_map_key=False, ext_hook=_unpack_array)
        tokens = {k: np.frombuffer(record.pop(k), "<i4") for k in ("inputs", "targets")}
        return cls(**tokens, **record | {"choices": tuple(record["choices"])})


def _pack_array(value: Any) -> msgpack.ExtType:
    """A NumPy array or scalar for msgpack; arrays of objects hold bytes, or arrays of them."""
    if isinstance(value, int):  # msgpack asks about those of more than 64 bits
        raise OverflowError(f"{shown(value)} has more than 64 bits")
    array = np.asarray(value)
    numeric = array.dtype != object
    content = array.tobytes() if numeric else array.ravel().tolist()
    record = [array.dtype.str if numeric else "", array.shape, content]
    return msgpack.ExtType(0, msgpack.packb(record, default=_pack_array))


def _unpack_array(_: int, data: bytes) -> Any:
    dtype, shape, content = msgpack.unpackb(data, ext_hook=_unpack_array)
    if dtype:
        return np.frombuffer(content, dtype).reshape(shape)[()]
    array = np.empty(len(content), object)
    array[:] = content
    return array.reshape(shape)
