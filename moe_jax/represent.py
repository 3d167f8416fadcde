"""Computes representations of tasks from their examples.

    python -m moe_jax.represent --gin.MODEL_DIR=DENSE --gin.represent.kind=fisher \\
        --gin.represent.output=FILE.npz [--gin.represent.mixtures="('UNSEEN',)"]

MODEL_DIR is a dense model: a run, or what `convert from-hf` wrote. The principal components are
those of the tasks of MIXTURE_OR_TASK_NAME (by default what the run was trained on); the tasks of
further mixtures are put beside them, and so is, later, any task with represent.pca_from=FILE.npz.

`train` starts from the file (RunConfig.representations_path), `eval` takes the rows of unseen
tasks from it (eval.representations). Every batch is spread over the devices of MeshConfig's data
axes; the numbers are those of one device, but for the noise of dropout in fine-tuning. Started
again, an interrupted command goes on with the task where it stopped.
"""

import dataclasses
import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gin
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from moe_jax.core import files
from moe_jax.core.errors import UserError, nearest
from moe_jax.core.sharding import MeshConfig, make_mesh, replicated
from moe_jax.data.cache import digest
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.experts import Params
from moe_jax.runs import flags as cli
from moe_jax.runs.config import DataConfig, RunConfig
from moe_jax.runs.load import load_run
from moe_jax.train import prepare_mixtures
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig
from moe_jax.unseen.embedding import Embedder
from moe_jax.unseen.representations import Representations, fit, unit_length

Kind = Literal["text", "fisher"]
SHUFFLES = 10_000
# What files must have in common for their rows to be comparable.
COMMON = ("kind", "backbone", "lengths", "steps", "batch_size", "optimizer", "label_smoothing")


class Affinity(NamedTuple):
    """Whether tasks of one category lie closer: mean cosines of pairs, and the share of shuffled
    categories (one-sided, with the true ones) whose difference is at least as large."""

    within: float
    between: float
    p: float
    tasks: int
    categories: int


