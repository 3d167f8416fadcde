"""Computes representations of tasks from their examples.

    python -m moe_jax.represent --gin.MODEL_DIR=DENSE --gin.represent.kind=fisher \\
        --gin.represent.output=FILE.npz [--gin.represent.mixtures="('UNSEEN',)"]

MODEL_DIR is a dense model: a run, or what `convert from-hf` wrote. The principal components are
those of the tasks of MIXTURE_OR_TASK_NAME (by default what the run was trained on); the tasks of
further mixtures are put beside them, and so is, later, any task with represent.pca_from=FILE.npz.

`train` starts from the file (RunConfig.representations_path), `eval` takes the rows of unseen
tasks from it (eval.representations). Started again, an interrupted command goes on with the task
where it stopped.
"""

import dataclasses
import hashlib
import io
import itertools
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gin
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax import cli, files
from moe_jax.config import DataConfig, RunConfig
from moe_jax.data.cache import PreparedMixture, digest
from moe_jax.data.packing import Batch
from moe_jax.data.pipeline import eval_batches, task_batches
from moe_jax.errors import UserError, nearest
from moe_jax.evaluation import INPUTS, TARGETS, input_bucket
from moe_jax.model.config import ModelConfig, RouterConfig
from moe_jax.model.experts import Params
from moe_jax.model.moe import TaskMoE
from moe_jax.parallel import MeshConfig, make_mesh, replicated
from moe_jax.representations import Representations, fit, unit_length
from moe_jax.runs import load_run
from moe_jax.train import prepare_mixtures
from moe_jax.training.groups import group_loss
from moe_jax.training.optimizer import OptimizerConfig
from moe_jax.training.step import StepConfig
from moe_jax.training.tuning import Tuner

Kind = Literal["text", "fisher"]
SHUFFLES = 10_000
# What files must have in common for their rows to be comparable.
COMMON = ("kind", "backbone", "lengths", "steps", "batch_size", "optimizer", "label_smoothing")


# ------------------------------------------------------------------------------ embeddings


def text_sum(model: TaskMoE, backbone: Params, batch: Batch) -> jax.Array:
    """Sum over examples of the encoder's last states, averaged over the tokens of each.

    Args:
        batch: arrays [R, L], one example to a row; an empty row adds nothing.

    Returns:
        float32 [d_model].
    """
    segments_RxL = batch["input_segments"]
    states_RxLxD = model.backbone(1).apply(
        {"params": backbone}, batch["inputs"], segments_RxL, batch["input_positions"], None,
        method="encode",
    )  # fmt: skip
    real_RxL = (segments_RxL > 0).astype(jnp.float32)
    weights_RxL = real_RxL / jnp.maximum(real_RxL.sum(-1, keepdims=True), 1.0)
    return jnp.einsum("rl,rld->d", weights_RxL, states_RxLxD.astype(jnp.float32))


def fisher_sum(model: TaskMoE, backbone: Params, batch: Batch) -> jax.Array:
    """Sum over examples of the squared gradient of the log-likelihood of their targets.

    Divided by the number of examples: the diagonal of the empirical Fisher information (Vu et al.
    2020, arXiv 2005.00770), averaged over the inputs of every unit as Task2Vec averages over a
    filter (Achille et al. 2019, arXiv 1902.03545), because the weights of a unit depend on each
    other. Of the layers' matrices only: both architectures have them, and the embedding would tell
    which words a task uses rather than what is done with them.

    Args:
        batch: arrays [R, L], one example to a row; an empty row adds nothing.

    Returns:
        float32 [D], one number per unit: see `unit_means`.
    """
    layers = {side: backbone[side]["layers"] for side in ("encoder", "decoder")}

    def log_likelihood(layers, example):
        sides = {side: {**backbone[side], "layers": tree} for side, tree in layers.items()}
        return -group_loss(model, {**backbone, **sides}, None, example, None)

    def add_one(total, row):
        example = {name: array[None] for name, array in row.items()}
        gradient = jax.grad(log_likelihood)(layers, example)
        return total + unit_means(jax.tree.map(jnp.square, gradient)), None

    # One by one: the gradients of one example are alive at a time.
    zero = jnp.zeros(jax.eval_shape(unit_means, layers).shape)
    return jax.lax.scan(add_one, zero, batch)[0]


