"""The meaning, range and default of settings, for `--help`."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator

from absl.flags import Flag

from moe_jax.core.configuration import Configuration, describe, hints
from moe_jax.runs.config import BASE_BINDINGS

MACROS = {
    "MODEL_DIR": "the run's directory",
    "MIXTURE_OR_TASK_NAME": "what to train on, or to score",
    "TASK_MODULES": "modules that register tasks: dotted names or .py files",
    "TASK_FEATURE_LENGTHS": "{'inputs': N, 'targets': N}, tokens in a row",
    "TRAIN_STEPS": "optimizer steps in all",
    "BATCH_SIZE": "rows per batch, each packed with examples of one task",
    "EVAL_PERIOD": "steps between dev scores; 0 for none",
    "EVAL_MIXTURES": "mixtures of the dev scores, in place of what is trained on",
    "CHECKPOINT_PERIOD": "steps between checkpoints",
    "INITIAL_CHECKPOINT_PATH": "a run whose backbone this one starts from",
    "ROUTER_CHECKPOINT_PATH": "a run whose router and task representations it starts from",
    "DENSE_DIR": "few-shot adaptation: the dense multi-task run",
    "MOE_DIR": "few-shot adaptation: the mixture of experts",
    "CACHE_DIR": "where prepared data lives",
    "EXTENSIONS": "modules or .py files that register routers, selections, families or metrics",
    "SEED": "the seed of everything",
}


def field_docs(cls: type) -> dict[str, str]:
    """Field -> its text in the docstring's `Attributes` section, for documented fields."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    result = {}
    for block in re.split(r"\n(?=    \S)", section.rstrip()):
        head, colon, text = textwrap.dedent(block).partition(":")
        if colon:
            for name in head.split(","):
                result[name.strip()] = " ".join(text.split())
    return {f.name: result[f.name] for f in dataclasses.fields(cls) if f.name in result}


def settings(cls: type[Configuration]) -> Iterator[str]:
    """Lines of help for a tree of configurations."""
    types, docs, inner, own = hints(cls), field_docs(cls), [], []
    for field in dataclasses.fields(cls):
        hint = types[field.name]
        if dataclasses.is_dataclass(hint):
            inner.append(hint)
            continue
        default = "" if field.default is dataclasses.MISSING else f"; default: {field.default!r}"
        text = f"{docs.get(field.name, '')} ({describe(hint)}{default})"
        own += [f"  --gin.{cls.called}.{field.name}", _indented(text)]
    if own:
        yield "\n".join([f"{cls.called}:", *own, ""])
    for each in inner:
        yield from settings(each)


def macros() -> str:
    """Lines of help for T5X's macros, with their defaults."""
    width = max(map(len, MACROS))
    defaults = dict(re.findall(r"^(\w+) = (.{1,60})$", BASE_BINDINGS, re.MULTILINE))
    lines = []
    for name, text in MACROS.items():
        default = defaults.get(name, "None")  # that of TASK_MODULES is too long
        more = "" if default == "None" else f" (default: {default})"
        lines.append(f"  --gin.{name:<{width}}  {text}{more}")
    return "\n".join(lines)


def flags(own: Iterable[Flag]) -> str:
    """Lines of help for flags, with their defaults."""
    lines = []
    for flag in own:
        text = flag.help.partition(";\n")[0]  # absl says of a list that it is one
        default = f" (default: {flag.default_as_str})" if flag.default else ""
        lines += [f"  --{flag.name}", _indented(f"{text}{default}")]
    return "\n".join(lines)


def _indented(text: str) -> str:
    indent = " " * 8
    return textwrap.fill(
        text, 92, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
