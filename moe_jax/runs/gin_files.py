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

from moe_jax.core import configuration, files, paths
from moe_jax.core.errors import UserError, did_you_mean, first_line, nearest, shown
from moe_jax.data import modules
from moe_jax.runs import configurables, directory
from moe_jax.runs.config import BASE_BINDINGS

GIN_CONFIGS = Path(__file__).resolve().parents[1] / "gin_configs"
_IMPORT = re.compile(r"^(import\s+)(\S+)", re.MULTILINE)
_EXTENSIONS = r"^EXTENSIONS\s*=\s*(\([^)]*\)|\[[^\]]*\]|.+)"  # brackets may span lines
COMMAND_LINE = "the command line"
Source = str | Path  # of a text: a file, or the command line
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
    found = [find(name, search_paths) for name in gin_files]
    texts = [text for path in found for text in _read(path, search_paths)]
    texts.append((COMMAND_LINE, "\n".join(bindings)))
    _check_macros(texts)
    modules.give([*_extensions(texts), *(name for _, text in texts for name in _imports(text))])
    _load_extensions(texts)
    _parse(texts)
    modules.give(configurables.modules())
    if from_model_dir:
        model_dir = gin.query_parameter("MODEL_DIR/macro.value")
        if model_dir is None:
            raise UserError("MODEL_DIR is not set: give --gin.MODEL_DIR=...")
        configuration.check("MODEL_DIR", model_dir, configuration.PathName)
        root = directory.root(model_dir)  # MODEL_DIR may name one of its checkpoints
        lines = directory.read_run_lines(root)
        modules.named_in(root, directory.modules_in(lines))
        own = (f"{root}/{directory.CONFIG}", directory.gin_text(lines))
        _load_extensions([own, *texts])
        _parse([own, *texts])
    try:
        gin.finalize()
    except ValueError as e:  # a macro that is read but not set
        raise UserError(_explain(e)) from e


def _load_extensions(texts: Sequence[tuple[Source, str]]) -> None:
    for name in _extensions(texts):
        modules.load_module(name)


def _extensions(texts: Sequence[tuple[Source, str]]) -> Sequence[str]:
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


def _read(
    path: Path, search_paths: Sequence[str], seen: tuple[Path, ...] = ()
) -> list[tuple[Source, str]]:
    """A gin file, in parts: what it includes comes between the lines before it and those after.

    Empty lines before a part keep the numbers of its lines.
    """
    if path in seen:
        raise UserError(f"{path} includes itself")
    parts, lines = [], []
    for number, line in enumerate(files.read_text(path).splitlines(), 1):
        match = re.fullmatch(r"\s*include\s+(['\"])(.+)\1\s*(#.*)?", line)
        if match is None:
            lines.append(line)
            continue
        try:
            inner = find(match[2], [str(path.parent), *search_paths])
        except UserError as e:
            raise UserError(f"{path}:{number}: include: {e}") from e
        parts += [(path, "\n".join(lines)), *_read(inner, search_paths, (*seen, path))]
        lines = [""] * number
    return [*parts, (path, "\n".join(lines))]


def _parse(texts: Sequence[tuple[Source, str]]) -> None:
    gin.clear_config()
    configurables.bind_defaults()
    for source, text in texts:
        try:
            # Built-in modules may be imported by their short names.
            gin.parse_config(_IMPORT.sub(lambda m: m[1] + modules.full_name(m[2]), text))
        except (*_NO_LITERAL, TypeError, AttributeError, ImportError, TokenError) as e:
            raise UserError(f"{_place(source, text, _line(e))}: {_explain(e)}") from e


def _line(error: Exception) -> int | None:
    """The number of the line at which gin stopped."""
    if isinstance(error, TokenError):  # (what, (line, column)); the line after the last one
        return error.args[1][0] - 1
    said = re.search(r"^  In bindings string line (\d+)$", str(error), re.MULTILINE)
    return int(said[1]) if said else getattr(error, "lineno", None)


def _place(source: Source, text: str, line: int | None) -> str:
    """Where a line of a text is, for the user: FILE:LINE, or the flag."""
    if line and source == COMMAND_LINE:
        return f"--gin.{text.splitlines()[line - 1].partition('=')[0].strip()}"
    return f"{source}:{line}" if line else str(source)


def _imports(text: str) -> list[str]:
    return [name for _, name in _IMPORT.findall(text)]


def find(name: str, search_paths: Sequence[str]) -> Path:
    """The path of a gin file in the search paths.

    Raises:
        UserError: it is in none of them; the nearest names are given.
    """
    search_paths = list(dict.fromkeys(map(str, search_paths)))
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


def _check_macros(texts: Sequence[tuple[Source, str]]) -> None:
    everything = "\n".join([BASE_BINDINGS, *(text for _, text in texts)])
    read = set(re.findall(r"%([A-Za-z_]\w*)", everything))
    for source, text in texts:
        for found in re.finditer(r"^([A-Za-z_]\w*)\s*=(?!=)", text, re.MULTILINE):
            if (name := found[1]) not in read:
                where = _place(source, text, text.count("\n", 0, found.start()) + 1)
                raise UserError(f"{where}: nothing reads the macro {name!r}"
                                f"{did_you_mean(called(name)) or nearest(name, read)}")  # fmt: skip


def called(name: str) -> list[str]:
    """What can be bound by a name that was meant for it: `train_steps` is TRAIN_STEPS, and
    `learning_rate` OptimizerConfig.learning_rate."""
    if re.search(rf"^{name.upper()} = ", BASE_BINDINGS, re.MULTILINE):
        return [name.upper()]
    owners = [each for each in configurables.CLASSES if name in configurables.parameters(each)]
    return [f"{owner}.{name}" for owner in owners]


def _explain(error: Exception) -> str:
    """Gin's message in one line, with the nearest names."""
    if isinstance(error, TokenError):
        return "a bracket is not closed"
    message = re.sub(r" \(line \d+\)$", "", first_line(error)).rstrip(".")
    if message.startswith("malformed node"):  # a name where only values are; Python's words
        return (
            "a value is a number, True, False, None, or a text in quotes, such as 'text' or"
            " {'inputs': 64}"
        )
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
        return message + nearest(parameter[2], names)
    return message
