"""Reads the cache that `prepare` wrote, without TensorFlow or SeqIO.

    CACHE/vocabularies/<id>/vocabulary.json, sentencepiece.model
    CACHE/tasks/<task>/<id>/spec.json, <split>-00000-of-0000N.array_record, <split>.lengths.npy,
        <split>.questions.npy (only where several rows are one question)
    CACHE/mixtures/<mixture>-<key>.json

A mixture's file lists its tasks' directories and the source files that they came from, so that a
process without TensorFlow can see that it is stale. Nothing is ever changed in place. Everything
has checksums: what is damaged is prepared again.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from moe_jax.core import checksums, files, paths
from moe_jax.core.checksums import digest
from moe_jax.core.errors import UserError, nearest, say
from moe_jax.data import staleness
from moe_jax.data.example import Example
from moe_jax.data.modules import resolve
from moe_jax.data.request import Request
from moe_jax.data.vocabulary import FILE as VOCABULARY_FILE
from moe_jax.data.vocabulary import Vocabulary, load_vocabulary

SPEC = "spec.json"


class Records(Sequence[Example]):
    """Random access to a split's examples. A damaged shard raises a UserError that names it."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = [str(path) for path in paths]
        with self._named_errors():
            self._source = grain.sources.ArrayRecordDataSource(self._paths)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.take([index])[0]

    def take(self, indices: Sequence[int]) -> list[Example]:
        """Examples at `indices`."""
        with self._named_errors():
            # One by one, because the source's own `__getitems__` starts threads and takes ten times
            # as long.
            return [Example.from_bytes(self._source[int(i)]) for i in indices]

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # ArrayRecord, msgpack and absl raise many types
            names = ", ".join(self._paths)
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise UserError(
                f"missing or damaged shard in {names} ({reason}); start again to have it prepared"
                " again"
            ) from e


