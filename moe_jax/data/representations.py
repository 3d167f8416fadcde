"""A file of task representations: any matrix with task names, or what `represent` computed.

`FILE.json` is {task name: [K numbers]}. Any other file is a NumPy archive (.npz, no pickles) with
`tasks` [T] and `representations` [T, K]. Archives of `moe_jax.represent` also hold what is needed
to project a new task the same way: `raw` [T, D], `mean` [D], `components` [K, D], `scale` and
`settings` (JSON).
"""

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.core import files
from moe_jax.core.errors import UserError, first_line, nearest

_LARGE = 1e30  # what float32 holds, with room for products


class Projection(NamedTuple):
    """Maps embeddings to representations: unit length, principal components, one common scale.

    Attributes:
        mean_D: mean of the embeddings that it was fitted on, at unit length.
        components_KxD: principal axes; zero rows where there are fewer than K.
        scale: the same for all components, so that distances between tasks keep their ratios.
    """

    mean_D: np.ndarray
    components_KxD: np.ndarray
    scale: np.ndarray

    def __call__(self, raw_TxD: np.ndarray) -> np.ndarray:
        """float [T, D] -> float32 [T, K]."""
        rows_TxK = (unit_length(raw_TxD) - self.mean_D) @ self.components_KxD.T
        return (rows_TxK * self.scale).astype(np.float32)


def unit_length(raw_TxD: np.ndarray) -> np.ndarray:
    """Rows divided by their Euclidean norm, as only their direction matters. float64."""
    raw_TxD = np.asarray(raw_TxD, np.float64)
    return raw_TxD / np.maximum(np.linalg.norm(raw_TxD, axis=1, keepdims=True), 1e-30)


def fit(raw_TxD: np.ndarray, dim: int) -> Projection:
    """Principal components of the tasks, scaled like freshly initialised representations.

    Those are standard normal, so the mean square of all [T, K] numbers becomes 1. Components keep
    their relative sizes. With components of equal size, T tasks in T - 1 or more components would
    all be equally far apart.

    Args:
        dim: K; components beyond the T - 1 that T tasks span are zero.

    Raises:
        UserError: there is only one task, or all tasks are the same.
    """
    from sklearn.decomposition import PCA  # slow to import, and reading a file does not need it

    unit_TxD = unit_length(raw_TxD)
    if np.ptp(unit_TxD, axis=0).max() < 1e-9:
        raise UserError(
            "principal components need at least two tasks that differ, here"
            f" {'is one' if len(unit_TxD) == 1 else 'all are alike'}; give represent.pca_from=FILE"
        )
    tasks, numbers = unit_TxD.shape
    pca = PCA(min(dim, tasks - 1, numbers), svd_solver="full").fit(unit_TxD)
    components_KxD = np.zeros((dim, numbers))
    components_KxD[: pca.n_components_] = pca.components_
    size = np.sqrt(np.mean(np.square((unit_TxD - pca.mean_) @ components_KxD.T)))
    return Projection(pca.mean_, components_KxD, 1 / size)


