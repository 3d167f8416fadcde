"""Representations of tasks, computed from their examples or descriptions."""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.core import files, paths
from moe_jax.core.checksums import digest
from moe_jax.core.configuration import (
    Configuration,
    Examples,
    Name,
    Names,
    PathName,
    Period,
    Range,
    Rows,
)
from moe_jax.core.errors import UserError
from moe_jax.core.progress import progress
from moe_jax.core.sharding import make_mesh, replicated
from moe_jax.data.cache import PreparedMixture, PreparedTask
from moe_jax.data.pipeline import evenly_spaced
from moe_jax.data.representations import Representations, fit, unit_length
from moe_jax.model.experts import Params
from moe_jax.runs.config import Config
from moe_jax.runs.load import Run, load_run
from moe_jax.runs.mixtures import prepare_mixtures
from moe_jax.unseen.descriptions import Descriptions
from moe_jax.unseen.embedding import Embedder

Kind = Literal["text", "example", "fisher", "description", "request"]
# Of words, which need no model.
_WORDS = ("description", "request")
SHUFFLES = 10_000
# Settings that two files must share for their rows to be comparable.
COMMON = ("kind", "backbone", "lengths", "steps", "batch_size", "optimizer", "label_smoothing")


class Affinity(NamedTuple):
    """Whether tasks of one category lie closer: mean cosines of pairs, and the share of shuffled
    categories (one-sided, with the true ones) whose difference is at least as large."""

    within: float
    between: float
    p: float
    tasks: int
    categories: int


def affinity(rows_TxK: np.ndarray, categories: Sequence[str]) -> Affinity | None:
    """Compares pairs within a category with pairs between categories.

    Args:
        categories: of the T tasks; those with '' are left out.

    Returns:
        None if pairs of one kind are missing.
    """
    known = [i for i, category in enumerate(categories) if category]
    names, label_T = np.unique([categories[i] for i in known], return_inverse=True)
    unit_TxK = unit_length(rows_TxK[known])
    first, second = np.triu_indices(len(known), 1)
    cosine_P = np.sum(unit_TxK[first] * unit_TxK[second], axis=1)

    def means(label_T: np.ndarray) -> tuple[float, float]:
        same = label_T[first] == label_T[second]
        return float(cosine_P[same].mean()), float(cosine_P[~same].mean())

    pairs_within = np.sum(label_T[first] == label_T[second])
    if not 0 < pairs_within < len(cosine_P):
        return None
    within, between = means(label_T)
    rng = np.random.default_rng(0)
    shuffled = (means(rng.permutation(label_T)) for _ in range(SHUFFLES))
    larger = sum(w - b >= within - between for w, b in shuffled)
    p = (1 + larger) / (1 + SHUFFLES)
    return Affinity(within, between, p, len(known), len(names))


@dataclasses.dataclass(frozen=True)
class RepresentConfig(Configuration, called="represent"):
    """Settings of `represent`.

    Attributes:
        kind: `text`, the mean over examples of the encoder's mean last state; `example`, the same
            of inputs and of targets, side by side, which tells tasks apart that have the same
            inputs; `fisher`, the diagonal of the empirical Fisher information after `steps` of
            fine-tuning on the task with OptimizerConfig and StepConfig; `description`, the words of
            the task's description, weighted by TF-IDF, for which no example is read; or `request`,
            the same less what the words of the task's inputs predict, so that it says what is
            asked for, and not what it is asked about.
        output: the file; MODEL_DIR/representations_KIND.npz when None.
        mixtures: further mixtures whose tasks are represented with the same components.
        split: of every task.
        examples: at most this many of a task, evenly spaced; None for all.
        steps: of fine-tuning.
        batch_size: of fine-tuning.
        dim: K; None for RouterConfig.representation_dim.
        pca_from: a file written before, whose principal components are taken.
    """

    kind: Kind = "text"
    output: PathName | None = None
    mixtures: Names = ()
    split: Name = "train"
    examples: Examples = 256
    steps: Period = 100
    batch_size: Rows = 8
    dim: Annotated[int, Range(1, 2**20)] | None = None
    pca_from: PathName | None = None


