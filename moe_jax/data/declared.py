"""What a task module says about its tasks, beside registering them when it is imported.

    ONTOLOGY = {category: {subcategory: [task names]}}
    DESCRIPTIONS = {task name: sentence}      what a task asks for, from which it can be routed
    PROMPTS = {dataset: [task names]}         tasks that are one dataset in other words
    ENVIRONMENT = ("VARIABLE", ...)           variables it reads
    data_files(task_name) -> [paths]          local files or directories that a task reads
    missing_hint(name) -> str | None          why a name is not registered

A module may have any of them, or none. The last two are functions, which `registry` calls.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from moe_jax.core.errors import UserError, shown
from moe_jax.data.modules import name_of


def descriptions(modules: Sequence[ModuleType]) -> dict[str, str]:
    """Task -> what it asks for, from the modules' DESCRIPTIONS.

    Raises:
        UserError: they are not sentences by name.
    """
    found = {}
    for module in modules:
        given = getattr(module, "DESCRIPTIONS", {})
        if not isinstance(given, Mapping):
            raise UserError(f"{name_of(module)}: DESCRIPTIONS must be {{task name: sentence}}")
        for name, text in given.items():
            if not (isinstance(name, str) and isinstance(text, str)):
                raise UserError(
                    f"{name_of(module)}: DESCRIPTIONS[{name!r}] is {text!r}, not a sentence"
                )
        found |= given
    return found


def ontology(modules: Sequence[ModuleType]) -> dict[str, tuple[str, str]]:
    """Task -> (category, subcategory), from the modules' ONTOLOGY.

    Raises:
        UserError: they are not names of tasks by category and subcategory.
    """
    return _grouped(modules, "ONTOLOGY", "{category: {subcategory: [task names]}}", 2)


def prompts(modules: Sequence[ModuleType]) -> dict[str, str]:
    """Task -> the dataset that it asks for in other words, from the modules' PROMPTS.

    Raises:
        UserError: they are not names of tasks by dataset.
    """
    found = _grouped(modules, "PROMPTS", "{dataset: [task names]}", 1)
    return {name: dataset for name, (dataset,) in found.items()}


def variables(module: ModuleType) -> Sequence[str]:
    """The environment variables that a module reads: its ENVIRONMENT.

    Raises:
        UserError: it is not a tuple of names.
    """
    names = getattr(module, "ENVIRONMENT", ())
    if not _are_names(names):
        raise UserError(
            f'{name_of(module)}: ENVIRONMENT is {shown(names)}; it must be ("VARIABLE", ...)'
        )
    return tuple(names)


def _grouped(modules: Sequence[ModuleType], name: str, form: str, levels: int) -> dict[str, tuple]:
    """Task -> the keys under which the modules' `name`, a mapping of such levels, lists it."""

    def flat(where: str, value: Any, levels: int) -> dict[str, tuple]:
        fits = isinstance(value, Mapping) and _are_names([*value]) if levels else _are_names(value)
        if not fits:
            raise UserError(f"{where} is {shown(value)}; {name} must be {form}")
        if not levels:
            return dict.fromkeys(value, ())
        return {
            task: (key, *keys)
            for key, inner in value.items()
            for task, keys in flat(f"{where}[{key!r}]", inner, levels - 1).items()
        }

    found = {}
    for module in modules:
        found |= flat(f"{name_of(module)}: {name}", getattr(module, name, {}), levels)
    return found


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)
