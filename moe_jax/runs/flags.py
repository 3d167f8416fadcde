"""Shared by all commands: flags, gin files, processes, and one-line errors.

    python -m moe_jax.train --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...]

A VALUE that is not a gin literal is a string, so paths need no quotes.
"""

import ast
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import gin
import jax
from absl import app, flags, logging
from jax._src.clusters import ClusterEnv

from moe_jax.core import ending, files, paths, peers, processes
from moe_jax.core.errors import UserError, first_line, nearest, shown
from moe_jax.data import modules
from moe_jax.kernels import memory
from moe_jax.runs import configurables, directory, help
from moe_jax.runs.config import BASE_BINDINGS

GIN_CONFIGS = Path(__file__).resolve().parents[1] / "gin_configs"

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "Gin file; repeatable, later ones override earlier ones."
)
_GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings", [], "One gin binding. --gin.NAME=VALUE is short for it and overrides files."
)
_GIN_SEARCH_PATHS = flags.DEFINE_list(
    "gin_search_paths", [".", str(GIN_CONFIGS)], "Directories in which gin files are looked up."
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache_dir",
    os.path.join(os.path.expanduser("~"), ".cache", "moe_jax", "xla"),
    "Cache of compiled programs, kept between runs; empty for none. "
    "JAX_COMPILATION_CACHE_DIR overrides it.",
)
_MULTIPROCESS = flags.DEFINE_bool(
    "multiprocess_gpu", False, "One of several processes (GPU or CPU) that train together."
)
_MULTIPROCESS_TPU = flags.DEFINE_bool(
    "multiprocess_tpu", False, "One process per host of a TPU slice; processes find each other."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0; needed with --multiprocess_gpu."
)
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "Number of processes.")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "Index of this process, from 0.")
_IMPORT = re.compile(r"^(import\s+)(\S+)", re.MULTILINE)
_EXTENSIONS = r"^EXTENSIONS\s*=\s*(\([^)]*\)|\[[^\]]*\]|.+)"  # brackets may span lines
# What Python's parser raises; the last two at thousands of brackets.
_NO_LITERAL = (SyntaxError, ValueError, MemoryError, RecursionError)


def run(
    main: Callable[..., None], config: type, settings: type | None = None,
    from_model_dir: bool = False,
) -> None:  # fmt: skip
    """Parses flags and gin, calls `main(config, settings)`, and ends the process.

    Whatever stops it ends in one line on standard error: see `ending.one_line`.

    Args:
        config: the dataclass of the run's configuration, made from gin's bindings.
        settings: that of the command's own settings, if it has some; registered by
            `configurables.register`.
        from_model_dir: starts from the configuration of the run in MODEL_DIR, so that flags give
            only the differences.
    """

    def start(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.ERROR)
        with ending.one_line():
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; flags start with --")
            parse_gin(_GIN_FILE.value, _GIN_BINDINGS.value, _GIN_SEARCH_PATHS.value, from_model_dir)
            parts = [configurables.build(part) for part in (config, settings) if part is not None]
            _start_jax()
            main(*parts)

    processes.end_with_parent()
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # for --help
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(_help(config, settings))
        return
    app.run(start, argv=rewrite_gin_flags(sys.argv))


def _help(config: type, settings: type | None) -> str:
    """The command's docstring, its flags, and the settings that it reads."""
    own = [] if settings is None else help.settings(settings)
    return "\n".join(
        [
            (sys.modules["__main__"].__doc__ or "").strip(),
            "\nFlags:\n",
            flags.FLAGS.main_module_help().split(":", 1)[-1].strip("\n"),
            "\nMacros, as T5X has them (--gin.NAME=VALUE, or NAME = VALUE in a gin file):\n",
            help.macros(),
            "\nSettings (--gin.NAME=VALUE):\n",
            *own,
            *help.settings(config),
        ]
    )


def rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
    """Turns `--gin.NAME=VALUE` into `--gin_bindings=NAME=VALUE`, quoting plain strings."""
    result = []
    for argument in argv:
        match = re.fullmatch(r"--?gin\.([^=]+)=(.*)", argument, re.DOTALL)
        if match:
            name, value = match.groups()
            argument = f"--gin_bindings={name} = {_literal(value)}"
        result.append(argument)
    return result


