"""The files of a run's directory: configuration, origin, task table, vocabulary.

The configuration is written twice: `config.json` for programs, `config.gin` for people and for
--gin_file. Reading uses no gin and imports no module that the files name.
"""

import dataclasses
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_jax import __version__
from moe_jax.core import checksums, files, paths
from moe_jax.core.configuration import Configuration, hints
from moe_jax.core.errors import UserError, nearest, shown
from moe_jax.data import vocabulary
from moe_jax.runs.config import BASE_BINDINGS, NAMES_MODULES, Config

CONFIG = "config.gin"
CONFIG_JSON = "config.json"
ORIGIN = "origin.json"
TASK_TABLE = "task_table.json"

# Settings that may change when a run is resumed: they affect neither the model nor its training.
# (Task modules may have moved; that their data are the same is checked. What a run started from is
# not read again.)
_FREE = re.compile(
    r"RunConfig\.(model_dir|(eval|log)_\w+|checkpoint_period|keep_checkpoints"
    r"|(\w+_checkpoint|representations)_path)"
    r"|DataConfig\.(cache_dir|task_modules)|MeshConfig\.\w+|StepConfig\.groups_at_once"
    r"|FinetuneConfig\.runs_at_once"
    r"|ModelConfig\.(dtype|unroll_layers|kept_activations|attention|attention_rows"
    r"|vocabulary_multiple)"
)
# Training can also go on for longer, or with other batches. In few-shot adaptation, such settings
# and decoding determine the scores in runs.jsonl.
_FREE_IN_TRAINING = re.compile(r"DecodingConfig\.\w+|RunConfig\.train_steps|DataConfig\.batch_size")
# Those that cannot, though the model stays the same.
_ORDER = re.compile(
    r"DataConfig\.(rows_per_group|pack|row_shapes|lengths|mixing\w*|cap)|RunConfig\.seed"
)
_MACROS = dict(re.findall(r"^(\w+\.\w+) = %(\w+)$", BASE_BINDINGS, re.M))

_SETTING = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)

Lines = dict[str, Any]  # `ModelConfig.d_model` -> value


def root(path: str | Path) -> Path:
    """The model directory of `path`, which may be a checkpoint in it."""
    path = paths.absolute(path)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return path.parents[1]
    return path.parent if path.name == "checkpoints" else path


def config_lines(config: Configuration) -> Lines:
    """Every setting in a tree of configurations, as `ModelConfig.d_model` -> 64."""
    lines: Lines = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines |= config_lines(value)
        else:
            value = dict(value) if isinstance(value, Mapping) else value
            value = tuple(value) if isinstance(value, list) else value
            lines[f"{config.called}.{field.name}"] = value
    return lines


def config_from(cls: type[Configuration], lines: Lines, source: Any) -> Any:
    """The configuration that `config_lines` describes; what the lines lack has its default.

    Raises:
        UserError: a setting that is not there, or a value that cannot be.
    """
    known: list[str] = []

    def made(cls: type[Configuration]) -> Configuration:
        values = {}
        for field, hint in hints(cls).items():
            name = f"{cls.called}.{field}"
            if dataclasses.is_dataclass(hint):
                values[field] = made(hint)
            elif name in lines:
                values[field] = lines[name]
            known.append(name)
        return cls(**values)

    try:
        result = made(cls)
    except UserError as e:
        raise UserError(f"{source}: {e}") from e
    for name in lines:
        if name not in known:
            raise UserError(f"{source}: there is no setting {name!r}{nearest(name, known)}")
    return result


def gin_text(lines: Lines) -> str:
    """Lines of gin that bind these settings, by macros where possible."""
    macros, bindings = [], []
    for name, value in lines.items():
        if name in _MACROS:
            macros.append(f"{_MACROS[name]} = {value!r}\n")
        else:
            bindings.append(f"{name} = {value!r}\n")
    return "".join([*macros, "\n", *bindings])


def write_config(
    model_dir: str | Path, config: Any, only: Sequence[type] = (), more: Sequence[str] = ()
) -> None:
    """Writes config.gin and config.json.

    Args:
        only: write only the settings of these classes; all if empty.
        more: names of further settings to write.
    """
    names = (*(f"{cls.__name__}." for cls in only), *more)
    lines = {k: v for k, v in config_lines(config).items() if not names or k.startswith(names)}
    files.write_text(paths.parse(model_dir) / CONFIG, gin_text(lines))
    files.write_json(paths.parse(model_dir) / CONFIG_JSON, lines)


