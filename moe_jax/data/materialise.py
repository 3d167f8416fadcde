"""Writes the cache: SeqIO tasks to ArrayRecord shards. Imports TensorFlow.

    python -m moe_jax.data.materialise JOB.json       started by `ensure_prepared`

Each task is written under a temporary name, then renamed. A killed run leaves only complete tasks,
and the next run writes the missing ones.
"""

import functools
import hashlib
import io
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from moe_jax.core import checksums, files, processes
from moe_jax.core.errors import UserError, say
from moe_jax.core.progress import progress
from moe_jax.data import cache, declared, modules, registry, staleness, task_functions
from moe_jax.data.example import Example
from moe_jax.data.materialise_vocabulary import is_replaced, is_whole, prepare_vocabulary
from moe_jax.data.registry import seqio  # not `import seqio`: this import is quiet
from moe_jax.data.request import FORMAT, Request
from moe_jax.data.sources import source_files

SHARD_BYTES = 1 << 27


def materialise(cache_dir: Path, request: Request) -> None:
    """Brings `cache_dir`, whose lock the caller holds, up to `request`.

    Raises:
        UserError: see `moe_jax.data.prepared.ensure_prepared`.
    """
    start = time.perf_counter()
    registry.set_environment(request.environment)
    for leftover in [
        *cache_dir.glob(f"tasks/*/.*{files.NEW}"),
        *cache_dir.glob(f"vocabularies/.*{files.NEW}"),
    ]:
        shutil.rmtree(leftover, ignore_errors=True)
    sources = _Sources(registry.load_task_modules(request.task_modules))
    mixtures = {name: registry.find_tasks(name, sources.modules) for name in request.names}
    tasks = {task.name: task for members in mixtures.values() for task in members}
    vocabulary_id, tokeniser = prepare_vocabulary(
        cache_dir, request, sources.modules, sources.digest, tasks
    )

    splits = {name: _chosen(task, request.splits) for name, task in tasks.items()}
    lengths = {n: request.lengths if registry.reads_lengths(t) else None for n, t in tasks.items()}
    directories = {
        name: f"tasks/{name}/"
        + checksums.digest([vocabulary_id, splits[name], sources.digest(task), lengths[name]])
        for name, task in tasks.items()
    }
    waiting = [name for name in tasks if not is_whole(cache_dir / directories[name])]
    examples = 0
    with progress(total=sum(len(splits[n]) for n in waiting), unit=" splits") as bar:
        for name in waiting:
            bar.set_description(f"prepare {name}", refresh=False)
            task = tasks[name]
            if tokeniser is not None:
                task = registry.with_vocabulary(task, tokeniser)
            with files.new_directory(cache_dir / directories[name]) as directory:
                spec = _write_task(directory, task, splits[name], lengths[name], sources, bar)
                spec |= {"vocabulary": vocabulary_id, "format": FORMAT}
                spec["category"], spec["subcategory"] = sources.ontology.get(name, ("", ""))
                spec["description"] = sources.descriptions.get(name, "")
                spec["dataset"] = sources.prompts.get(name, "")
                files.write_json(directory / cache.SPEC, spec)
                checksums.seal(directory)
            examples += sum(split["examples"] for split in spec["splits"].values())
    for name, members in mixtures.items():
        used = {task.name: directories[task.name] for task in members}
        mixture = _mixture(cache_dir, name, used, sources)
        mixture["replaced"] = [
            task.name for task in members if tokeniser is not None and is_replaced(task, tokeniser)
        ]
        behind = [name, *filter(None, [request.vocabulary.trained_on])]
        inputs = [*sources.files(behind), *request.vocabulary.files()]
        mixture["inputs"] = {path: sources.state(path) for path in inputs}
        mixture["environment"] = registry.environment(behind, sources.modules)
        read = [lengths[task.name] for task in members]
        mixture["lengths"] = next(filter(None, read), None)
        mixture |= {"vocabulary": vocabulary_id, "format": FORMAT}
        cache.write_mixture(request.path(cache_dir, name), mixture)
    if waiting:
        seconds = time.perf_counter() - start
        print(f"prepared {len(waiting)} tasks, {examples:,} examples, in {seconds:.1f} s in"
              f" {cache_dir}", file=sys.stderr)  # fmt: skip


def _chosen(task: seqio.Task, wanted: Sequence[str] | None) -> list[str]:
    splits = [split for split in task.splits if wanted is None or split in wanted]
    if not splits:
        raise UserError(
            f"task {task.name!r} has none of the splits {', '.join(wanted or ())}"
            f"; it has {', '.join(task.splits) or 'none'}"
        )
    return splits


class _Sources:
    """The sources of the tasks: modules, files, environment variables."""

    def __init__(self, modules: Sequence[ModuleType]):
        self.modules = modules
        self._code = {module.__name__: source_files(module) for module in modules}
        # As it is before the tasks are read: what changes meanwhile is noticed.
        self.state = functools.cache(staleness.state)
        self.ontology = declared.ontology(modules)
        self.descriptions = declared.descriptions(modules)
        self.prompts = declared.prompts(modules)

    def files(self, names: Sequence[str]) -> list[str]:
        """Files and directories that decide what the tasks or mixtures `names` hold, sorted."""
        found = set()
        for name in names:
            for module in registry.owners(name, self.modules):
                found.update(self._code[module.__name__])
                for variable in declared.variables(module):
                    if path := os.environ.get(variable):
                        # Of a directory, a module may say itself which files a task reads.
                        alone = os.path.isdir(path) and hasattr(module, "data_files")
                        found.add(os.path.abspath(path) + "/" * alone)
            for task in registry.find_tasks(name, self.modules):
                found.update(registry.data_files(task, self.modules))
        return sorted(path for path in found if staleness.exists(path))

    def digest(self, task: seqio.Task) -> str:
        """Hash of the code and data of one task."""
        paths = self.files([task.name])
        contents = [(os.path.basename(path.rstrip("/")), self.state(path)[1]) for path in paths]
        environment = registry.environment([task.name], self.modules)
        return checksums.digest([FORMAT, environment, contents])


