"""Code that a user wrote, among that of libraries: its files, and what went wrong in it."""

import re
import sysconfig
import traceback
from pathlib import Path

import moe_jax
from moe_jax.core.errors import first_line

_PACKAGE = Path(moe_jax.__file__).absolute().parent
# Includes the user's and the system's, which sysconfig leaves out in a virtual environment.
_INSTALLED = frozenset(("site-packages", "dist-packages"))
_AUTOGRAPH = "in user code:"  # how an error begins to which AutoGraph has added the user's lines
_GENERATED = "__autograph_generated_file"


def is_users(path: Path) -> bool:
    """Whether a source file is part of no library. The built-in tasks are like those of users."""
    if path.is_relative_to(_PACKAGE / "builtin_tasks"):
        return True
    if path.suffix != ".py" or not _INSTALLED.isdisjoint(path.parts):
        return False
    directories = [sysconfig.get_path(k) for k in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not any(map(path.is_relative_to, [_PACKAGE, *directories]))


def what_failed(error: BaseException) -> str:
    """An error of a user's code in one line: 'FILE:LINE: NameError: name 'x' is not defined'.

    The place is the last one that is in the user's code; there may be none.
    """
    text = str(error).strip()
    if text.startswith(_AUTOGRAPH):  # it ends with the error itself
        found = re.findall(r'File "([^"\n]+)", line (\d+)', text)
        what = text.splitlines()[-1].strip()
    else:
        found = [(at.filename, at.lineno) for at in traceback.extract_tb(error.__traceback__)]
        what = first_line(error)
        if isinstance(error, SyntaxError) and error.filename:
            found.append((error.filename, error.lineno))
            what = error.msg
        what = f"{type(error).__name__}: {what}".removesuffix(": ")
    places = [
        f"{file}:{line}: "
        for file, line in found
        if is_users(Path(file)) and not Path(file).name.startswith(_GENERATED)
    ]
    return "".join(places[-1:]) + what