def read_lines(model_dir: str | Path) -> Lines:
    """The settings in a directory; empty if it holds no run.

    Raises:
        UserError: the file cannot be parsed, or names what is no setting.
    """
    path = paths.parse(model_dir) / CONFIG_JSON
    if not path.exists():
        return {}
    lines = files.read_object(path)
    lines = {name: tuple(v) if isinstance(v, list) else v for name, v in lines.items()}
    for name in lines:  # which become lines of gin: not an import, nor a macro
        if not _SETTING.fullmatch(name):
            raise UserError(f"{path} is no run's: {shown(name)} is no setting")
    return lines


def modules_in(lines: Lines) -> dict[str, tuple[str, ...]]:
    """The modules, and the function, that a run's settings name: by the name of the setting."""
    named = {}
    for setting in NAMES_MODULES:
        value = lines.get(setting) or ()
        names = value if isinstance(value, list | tuple) else [value]
        named[_MACROS.get(setting, setting)] = tuple(n for n in names if isinstance(n, str))
    return named


def read_config(model_dir: str | Path) -> Config:
    """The configuration of a run; missing settings have their defaults.

    Raises:
        UserError: there is no run, or a value is invalid.
    """
    return config_from(Config, read_run_lines(model_dir), f"{model_dir}/{CONFIG_JSON}")


def read_run_lines(model_dir: str | Path) -> Lines:
    """The settings of the run in a directory.

    Raises:
        UserError: there is none.
    """
    if lines := read_lines(model_dir):
        return lines
    there = paths.parse(model_dir).exists()
    reason = f"it has no {CONFIG_JSON}" if there else "there is no such directory"
    raise UserError(f"{model_dir} holds no run: {reason}")


def check_config(model_dir: str | Path, config: Any) -> Lines:
    """Checks that a directory does not hold a run of another configuration.

    A setting that did not exist when the run began had its default.

    Returns:
        The settings of the run that the directory holds; those of `config` if it holds none.

    Raises:
        UserError: names the first setting that differs, and may not.
    """
    lines = read_lines(model_dir)
    if not lines:
        return config_lines(config)
    old = config_lines(config_from(type(config), lines, f"{model_dir}/{CONFIG}"))
    for name, value in config_lines(config).items():
        free = _FREE.fullmatch(name)
        free = free or (isinstance(config, Config) and _FREE_IN_TRAINING.fullmatch(name))
        if not free and old[name] != value:
            why = " (the examples to come would be others)" if _ORDER.fullmatch(name) else ""
            raise UserError(
                f"{model_dir} holds another run: there {_MACROS.get(name, name)} is "
                f"{old[name]!r}, here {value!r}{why}; give another MODEL_DIR"
            )
    return old


def write_origin(model_dir: str | Path) -> None:
    """Writes when and with which code a run began: {"date", "version", "commit"}.

    A resumed run keeps what it has. The date is UTC; the commit is None outside a git checkout.
    """
    path = paths.parse(model_dir) / ORIGIN
    if not path.exists():
        date = datetime.now(UTC).isoformat(timespec="seconds")
        files.write_json(path, {"date": date, "version": __version__, "commit": _commit()})


def _commit() -> str | None:
    """The commit of this package's checkout, with `-dirty` if tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    # An installed package may lie within the repository of another project.
    commands = (["ls-files", "--error-unmatch", Path(__file__).name],
                ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])  # fmt: skip
    try:
        for command in commands:
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=30)
            if done.returncode:
                return None
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def copy_vocabulary(model_dir: str | Path, source: Path) -> None:
    """Copies the vocabulary from the cache, so that the model can be used without the cache."""
    directory = paths.parse(model_dir) / vocabulary.DIRECTORY
    if checksums.is_sealed(directory):
        return
    if not (directory / vocabulary.FILE).exists():  # which is written last
        names = [path.name for path in source.iterdir() if path.name != checksums.FILE]
        for name in sorted(names, key=lambda name: name == vocabulary.FILE):
            files.write_bytes(directory / name, (source / name).read_bytes())
    checksums.seal(directory)  # not a copy of the cache's: a bucket has checksums of its own


def describe(
    model_dir: str | Path, config: Config, tasks: Sequence[str], vocabulary_dir: Path
) -> None:
    """Writes what a model directory holds beside checkpoints when training begins."""
    write_config(model_dir, config)
    write_origin(model_dir)
    write_task_table(model_dir, tasks)
    copy_vocabulary(model_dir, vocabulary_dir)


def write_task_table(model_dir: str | Path, tasks: Sequence[str]) -> None:
    """Writes the ordered task names; the index is the `task_id`."""
    files.write_json(paths.parse(model_dir) / TASK_TABLE, {"tasks": list(tasks)})


def read_task_table(model_dir: str | Path) -> list[str]:
    """The ordered task names of a run.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    path = paths.parse(model_dir) / TASK_TABLE
    names = files.read_object(path).get("tasks")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: must be {{"tasks": [names]}}')
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: {shown(twice)} is there twice")
    return names
