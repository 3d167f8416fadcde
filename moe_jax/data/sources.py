"""Reads the source of the user's modules, and executes none of it."""

import ast
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import moe_jax
from moe_jax.core.user_code import is_users

_PACKAGE = Path(moe_jax.__file__).absolute().parent


def source_files(module: ModuleType) -> list[str]:
    """Files of `module` and of the user's modules that it imports, directly or indirectly, sorted.

    Installed packages and moe_jax itself are left out, except its built-in tasks. Imports are read
    from the source, so the result does not depend on other imports of the process.
    """
    sources: dict[Path, None] = {}
    waiting = [module]
    while waiting:
        module = waiting.pop()
        path = getattr(module, "__file__", None)
        path = path and Path(path).absolute()
        if path is None or path in sources or not is_users(path):
            continue
        sources[path] = None
        imported = _imports(_nodes(path), module.__package__ or "")
        waiting += (sys.modules[name] for name in imported if name in sys.modules)
    return sorted(map(str, sources))


@functools.cache
def mentioned(names: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """What the sources of modules mention, and those of the user's modules that they import.

    Those of this package count for nothing.

    Args:
        names: dotted, or absolute paths of .py files.

    Returns:
        (packages that are imported, by the first part of their names; identifiers)
    """
    packages: set[str] = set()
    identifiers: set[str] = set()
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        path = Path(name) if name.endswith(".py") else _find(name)
        if name in seen or path is None or path.is_relative_to(_PACKAGE):
            continue
        if not (name in names or is_users(path)):
            continue
        seen.add(name)
        package = "" if name.endswith(".py") else name
        if path.name != "__init__.py":
            package = package.rpartition(".")[0]
        with contextlib.suppress(
            OSError, SyntaxError, ValueError, ImportError
        ):  # which importing it tells
            nodes = _nodes(path)
            imported = list(_imports(nodes, package))
            packages.update(name.partition(".")[0] for name in imported)
            waiting += imported
            identifiers.update(_identifiers(nodes))
    return frozenset(packages), frozenset(identifiers)


def _find(name: str) -> Path | None:
    """The file of a module, looked up without importing the packages that it is in."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    paths = [Path(spec.origin or "")] if not rest else []
    for place in (spec.submodule_search_locations or ()) if rest else ():
        path = Path(place, *rest)
        paths += [path.with_name(f"{path.name}.py"), path / "__init__.py"]
    return next((path for path in paths if path.suffix == ".py" and path.is_file()), None)


def _nodes(path: Path) -> list[ast.AST]:
    """The syntax tree of a source file."""
    return list(ast.walk(ast.parse(path.read_bytes())))


def _imports(nodes: Iterable[ast.AST], package: str) -> Iterator[str]:
    """Imported names in a source file that may be modules.

    Args:
        package: that the file is in; '' without one.
    """
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _identifiers(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names that a source file uses: of variables, of attributes, imported ones."""
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
