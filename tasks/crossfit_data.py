"""CrossFit's NLP Few-shot Gym on disk: names, partitions, file layout, lines. No TensorFlow here.

Facts about the 160 tasks (metric, category, subcategory) and the eight published partitions are in
`crossfit_tasks.json` and `crossfit_partitions.json` beside this file (Ye, Lin & Ren, *CrossFit*,
EMNLP 2021, arXiv 2104.08835). The tasks' descriptions there are this project's own; tasks that ask
for the same are described in the same words. The data is the user's:

    few-shot  DIR/<task>/<task>_<k>_<seed>_{train,dev,test}.tsv       CROSSFIT_DIR
    full      DIR/<task>/{train,test}.tsv                             CROSSFIT_FULL_DIR

A line is `input<TAB>output[<TAB>other valid output ...]` in UTF-8: split at tabs and nothing else,
so quotes are part of the text. A last line without newline, CRLF line ends and a byte order mark
are accepted.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gin

from moe_jax.core.errors import UserError, nearest, shown
from moe_jax.core.files import read_json

from .data_directory import absolute, data_directory

FACTS = Path(__file__).with_name("crossfit_tasks.json")
TASKS: dict[str, dict[str, str]] = read_json(FACTS)
PUBLISHED = {
    name: {
        # The published train_non_nli_test_nli has `sick` in both train and dev; here only in dev.
        "train": [task for task in lists["train"] if task not in lists["dev"] + lists["test"]],
        "dev": lists["dev"],
        "test": lists["test"],
    }
    for name, lists in read_json(Path(__file__).with_name("crossfit_partitions.json")).items()
}

DATA_DIR, FULL_DIR, PARTITION = "CROSSFIT_DIR", "CROSSFIT_FULL_DIR", "CROSSFIT_PARTITION"

_FEW_SHOT_FILE = re.compile(r"_(\d+)_(\d+)_(train|dev|test)\.tsv")
_MAX_HELD_OUT = 500

Splits = Mapping[str, Sequence[Path]]
Example = tuple[str, ...]  # input, output, other valid outputs


@gin.configurable("crossfit")
def settings(
    data_dir: str | None = None, full_dir: str | None = None, partition: str | None = None
) -> dict[str, str]:
    """The gin settings as environment variables: {"CROSSFIT_DIR": absolute path, ...}."""
    return absolute(**{DATA_DIR: data_dir, FULL_DIR: full_dir, PARTITION: partition})


def directory(variable: str) -> Path | None:
    """The directory that `variable` names, or None where it is unset or empty.

    Raises:
        UserError: it is not a directory, or contains no CrossFit task.
    """
    path = data_directory(variable)
    if path is not None and not present(path):
        inside = next((d for d in sorted(path.iterdir()) if d.is_dir() and present(d)), None)
        raise UserError(
            f"{variable}={path}: holds no directory named as a CrossFit task (such as ag_news)"
            + (f"; give {inside}" if inside else "")
        )
    return path


def present(path: Path) -> list[str]:
    """Names of the tasks that have a directory in `path`, by category, subcategory and name."""
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.name in TASKS and e.is_dir()]
    return sorted(names, key=lambda t: (TASKS[t]["category"], TASKS[t]["subcategory"], t))


def partitions() -> dict[str, dict[str, list[str]]]:
    """Partition name -> {"train" | "dev" | "test": task names}, the three lists disjoint.

    The published ones and, under its file name, the one that CROSSFIT_PARTITION gives.

    Raises:
        UserError: the given partition is not {"train": [names], "dev": ..., "test": ...}, names
            an unknown task, or has one task in two lists.
    """
    path = os.environ.get(PARTITION)
    if not path:
        return PUBLISHED
    name = re.sub(r"\W", "_", Path(path).stem)
    if name in PUBLISHED or name.partition("_")[0] in ("full", "prompts"):
        raise UserError(f"{PARTITION}={path}: the name {name!r} is taken; rename the file")
    return PUBLISHED | {name: _checked_partition(path)}


def _checked_partition(path: str) -> dict[str, list[str]]:
    given = read_json(path)
    if not isinstance(given, dict) or not all(
        isinstance(given.get(part), list) for part in ("train", "dev", "test")
    ):
        raise UserError(f'{path}: must be {{"train": [task names], "dev": [...], "test": [...]}}')
    lists: dict[str, list[str]] = {part: given[part] for part in ("train", "dev", "test")}
    where: dict[str, str] = {}
    for part, names in lists.items():
        for task in names:
            if not isinstance(task, str) or task not in TASKS:
                raise UserError(f"{path}: unknown task {shown(task)}{nearest(shown(task), TASKS)}")
            if task in where:
                raise UserError(f"{path}: {task!r} is in {where[task]!r} and again in {part!r}")
            where[task] = part
    return lists


def few_shot_splits(path: Path, task: str) -> dict[str, list[Path]]:
    """Split name -> files of `task`, from the listing of its directory alone.

    `train` and `validation` take the files of all seeds (as CrossFit's multi-task training does),
    `test` that of the first seed; `fewshot_<seed>_train` and `fewshot_<seed>_validation` are one
    seed's. A split without files is absent.

    Raises:
        UserError: the directory holds files of more than one k.
    """
    by_part: dict[str, dict[int, Path]] = {"train": {}, "dev": {}, "test": {}}
    shots = set()
    for file in (path / task).iterdir():
        match = _FEW_SHOT_FILE.fullmatch(file.name.removeprefix(task))
        if match:
            k, seed, part = match.groups()
            shots.add(int(k))
            by_part[part][int(seed)] = file
    if len(shots) > 1:
        raise UserError(
            f"{path / task}: files of several k ({', '.join(map(str, sorted(shots)))}); "
            "keep one k per directory"
        )
    splits: dict[str, list[Path]] = {}
    for part, name in (("train", "train"), ("dev", "validation")):
        seeds = sorted(by_part[part])
        splits[name] = [by_part[part][seed] for seed in seeds]
        splits |= {f"fewshot_{seed}_{name}": [by_part[part][seed]] for seed in seeds}
    splits["test"] = [by_part["test"][seed] for seed in sorted(by_part["test"])[:1]]
    return {name: files for name, files in splits.items() if files}


def full_splits(path: Path, task: str) -> dict[str, list[Path]]:
    """Split name -> files of `task`; `train` and `validation` share a file, see `read_full`."""
    train, test = path / task / "train.tsv", path / task / "test.tsv"
    splits = {"train": [train], "validation": [train], "test": [test]}
    return {name: files for name, files in splits.items() if files[0].is_file()}


def read_few_shot(splits: Splits, split: str) -> list[Example]:
    """Examples of a few-shot split, in order.

    `train` and `validation` unite the seeds' files, each distinct line once; `validation` also
    leaves out what is in `train`, because one seed's dev lines are another seed's train lines.
    Every other split is one file as it stands.

    Raises:
        UserError: see `read_tsv`; or nothing is left of `validation`.
    """
    if split not in ("train", "validation"):
        return read_tsv(splits[split][0])
    examples = _union(splits[split])
    if split == "validation":
        seen = set(_union(splits.get("train", ())))
        examples = [e for e in examples if e not in seen]
        if not examples:
            raise UserError(
                f"{splits[split][0].parent}: every dev line is also a train line of some seed"
            )
    return examples


def read_full(splits: Splits, split: str) -> list[Example]:
    """Examples of a full-size split, in the order of its file.

    `validation` is a tenth of the distinct training lines, at most 500, chosen by a hash of the
    line, so that it depends neither on the order of the file nor on a seed; `train` is the rest.

    Raises:
        UserError: see `read_tsv`; or the file is too short to hold lines out.
    """
    examples = read_tsv(splits[split][0])
    if split == "test":
        return examples
    distinct = sorted(set(examples), key=_digest)
    count = min(len(distinct) // 10, _MAX_HELD_OUT)
    if not count:
        raise UserError(f"{splits[split][0]}: needs 10 distinct lines to hold out validation")
    held_out = set(distinct[:count])
    return [e for e in examples if (e in held_out) == (split == "validation")]


def read_tsv(path: Path) -> list[Example]:
    """Reads a file of `input<TAB>output[<TAB>other outputs]` lines; empty other outputs are
    dropped.

    Raises:
        UserError: missing or empty file; or, with the line number, a line without a tab, with an
            empty input or first output, or not in UTF-8.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8").removeprefix("\ufeff")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8 ({e.reason})") from e
    if not text:
        raise UserError(f"{path}: the file is empty")
    examples = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) < 2:
            raise UserError(f"{path}:{number}: no tab; a line is input<TAB>output")
        if not fields[0] or not fields[1]:
            what = "output" if fields[0] else "input"
            raise UserError(f"{path}:{number}: empty {what}; a line is input<TAB>output")
        examples.append((*fields[:2], *filter(None, fields[2:])))
    return examples


def _union(paths: Sequence[Path]) -> list[Example]:
    return list(dict.fromkeys(example for path in paths for example in read_tsv(path)))


def _digest(example: Example) -> bytes:
    return hashlib.blake2b("\t".join(example).encode(), digest_size=16).digest()
