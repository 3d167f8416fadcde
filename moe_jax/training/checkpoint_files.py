"""What lies in a run's directory `checkpoints`: which are finished, damaged, left over.

On a file system a checkpoint is finished when it has its name, which it gets last. In a bucket,
where nothing can be renamed, it is finished when it has Orbax's commit file, which is written last
and removed first.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from moe_jax.core import checksums, files, paths
from moe_jax.core.errors import UserError
from moe_jax.core.paths import Path

COMMITTED = "commit_success.txt"
DAMAGED = ".damaged"
_OLD = ".old"  # is being removed
_LEFT = re.compile(rf"\d+({re.escape(_OLD)}|\.orbax-checkpoint-tmp.*)")
# What Orbax writes to a checkpoint's directory after it is finalised; nothing reads it.
_CHANGING = ("_CHECKPOINT_METADATA", COMMITTED)


def seal(place: Path) -> None:
    """Adds the checksums of all files, when all processes have written."""
    checksums.seal(place, without=_CHANGING)


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory `checkpoints`, in no order."""
    if paths.in_bucket(directory):
        found = [path.parent for path in directory.glob(f"*/{COMMITTED}")]
    else:
        found = directory.iterdir() if directory.is_dir() else []
    return [int(path.name) for path in found if re.fullmatch(r"\d+", path.name)]


def clear(directory: Path) -> bool:
    """Removes what is half written or half removed; whether there was any."""
    if paths.in_bucket(directory):
        finished = map(str, steps(directory))
        names = {name.split("/")[0] for name in paths.objects(directory)} - {*finished}
        found = [directory / name for name in names if re.fullmatch(r"\d+", name)]
    else:
        found = [path for path in directory.iterdir() if _LEFT.fullmatch(path.name)]
    for path in found:
        paths.remove_tree(path)
    return bool(found)


def remove(place: Path) -> None:
    """Removes a checkpoint: as soon as it begins to go, it counts no longer."""
    if paths.in_bucket(place):
        (place / COMMITTED).unlink(missing_ok=True)
    else:
        place = place.rename(place.with_name(place.name + _OLD))
    paths.remove_tree(place)


def set_aside(place: Path) -> Path:
    """Renames a damaged checkpoint; returns where it is."""
    name = place.name + DAMAGED
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    aside = next(path for path in map(place.with_name, names) if not path.exists())
    if not paths.in_bucket(place):
        return place.rename(aside)
    for name in paths.objects(place):
        (place / name).copy(aside / name)
    remove(place)
    return aside


def read_meta(place: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its arrays: `tasks`, `step`, `shapes` and more.

    Raises:
        UserError: the file cannot be read, or one of these is missing or of another form.
    """
    path = place / "meta" / "metadata"
    meta = files.read_object(path)
    tasks, shapes = meta.get("tasks"), meta.get("shapes")
    forms = {
        "tasks": _are(str, tasks) and len(set(tasks)) == len(tasks),
        "step": str(meta.get("step")) == place.name,
        "shapes": isinstance(shapes, dict) and all(_are(int, shape) for shape in shapes.values()),
    }
    for name, good in forms.items():
        if not good:
            raise UserError(f"{path}: its {name!r} is not that of a checkpoint")
    return meta


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def damage(place: Path, parts: Sequence[str] = ("",)) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None where nothing is.

    Args:
        parts: what its files' names begin with that are to be read.
    """
    if not checksums.is_sealed(place):
        return f"{place / checksums.FILE} is missing"
    return checksums.damage(place, parts)
