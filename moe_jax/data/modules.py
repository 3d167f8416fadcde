"""Imports modules and finds functions by name: the built-in tasks and metrics, and the user's.

Files of a run and of a cache name modules too. They may come from anywhere, and importing a module
executes it: so a command imports no modules of the user but those that it was given (`give`).
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gin

import moe_jax
from moe_jax.core.errors import UserError, quoted, shown
from moe_jax.core.user_code import what_failed
from moe_jax.data.sources import mentioned

# 'module:name(argument=value)' -> 'module', 'name', '(argument=value)'.
_FUNCTION = re.compile(r"(.+?):([\w.]+)(\(.*\))?", re.DOTALL)
_TENSORFLOW = re.compile(rb"^\s*(import|from)\s+(tensorflow|seqio)\b", re.MULTILINE)
# How the names of modules begin that are files.
_FILE = "_file_"
# The package `tasks/` at the top of the repository.
BUILTIN_TASKS = "moe_jax.builtin_tasks"
METRICS = "moe_jax.metrics"
DEFAULT_TASK_MODULES = tuple(
    f"{BUILTIN_TASKS}.{name}" for name in ("skills_gym", "crossfit", "p3", "natural_instructions")
)
# What the user of a command gave; None in a program that calls this package, and answers itself for
# what it names.
_given: frozenset[str] | None = None
_flag = ""  # by which a command takes modules, where it reads no gin
_run: tuple[str, Mapping[str, Sequence[str]]] = ("", {})  # what `named_in` was told


def full_name(name: str) -> str:
    """The full name of a module. `tasks.NAME` means the built-in task module NAME.

    That was its name in earlier versions. A module or package `tasks` in the working directory does
    not change this.
    """
    package, _, module = name.rpartition(".")
    builtin = f"{BUILTIN_TASKS}.{module}"
    is_there = package == "tasks" and module and importlib.util.find_spec(builtin)
    return builtin if is_there else name


def give(names: Iterable[str], flag: str = "") -> None:
    """Lets a command import these modules, and from now on no others but those that are shipped.

    Args:
        names: dotted names or .py files of modules, or 'module:function', as the user gave them.
        flag: the command's own flag for them, in place of --gin.NAME=VALUE.
    """
    global _given, _flag
    names = [name for name in names if isinstance(name, str)]  # importing tells of others
    functions = filter(None, map(_FUNCTION.fullmatch, names))
    more = [part for found in functions for part in (found[1], f"{found[1]}:{found[2]}")]
    _given, _flag = (_given or frozenset()) | {_full(name) for name in [*names, *more]}, flag


def given() -> list[str] | None:
    """What `give` was told, for a child process; None if it was not called."""
    return None if _given is None else sorted(_given)


def named_in(run: str | os.PathLike, names: Mapping[str, Sequence[str]]) -> None:
    """Notes what a run's files name, so that errors can say how the user can give it.

    Args:
        names: setting in gin -> modules, or one 'module:function'.
    """
    global _run
    _run = str(run), names


def is_shipped(name: str) -> bool:
    """Whether a module is one of the tasks or metrics that are part of this package."""
    full = full_name(name)
    package, _, module = full.rpartition(".")
    return full == METRICS or (package == BUILTIN_TASKS and module.isidentifier())


def check_module(name: str, named_by: str | os.PathLike = "") -> None:
    """Checks that a command may import a module.

    Args:
        named_by: the file that names it; '' for the run's configuration.

    Raises:
        UserError: it is neither shipped (see `is_shipped`) nor given by the user.
    """
    if not isinstance(name, str) or len(name.splitlines()) != 1:
        raise UserError(f"{shown(name)} is no module's name")
    if _given is not None and _full(name) not in _given and not is_shipped(name):
        raise _refusal(f"the module {name}", name, named_by)


def may_call(reference: str) -> bool:
    """Whether a command may call the function 'module:name'.

    It may if it or its module was given or is shipped, or if the given modules import its package
    and mention its name.
    """
    module, name = _parts(reference)
    own = {_full(reference), _full(f"{module}:{name}"), _full(module)}
    if _given is None or own & _given or is_shipped(module):
        return True
    return _is_mentioned(module, name, _given)


def _parts(reference: str) -> tuple[str, str]:
    """(module, name) of 'module:name' or 'module:name(argument=value)'."""
    found = _FUNCTION.fullmatch(reference)
    if found is None:
        raise UserError(f"{shown(reference)} is no function's name")
    return found[1], found[2]


def _is_mentioned(module: str, name: str, by: Iterable[str]) -> bool:
    package = module.partition(".")[0]
    packages, identifiers = mentioned(frozenset(n for n in map(_full, by) if ":" not in n))
    ours = package == moe_jax.__name__  # whose other functions are not those of tasks
    return not ours and package in packages and name.rpartition(".")[2] in identifiers


def check_function(reference: str, named_by: str | os.PathLike = "") -> None:
    """Checks that a command may call the function 'module:name'; see `may_call`.

    Raises:
        UserError: it may not, or it is no function's name.
    """
    if not may_call(reference):
        raise _refusal(f"the function {reference}", reference, named_by)


def _refusal(what: str, name: str, named_by: str | os.PathLike) -> UserError:
    """The error that says how to give a module, or a function of it, to this command."""
    run, named = _run
    module, function = _parts(name) if ":" in name else (name, None)
    by_name = (setting for setting, names in named.items() if name in names)
    by_source = (
        setting
        for setting, names in named.items()
        if function is not None and _is_mentioned(module, function, names)
    )
    setting = next(by_name, None) or next(by_source, "EXTENSIONS")
    values = named.get(setting, ())
    if setting == "EXTENSIONS" and module not in values:
        values = (*values, module)
    if _flag:
        others = (name for name in sorted(_given) if not is_shipped(name) and ":" not in name)
        how = f"{_flag}=" + quoted(",".join([*others, module]))
    else:
        how = f"--gin.{setting}=" + quoted(values[0] if len(values) == 1 else str(values))
    source = f"{named_by}, read for {run}," if named_by and run else named_by or run or "a file"
    return UserError(f"{source} names {what}: if you trust its code, give {how}")


def _full(name: str) -> str:
    """A module's name or 'module:function' as it is compared: files by their absolute path."""
    function = _FUNCTION.fullmatch(name)
    module = function[1] if function else name
    full = os.path.abspath(module) if module.endswith(".py") else full_name(module)
    return full + name[len(module) :]


