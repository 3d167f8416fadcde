"""User modules: importing them by name or file, looking up objects, listing source files."""

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gin

import moe_jax
from moe_jax.core.errors import UserError, shown

# Includes the user's and the system's, which sysconfig leaves out in a virtual environment.
_INSTALLED = frozenset(("site-packages", "dist-packages"))
# 'module:name(argument=value)' -> 'module:name', 'argument=value'.
_CALL = re.compile(r"(.+?:[\w.]+)\((.*)\)", re.DOTALL)
# How the names of modules begin that are files.
_FILE = "_file_"
# The package `tasks/` at the top of the repository.
BUILTIN_TASKS = "moe_jax.builtin_tasks"
DEFAULT_TASK_MODULES = tuple(
    f"{BUILTIN_TASKS}.{name}" for name in ("skills_gym", "crossfit", "p3", "natural_instructions")
)


def full_name(name: str) -> str:
    """The full name of a module. `tasks.NAME` means the built-in task module NAME.

    That was its name in earlier versions. A module or package `tasks` in the working directory does
    not change this.
    """
    package, _, module = name.rpartition(".")
    builtin = f"{BUILTIN_TASKS}.{module}"
    is_there = package == "tasks" and module and importlib.util.find_spec(builtin)
    return builtin if is_there else name


def load_module(name: str) -> ModuleType:
    """Imports 'package.module' (also from the working directory) or the file 'path/to/file.py'.

    Raises:
        UserError: there is no such module, or importing it fails.
    """
    if not isinstance(name, str):
        raise UserError(f"{shown(name)} is no module's name")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    with gin.unlock_config():  # the module may define configurables after gin was parsed
        return _load_file(name) if name.endswith(".py") else _load_package(name)


def name_of(module: ModuleType) -> str:
    """The name by which `load_module` imports `module` again: dotted, or the path of its file."""
    if module.__name__.startswith(_FILE):
        return os.path.abspath(module.__file__)
    return module.__name__


def _load_package(name: str) -> ModuleType:
    if not all(name.split(".")):
        raise UserError(f"{shown(name)} is no module's name")
    try:
        return importlib.import_module(full_name(name))
    except ImportError as e:
        raise UserError(f"cannot import module {name!r}: {e}") from e


def _load_file(name: str) -> ModuleType:
    path = os.path.abspath(name)
    # Not the file's own name, which another module may have.
    alias = _FILE + hashlib.sha256(path.encode()).hexdigest()[:16]
    if alias not in sys.modules:
        if not os.path.isfile(path):
            raise UserError(f"no such module file: {name}")
        spec = importlib.util.spec_from_file_location(alias, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        try:
            spec.loader.exec_module(module)
        except ImportError as e:
            del sys.modules[alias]
            raise UserError(f"cannot import {name}: {e}") from e
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]


def resolve(reference: str) -> Any:
    """Returns the object named 'package.module:qualified.name' or 'file.py:qualified.name'.

    A function may come with keyword arguments that are Python literals:
    'package.module:function(num_classes=2)'.

    Raises:
        UserError: the module cannot be imported or lacks the name, or is one of Python's own: such
            as `subprocess`, which a cache from elsewhere could name.
    """
    call = _CALL.fullmatch(reference)
    if call:
        keywords = ast.parse(f"f({call[2]})", mode="eval").body.keywords
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords}
        return functools.partial(resolve(call[1]), **values)
    module, _, name = reference.rpartition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"{reference!r}: a function of Python's own library is not called by name")
    try:
        return functools.reduce(getattr, name.split("."), load_module(module))
    except AttributeError as e:
        raise UserError(f"{module} has no {name!r}") from e


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


def lies_in(name: str, directory: str | os.PathLike) -> bool:
    """Whether `load_module(name)` would import a file below a directory. Imports nothing."""
    path = Path(name if name.endswith(".py") else full_name(name).replace(".", os.sep))
    return path.resolve().is_relative_to(Path(directory).resolve())


def source_files(module: ModuleType) -> list[str]:
    """Files of `module` and of the user's modules that it imports, directly or indirectly, sorted.

    Installed packages and moe_jax itself are left out, except its built-in tasks. Imports are read
    from the source, so the result does not depend on other imports of the process.
    """
    sources: dict[str, None] = {}
    waiting = [module]
    while waiting:
        module = waiting.pop()
        path = getattr(module, "__file__", None)
        if path is None or path in sources or not _is_task_code(path):
            continue
        sources[path] = None
        waiting += (sys.modules[name] for name in _imports(module) if name in sys.modules)
    return sorted(map(os.path.abspath, sources))


def _is_task_code(path: str) -> bool:
    path, package = Path(os.path.abspath(path)), Path(moe_jax.__file__).parent
    if path.is_relative_to(package / "builtin_tasks"):
        return True
    if path.suffix != ".py" or not _INSTALLED.isdisjoint(path.parts):
        return False
    directories = [sysconfig.get_path(k) for k in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not any(map(path.is_relative_to, [package, *directories]))


def _imports(module: ModuleType) -> Iterator[str]:
    """Imported names in `module`'s source that may be modules."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.__package__ or ""
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
