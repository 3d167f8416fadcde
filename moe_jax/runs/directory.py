"""What a model directory says about its run: its configuration and its task table."""

import ast
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.core import files
from moe_jax.core.errors import UserError
from moe_jax.data import vocabulary
from moe_jax.runs.config import BASE_BINDINGS

CONFIG = "config.gin"
TASK_TABLE = "task_table.json"

# What may differ when a run goes on: it changes neither the model nor its training.
_FREE = re.compile(
    r"RunConfig\.(model_dir|eval_\w+|checkpoint_period|keep_checkpoints|\w+_checkpoint_path)"
    r"|DataConfig\.cache_dir|MeshConfig\.\w+"
)
_MACROS = dict(re.findall(r"^(\w+\.\w+) = %(\w+)$", BASE_BINDINGS, re.M))


def root(path: str | Path) -> Path:
    """The model directory of `path`, which may name its checkpoints or one of them."""
    path = Path(path).absolute()
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return path.parents[1]
    return path.parent if path.name == "checkpoints" else path


def config_lines(configs: Sequence[Any], defaults: bool = False) -> dict[str, str]:
    """Every setting of a run, as `ModelConfig.d_model` -> `64`; or the defaults of all of them."""
    lines = {}
    for config in configs:
        for field in dataclasses.fields(config):
            value = _default(field) if defaults else getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                lines |= config_lines([value], defaults)
                text = f"@{type(value).__name__}()"
            else:
                text = repr(dict(value) if hasattr(value, "items") else value)
            lines[f"{type(config).__name__}.{field.name}"] = text
    return lines


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def write_config(model_dir: str | Path, configs: Sequence[Any]) -> None:
    """Writes config.gin, which says the whole configuration and can be given as --gin_file."""
    macros, bindings = [], []
    for binding, value in config_lines(configs).items():
        if binding in _MACROS:
            macros.append(f"{_MACROS[binding]} = {value}\n")
        else:
            bindings.append(f"{binding} = {value}\n")
    files.write_text(Path(model_dir) / CONFIG, "".join([*macros, "\n", *bindings]))


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """The configuration of a run: class name -> configuration, such as `ModelConfig`.

    Raises:
        UserError: there is no run, or its config.gin was edited beyond recognition.
    """
    from moe_jax.runs.configurables import RUN_CONFIGS

    lines = _read_lines(model_dir)
    if not lines:
        raise UserError(f"{model_dir} holds no run: it has no {CONFIG}")
    configs: dict[str, Any] = {}
    for cls in reversed(RUN_CONFIGS):  # nested ones come later in RUN_CONFIGS
        values = {}
        for field in dataclasses.fields(cls):
            text = lines.get(f"{cls.__name__}.{field.name}")
            if text is None:
                continue
            reference = re.fullmatch(r"@(\w+)\(\)", text)
            try:
                values[field.name] = configs[reference[1]] if reference else ast.literal_eval(text)
            except (ValueError, SyntaxError, KeyError) as e:
                raise UserError(
                    f"{model_dir}/{CONFIG}: {cls.__name__}.{field.name} is no plain value: {text}"
                ) from e
        configs[cls.__name__] = cls(**values)
    return configs


def _read_lines(model_dir: str | Path) -> dict[str, str]:
    path = Path(model_dir) / CONFIG
    if not path.exists():
        return {}
    names = {macro: binding for binding, macro in _MACROS.items()}
    lines = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition(" = ")
        if equals:
            lines[names.get(name, name)] = value
    return lines


def check_config(model_dir: str | Path, configs: Sequence[Any]) -> None:
    """Refuses to go on in a directory that holds another configuration's run.

    A setting that was not there yet when the run began had its default.

    Raises:
        UserError: naming the first setting that differs.
    """
    old = _read_lines(model_dir)
    if not old:
        return
    old = config_lines(configs, defaults=True) | old
    for name, value in config_lines(configs).items():
        if not _FREE.fullmatch(name) and old[name] != value:
            raise UserError(
                f"{model_dir} holds another run: there {_MACROS.get(name, name)} is "
                f"{old[name]}, here {value}; give another MODEL_DIR"
            )


def copy_vocabulary(model_dir: str | Path, source: Path) -> None:
    """Copies the prepared vocabulary, so that the model can be used without the cache."""
    directory = Path(model_dir) / vocabulary.DIRECTORY
    for path in sorted(source.iterdir(), key=lambda path: path.name == vocabulary.FILE):
        if not (directory / path.name).exists():
            files.write_bytes(directory / path.name, path.read_bytes())


def write_task_table(model_dir: str | Path, tasks: Sequence[str]) -> None:
    """Writes the ordered task names; the index is the `task_id`."""
    files.write_json(Path(model_dir) / TASK_TABLE, {"tasks": list(tasks)})


def read_task_table(model_dir: str | Path) -> list[str]:
    """The ordered task names of a run."""
    return files.read_json(Path(model_dir) / TASK_TABLE)["tasks"]