def _literal(value: str) -> str:
    """The value in gin's syntax: a literal, a reference or a container; anything else as a
    string."""
    if re.fullmatch(r"[%@][\w./]+(\(\))?", value) or (value[:1] in "[({" and value):
        return value
    try:
        ast.literal_eval(value)
    except _NO_LITERAL:
        return repr(value)
    return value


def parse_gin(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str],
    from_model_dir: bool = False,
) -> None:
    """Parses base bindings, files, then bindings; later ones win.

    Raises:
        UserError: a file is missing, a line is not gin, a macro is set but never read, or a
            configurable or parameter is unknown.
    """
    texts = [(path, _with_includes(path, search_paths))
             for path in (_find(f, search_paths) for f in gin_files)]  # fmt: skip
    texts.append(("the command line", "\n".join(bindings)))
    _check_macros(texts)
    modules.give([*_extensions(texts), *(name for _, text in texts for name in _imports(text))])
    _load_extensions(texts)
    _parse(texts)
    modules.give(configurables.modules())
    if from_model_dir:
        model_dir = gin.query_parameter("MODEL_DIR/macro.value")
        if model_dir is None:
            raise UserError("MODEL_DIR is not set: give --gin.MODEL_DIR=...")
        root = directory.root(model_dir)  # MODEL_DIR may name one of its checkpoints
        lines = directory.read_lines(root)
        if not lines:
            raise UserError(f"{model_dir} holds no run: it has no {directory.CONFIG}")
        modules.named_in(root, directory.modules_in(lines))
        own = (f"{root}/{directory.CONFIG}", directory.gin_text(lines))
        _load_extensions([own, *texts])
        _parse([own, *texts])
    try:
        gin.finalize()
    except ValueError as e:  # a macro that is read but not set
        raise UserError(_explain(e)) from e


def _load_extensions(texts: Sequence[tuple[object, str]]) -> None:
    for name in _extensions(texts):
        modules.load_module(name)


def _extensions(texts: Sequence[tuple[object, str]]) -> Sequence[str]:
    """The modules of the last binding of EXTENSIONS."""
    everything = "\n".join(text for _, text in texts)
    assignments = re.findall(_EXTENSIONS, everything, re.MULTILINE)
    if not assignments:
        return []
    try:
        names = ast.literal_eval(assignments[-1])
    except _NO_LITERAL:
        names = None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple):
        raise UserError(f"EXTENSIONS must be module names, not {shown(assignments[-1])}")
    return names


def _with_includes(path: Path, search_paths: Sequence[str], seen: tuple[Path, ...] = ()) -> str:
    """The text of a gin file, with each `include` line replaced by the file."""
    if path in seen:
        raise UserError(f"{path} includes itself")
    lines = []
    for line in files.read_text(path).splitlines():
        match = re.fullmatch(r"\s*include\s+(['\"])(.+)\1\s*(#.*)?", line)
        if match is None:
            lines.append(line)
            continue
        try:
            inner = _find(match[2], [str(path.parent), *search_paths])
        except UserError as e:
            raise UserError(f"{path}: include: {e}") from e
        lines.append(_with_includes(inner, search_paths, (*seen, path)))
    return "\n".join(lines) + "\n"


def _parse(texts: Sequence[tuple[object, str]]) -> None:
    gin.clear_config()
    configurables.bind_defaults()
    for source, text in texts:
        try:
            gin.parse_config(_with_full_names(text))
        except (*_NO_LITERAL, TypeError, AttributeError, ImportError, TokenError) as e:
            line = getattr(e, "lineno", None)
            where = f"{source}:{line}" if line else str(source)
            raise UserError(f"{where}: {_explain(e)}") from e


def _with_full_names(text: str) -> str:
    """The text with `import tasks.NAME` replaced by the full name of the built-in module."""
    return _IMPORT.sub(lambda m: m[1] + modules.full_name(m[2]), text)


def _imports(text: str) -> list[str]:
    return [name for _, name in _IMPORT.findall(text)]


def given_bindings() -> list[tuple[str, str]]:
    """(name, value) of the bindings on this command line, in order; strings without quotes."""
    pairs = (binding.partition("=") for binding in _GIN_BINDINGS.value)
    return [(name.strip(), _unquoted(value.strip())) for name, _, value in pairs]


