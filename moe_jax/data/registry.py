"""Reads SeqIO's registry: task modules, tasks, mixtures and their examples as NumPy arrays.

Importing this module imports SeqIO and TensorFlow (5 s and 1 GB). `prepare` and `tasks` do so, a
training process does not.

Metric and postprocess functions belong in a module without TensorFlow, because evaluation imports
it.
"""

import dataclasses
import functools
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging

from moe_jax.core.errors import UserError, first_line, nearest
from moe_jax.core.files import to_json
from moe_jax.core.user_code import what_failed
from moe_jax.data import declared, staleness
from moe_jax.data.modules import load_module, quiet, resolve

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with quiet():  # hides a dozen lines on CUDA and oneDNN
    import seqio
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # the training process uses the GPU
# SeqIO warns of uncached and unshuffled sources, but here sources are read once, in order.
logging.set_verbosity(logging.ERROR)

FEATURES = ("inputs", "targets")
Row = dict[str, Any]
_BATCH = 256  # examples per call into TensorFlow
_owners: dict[str, ModuleType] = {}  # task or mixture -> the module that registered it
_traces: dict[Any, tuple[seqio.Task, Any]] = {}


def load_task_modules(names: Sequence[str], named_by: str | os.PathLike = "") -> list[ModuleType]:
    """Imports modules that register tasks: dotted names or paths of .py files.

    Args:
        named_by: the file that names them, for errors.

    Raises:
        UserError: a module cannot or may not be imported, or registers a name that is taken.
    """
    modules = []
    for name in names:
        before = _registered()
        modules.append(load_module(name, named_by))
        _owners.update(dict.fromkeys(_registered() - before, modules[-1]))
    return modules


def _registered() -> set[str]:
    return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def find_tasks(name: str, modules: Sequence[ModuleType]) -> list[seqio.Task]:
    """Tasks of the mixture `name`, or the task itself, sorted by name.

    Raises:
        UserError: nothing is registered under the name; the message says why, or gives the nearest
            names.
    """
    if name in seqio.TaskRegistry.names():
        return [seqio.TaskRegistry.get(name)]
    if name in seqio.MixtureRegistry.names():
        return seqio.MixtureRegistry.get(name).tasks
    hints = (m.missing_hint(name) for m in modules if hasattr(m, "missing_hint"))
    if hint := next(filter(None, hints), None):
        raise UserError(hint)
    known = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
    raise UserError(
        f"no task or mixture {name!r} is registered by"
        f" {', '.join(m.__file__ or m.__name__ for m in modules) or 'any module'}"
        f"{nearest(name, known)}"
    )


