"""Makes configuration dataclasses from gin bindings. No other module does.

Libraries get dataclasses and do not use gin. A field is bound by its class (`ModelConfig.experts =
6`), a command's own setting by the command (`eval.split = 'test'`).
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
    """The parameters of a configurable that can be bound; empty if there is no such
    configurable."""
    cls = _CLASSES.get(name)
    return [field.name for field in dataclasses.fields(cls)] if cls else []


def classes() -> dict[str, type]:
    """Every configuration class by its name in gin."""
    return dict(_CLASSES)


def name_of(cls: type) -> str:
    """The name of a registered class in gin."""
    return next(name for name, known in _CLASSES.items() if known is cls)


def build(cls: type[T]) -> T:
    """Makes a dataclass from gin's bindings, and recursively its fields that are dataclasses.

    Raises:
        UserError: a value is invalid.
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
        # Gin makes a subclass. An instance of the class itself equals one made without gin.
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
    """Converts an instance made by a reference such as `@VocabularyConfig()` to the class
    itself."""
    for cls in _CLASSES.values():
        if isinstance(value, cls) and type(value) is not cls:
            return cls(**{f.name: getattr(value, f.name) for f in dataclasses.fields(cls)})
    return value