@dataclasses.dataclass(frozen=True)
class Representations:
    """What `represent` writes.

    Attributes:
        tasks: T names.
        rows_TxK: float32, their representations.
        raw_TxD: float32, their embeddings before the projection.
        settings: how they were computed; JSON.
    """

    tasks: tuple[str, ...]
    rows_TxK: np.ndarray
    raw_TxD: np.ndarray
    projection: Projection
    settings: dict[str, Any]

    def write(self, path: str | os.PathLike) -> None:
        """Writes an archive atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            tasks=np.array(self.tasks),
            representations=self.rows_TxK,
            raw=self.raw_TxD,
            mean=self.projection.mean_D,
            components=self.projection.components_KxD,
            scale=self.projection.scale,
            settings=np.array(json.dumps(self.settings)),
        )
        files.write_bytes(path, buffer.getvalue())

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Representations":
        """Reads what `write` wrote.

        Raises:
            UserError: the file cannot be read, or it is not what `represent` writes.
        """
        archive = _read_archive(path)
        absent = {"raw", "mean", "components", "scale", "settings"} - archive.keys()
        if absent:
            raise UserError(
                f"{path}: it has no {min(absent)!r}, so represent did not write it: a new task"
                " cannot be put beside its tasks"
            )
        tasks, rows_TxK = _checked(path, archive["tasks"].tolist(), archive["representations"])
        (T, K), D = rows_TxK.shape, archive["raw"].shape[-1:]
        # Of vectors of unit length: none of their numbers is above 1.
        parts = {"raw": ((T, *D), _LARGE), "mean": (D, 1.001), "components": ((K, *D), 1.001),
                 "scale": ((), _LARGE)}  # fmt: skip
        for name, (shape, limit) in parts.items():
            array = archive[name]
            if (
                array.dtype.kind != "f"
                or array.shape != shape
                or not np.all(np.abs(array, dtype=np.float64) <= limit)
            ):
                raise UserError(f"{path}: its {name!r} is not what represent writes")
        projection = Projection(*(archive[name] for name in ("mean", "components", "scale")))
        try:
            settings = files.parse_json(str(archive["settings"]))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: its settings are not valid JSON: {first_line(e)}") from e
        if not isinstance(settings, dict):
            raise UserError(f"{path}: its settings must be {{name: value}}")
        return cls(tuple(tasks), rows_TxK, archive["raw"], projection, settings)


def read_representations(
    path: str | os.PathLike, names: Sequence[str], dim: int | None
) -> np.ndarray:
    """The representations of some tasks.

    Args:
        path: a .json or .npz file, see above.
        names: n tasks; the file may have more.
        dim: K, `RouterConfig.representation_dim`; None for whatever the file has.

    Returns:
        float32 [n, K].

    Raises:
        UserError: the file cannot be read or is of another form, lacks a task (the nearest names
            are given), has rows of another length, or numbers that are not finite.
    """
    if os.fspath(path).endswith(".json"):
        value = files.read_object(path)
        content = {"tasks": list(value), "rows": list(value.values())}
    else:
        archive = _read_archive(path)
        content = {"tasks": archive["tasks"].tolist(), "rows": archive["representations"]}
    tasks, rows_TxK = _checked(path, content["tasks"], content["rows"])
    missing = [name for name in names if name not in tasks]
    if missing:
        more = f" (nor {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UserError(f"{path} has no task {missing[0]!r}{more}{nearest(missing[0], tasks)}")
    if dim is not None and rows_TxK.shape[1] != dim:
        raise UserError(
            f"{path}: representations have {rows_TxK.shape[1]} numbers, but"
            f" RouterConfig.representation_dim is {dim}"
        )
    return rows_TxK[[tasks.index(name) for name in names]]


def _read_archive(path: str | os.PathLike) -> dict[str, np.ndarray]:
    content = files.read_bytes(path)
    try:
        with io.BytesIO(content) as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive}
    except Exception as e:  # zipfile, zlib and NumPy raise many kinds
        raise UserError(f"{path} is neither a .json file nor an .npz archive of arrays") from e
    for name in ("tasks", "representations"):
        if name not in arrays:
            raise UserError(f"{path}: the archive has no {name!r}{nearest(name, arrays)}")
    return arrays


def _checked(path: Any, tasks: Any, rows: Any) -> tuple[list[str], np.ndarray]:
    """The names as a list, the rows as float32 [T, K]."""
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{path}: 'tasks' must be one name per row")
    if len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if tasks.count(task) > 1)
        raise UserError(f"{path}: {twice!r} is there twice")
    try:
        rows_TxK = np.asarray(rows)
        if rows_TxK.dtype.kind not in "fiu":  # complex numbers and truth values are no rows
            rows_TxK = np.empty(0)
        with np.errstate(over="ignore"):  # what float32 does not hold is not finite: below
            rows_TxK = rows_TxK.astype(np.float32)
    except (TypeError, ValueError, OverflowError):  # lists of uneven length, or of no numbers
        rows_TxK = np.empty(0)
    if rows_TxK.ndim != 2 or len(rows_TxK) != len(tasks):
        raise UserError(f"{path}: must hold as many numbers for each of its {len(tasks)} tasks")
    finite = np.isfinite(rows_TxK).all(axis=1)
    if not finite.all():
        worst = tasks[int(np.argmin(finite))]
        raise UserError(f"{path}: {worst!r} has a number that is not finite")
    return tasks, rows_TxK
