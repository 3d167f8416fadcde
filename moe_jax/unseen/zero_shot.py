"""Routes of tasks that were never trained on, from their unlabelled inputs.

A new task takes the representation of the training task whose inputs are most similar to its own.
No label is read. The mean of all representations is a poor substitute: the router maps it to a
route that no task was trained with.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.core.sharding import replicated
from moe_jax.data.cache import PreparedMixture
from moe_jax.data.representations import unit_length
from moe_jax.model.task_moe import routes_of
from moe_jax.runs.load import Run
from moe_jax.unseen.embedding import mean_over_examples, text_sum


def nearest_trained(
    run: Run,
    trained: PreparedMixture,
    mixtures: Sequence[PreparedMixture],
    split: str,
    lengths: Mapping[str, int],
    rows: int,
    mesh: Mesh,
    examples: int = 64,
) -> dict[str, str]:
    """New task -> the training task with the most similar inputs.

    A task is embedded by the trained encoder, under the mean of all training routes: see
    `text_sum`.

    Args:
        run: with parameters on the mesh.
        trained: the mixture that the run was trained on; its training inputs are read.
        mixtures: those with new tasks, of which the inputs of `split` are read.
        lengths: {"inputs", "targets"}.
        rows: examples computed together.
        examples: at most this many of each task, evenly spaced.
    """
    mixture_of = {name: mixture for mixture in mixtures for name in mixture.names}
    new = [
        name
        for name, mixture in mixture_of.items()
        if name not in run.task_ids and split in mixture.task(name).splits
    ]
    seen = [name for name in trained.names if name in run.task_ids]
    if not new or not seen:
        return {}
    routes_TxNxE = jax.jit(partial(routes_of, run.model))(run.params, jnp.int32(run.step))
    mean_NxE = routes_TxNxE.mean(0)
    embed = jax.jit(partial(text_sum, run.model), out_shardings=replicated(mesh))

    def embedding(mixture: PreparedMixture, task: str, split: str) -> np.ndarray:
        return mean_over_examples(
            lambda batch: embed(run.params["backbone"], batch, mean_NxE),
            mixture, task, split, lengths, rows, examples,
        )  # fmt: skip

    seen_TxD = np.stack([embedding(trained, name, "train") for name in seen])
    new_TxD = np.stack([embedding(mixture_of[name], name, split) for name in new])
    return {name: seen[i] for name, i in zip(new, most_similar(seen_TxD, new_TxD), strict=True)}


def most_similar(seen_TxD: np.ndarray, new_NxD: np.ndarray) -> np.ndarray:
    """Index of the most similar of T embeddings for each of N others: int [N].

    The similarity is the cosine, after the mean of the T is subtracted from all.
    """
    center_D = unit_length(seen_TxD).mean(0)
    seen_TxD, new_NxD = (unit_length(unit_length(x) - center_D) for x in (seen_TxD, new_NxD))
    return np.argmax(new_NxD @ seen_TxD.T, axis=1)