def rates(name: str, examples: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Mixing rate of each task of `name`; `examples` are counts by task and split.

    Rates that are functions of the task, such as `seqio.mixing_rate_num_examples`, see these
    counts, and 0 for a split that a task lacks. A single task has rate 1.

    Raises:
        UserError: a function failed, or a rate is negative or not finite.
    """
    if name not in seqio.MixtureRegistry.names():
        return {name: 1.0}
    mixture = seqio.MixtureRegistry.get(name)
    for task in mixture.tasks:  # shadows the method until the rates are known
        task.num_input_examples = lambda split, counts=examples[task.name]: counts.get(split, 0)
    try:
        found = {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
    except ZeroDivisionError:  # of a mixture in it, all rates are 0: there is nothing to train on
        return dict.fromkeys((task.name for task in mixture.tasks), 0.0)
    except Exception as e:  # whatever the user's function raises
        raise UserError(f"mixture {name!r}: a rate cannot be computed: {what_failed(e)}") from e
    finally:
        for task in mixture.tasks:
            del task.num_input_examples
    for task, rate in found.items():
        if not 0 <= rate < math.inf:
            raise UserError(f"mixture {name!r}: the rate of {task!r} is {rate}, not a number >= 0")
    return found


def owners(name: str, modules: Sequence[ModuleType]) -> list[ModuleType]:
    """The modules that registered the task or mixture `name` or a part of it.

    All of them if this is not known (if it was registered before they were loaded).
    """
    if name in seqio.MixtureRegistry.names():
        parts = seqio.MixtureRegistry.get(name).rate_per_task_name
    else:
        parts = ()
    registering = [module for part in parts for module in owners(part, modules)]
    registering += [_owners[name]] if name in _owners else modules
    return [module for module in modules if module in registering]


def environment(names: Sequence[str], modules: Sequence[ModuleType]) -> dict[str, str | None]:
    """Environment variables that the modules of tasks or mixtures read, with their values.

    Raises:
        UserError: see `declared.variables`.
    """
    read = {name for task in names for m in owners(task, modules) for name in declared.variables(m)}
    return {name: os.environ.get(name) for name in sorted(read)}


def set_environment(variables: Mapping[str, str | None]) -> None:
    """Sets environment variables for task modules, as files of a run or a cache have them.

    Raises:
        UserError: it is one by which a program that starts would execute a file, or no name.
    """
    for name, value in variables.items():
        if "=" in name or re.fullmatch(r"(LD|DYLD)_.*|PYTHON.*|PATH", name):
            raise UserError(f"the environment variable {name} is not one of tasks")
        if value is not None:
            os.environ[name] = value


def data_files(task: seqio.Task, modules: Sequence[ModuleType]) -> list[str]:
    """Local files, directories and patterns that `task` reads, sorted, as far as can be told."""
    found = {
        str(path)
        for module in owners(task.name, modules)
        if hasattr(module, "data_files")
        for path in module.data_files(task.name)
    }
    source = task.source
    if isinstance(source, seqio.FileDataSource):
        for patterns in source._split_to_filepattern.values():
            found.update([patterns] if isinstance(patterns, str | Path) else patterns)
        found.update(file for split in source.splits for file in source.list_shards(split))
    elif isinstance(source, seqio.TfdsDataSource):
        found.add(os.path.join(source.tfds_dataset.builder.data_dir, "dataset_info.json"))
    elif isinstance(source, seqio.FunctionDataSource):
        partial = source._dataset_fn
        while isinstance(partial, functools.partial):
            values = [*partial.args, *partial.keywords.values()]
            paths = [str(v) for v in values if isinstance(v, str | Path)]
            found.update(p for p in paths if os.path.exists(p) or "/" in p)  # or a pattern
            partial = partial.func
    paths = {os.path.abspath(path) for path in found if str(path)}
    return sorted(path for path in paths if staleness.exists(path))


def reads_lengths(task: seqio.Task) -> bool:
    """Whether preprocessing depends on the lengths of features.

    SeqIO's `append_eos_after_trim` does not count: prepared examples are whole, and batches trim
    them in the same way.
    """
    return any(
        "sequence_length" in inspect.signature(preprocessor).parameters
        for preprocessor in task.preprocessors
        if preprocessor is not seqio.preprocessors.append_eos_after_trim
    )


def with_vocabulary(task: seqio.Task, vocabulary: seqio.Vocabulary) -> seqio.Task:
    """`task` with its inputs and targets tokenised by `vocabulary`."""
    check_features(task)
    features = {
        name: dataclasses.replace(feature, vocabulary=vocabulary) if name in FEATURES else feature
        for name, feature in task.output_features.items()
    }
    return task.replace(output_features=features)


def own_vocabularies(task: seqio.Task) -> tuple[seqio.Vocabulary, seqio.Vocabulary]:
    """The vocabularies that the inputs and the targets of `task` were registered with."""
    check_features(task)
    return tuple(task.output_features[name].vocabulary for name in FEATURES)


def check_features(task: seqio.Task) -> None:
    """Raises UserError where `task` is not text-to-text."""
    missing = [name for name in FEATURES if name not in task.output_features]
    if missing:
        raise UserError(f"task {task.name!r} has no output feature {' nor '.join(missing)}")


def load_vocabulary(
    settings: Mapping[str, Any], named_by: str | os.PathLike = ""
) -> seqio.Vocabulary:
    """The SeqIO vocabulary that `settings` describes: a factory's, or that of a task's feature.

    Args:
        named_by: the file of the settings, for errors.
    """
    if "factory" in settings:
        vocabulary = resolve(settings["factory"], named_by)()
        if not isinstance(vocabulary, seqio.Vocabulary):
            raise UserError(f"{settings['factory']} returns no seqio.Vocabulary: {vocabulary!r}")
        return vocabulary
    modules = load_task_modules(settings["task_modules"], named_by)
    task = find_tasks(settings["task"], modules)[0]
    return task.output_features[settings.get("feature", "inputs")].vocabulary


def read(
    task: seqio.Task, splits: Sequence[str], lengths: Mapping[str, int] | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """Yields (split, up to 256 examples as NumPy values), in order, without shuffling.

    Equals `task.get_dataset(split=..., sequence_length=lengths, shuffle=False)` per split, but
    whole (nothing is trimmed but by the task's own preprocessors), and faster:
    preprocessing is traced once for all tasks that share it, and the splits are read as one data
    set. Otherwise many small splits would spend most time in TensorFlow's graph building.

    Raises:
        UserError: no such split, or reading fails (the UserError that the source raised, or one
            with the first line of the failure).
    """
    unknown = [split for split in splits if split not in task.splits]
    if unknown:
        raise UserError(
            f"task {task.name!r} has no split {unknown[0]!r}; it has {', '.join(task.splits)}"
        )
    done = ""
    try:
        for number, batch in _joined(task, splits, lengths).as_numpy_iterator():
            done = splits[number]
            columns = batch.items()
            size = len(next(iter(batch.values())))
            yield done, [{key: column[i] for key, column in columns} for i in range(size)]
    except (tf.errors.OpError, OSError) as e:
        raise _user_error(e, f"task {task.name!r}, after split {done!r}") from e


def _joined(
    task: seqio.Task, splits: Sequence[str], lengths: Mapping[str, int] | None
) -> tf.data.Dataset:
    """One data set of all splits, with elements (index of the split, ragged batch)."""
    if not reads_lengths(task):
        lengths = None
    elif lengths is None:
        raise UserError(f"task {task.name!r}: preprocessing reads sequence_length; give lengths")
    preprocess = _trace(task, lengths)
    joined = None
    for number, split in enumerate(splits):
        try:
            raw = task.source.get_dataset(split=split, shuffle=False)
            if raw.cardinality() == tf.data.INFINITE_CARDINALITY:
                raise UserError(f"task {task.name!r}, split {split!r}: the source never ends")
            number = tf.constant(number, tf.int32)
            try:
                data = preprocess(raw, number)
            except UserError:
                raise
            except Exception:  # a preprocessor that only runs eagerly, or uses `if tensor:`
                data = _preprocess(task, lengths, raw, number)
        except Exception as e:  # of any kind: source and preprocessors may be the user's code
            raise _user_error(e, f"task {task.name!r}, split {split!r}") from e
        joined = data if joined is None else joined.concatenate(data)
    options = tf.data.Options()
    # For data that is read once, tuning and rewriting cost more than they save.
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    options.threading.private_threadpool_size = os.cpu_count() or 1
    return joined.with_options(options)


def _trace(task: seqio.Task, lengths: Mapping[str, int] | None) -> Any:
    """The task's preprocessing as a graph, shared by tasks with the same preprocessors."""
    features = [
        (name, id(getattr(feature, "vocabulary", None)), getattr(feature, "add_eos", None))
        for name, feature in task.output_features.items()
    ]
    key = (tuple(map(id, task.preprocessors)), tuple(features), str(lengths))
    if key not in _traces:
        # The task is kept alive because the key holds ids of its objects.
        inner = functools.partial(_preprocess, task, lengths)
        _traces[key] = task, tf.function(inner, autograph=False)
    return _traces[key][1]


def _preprocess(
    task: seqio.Task, lengths: Mapping[str, int] | None, raw: tf.data.Dataset, number: tf.Tensor
) -> tf.data.Dataset:
    data = task.preprocess_precache(raw, seed=0)
    data = task.preprocess_postcache(data, sequence_length=lengths, seed=0)
    data = task._validate_preprocessing(data)
    return data.ragged_batch(_BATCH).map(lambda batch: (number, batch))


def _user_error(error: Exception, where: str) -> UserError:
    """A one-line error; if TensorFlow wrapped a UserError of the source, that error."""
    if isinstance(error, UserError):
        return error
    wrapped = re.search(r"UserError: (.+)", str(error))
    if wrapped:
        return UserError(wrapped[1].strip())
    reason = first_line(error) if isinstance(error, tf.errors.OpError) else what_failed(error)
    return UserError(f"{where}: {reason}")


def text(row: Row, feature: str, vocabulary: seqio.Vocabulary) -> str:
    """The text of a feature: the text before tokenisation if the task keeps it."""
    value = row.get(f"{feature}_pretokenized")
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return vocabulary.decode([int(i) for i in row[feature]])


def choices(row: Row) -> tuple[str, ...]:
    """The texts that an answer is chosen from: feature `answer_choices` [n]; () without it."""
    return tuple(to_json(np.ravel(row.get("answer_choices", ()))))


def question(row: Row) -> int | None:
    """Which question a row is one choice of, in a task for rank classification: `idx` [2] is
    (question, choice), as the `rank_classification` preprocessors of T5 write it."""
    index = np.asarray(row.get("idx", ()))
    return int(index[0]) if index.shape == (2,) and index.dtype.kind in "iu" else None