def affinity(rows_TxK: np.ndarray, categories: Sequence[str], seed: int = 0) -> Affinity | None:
    """Compares pairs within a category with pairs between categories.

    Args:
        categories: of the T tasks; those with '' are left out.

    Returns:
        None where there are not pairs of both sorts.
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
    rng = np.random.default_rng(seed)
    shuffled = (means(rng.permutation(label_T)) for _ in range(SHUFFLES))
    larger = sum(w - b >= within - between for w, b in shuffled)
    p = (1 + larger) / (1 + SHUFFLES)
    return Affinity(within, between, p, len(known), len(names))


@gin.configurable("represent")
def represent(
    kind: Kind = "text",
    output: str | None = None,
    mixtures: Sequence[str] = (),
    split: str = "train",
    examples: int | None = 256,
    steps: int = 100,
    batch_size: int = 8,
    dim: int | None = None,
    pca_from: str | None = None,
) -> None:
    """Computes the representations of all tasks.

    Args:
        kind: `text`, the mean over examples of the encoder's mean last state; or `fisher`, the
            diagonal of the empirical Fisher information after `steps` of fine-tuning on the task
            with OptimizerConfig and StepConfig.
        output: the file; MODEL_DIR/representations_KIND.npz when None.
        mixtures: further mixtures whose tasks are represented with the same components.
        split: of every task.
        examples: at most this many of a task, evenly spaced; None for all.
        steps, batch_size: of fine-tuning.
        dim: K; None for RouterConfig.representation_dim.
        pca_from: a file written before, whose principal components are taken.
    """
    run_config, data = RunConfig(), DataConfig()
    if kind not in get_args(Kind):
        raise UserError(f"represent.kind {kind!r} is not one of text, fisher"
                        f"{nearest(str(kind), get_args(Kind))}")  # fmt: skip
    if min(steps + 1, batch_size, 1 if dim is None else dim) < 1:
        raise UserError("represent.batch_size and represent.dim must be at least 1, steps 0")
    output = output or str(Path(run_config.model_dir) / f"representations_{kind}.npz")
    if not output.endswith(".npz"):
        raise UserError(f"represent.output {output!r} must end in .npz")
    earlier = Representations.read(pca_from) if pca_from else None
    found = prepare_mixtures(data, *mixtures)
    vocabulary = found[data.mixture_or_task_name].vocabulary
    run = load_run(run_config.model_dir, ModelConfig(), RouterConfig(), vocabulary.size)
    if run.model.routed:
        raise UserError(
            f"{run_config.model_dir} is a mixture of experts: the encoder would differ from task"
            " to task, and a new task would have none; give a dense model's MODEL_DIR"
        )
    settings: dict[str, Any] = {
        "kind": kind,
        "backbone": _fingerprint(run.params["backbone"]),
        "lengths": dict(data.lengths),
    }
    if kind == "fisher":
        settings |= {
            "steps": steps,
            "batch_size": batch_size,
            "optimizer": dataclasses.asdict(OptimizerConfig()),
            "label_smoothing": StepConfig().label_smoothing,
        }
    settings |= {"split": split, "examples": examples, "seed": run_config.seed}
    if earlier is not None:
        _check_common(pca_from, earlier.settings, settings)
        if dim not in (None, earlier.rows_TxK.shape[1]):
            raise UserError(f"represent.dim is {dim}, in {pca_from} {earlier.rows_TxK.shape[1]}")

    # ---------------------------------------------------------------- embeddings, task by task
    places = {name: mixture for mixture in reversed(found.values()) for name in mixture.names}
    for name, mixture in places.items():
        mixture.task(name).split(split)  # an error before the work, not in the middle of it
    names = sorted(places)
    mesh = make_mesh(MeshConfig())
    lead = jax.process_index() == 0
    with jax.set_mesh(mesh):
        params = jax.device_put(run.params, replicated(mesh))
        embed = Embedder(run.model, params, data, settings, run_config.eval_batch_rows, mesh)
        parts = Path(f"{output}.parts")
        raw = []
        bar = tqdm(names, desc=f"{kind} of tasks", unit="task", disable=not lead)
        for name in bar:
            bar.set_postfix_str(name)
            task = places[name].task(name)
            key = [settings, task.split(split).fingerprint, places[name].vocabulary_dir.name, name]
            part = parts / f"{digest(key)}.npy"
            raw.append(_cached(part, partial(embed, places[name], name), lead))
    if not lead:
        return
    raw_TxD = np.stack(raw)

    # ---------------------------------------------------------------- components and output
    if earlier is not None:
        projection = earlier.projection
    else:
        fitted = [names.index(name) for name in found[data.mixture_or_task_name].names]
        projection = fit(raw_TxD[fitted], dim or RouterConfig().representation_dim)
    rows_TxK = projection(raw_TxD)
    agreement = affinity(rows_TxK, [places[name].task(name).category for name in names])
    if agreement is not None:
        settings["affinity"] = agreement._asdict()
    Representations(tuple(names), rows_TxK, raw_TxD, projection, settings).write(output)
    shutil.rmtree(parts, ignore_errors=True)
    used = int(np.any(projection.components_KxD, axis=1).sum())
    print(f"{output}: {len(names)} tasks, {rows_TxK.shape[1]} numbers each ({used} components of"
          f" {raw_TxD.shape[1]})")  # fmt: skip
    if agreement is not None:
        print(
            f"{agreement.tasks} tasks of {agreement.categories} categories: mean cosine"
            f" {agreement.within:+.3f} within a category, {agreement.between:+.3f} between;"
            f" p = {agreement.p:.4f} ({SHUFFLES} shuffled)"
        )


def _cached(path: Path, compute: Callable[[], np.ndarray], lead: bool) -> np.ndarray | None:
    """What an interrupted command has left at `path`, or else computes it and leaves it there.

    All processes compute together or none: the lead, which alone needs the value, decides.
    """
    if multihost_utils.broadcast_one_to_all(np.int32(lead and path.exists())):
        return np.load(path, allow_pickle=False) if lead else None
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


if __name__ == "__main__":
    cli.run(represent, from_model_dir=True)