@dataclasses.dataclass(frozen=True)
class Split:
    """A split: number of examples, hash of the records, (file name, bytes) of each shard."""

    examples: int
    fingerprint: str
    shards: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class SeqioScoring:
    """What it takes to score a task as SeqIO does; see `moe_jax.evaluation.by_seqio`.

    Attributes:
        task_modules: the modules that register the task.
        environment: the variables that they read, with their values.
        outputs: what the metrics take: `prediction`, `score`, `prediction_with_aux`.
    """

    task_modules: tuple[str, ...]
    environment: Mapping[str, str | None]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """One task of a mixture.

    Attributes:
        name: as registered with SeqIO.
        category, subcategory: from the task module's ONTOLOGY; '' without one.
        description: from the task module's DESCRIPTIONS; '' without one.
        directory: directory of its shards.
        rate: SeqIO's mixing rate, resolved to a number.
        splits: by name.
        metrics: 'module:function' of each metric of (targets, predictions).
        score_metrics: the same, of (targets, scores).
        postprocess: 'module:function' or None.
        dataset: name of the dataset that this task is one prompt of; '' if none.
        seqio: how SeqIO scores it; None where the functions named above do, without SeqIO.
    """

    name: str
    category: str
    subcategory: str
    description: str
    directory: Path
    rate: float
    splits: dict[str, Split]
    metrics: tuple[str, ...]
    score_metrics: tuple[str, ...]
    postprocess: str | None
    dataset: str
    seqio: SeqioScoring | None = None

    @property
    def outputs(self) -> frozenset[str]:
        """What of a model its metrics take, as in `SeqioScoring`; empty without metrics."""
        if self.seqio is not None:
            return frozenset(self.seqio.outputs)
        kinds = {"prediction": self.metrics, "score": self.score_metrics}
        return frozenset(kind for kind, metrics in kinds.items() if metrics)

    def split(self, name: str) -> Split:
        if name not in self.splits:
            near = nearest(name, self.splits)
            raise UserError(
                f"task {self.name!r} has no split {name!r}; it has {', '.join(self.splits)}{near}"
            )
        return self.splits[name]

    def examples(self, split: str) -> int:
        """Number of examples."""
        return self.split(split).examples

    def lengths(self, split: str) -> np.ndarray:
        """int32 [n, 2]: tokens of inputs and targets with EOS, before any truncation."""
        return self._numbers(split, "lengths", (2,))

    def questions(self, split: str) -> np.ndarray:
        """int32 [n]: the question that each example belongs to.

        Examples of one question are scored together or not at all: in a task for rank
        classification they are its choices. Elsewhere each is a question of its own.
        """
        if not (self.directory / f"{split}.questions.npy").exists():
            return np.arange(self.examples(split), dtype=np.int32)
        return self._numbers(split, "questions", ())

    def _numbers(self, split: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The array [n, *shape] beside the shards."""
        examples = self.examples(split)
        path = self.directory / f"{split}.{name}.npy"
        try:
            numbers = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"missing or damaged {path} ({e})") from e
        if numbers.shape != (examples, *shape):
            raise UserError(f"{path} holds {len(numbers)} {name}, not {examples}")
        return numbers

    def records(self, split: str) -> Records:
        """The examples, in the order of the source.

        Raises:
            UserError: no such split, or a shard is missing or damaged; the message names it.
        """
        for name, size in self.split(split).shards:
            path = self.directory / name
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                state = "is missing" if actual is None else f"has {actual} bytes, not {size}"
                raise UserError(f"shard {path} {state}; start again to have it prepared again")
        return Records([self.directory / name for name, _ in self.split(split).shards])

    def metric_fns(self) -> list[Callable[[list, list], Mapping[str, float]]]:
        """Metric functions `(targets, predictions) -> {name: value}`."""
        return [self._function(reference) for reference in self.metrics]

    def score_metric_fns(self) -> list[Callable[[list, list], Mapping[str, float]]]:
        """Metric functions `(targets, scores) -> {name: value}`.

        A score is the log-likelihood of an example's target, summed over its tokens.
        """
        return [self._function(reference) for reference in self.score_metrics]

    def postprocess_fn(self) -> Callable[..., Any] | None:
        """The function that turns a decoded prediction into what the metrics take."""
        return self._function(self.postprocess) if self.postprocess else None

    def _function(self, reference: str) -> Callable[..., Any]:
        return resolve(reference, self.directory / SPEC)


@dataclasses.dataclass(frozen=True)
class PreparedMixture:
    """A mixture, or a single task treated as one, in the cache.

    Attributes:
        name: as registered.
        tasks: sorted by name; this order is the default task table.
        ontology: {category: {subcategory: [task names]}} of these tasks, in the module's order.
        vocabulary_dir: directory of the vocabulary, which all its tasks share.
        fingerprint: hash of all splits' records, the rates and the vocabulary.
        replaced: tasks that were registered with another vocabulary.
    """

    name: str
    tasks: tuple[PreparedTask, ...]
    ontology: dict[str, dict[str, list[str]]]
    vocabulary_dir: Path
    fingerprint: str
    replaced: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return load_vocabulary(self.vocabulary_dir)

    def task(self, name: str) -> PreparedTask:
        """The task called `name`.

        Raises:
            UserError: the mixture has no such task; the message gives the nearest names.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise UserError(f"mixture {self.name!r} has no task {name!r}{nearest(name, self.names)}")

    def with_split(self, split: str) -> list[PreparedTask]:
        """The tasks that have a split.

        Raises:
            UserError: there is none; the message gives the splits that there are.
        """
        tasks = [task for task in self.tasks if split in task.splits]
        if not tasks:
            known = sorted({name for task in self.tasks for name in task.splits})
            raise UserError(
                f"no task of {self.name} has a split {split!r}{nearest(split, known)} "
                f"(there are {', '.join(known)})"
            )
        return tasks


def _mixture(cache_dir: Path, stored: Mapping[str, Any]) -> PreparedMixture:
    """What a prepared mixture's file says, and the spec of each of its tasks."""
    vocabulary_dir = cache_dir / "vocabularies" / stored["vocabulary"]
    places = [(cache_dir / entry["dir"], entry["rate"]) for entry in stored["tasks"]]
    tasks = tuple(task_of(files.read_json(place / SPEC), place, rate) for place, rate in places)
    content = [
        files.read_json(vocabulary_dir / VOCABULARY_FILE)["fingerprint"],
        [(t.name, t.rate, {s: split.fingerprint for s, split in t.splits.items()}) for t in tasks],
    ]
    return PreparedMixture(
        stored["name"],
        tasks,
        stored["ontology"],
        vocabulary_dir,
        digest(content),
        tuple(stored["replaced"]),
    )


def task_of(spec: Mapping[str, Any], directory: Path, rate: float) -> PreparedTask:
    """The task that a `spec.json` describes."""
    return PreparedTask(
        name=spec["task"],
        category=spec["category"],
        subcategory=spec["subcategory"],
        description=spec["description"],
        directory=directory,
        rate=rate,
        splits={
            name: Split(s["examples"], s["fingerprint"], tuple(map(tuple, s["shards"])))
            for name, s in spec["splits"].items()
        },
        metrics=tuple(spec["metrics"]),
        score_metrics=tuple(spec["score_metrics"]),
        postprocess=spec["postprocess"],
        dataset=spec["dataset"],
        seqio=spec["seqio"] and SeqioScoring(**spec["seqio"]),
    )


def find(
    cache_dir: str | os.PathLike, request: Request, name: str, quiet: bool = False
) -> PreparedMixture | None:
    """The prepared mixture `name` of `request`, or None where it is missing, stale or damaged.

    Args:
        quiet: does not say what is damaged.
    """
    cache_dir = paths.parse(cache_dir)
    path = request.path(cache_dir, name)
    if not path.is_file():
        return None
    stored, problem = _read_sealed(path)
    if stored is not None:
        places = [cache_dir / directory for directory in directories(stored)]
        if not all(place.is_dir() for place in places):
            return None
        problems = map(checksums.damage, places)
        problem = next(filter(None, problems), None)
    if problem is not None:
        if not quiet:
            say(f"damaged, and prepared again: {problem}")
        return None
    environment = {**os.environ, **request.environment}
    if any(environment.get(k) != v for k, v in stored["environment"].items()):
        return None
    if stored["lengths"] not in (None, request.lengths):
        return None
    if any(staleness.changed(source, state) for source, state in stored["inputs"].items()):
        return None
    return _mixture(cache_dir, stored)


def directories(stored: Mapping[str, Any]) -> list[str]:
    """The directories of the cache that a prepared mixture's file names."""
    return [f"vocabularies/{stored['vocabulary']}", *(task["dir"] for task in stored["tasks"])]


def read_mixture(cache_dir: str | os.PathLike, path: Path) -> PreparedMixture:
    """The mixture of one file of a cache, whatever has become of what it was made from.

    Raises:
        UserError: the file is damaged.
    """
    stored, problem = _read_sealed(path)
    if stored is None:
        raise UserError(f"damaged: {problem}")
    return _mixture(Path(cache_dir), stored)


def write_mixture(path: Path, stored: Mapping[str, Any]) -> None:
    """Writes a prepared mixture's file, with a digest of its own."""
    files.write_json(path, {**stored, "digest": digest(stored)})


def _read_sealed(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(what `write_mixture` wrote, None), or (None, what is wrong with the file)."""
    try:
        stored = files.read_json(path)
    except UserError as e:
        return None, str(e)
    if isinstance(stored, dict) and stored.pop("digest", None) == digest(stored):
        return stored, None
    return None, f"{path} is not what was written"