def load_module(name: str, named_by: str | os.PathLike = "") -> ModuleType:
    """Imports 'package.module' (also from the working directory) or the file 'path/to/file.py'.

    Args:
        named_by: the file that names it, for errors.

    Raises:
        UserError: there is no such module, importing it fails, or it may not be imported.
    """
    check_module(name, named_by)
    return _load(name)


def _load(name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    with gin.unlock_config():  # the module may define configurables after gin was parsed
        return _load_file(name) if name.endswith(".py") else _load_package(name)


def name_of(module: ModuleType) -> str:
    """The name by which `load_module` imports `module` again: dotted, or the path of its file."""
    path = os.path.abspath(getattr(module, "__file__", None) or "")
    return path if _alias(path) in sys.modules else module.__name__


def _load_package(name: str) -> ModuleType:
    if not all(name.split(".")) or len(name) > 255:  # too long for a file
        raise UserError(f"{shown(name)} is no module's name")
    try:
        return importlib.import_module(full_name(name))
    except Exception as e:  # of any kind: it is the user's code
        raise _cannot_import(f"module {name!r}", e) from e


def _load_file(name: str) -> ModuleType:
    path = os.path.abspath(name)
    alias = _alias(path)
    if alias not in sys.modules:
        if not os.path.isfile(path):
            several = "; several are a list, ('a.py', 'b.py')" if "," in name else ""
            raise UserError(f"no such module file: {name}{several}")
        spec = importlib.util.spec_from_file_location(alias, path)
        module = importlib.util.module_from_spec(spec)
        # Another file may import this one by its name: it is executed once all the same.
        names = [alias, *_importable(path)]
        if there := sys.modules.get(names[-1]):
            sys.modules[alias] = there
            return there
        if "tensorflow" not in sys.modules and _TENSORFLOW.search(Path(path).read_bytes()):
            with quiet(), contextlib.suppress(ImportError):  # hides its lines, not the module's
                importlib.import_module("tensorflow")
        sys.modules.update(dict.fromkeys(names, module))
        try:
            spec.loader.exec_module(module)
        except BaseException as e:
            for each in names:
                del sys.modules[each]
            if isinstance(e, Exception):
                raise _cannot_import(name, e) from e
            raise
    return sys.modules[alias]


def _alias(path: str) -> str:
    """A file's name among the modules. Its own name may be that of another module."""
    return _FILE + hashlib.sha256(path.encode()).hexdigest()[:16]


def _importable(path: str) -> list[str]:
    """The name by which `import` finds a file, if there is one."""
    name = Path(path).stem
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a file, such as __main__
        spec = None
    here = spec is not None and os.path.abspath(spec.origin or "") == path
    return [name] if here else []


def _cannot_import(name: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = str(error) if isinstance(error, ImportError) else what_failed(error)
    beside = Path(name).with_name(f"{getattr(error, 'name', None)}.py")
    if isinstance(error, ModuleNotFoundError) and os.path.isfile(beside):
        reason += f"; to find {beside}, give its directory in PYTHONPATH"
    return UserError(f"cannot import {name}: {reason}")


def resolve(reference: str, named_by: str | os.PathLike = "") -> Any:
    """Returns the object named 'package.module:qualified.name' or 'file.py:qualified.name'.

    A function may come with keyword arguments that are Python literals:
    'package.module:function(num_classes=2)'.

    Args:
        named_by: the file that names it, for errors.

    Raises:
        UserError: it may not be called (see `may_call`), its module cannot be imported or lacks the
            name, or it is one of Python's own, such as `subprocess.call`.
    """
    module, name = _parts(reference)
    if arguments := reference[len(f"{module}:{name}") :]:
        return functools.partial(resolve(f"{module}:{name}", named_by), **_keywords(arguments))
    _check_is_not_python(module, reference)
    check_function(reference, named_by)
    home, found = _load(module), None
    for part in name.split("."):
        found = getattr(home if found is None else found, part, None)
        if found is None:
            raise UserError(f"{module} has no {name!r}")
        _check_is_not_python(_home(found), reference)
    if _given is not None and _full(reference) not in _given and _home(found) != home.__name__:
        raise UserError(f"{reference!r} is defined in {_home(found) or 'no module'}")
    return found


def _keywords(arguments: str) -> dict[str, Any]:
    """The values in '(name=literal, ...)'."""
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError) as e:
        raise UserError(f"{shown(arguments)} are no keyword arguments") from e
    if call.args or None in values:
        raise UserError(f"{shown(arguments)} are no keyword arguments")
    return values


def _check_is_not_python(module: str, reference: str) -> None:
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{reference!r}: a function of Python's own library is not called by name")


def _home(found: Any) -> str:
    """The module in which a function or class is defined, or which it is; '' for other objects."""
    if isinstance(found, ModuleType):
        return found.__name__
    return (hasattr(found, "__qualname__") and found.__module__) or ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back what C++ libraries write to standard error; shows it only if there is an error."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            log.seek(0)
            os.write(saved, log.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
