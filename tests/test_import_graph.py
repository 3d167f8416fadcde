"""No import circles among modules and rooms; the parsed imports match the interpreter's."""

import subprocess
import sys

import pytest

from benchmarks.import_graph import PACKAGE, circles, floors, module_graph, room, room_graph


def test_no_circles():
    modules = module_graph()
    assert circles(modules) == []
    assert circles(room_graph(modules)) == []


def test_imports_are_those_of_the_interpreter():
    """All package modules loaded by importing a module are reachable from it in the graph."""
    graph = module_graph()
    start = "moe_jax.interop.t5x"
    code = f"import sys, {start}; print(*(m for m in sys.modules if m.startswith('moe_jax')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reached, waiting = {start}, [start]
    while waiting:
        waiting += (new := graph[waiting.pop()] - reached)
        reached |= new
    packages = {name for name in graph if (PACKAGE.parent / name.replace(".", "/")).is_dir()}
    loaded = set(done.stdout.split())
    assert "moe_jax.model.config" in loaded
    assert loaded - packages <= reached


def test_all_forms_of_imports(tmp_path):
    package = tmp_path / "moe_jax"
    content = {
        "__init__.py": "",
        "train.py": "from moe_jax.core import errors as e, nothing\nimport moe_jax.data.cache, os",
        "core/__init__.py": "from . import errors",
        "core/errors.py": "def f():\n    from ..data.cache import Cache",
        "data/__init__.py": "",
        "data/cache.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import moe_jax.train\nelse:\n    from moe_jax import core",
    }
    for name, text in content.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    graph = module_graph(package)
    assert graph["moe_jax.train"] == {"moe_jax.core.errors", "moe_jax.core", "moe_jax.data.cache"}
    assert graph["moe_jax.core"] == {"moe_jax.core.errors"}
    assert graph["moe_jax.core.errors"] == {"moe_jax.data.cache"}
    assert graph["moe_jax.data.cache"] == {"moe_jax.core"}
    assert room("moe_jax.train", graph) == "commands" and room("moe_jax.core", graph) == "core"
    rooms = room_graph(graph)
    assert rooms == {"commands": {"core", "data"}, "core": {"data"}, "data": {"core"}}
    assert circles(rooms) == [["core", "data"]]


def test_floors():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}
    assert circles(graph) == [] and floors(graph) == [["c", "d"], ["b"], ["a"]]
    assert circles(graph | {"c": {"c"}}) == [["c"]]
    with pytest.raises(ValueError, match="cycle"):
        floors(graph | {"c": {"a"}})
