"""Prints which subpackages ("rooms") import which, with circles and layers ("floors").

    python -m benchmarks.import_graph

A room is a subpackage of `moe_jax`; the modules at the top level form the room `commands`. An arrow
goes from a room to a room that it imports from. Imports inside functions count, imports for type
checkers do not. The source is parsed, not imported.
"""

import argparse
import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "moe_jax"
COMMANDS = "commands"

Graph = dict[str, set[str]]


def module_graph(package: Path = PACKAGE) -> Graph:
    """Module -> the modules of the same package that it imports.

    Args:
        package: its directory.
    """
    paths = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    return {
        name: {
            target
            for imported in _imports(ast.parse(path.read_text()), name, path.name == "__init__.py")
            if (target := _module(imported, paths)) and target != name
        }
        for name, path in paths.items()
    }


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports, including names that are not modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = module.split(".")
            parents = parents[: len(parents) - node.level + is_package]
            base = ".".join([*parents, *([base] if base else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from _imports(child, module, is_package)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, module, is_package)


def _module(imported: str, modules: Mapping[str, Path]) -> str | None:
    """The module that a dotted name is or belongs to; None for other packages."""
    while imported and imported not in modules:
        imported = imported.rpartition(".")[0]
    return imported or None


def room(module: str, modules: Iterable[str]) -> str:
    """The room of a module; names are dotted."""
    parts = module.split(".")
    is_package = any(other.startswith(f"{module}.") for other in modules)
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and is_package) else COMMANDS


def room_graph(modules: Graph) -> Graph:
    """Room -> the other rooms that its modules import from."""
    room_of = {module: room(module, modules) for module in modules}
    rooms: Graph = {name: set() for name in room_of.values()}
    for module, imported in modules.items():
        rooms[room_of[module]] |= {room_of[other] for other in imported if other != "moe_jax"}
    return {name: others - {name} for name, others in rooms.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other, sorted; empty where there is no circle."""
    reached: Graph = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    groups = {
        tuple(sorted(other for other in reached[node] if node in reached[other]))
        for node in graph
        if node in reached[node]
    }
    return [list(group) for group in sorted(groups)]


def floors(graph: Graph) -> list[list[str]]:
    """Nodes by the length of their longest import path. The first floor imports nothing.

    Raises:
        graphlib.CycleError: the graph has a circle.
    """
    height: dict[str, int] = {}
    for node in graphlib.TopologicalSorter(graph).static_order():
        height[node] = 1 + max((height[other] for other in graph[node]), default=-1)
    levels: list[list[str]] = [[] for _ in range(max(height.values(), default=-1) + 1)]
    for node in sorted(height):
        levels[height[node]].append(node)
    return levels


def main(argv: list[str] | None = None) -> int:
    """Prints the graph; returns 1 if there is a circle."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.import_graph",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    modules = module_graph()
    rooms = room_graph(modules)
    for name, others in sorted(rooms.items()):
        print(f"{name:12} -> {', '.join(sorted(others)) or '(nothing)'}")
    arrows = {what: sum(map(len, graph.values())) for what, graph in
              (("modules", modules), ("rooms", rooms))}  # fmt: skip
    print(f"\n{len(modules)} modules, {arrows['modules']} arrows between them")
    print(f"{len(rooms)} rooms, {arrows['rooms']} arrows between them")
    all_circles = {"modules": circles(modules), "rooms": circles(rooms)}
    for what, groups in all_circles.items():
        print(f"circles between {what}: {len(groups)}")
        for group in groups:
            print(f"  {' <-> '.join(group)}")
    if not all_circles["rooms"]:
        levels = floors(rooms)
        print(f"floors: {len(levels)}")
        for number, names in enumerate(levels):
            print(f"  {number}: {', '.join(names)}")
    return int(any(all_circles.values()))


if __name__ == "__main__":
    sys.exit(main())
