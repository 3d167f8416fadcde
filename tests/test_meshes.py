"""Training on meshes of 8 devices equals training on one; each device holds only its share."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.multihost_utils import process_allgather
from toy_run import finish, free_port, random_batch, start, start_state, tiny_model, tiny_params

from moe_jax.core.sharding import LOGICAL_AXES, MeshConfig, by_group, global_array, make_mesh
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import (
    StepConfig,
    gradients,
    make_train_step,
    state_shardings,
)

MESHES = {
    "8 data": MeshConfig(data=8),
    "8 fsdp": MeshConfig(data=1, fsdp=8),
    "2 fsdp, 4 expert": MeshConfig(data=1, fsdp=2, expert=4),
    "2 data, 2 fsdp, 2 expert": MeshConfig(data=2, fsdp=2, expert=2),
    "2 fsdp, 2 expert, 2 model": MeshConfig(data=1, fsdp=2, expert=2, model=2),
}
# Routed and vanilla layers in turn: hard routes of one and of two experts, soft routes, no routes.
# No dropout where groups share all weights: they are merged, and the masks depend on the merge.
LAYERS = {"encoder_layers": 2, "encoder_vanilla_layers": (0,)}
ROUTES = {
    "hard": {"selection": "gumbel_softmax_st", "experts_per_layer": 1, "dropout_rate": 0.1},
    "two": {"selection": "top_k", "experts_per_layer": 2, "dropout_rate": 0.1},
    "soft": {"selection": "gumbel_softmax"},
    "dense": {"experts": 1},
}
# Adam's usual epsilon would blow up gradients that are zero but for rounding (key biases).
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.5, clip_norm=0.5, epsilon=1e-2)
KEY = jax.random.key(5, impl="rbg")
BATCHES = [random_batch(groups=16, rows=1, seed=seed) for seed in (0, 1, 0)]


@functools.cache
def trained(mesh_name: str, routes: str, kept: str, differentiate: bool):
    """(gradients of the first batch if `differentiate`, parameters after 3 steps, metrics of
    each)."""
    model = tiny_model(**LAYERS, **ROUTES[routes], kept_activations=kept)
    one = mesh_name == "1 device"
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if one else make_mesh(MESHES[mesh_name])
    params = jax.device_get(tiny_params(model))
    with jax.set_mesh(mesh):
        state = start_state(model, OPTIMIZER, mesh, params)
        batches = [
            {name: global_array(array, by_group(mesh)) for name, array in batch.items()}
            for batch in BATCHES
        ]
        grads = {}
        if differentiate:
            settings = {"step": jnp.int32(0), "key": KEY, "config": StepConfig(), "mesh": mesh}
            compute = jax.jit(lambda params, batch: gradients(model, params, batch, **settings)[0])
            grads = compute(state.params, batches[0])
        step = make_train_step(model, OPTIMIZER, StepConfig(), mesh, total_steps=10, seed=0)
        rates = {k: jnp.float32(v) for k, v in OPTIMIZER.learning_rates.items()}
        seen = []
        for batch in batches:
            state, metrics = step(state, batch, rates)
            seen.append(metrics)
        assert step._cache_size() == 1
        return process_allgather((grads, state.params, seen), tiled=True)


def assert_close(a, b, relative=1e-5):
    """Equal trees, relative to the largest entry of each part of the model."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for part in a:
        size = max(np.max(np.abs(x), initial=0) for x in jax.tree.leaves(b[part]))
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(a[part]), jax.tree.leaves(b[part]), strict=True
        ):
            where = part + jax.tree_util.keystr(path)
            np.testing.assert_allclose(x, y, rtol=relative, atol=relative * size, err_msg=where)


def assert_equal_training(actual, wanted) -> None:
    """Compares two results of `trained`."""
    for trees in zip(actual[:2], wanted[:2], strict=True):  # gradients, parameters
        assert_close(*trees)
    for seen, expected in zip(actual[2], wanted[2], strict=True):
        assert seen.keys() == expected.keys()
        for key in seen:  # among them the loss and the norm of the gradient
            np.testing.assert_allclose(seen[key], expected[key], rtol=1e-5, err_msg=key)