def represent(config: Config, settings: RepresentConfig) -> None:
    """Computes the representations of all tasks, and writes them."""
    kind, dim, split, pca_from = settings.kind, settings.dim, settings.split, settings.pca_from
    model_dir = config.run.model_dir
    output = settings.output or str(paths.parse(model_dir) / f"representations_{kind}.npz")
    if not output.endswith(".npz"):
        raise UserError(f"represent.output {output!r} must end in .npz")
    if kind in _WORDS and pca_from:
        raise UserError(
            "represent.pca_from: descriptions are compared by the words of one mixture; give the"
            " others in represent.mixtures"
        )
    earlier = Representations.read(pca_from) if pca_from else None
    found = prepare_mixtures(config.data, *settings.mixtures, run=model_dir)
    trained = found[config.data.mixture_or_task_name]
    run = None if kind in _WORDS else _dense_run(config, trained.vocabulary.size)
    made_with = _made_with(config, settings, run)
    if earlier is not None:
        _check_common(pca_from, earlier.settings, made_with)
        if dim not in (None, earlier.rows_TxK.shape[1]):
            raise UserError(f"represent.dim is {dim}, in {pca_from} {earlier.rows_TxK.shape[1]}")

    places = {name: mixture for mixture in reversed(found.values()) for name in mixture.names}
    names = sorted(places)
    tasks = [places[name].task(name) for name in names]
    parts = paths.parse(f"{output}.parts")
    if kind == "description":
        raw_TxD = Descriptions(trained.tasks).vectors(tasks)
    elif kind == "request":
        inputs = {task.name: _inputs(task, split, settings.examples) for task in tasks}
        raw_TxD = Descriptions(trained.tasks).requests(tasks, inputs)
    else:
        raw_TxD = _embeddings(run, config, made_with, places, parts)
    if jax.process_index() != 0:
        return
    if earlier is not None:
        projection = earlier.projection
    else:
        fitted = [names.index(name) for name in trained.names]
        projection = fit(raw_TxD[fitted], dim or config.router.representation_dim)
    rows_TxK = projection(raw_TxD)
    agreement = affinity(rows_TxK, [task.category for task in tasks])
    if agreement is not None:
        made_with["affinity"] = agreement._asdict()
    Representations(tuple(names), rows_TxK, raw_TxD, projection, made_with).write(output)
    if parts.exists():
        paths.remove_tree(parts)
    used = int(np.any(projection.components_KxD, axis=1).sum())
    print(f"{output}: {len(names)} tasks, {rows_TxK.shape[1]} numbers each ({used} components of"
          f" {raw_TxD.shape[1]})")  # fmt: skip
    if agreement is not None:
        print(
            f"{agreement.tasks} tasks of {agreement.categories} categories: mean cosine"
            f" {agreement.within:+.3f} within a category, {agreement.between:+.3f} between;"
            f" p = {agreement.p:.4f} ({SHUFFLES} shuffled)"
        )


def _dense_run(config: Config, vocabulary_size: int) -> Run:
    run = load_run(config.run.model_dir, config.model, config.router, vocabulary_size)
    if run.model.routed:
        raise UserError(
            f"{config.run.model_dir} is a mixture of experts: the encoder would differ from task"
            " to task, and a new task would have none; give a dense model's MODEL_DIR"
        )
    return run


def _made_with(config: Config, settings: RepresentConfig, run: Run | None) -> dict[str, Any]:
    """The settings on which representations depend, and a hash of the model's weights."""
    result: dict[str, Any] = {"kind": settings.kind}
    if settings.kind != "description":
        result |= {"split": settings.split, "examples": settings.examples}
    if run is not None:
        result |= {
            "backbone": _fingerprint(run.params["backbone"]),
            "lengths": dict(config.data.lengths),
            "seed": config.run.seed,
        }
    if settings.kind == "fisher":
        result |= {
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "optimizer": dataclasses.asdict(config.optimizer),
            "label_smoothing": config.step.label_smoothing,
        }
    return result


def _inputs(task: PreparedTask, split: str, limit: int | None) -> list[str]:
    """Texts of a task's inputs."""
    chosen = evenly_spaced(task, split, limit)
    return [example.inputs_text for example in task.records(split).take(chosen)]


def _embeddings(
    run: Run,
    config: Config,
    made_with: dict[str, Any],
    places: Mapping[str, PreparedMixture],
    parts: Path,
) -> np.ndarray | None:
    """What the model makes of each task's examples: [T, D], tasks sorted; None unless the lead.

    Args:
        places: a mixture of each task.
        parts: the directory where embeddings are kept until the file is written.
    """
    lead, split = jax.process_index() == 0, made_with["split"]
    splits = {name: mixture.task(name).split(split) for name, mixture in places.items()}
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params, rows = jax.device_put(run.params, replicated(mesh)), config.run.eval_batch_rows
        embed = Embedder(run.model, params, config, made_with, rows, mesh)
        raw = []
        bar = progress(
            sorted(places), desc=f"{made_with['kind']} of tasks", unit="task", disable=not lead
        )
        for name in bar:
            bar.set_postfix_str(name, refresh=False)
            mixture = places[name]
            key = [made_with, splits[name].fingerprint, mixture.vocabulary_dir.name, name]
            part = parts / f"{digest(key)}.npy"
            raw.append(_cached(part, partial(embed, mixture, name), lead))
    return np.stack(raw) if lead else None


def _cached(path: Path, compute: Callable[[], np.ndarray], lead: bool) -> np.ndarray | None:
    """Reads the value that an interrupted command left at `path`, or computes and saves it.

    All processes compute together or none does. The lead process, which needs the value, decides.
    """
    if multihost_utils.broadcast_one_to_all(np.int32(lead and path.exists())):
        return np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) if lead else None
    value = compute()
    if lead:
        buffer = io.BytesIO()
        np.save(buffer, value)
        files.write_bytes(path, buffer.getvalue())
    return value


def _fingerprint(backbone: Params) -> str:
    """Short hash of all weights."""
    hash_ = hashlib.sha256()
    for leaf in jax.tree.leaves(backbone):
        hash_.update(np.ascontiguousarray(leaf).data.cast("B"))
    return hash_.hexdigest()[:16]


def _check_common(path: Any, earlier: dict[str, Any], here: dict[str, Any]) -> None:
    for name in COMMON:
        if digest(earlier.get(name)) != digest(here.get(name)):
            raise UserError(
                f"{path} was made with another {name}: there {earlier.get(name)}, here"
                f" {here.get(name)}; its components do not fit"
            )
