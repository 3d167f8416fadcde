"""Makes configuration dataclasses from gin bindings. No other module does.

Libraries get dataclasses and do not use gin. A field is bound by its class (`ModelConfig.experts =
6`), a command's own setting by the command (`eval.split = 'test'`).
"""

import copy
import dataclasses
from typing import Any, TypeVar

import gin

from moe_jax.core.configuration import Configuration, hints
from moe_jax.core.errors import UserError, first_line
from moe_jax.core.sharding import MeshConfig
from moe_jax.data.vocabulary import VocabularyConfig
from moe_jax.decoding.search import DecodingConfig
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.runs.config import BASE_BINDINGS, NAMES_MODULES, DataConfig, FinetuneConfig, RunConfig
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig

T = TypeVar("T", bound=Configuration)
CLASSES: dict[str, type[Configuration]] = {}  # by the name in gin


def register(cls: type[Configuration]) -> None:
    """Makes a configuration known to gin."""
    if cls.called not in CLASSES:
        gin.external_configurable(cls, name=cls.called, module="moe_jax")
        CLASSES[cls.called] = cls


for _cls in (
    RunConfig, DataConfig, VocabularyConfig, ModelConfig, RouterConfig, OptimizerConfig, StepConfig,
    MeshConfig, DecodingConfig, FinetuneConfig,
):  # fmt: skip
    register(_cls)


def bind_defaults() -> None:
    """Binds the macros that every command has, and the settings that read them."""
    gin.parse_config(BASE_BINDINGS)


def parameters(name: str) -> list[str]:
    """The parameters of a configurable that can be bound; empty if there is no such
    configurable."""
    cls = CLASSES.get(name)
    return [field.name for field in dataclasses.fields(cls)] if cls else []


def modules() -> list[str]:
    """The modules, and 'module:function', that gin's bindings name."""
    names: list[str] = []
    for setting in NAMES_MODULES:
        try:
            value = copy.deepcopy(gin.query_parameter(setting))  # which reads macros
        except (ValueError, TypeError):  # not bound, or to what is not
            continue
        names += value if isinstance(value, list | tuple) else [value]
    return names


def build(cls: type[T]) -> T:
    """The configuration as gin's bindings have it; fields that are ones are built likewise.

    Raises:
        UserError: a value is invalid.
    """
    name = cls.called if cls.called in CLASSES else None
    values: dict[str, Any] = {}
    for field, hint in hints(cls).items():
        if dataclasses.is_dataclass(hint) and not _is_bound(name, field):
            values[field] = build(hint)
    if name is not None:
        try:
            made = gin.get_configurable(name)(**values)
        except RecursionError as e:  # @DataConfig() somewhere in DataConfig
            raise UserError(f"{name} is nested in itself") from e
        except UserError as e:  # to which gin adds from where it was called
            raise UserError(first_line(e)) from e
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
    """Converts an instance made by a reference such as `@VocabularyConfig()` to the class
    itself."""
    for cls in CLASSES.values():
        if isinstance(value, cls) and type(value) is not cls:
            return cls(**{f.name: getattr(value, f.name) for f in dataclasses.fields(cls)})
    return value
