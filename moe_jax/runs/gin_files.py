"""Gin files and bindings of a command: found, completed, checked and parsed.

In `--gin.NAME=VALUE`, a value that is not a gin literal is a string, so paths need no quotes.
"""

import ast
import os
import re
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import gin

from moe_jax.core import files, paths
from moe_jax.core.errors import UserError, first_line, nearest, shown
from moe_jax.data import modules
from moe_jax.runs import configurables, directory
from moe_jax.runs.config import BASE_BINDINGS

GIN_CONFIGS = Path(__file__).resolve().parents[1] / "gin_configs"
_IMPORT = re.compile(r"^(import\s+)(\S+)", re.MULTILINE)
_EXTENSIONS = r"^EXTENSIONS\s*=\s*(\([^)]*\)|\[[^\]]*\]|.+)"  # brackets may span lines
# What Python's parser raises; the last two at thousands of brackets.
_NO_LITERAL = (SyntaxError, ValueError, MemoryError, RecursionError)


def rewrite_flags(argv: Sequence[str]) -> list[str]:
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


def unquoted(value: str) -> str:
    """A value in gin's syntax as `rewrite_flags` takes it: strings without quotes."""
    try:
        literal = ast.literal_eval(value)
    except _NO_LITERAL:
        return value
    return literal if isinstance(literal, str) and _literal(literal) == value else value


def parse(
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
             for path in (find(f, search_paths) for f in gin_files)]  # fmt: skip
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
            inner = find(match[2], [str(path.parent), *search_paths])
        except UserError as e:
            raise UserError(f"{path}: include: {e}") from e
        lines.append(_with_includes(inner, search_paths, (*seen, path)))
    return "\n".join(lines) + "\n"


def _parse(texts: Sequence[tuple[object, str]]) -> None:
    gin.clear_config()
    configurables.bind_defaults()
    for source, text in texts:
        try:
            # Built-in modules may be imported by their short names.
            gin.parse_config(_IMPORT.sub(lambda m: m[1] + modules.full_name(m[2]), text))
        except (*_NO_LITERAL, TypeError, AttributeError, ImportError, TokenError) as e:
            line = getattr(e, "lineno", None)
            where = f"{source}:{line}" if line else str(source)
            raise UserError(f"{where}: {_explain(e)}") from e


def _imports(text: str) -> list[str]:
    return [name for _, name in _IMPORT.findall(text)]


def find(name: str, search_paths: Sequence[str]) -> Path:
    """The path of a gin file in the search paths.

    Raises:
        UserError: it is in none of them; the nearest names are given.
    """
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
        return message + nearest(unknown[1], configurables.CLASSES)
    parameter = re.search(r"configurable '?([\w.]+)'? doesn't have a parameter named '(\w+)'",
                          message, re.IGNORECASE)  # fmt: skip
    if parameter:
        names = configurables.parameters(parameter[1].split(".")[-1])
        return message.rstrip(".") + nearest(parameter[2], names)
    return message
