"""All commands under one name: `moe_jax COMMAND ...` is `python -m moe_jax.COMMAND ...`."""

import ast
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from moe_jax import end_silently
from moe_jax.core.errors import nearest

COMMANDS = (
    "prepare", "train", "eval", "infer", "finetune", "represent", "report", "experiment", "convert",
    "tasks", "plan",
)  # fmt: skip


def main() -> None:
    """Runs the command that the first argument names."""
    end_silently()
    name = next(iter(sys.argv[1:]), None)
    if name in ("-h", "--help"):
        print(_help())
    elif name is None:
        sys.exit(_help())
    elif name not in COMMANDS:
        near = nearest(name, COMMANDS)
        sys.exit(f"error: there is no command {name!r}{near}; see moe_jax --help")
    else:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: finds the user's modules
        del sys.argv[1]
        runpy.run_module(f"moe_jax.{name}", run_name="__main__", alter_sys=True)


def _help() -> str:
    lines = ["usage: moe_jax COMMAND [ARGUMENTS]", "", "commands:"]
    lines += [f"  {name:<12}{_summary(name)}" for name in COMMANDS]
    return "\n".join([*lines, "", "moe_jax COMMAND --help explains a command."])


def _summary(name: str) -> str:
    """First line of a command's docstring, read without importing the command, which takes
    seconds."""
    source = Path(find_spec(f"moe_jax.{name}").origin).read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).partition("\n")[0]


if __name__ == "__main__":
    main()
