"""Lists, shows and checks the registered tasks.

    python -m moe_jax.tasks list | show NAME | check NAME

    list   every task by category, with splits and metrics, and every mixture
    show   the first examples of a task, as text and as tokens
    check  whether a task (or every task of a mixture) is usable: splits, features, metrics, lengths

Exit status 1 means that the command line is wrong or, for `check`, that a task is not usable.
"""

import argparse
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from moe_jax.core.ending import one_line
from moe_jax.core.errors import UserError, say
from moe_jax.data import declared
from moe_jax.data.modules import DEFAULT_TASK_MODULES, give
from moe_jax.metrics import METRICS

LENGTHS = {"inputs": 512, "targets": 64}  # of features, unless others are given

# `moe_jax.data.registry` imports TensorFlow (5 s): only inside functions, not for --help.


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    args.command(args, _load_modules(args.task_modules))


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--task_modules",
        metavar="MODULE,...",
        help="modules that register tasks: dotted names or .py files "
        f"(default: {','.join(DEFAULT_TASK_MODULES)})",
    )
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("name", metavar="NAME", help="a task or a mixture")
    one.add_argument(
        "--vocabulary",
        metavar="MODEL",
        help="a SentencePiece .model file (default: the task's own, mostly bytes)",
    )
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.tasks",
        description=__doc__.partition("\n")[0],
        epilog="See examples/README.md for a task of your own.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("list", parents=[shared], help="tasks by category, and mixtures")
    sub.add_argument("--category", help="only the tasks of this category")
    sub.set_defaults(command=_list)
    sub = commands.add_parser("show", parents=[one, shared], help="first examples, text and tokens")
    sub.add_argument("--split", help="default: train, or the first split")
    sub.add_argument("--examples", type=int, default=3, help="how many (default: 3)")
    sub.set_defaults(command=_show)
    sub = commands.add_parser("check", parents=[one, shared], help="is the task usable?")
    for feature, length in LENGTHS.items():
        help_ = f"default: {length} tokens"
        sub.add_argument(f"--{feature}_length", type=int, default=length, help=help_)
    sub.add_argument(
        "--examples", type=int, default=1000, help="at most this many per split (default: 1000)"
    )
    sub.set_defaults(command=_check)
    return parser


def _load_modules(names: str | None) -> list[ModuleType]:
    """Imports the task modules, the built-in ones unless others are named."""
    from moe_jax.data import registry

    chosen = DEFAULT_TASK_MODULES if names is None else list(filter(None, names.split(",")))
    give(chosen, "--task_modules")
    return registry.load_task_modules(chosen)


# ---- list ----


def _list(args: argparse.Namespace, modules: Sequence[ModuleType]) -> None:
    from moe_jax.data.calls import name_of
    from moe_jax.data.registry import seqio

    groups: dict[tuple[str, str], list[str]] = {}
    categories = declared.ontology(modules)
    for name in sorted(seqio.TaskRegistry.names()):
        groups.setdefault(categories.get(name, ("no category", "")), []).append(name)
    if args.category is not None:
        known = {category for category, _ in groups}
        if args.category not in known:
            raise UserError(f"no category {args.category!r}; there are: {', '.join(sorted(known))}")
        groups = {key: names for key, names in groups.items() if key[0] == args.category}
    for (category, subcategory), names in sorted(groups.items()):
        print(f"{category} / {subcategory}" if subcategory else category)
        for name in names:
            task = seqio.TaskRegistry.get(name)
            found = [*task.metric_fns, *task._metric_objs_constructor_args]
            scores = ", ".join(map(name_of, found)) or "no metric"
            print(f"  {name:<44} {scores:<18} {_short(task.splits)}")
    if args.category is None:
        listed = {name: n for m in modules for name, n in getattr(m, "LISTED", {}).items()}
        mixtures = sorted(seqio.MixtureRegistry.names())
        if mixtures:
            print("mixtures")
        for name in mixtures:
            of = f" of {listed[name]}" if name in listed else ""
            print(f"  {name:<70} {len(seqio.MixtureRegistry.get(name).tasks)}{of} tasks")
    print(f"{sum(map(len, groups.values()))} tasks")
    unset = [name for m in modules for name in declared.variables(m) if name not in os.environ]
    if not groups and unset:
        say(f"variables of these modules that are not set: {', '.join(unset)}")