def _unquoted(value: str) -> str:
    try:
        literal = ast.literal_eval(value)
    except _NO_LITERAL:
        return value
    return literal if isinstance(literal, str) and _literal(literal) == value else value


def stage_config(config: type, gin_files: Sequence[str], bindings: Mapping[str, str]) -> Any:
    """The configuration of a command with these files and bindings; gin's own state is replaced.

    Raises:
        UserError: as `parse_gin`, or a value is invalid.
    """
    arguments = rewrite_gin_flags([f"--gin.{name}={value}" for name, value in bindings.items()])
    lines = [argument.partition("=")[2] for argument in arguments]
    parse_gin(gin_files, lines, _GIN_SEARCH_PATHS.value)
    return configurables.build(config)


def process_flags() -> list[str]:
    """The flags, other than gin files and bindings, that child processes get too."""
    return [
        f"--gin_search_paths={','.join(_GIN_SEARCH_PATHS.value)}",
        f"--compilation_cache_dir={_COMPILATION_CACHE.value}",
    ]


def find_gin_file(name: str) -> Path:
    """The path of a gin file in the search paths."""
    return _find(name, _GIN_SEARCH_PATHS.value)


def _find(name: str, search_paths: Sequence[str]) -> Path:
    for parent in ["", *search_paths]:
        path = paths.parse(name if paths.in_bucket(name) else os.path.join(parent, name))
        if path.is_file():
            return path
    known = [
        str(path.relative_to(parent))
        for parent in search_paths
        if not paths.in_bucket(parent)
        for path in paths.parse(parent).glob("**/*.gin")
    ]
    raise UserError(f"no gin file {name!r} in {', '.join(search_paths)}{nearest(name, known)}")


def _check_macros(texts: Sequence[tuple[object, str]]) -> None:
    everything = "\n".join([BASE_BINDINGS, *(text for _, text in texts)])
    read = set(re.findall(r"%([A-Za-z_]\w*)", everything))
    for source, text in texts:
        for name in re.findall(r"^([A-Za-z_]\w*)\s*=(?!=)", text, re.MULTILINE):
            if name not in read:
                raise UserError(f"{source}: nothing reads the macro {name!r}{nearest(name, read)}")


def _explain(error: Exception) -> str:
    """Gin's message in one line, with the nearest names."""
    message = first_line(error)
    unset = re.search(r"No bindings specified for '(\w+)/gin.macro'", message)
    if unset:
        known = re.findall(r"^(\w+) =", BASE_BINDINGS, re.MULTILINE)
        return f"the macro {unset[1]!r} is read but not set{nearest(unset[1], known)}"
    unknown = re.search(r"No configurable matching '([\w./]+)'", message)
    if unknown:
        return message + nearest(unknown[1], configurables.classes())
    parameter = re.search(r"configurable '?([\w.]+)'? doesn't have a parameter named '(\w+)'",
                          message, re.IGNORECASE)  # fmt: skip
    if parameter:
        names = configurables.parameters(parameter[1].split(".")[-1])
        return message.rstrip(".") + nearest(parameter[2], names)
    return message


def _start_jax() -> None:
    memory.run_in_main_thread()
    if _COMPILATION_CACHE.value and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        path = str(paths.parse(_COMPILATION_CACHE.value))
        jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    if _MULTIPROCESS.value:
        for flag in ("coordinator_address", "process_count", "process_index"):
            if flags.FLAGS[flag].value is None:
                raise UserError(f"--multiprocess_gpu needs --{flag}")
        _meet(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value)
    elif _MULTIPROCESS_TPU.value:
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, initialization_timeout=300
        )
        if address is None:
            raise UserError("--multiprocess_tpu: this host is no part of a TPU slice")
        _meet(address, count, index)


def _meet(address: str, count: int, index: int) -> None:
    """Waits for the other processes, and connects JAX with theirs."""
    own = peers.Peers(address, count, index, lambda line: ending.end(line, ending.AGAIN))
    own.meet()
    peers.hold_back_libraries()
    ending.tell(own)
    jax.distributed.initialize(address, count, index)