def check(mesh_name: str, routes: str, kept: str, differentiate: bool) -> None:
    actual = trained(mesh_name, routes, kept, differentiate)
    assert_equal_training(actual, trained("1 device", routes, "all", differentiate))


@pytest.mark.parametrize(("mesh", "routes", "kept"), [
    ("8 data", "hard", "all"),
    ("8 fsdp", "hard", "inputs"),
    ("2 fsdp, 4 expert", "soft", "all"),
    ("2 data, 2 fsdp, 2 expert", "hard", "products"),
    ("2 fsdp, 2 expert, 2 model", "two", "all"),
    ("8 fsdp", "dense", "all"),
])  # fmt: skip
def test_meshes_agree_with_one_device(mesh, routes, kept):
    check(mesh, routes, kept, differentiate=False)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["all", "products", "inputs"])
@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("mesh", MESHES)
def test_all_meshes_agree_with_one_device(mesh, routes, kept):
    check(mesh, routes, kept, differentiate=True)


PROCESS = """
import sys
import jax
address, index, path = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
import numpy as np
import test_meshes
test_meshes.MESHES["2 fsdp"] = test_meshes.MeshConfig(data=1, fsdp=2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
for routes in ("hard", "soft"):
    leaves = jax.tree.leaves(test_meshes.trained("2 fsdp", routes, "all", True))
    if index == "0":
        np.savez(f"{path}/{routes}.npz", *leaves)
"""


@pytest.mark.slow
def test_two_processes_agree_with_one_device(tmp_path):
    """With parameters sharded over two processes, which exchange experts by gloo."""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        start("", [address, str(index), str(tmp_path)], code=PROCESS, path=Path(__file__).parent)
        for index in range(2)
    ]
    for process in processes:
        finish(process, timeout=600)
    for routes in ("hard", "soft"):
        wanted = trained("1 device", routes, "all", True)
        with np.load(tmp_path / f"{routes}.npz") as leaves:
            actual = jax.tree.unflatten(jax.tree.structure(wanted), list(leaves.values()))
        assert_equal_training(actual, wanted)


@pytest.mark.parametrize(("name", "shape"), [
    ("8 data", (1, 4, 16, 1, 32)),
    ("8 fsdp", (1, 4, 2, 1, 32)),
    ("2 fsdp, 4 expert", (1, 4, 2, 1, 32)),
    ("2 data, 2 fsdp, 2 expert", (1, 4, 4, 1, 32)),
    ("2 fsdp, 2 expert, 2 model", (1, 4, 4, 1, 16)),
])  # fmt: skip
def test_parameters_and_optimizer_state_are_sharded(name, shape):
    model = tiny_model(**ROUTES["hard"])
    places = state_shardings(model, make_optimizer(OPTIMIZER), make_mesh(MESHES[name]))
    arrays = jax.device_put(tiny_params(model), places.params)
    kernel = arrays["backbone"]["decoder"]["layers"]["routed"]["feed_forward"]["in_kernel"]
    assert kernel.shape == (1, 4, 16, 1, 32)
    assert {s.data.shape for s in kernel.addressable_shards} == {shape}
    # Adam's moments have the shardings of their parameters.
    wanted = {a.sharding for a in jax.tree.leaves(arrays)}
    assert {a for a in jax.tree.leaves(places.opt_state) if a.spec} <= wanted
    if name == "2 fsdp, 2 expert, 2 model":
        embedding = arrays["backbone"]["embedding"]
        assert {s.data.shape for s in embedding.addressable_shards} == {(12, 4)}


def test_a_logical_axis_missing_from_the_table_is_an_error(monkeypatch):
    monkeypatch.delitem(LOGICAL_AXES, "mlp")
    model = tiny_model(**ROUTES["hard"])
    with pytest.raises(ValueError, match="logical axis 'mlp' is missing from LOGICAL_AXES"):
        state_shardings(model, make_optimizer(OPTIMIZER), make_mesh(MESHES["8 data"]))