# ---- tasks ----


def _write_task(
    directory: Path,
    task: seqio.Task,
    splits: Sequence[str],
    lengths: Mapping[str, int] | None,
    sources: "_Sources",
    bar: tqdm,
) -> dict[str, Any]:
    """Writes the shards of all splits; returns the spec."""
    eos = registry.own_vocabularies(task)[1].eos_id
    outside: Counter[str] = Counter()  # split -> targets that no answer can be
    spec: dict[str, Any] = {}
    writers: dict[str, _SplitWriter] = {}
    for split, rows in registry.read(task, splits, lengths):
        spec = spec or task_functions.scoring(task, rows, sources.modules)
        if split not in writers:
            writers[split] = _SplitWriter(directory, split)
            bar.update(len(writers) > 1)
        writer = writers[split]
        for row in rows:
            example = task_functions.example(task, row, spec["seqio"] is not None)
            where = f"task {task.name!r}, split {split!r}, example {len(writer.lengths)}"
            if not len(example.inputs) or not len(example.targets):
                raise UserError(f"{where}: inputs or targets have no tokens")
            if eos is not None and example.targets[-1] != eos:
                raise UserError(
                    f"{where}: targets do not end in EOS; add seqio.preprocessors.append_eos"
                )
            outside[split] += bool(example.choices) and example.targets_text not in example.choices
            try:
                writer.write(example, registry.question(row))
            except OverflowError as e:
                raise UserError(f"{where}: {e}") from e
        done = sum(len(w.lengths) for w in writers.values())
        bar.set_postfix_str(f"{done:,} examples", refresh=False)
    bar.update(1)
    for split in splits:
        if split not in writers:
            raise UserError(f"task {task.name!r}: split {split!r} is empty")
        if outside[split]:
            count = outside[split]
            say(f"task {task.name!r}: {count} targets of {split} are not among their choices")
    return spec | {"splits": {split: writers[split].close() for split in splits}}


class _SplitWriter:
    """Writes one split's shards and lengths, a new shard every SHARD_BYTES."""

    def __init__(self, directory: Path, split: str):
        self.directory = directory
        self.split = split
        self.lengths: list[tuple[int, int]] = []
        self._questions: list[int | None] = []
        self._hash = hashlib.sha256()
        self._shards: list[Path] = []
        self._writer = None
        self._room = 0

    def write(self, example: Example, question: int | None) -> None:
        record = example.to_bytes()
        if self._room <= 0:
            self._next_shard()
        self._writer.write(record)
        self._room -= len(record)
        self._hash.update(len(record).to_bytes(8, "little") + record)
        self.lengths.append((len(example.inputs), len(example.targets)))
        self._questions.append(question)

    def _next_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._shards.append(self.directory / f"{self.split}-{len(self._shards):05d}")
        # One record per chunk, because reads are random. Such short text hardly compresses anyway.
        self._writer = ArrayRecordWriter(str(self._shards[-1]), "group_size:1,uncompressed")
        self._room = SHARD_BYTES

    def close(self) -> dict[str, Any]:
        """Gives the shards their final names; returns the split's entry in the spec."""
        self._writer.close()
        shards = []
        for path in self._shards:
            path = path.rename(f"{path}-of-{len(self._shards):05d}.array_record")
            shards.append((path.name, path.stat().st_size))
        numbers = {"lengths": self.lengths}
        if None not in self._questions:
            # Only which are equal counts; their own numbers may be larger than int32.
            numbers["questions"] = np.unique(self._questions, return_inverse=True)[1]
        for name, values in numbers.items():
            content = io.BytesIO()  # NumPy does not tell why it could not write to a file
            np.save(content, np.array(values, np.int32), allow_pickle=False)
            (self.directory / f"{self.split}.{name}.npy").write_bytes(content.getvalue())
        return {
            "examples": len(self.lengths),
            "fingerprint": self._hash.hexdigest()[:16],
            "shards": shards,
        }


# ---- mixtures ----


def _mixture(
    cache_dir: Path, name: str, directories: Mapping[str, str], sources: _Sources
) -> dict[str, Any]:
    """The content of the mixture's file, without its sources."""
    counts = {}
    for task, directory in directories.items():
        splits = files.read_json(cache_dir / directory / cache.SPEC)["splits"]
        counts[task] = {split: facts["examples"] for split, facts in splits.items()}
    rates = registry.rates(name, counts)
    ontology: dict[str, dict[str, list[str]]] = {}
    for task, (category, subcategory) in sources.ontology.items():
        if task in directories:
            ontology.setdefault(category, {}).setdefault(subcategory, []).append(task)
    return {
        "name": name,
        "tasks": [{"name": n, "rate": rates[n], "dir": d} for n, d in directories.items()],
        "ontology": ontology,
    }


def _child(job_file: str) -> int:
    """Runs a job; a UserError goes to the file that the parent reads, which reports it once.

    Stopped by a signal, it clears away what is half written; the parent says so.
    """
    processes.end_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    job = files.read_json(job_file)
    if job["given"] is not None:
        modules.give(job["given"])
    try:
        materialise(Path(job["cache_dir"]), Request.from_json(job["request"]))
    except UserError as e:
        files.write_text(job["error"], str(e))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