def unit_means(layers: Params) -> jax.Array:
    """Every matrix of {side: {"routed" | "vanilla": stack}} averaged over its units' inputs.

    Returns:
        float32 [D], in the order of the tree's leaves; of each [layer, expert, unit].
    """
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        if path[-1].key == "out_kernel":  # [layer, expert, inputs..., output]
            parts.append(leaf.mean(tuple(range(2, leaf.ndim - 1))).ravel())
        elif path[-1].key.endswith("_kernel"):  # [layer, expert, input, outputs...]
            parts.append(leaf.mean(2).ravel())
    return jnp.concatenate(parts)


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


# ------------------------------------------------------------------------------ the command


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
    # Models are small enough for it: one device.
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.device_put(run.params, replicated(mesh))
        embed = Embedder(run.model, params, data, settings, run_config.eval_batch_rows, mesh)
        parts = Path(f"{output}.parts")
        raw = []
        bar = tqdm(names, desc=f"{kind} of tasks", unit="task")
        for name in bar:
            bar.set_postfix_str(name)
            task = places[name].task(name)
            key = [settings, task.split(split).fingerprint, places[name].vocabulary_dir.name, name]
            raw.append(_cached(parts / f"{digest(key)}.npy", partial(embed, places[name], name)))
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


class Embedder:
    """One task's embedding; compiles once per bucket of input lengths, whatever the task."""

    def __init__(
        self,
        model: TaskMoE,
        params: Params,
        data: DataConfig,
        settings: dict[str, Any],
        rows: int,
        mesh: jax.sharding.Mesh,
    ):
        self._params, self._data, self._settings, self._rows = params, data, settings, rows
        self._tune: Tuner | None = None
        self._sum = jax.jit(partial(text_sum, model))
        if settings["kind"] == "fisher":
            self._sum = jax.jit(partial(fisher_sum, model))
            steps, seed = max(1, settings["steps"]), settings["seed"]
            self._tune = Tuner(model, OptimizerConfig(), StepConfig(), mesh, steps, seed)

    def __call__(self, mixture: PreparedMixture, task: str) -> np.ndarray:
        """float32 [D].

        Raises:
            UserError: it is not finite.
        """
        s, data = self._settings, self._data
        backbone = self._params["backbone"]
        if self._tune is not None:
            batches = task_batches(
                mixture, task, s["split"], lengths=data.lengths, rows=s["batch_size"],
                seed=s["seed"],
            )  # fmt: skip
            few = itertools.islice(batches, s["steps"])
            rates = OptimizerConfig().learning_rates
            backbone = self._tune(self._params, few, rates)["backbone"]
        total, count = jnp.float32(0), 0
        for batch, examples in eval_batches(
            mixture, task, s["split"], lengths=data.lengths, rows=self._rows, limit=s["examples"]
        ):
            total = total + self._sum(backbone, _cut(batch))
            count += len(examples)
        raw_D = np.asarray(total) / np.float32(count)
        if not np.isfinite(raw_D).all():
            raise UserError(f"the embedding of {task!r} is not finite; lower the learning rate")
        return raw_D


def _cut(batch: Batch) -> Batch:
    """[1, R, L] -> [R, L], inputs no longer than the bucket that holds them."""
    longest = int(np.count_nonzero(batch["input_segments"], -1).max())
    bucket = input_bucket(longest, batch["inputs"].shape[-1])
    cut = {name: batch[name][0, :, :bucket] for name in INPUTS}
    return cut | {name: batch[name][0] for name in TARGETS}


def _cached(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What an interrupted command has left at `path`, or else computes it and leaves it there."""
    if path.exists():
        return np.load(path, allow_pickle=False)
    value = compute()
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
