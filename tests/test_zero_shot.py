"""Tasks never trained on take the route of the training task with the most similar inputs."""

import jax
import numpy as np
import pytest
from toy import toy_mixtures
from toy_run import tiny_model, tiny_params

from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.model.task_moe import parameter_shardings
from moe_jax.runs.load import Run, with_tasks
from moe_jax.unseen.zero_shot import most_similar, nearest_trained


def test_similarity_by_hand():
    """All embeddings share a large part, which says nothing."""
    shared = np.array([10.0, 0, 0, 0])
    seen = shared + np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, -1, -1, 0]])
    new = shared + np.array([[0, 0.2, 1, 0.5], [0, 2, 0, 0], [0, -3, -3, 1]])
    assert most_similar(seen, new).tolist() == [1, 0, 2]
    # The length of an embedding makes no difference.
    assert most_similar(3 * seen, 0.1 * new).tolist() == [1, 0, 2]


@pytest.mark.parametrize("devices", [1, 4])
def test_words_resemble_words_not_numbers(devices):
    trained, unseen = toy_mixtures()
    model = tiny_model(
        tasks=2, selection="argmax", max_positions=48, d_model=64, init_std=0.1,
        vocabulary_size=trained.vocabulary.size,
    )  # fmt: skip
    ids = {name: i for i, name in enumerate(trained.names)}
    run = Run(model, tiny_params(model), ids, step=0)
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = jax.device_put(run.params, parameter_shardings(model, mesh))
        placed = Run(model, params, ids, step=0)
        nearest = nearest_trained(
            placed, trained, [trained, unseen], "test", {"inputs": 40, "targets": 20}, 4, mesh
        )
    assert nearest == {"toy_reverse": "toy_copy"}
    table = run.params["representations"]
    for choice, row in ((nearest, table[ids["toy_copy"]]), (None, np.asarray(table).mean(0))):
        more = with_tasks(run, ["toy_sum", "toy_reverse"], nearest=choice)
        assert more.model.tasks == 3
        np.testing.assert_array_equal(more.params["representations"][:2], table)
        np.testing.assert_allclose(
            more.params["representations"][more.task_ids["toy_reverse"]], row, rtol=1e-6
        )