def _short(splits: Sequence[str]) -> str:
    """`train validation test`, with the few-shot splits of all seeds summarised as one word."""
    plain = [split for split in splits if not split.startswith("fewshot_")]
    seeds = {split.split("_")[1] for split in splits if split.startswith("fewshot_")}
    return " ".join(plain) + (f" few-shot({len(seeds)} seeds)" if seeds else "")


# ---- show ----


def _show(args: argparse.Namespace, modules: Sequence[ModuleType]) -> None:
    from moe_jax.data import registry, task_functions
    from moe_jax.evaluation import checking

    if args.examples < 1:
        raise UserError("--examples must be at least 1")
    tasks = _find_tasks(args, modules)
    task = tasks[0]
    if task.name != args.name:
        print(f"{args.name}: a mixture of {len(tasks)} tasks, of which the first is shown below")
        print("".join(f"  {task.name}\n" for task in tasks))
    category = declared.ontology(modules).get(task.name, ("none",))
    print(f"{task.name}\n  category: {' / '.join(filter(None, category))}")
    if description := declared.descriptions(modules).get(task.name):
        print(f"  asks for: {description}")
    print(f"  splits:   {', '.join(task.splits)}")
    split = args.split or ("train" if "train" in task.splits else next(iter(task.splits), ""))
    rows = checking.first_rows(task, split, args.examples, LENGTHS)
    scored = checking.scored(task, rows, modules)
    print(f"  metrics:  {checking.scored_by(scored)}")
    for number, row in enumerate(rows, 1):
        print(f"example {number} of {split}")
        for feature in registry.FEATURES:
            vocabulary = task.output_features[feature].vocabulary
            ids = row[feature].tolist()
            tokens = [f"{i}:{vocabulary.decode([i])!r}" for i in ids[:40]]
            print(f"  {feature}: {registry.text(row, feature, vocabulary)}")
            print(f"    {len(ids)} tokens: {' '.join(tokens)}{' ...' * (len(ids) > 40)}")
        example = task_functions.example(task, row, scored.seqio is not None)
        print(f"  references: {example.references!r}")
        if example.choices:
            print(f"  choices: {', '.join(map(repr, example.choices))}")


# ---- check ----


def _check(args: argparse.Namespace, modules: Sequence[ModuleType]) -> None:
    from moe_jax.evaluation import checking

    if min(args.examples, args.inputs_length, args.targets_length) < 1:
        raise UserError("--examples, --inputs_length and --targets_length must be at least 1")
    limits = {"inputs": args.inputs_length, "targets": args.targets_length}
    failed = []
    for task in _find_tasks(args, modules):
        print(task.name)
        found = checking.check(task, limits, args.examples, modules, METRICS)
        for line in found.facts + [f"problem: {problem}" for problem in found.problems]:
            print(f"  {line}")
        print(f"  {'NOT USABLE' if found.problems else 'ok'}", flush=True)
        if found.problems:
            failed.append(f"{task.name}: {found.problems[0]}")
    if failed:
        more = f" (and {len(failed) - 1} more tasks)" if len(failed) > 1 else ""
        raise UserError(f"not usable: {failed[0]}{more}")


# ---- shared ----


def _find_tasks(args: argparse.Namespace, modules: Sequence[ModuleType]) -> list[Any]:
    """The tasks of the task or mixture `args.name`, with the vocabulary chosen."""
    from moe_jax.data import registry

    tasks = registry.find_tasks(args.name, modules)
    if args.vocabulary is None:
        for task in tasks:
            registry.check_features(task)
        return tasks
    if not os.path.isfile(args.vocabulary):
        raise UserError(f"--vocabulary {args.vocabulary}: no such file")
    vocabulary = registry.seqio.SentencePieceVocabulary(args.vocabulary)
    try:
        _ = vocabulary.vocab_size  # the file is read here
    except Exception as e:
        raise UserError(f"--vocabulary {args.vocabulary} is not a SentencePiece model") from e
    return [registry.with_vocabulary(task, vocabulary) for task in tasks]


if __name__ == "__main__":
    with one_line():
        main()
