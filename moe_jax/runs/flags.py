"""Shared by the commands that read gin: flags, help, JAX and the processes that work together.

    python -m moe_jax.train --gin_file=FILE [--gin_file=FILE ...] [--gin.NAME=VALUE ...]

What files and bindings mean is in `gin_files`, how a command ends in `moe_jax.core.ending`.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from logging import WARNING, getLogger
from typing import Any

import jax
from absl import app, flags, logging
from jax._src.clusters import ClusterEnv

from moe_jax.core import ending, paths, peers, processes
from moe_jax.core.errors import UserError, did_you_mean, first_line, nearest
from moe_jax.kernels import memory
from moe_jax.runs import configurables, gin_files, help

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "Gin file; repeatable, later ones override earlier ones."
)
_GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings", [], "One gin binding. --gin.NAME=VALUE is short for it and overrides files."
)
_GIN_SEARCH_PATHS = flags.DEFINE_list(
    "gin_search_paths",
    [".", str(gin_files.GIN_CONFIGS)],
    "Directories in which gin files are looked up.",
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
        # Here JAX says that it does not use a GPU which the machine has.
        getLogger("jax._src.xla_bridge").setLevel(WARNING)
        with ending.one_line():
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; flags start with --")
            given = _GIN_FILE.value, _GIN_BINDINGS.value, _GIN_SEARCH_PATHS.value
            gin_files.parse(*given, from_model_dir)
            parts = [configurables.build(part) for part in (config, settings) if part is not None]
            _start_jax()
            main(*parts)

    processes.end_with_parent()
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        with ending.one_line():
            print(_help(config, settings))
        return
    app.run(start, argv=gin_files.rewrite_flags(sys.argv), flags_parser=_parsed)


def _parsed(argv: Sequence[str]) -> list[str]:
    """What flags leave of the command line. A wrong flag ends the process in one line."""
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
        name = e.flagname
        if name.startswith("gin."):
            ending.fail(UserError(f"--{name} has no value: give --{name}=VALUE"))
        near = did_you_mean(f"--gin.{setting}" for setting in gin_files.called(name))
        near = near or nearest(f"--{name}", [f"--{flag.name}" for flag in _own_flags()])
        ending.fail(UserError(f"there is no flag --{name}{near}"))
    except flags.Error as e:
        ending.fail(UserError(first_line(e)))


def _own_flags() -> list[flags.Flag]:
    """The flags of the command, those that all share first, in the order of their definition."""
    found = [*flags.FLAGS.get_key_flags_for_module(__name__),
             *flags.FLAGS.get_key_flags_for_module(sys.argv[0])]  # fmt: skip
    return list(dict.fromkeys(found))


def _help(config: type, settings: type | None) -> str:
    """The command's docstring, the macros, its flags, and the settings that it reads."""
    own = [] if settings is None else help.settings(settings)
    return "\n".join(
        [
            (sys.modules["__main__"].__doc__ or "").strip(),
            "\nMacros, as T5X has them (--gin.NAME=VALUE, or NAME = VALUE in a gin file):\n",
            help.macros(),
            "\nFlags:\n",
            help.flags(_own_flags()),
            "\nSettings (--gin.NAME=VALUE, or NAME = VALUE in a gin file):\n",
            *own,
            *help.settings(config),
        ]
    )


def given_bindings() -> list[tuple[str, str]]:
    """(name, value) of the bindings on this command line, in order; strings without quotes."""
    pairs = (binding.partition("=") for binding in _GIN_BINDINGS.value)
    return [(name.strip(), gin_files.unquoted(value.strip())) for name, _, value in pairs]


def stage_config(config: type, files: Sequence[str], bindings: Mapping[str, str]) -> Any:
    """The configuration of a command with these files and bindings; gin's own state is replaced.

    Raises:
        UserError: as `gin_files.parse`, or a value is invalid.
    """
    arguments = [f"--gin.{name}={value}" for name, value in bindings.items()]
    arguments = gin_files.rewrite_flags(arguments)
    lines = [argument.partition("=")[2] for argument in arguments]
    gin_files.parse(files, lines, _GIN_SEARCH_PATHS.value)
    return configurables.build(config)


def process_flags() -> list[str]:
    """The flags, other than gin files and bindings, that child processes get too."""
    return [
        f"--gin_search_paths={','.join(_GIN_SEARCH_PATHS.value)}",
        f"--compilation_cache_dir={_COMPILATION_CACHE.value}",
    ]


def _start_jax() -> None:
    memory.run_in_main_thread()
    if _COMPILATION_CACHE.value and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        path = str(paths.parse(_COMPILATION_CACHE.value))
        jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    for flag in ("coordinator_address", "process_count", "process_index"):
        given = flags.FLAGS[flag].value is not None
        if _MULTIPROCESS.value and not given:
            raise UserError(f"--multiprocess_gpu needs --{flag}")
        if given and not _MULTIPROCESS.value:
            raise UserError(f"--{flag} is for --multiprocess_gpu, which is not given")
    if _MULTIPROCESS.value:
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
