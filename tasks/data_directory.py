"""Directories of data that an environment variable names."""

import os
from pathlib import Path

from moe_jax.core import paths
from moe_jax.core.errors import UserError


def data_directory(variable: str) -> Path | None:
    """The directory that `variable` names, or None where it is unset or empty.

    Raises:
        UserError: it is no directory.
    """
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value)
    if not path.is_dir():
        raise UserError(f"{variable}={value}: no such directory")
    return path


def absolute(**given: str | None) -> dict[str, str]:
    """Environment variables for the paths that are given, made absolute.

    Raises:
        UserError: one is a URL.

    Settings are passed as environment variables, because tasks are registered in a child process
    (which imports TensorFlow), where gin is not configured.
    """
    return {
        name: os.path.abspath(paths.local(path)) for name, path in given.items() if path is not None
    }
