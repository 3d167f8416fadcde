"""The mesh and the table of logical axes; that training agrees on meshes is in test_step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import (
    LOGICAL_AXES,
    MESH_AXES,
    MeshConfig,
    by_group,
    group_shards,
    make_mesh,
    shardings,
)


def test_data_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(fsdp=2, model=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "model": 2}
    assert group_shards(mesh) == 4


@pytest.mark.parametrize(("config", "message"), [
    (MeshConfig(data=3), "3 x 1 x 1 x 1 = 3 devices, but there are 8"),
    (MeshConfig(expert=3), "2 x 1 x 3 x 1 = 6 devices, but there are 8"),
    (MeshConfig(fsdp=16), "1 x 16 x 1 x 1 = 16 devices, but there are 8"),
])  # fmt: skip
def test_a_mesh_of_another_size_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


@pytest.mark.parametrize("field", ["fsdp", "expert", "model"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused(field, size):
    with pytest.raises(UserError, match=f"MeshConfig.{field}"):
        make_mesh(MeshConfig(**{field: size}))


def box(*names, shape):
    return nn.LogicallyPartitioned(jnp.zeros(shape), names)


def test_arrays_lie_as_the_table_says():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, model=2))
    tree = {
        "kernel": box("expert", "embed", "mlp", shape=(4, 8, 8)),
        "odd": box("expert", "embed", "mlp", shape=(3, 6, 5)),
        "count": jnp.zeros(()),
    }
    arrays = jax.device_put(nn.meta.unbox(tree), shardings(tree, mesh))
    shapes = {name: {s.data.shape for s in a.addressable_shards} for name, a in arrays.items()}
    # An axis that the mesh axes do not divide is replicated.
    assert shapes == {"kernel": {(4, 2, 4)}, "odd": {(3, 6, 5)}, "count": {()}}


def test_the_table_names_axes_of_the_mesh():
    named = [axes for axes in LOGICAL_AXES.values() if axes]
    assert {a for axes in named for a in ((axes,) if isinstance(axes, str) else axes)} <= set(
        MESH_AXES
    )


def test_groups_are_spread_over_all_but_model():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    array = jax.device_put(np.arange(8).reshape(8, 1), by_group(mesh))
    parts = {tuple(s.data.ravel().tolist()) for s in array.addressable_shards}
    assert parts == {(0, 1), (2, 3), (4, 5), (6, 7)}
