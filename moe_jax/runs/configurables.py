"""From gin bindings to dataclasses: the one place where a configuration is made.

Below the commands, nothing knows gin: they are given dataclasses. Each class can be bound by its
name (`ModelConfig.experts = 6`); a command's own settings by the command's (`eval.split = 'test'`).
"""

import dataclasses
import typing
from typing import Any, TypeVar

import gin

from moe_jax.core.sharding import MeshConfig
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.decoding.search import DecodingConfig
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.runs.config import DataConfig, FinetuneConfig, RunConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

T = TypeVar("T")
# Name in gin -> class.
_CLASSES: dict[str, type] = {}


def register(cls: type, name: str | None = None) -> None:
    """Makes a dataclass known to gin as `name`, by default its own."""
    name = name or cls.__name__
    if name not in _CLASSES:
        gin.external_configurable(cls, name=name, module="moe_jax")
        _CLASSES[name] = cls


for _cls in (
    RunConfig, DataConfig, VocabularyConfig, ModelConfig, RouterConfig, OptimizerConfig, StepConfig,
    MeshConfig, DecodingConfig, FinetuneConfig,
):  # fmt: skip
    register(_cls)


def parameters(name: str) -> list[str]:
    """What can be bound of a configurable; nothing where there is none of this name."""
    cls = _CLASSES.get(name)
    return [field.name for field in dataclasses.fields(cls)] if cls else []


def classes() -> dict[str, type]:
    """Every configuration class by its name in gin."""
    return dict(_CLASSES)


def name_of(cls: type) -> str:
    """What gin calls a registered class."""
    return next(name for name, known in _CLASSES.items() if known is cls)


def build(cls: type[T]) -> T:
    """The dataclass as gin's bindings have it; fields that are dataclasses are built likewise.

    Raises:
        UserError: a value that cannot be.
    """
    hints = typing.get_type_hints(cls)
    name = next((name for name, known in _CLASSES.items() if known is cls), None)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner) and not _is_bound(name, field.name):
            values[field.name] = build(inner)
    if name is not None:
        made = gin.get_configurable(name)(**values)
        # Gin makes a subclass: an instance of the class itself is equal to one made without gin.
        values = {field.name: getattr(made, field.name) for field in dataclasses.fields(cls)}
        values = {key: _plain(value) for key, value in values.items()}
    return cls(**values)


def _is_bound(name: str | None, field: str) -> bool:
    if name is None:
        return False
    try:
        gin.query_parameter(f"{name}.{field}")
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    """An instance that a reference such as `@VocabularyConfig()` made, of the class itself."""
    for cls in _CLASSES.values():
        if isinstance(value, cls) and type(value) is not cls:
            return cls(**{f.name: getattr(value, f.name) for f in dataclasses.fields(cls)})
    return value
