"""Experts switched off: the routes by hand, and the losses against the model's own router."""

import jax
import numpy as np
import pytest
from toy import toy_mixtures
from toy_run import tiny_model, tiny_params

from moe_jax.core.errors import UserError
from moe_jax.core.sharding import MeshConfig, make_mesh
from moe_jax.data.pipeline import eval_batches
from moe_jax.eval import EvalConfig, _named
from moe_jax.evaluation.disabling import disabling, experts_named, without, without_each
from moe_jax.evaluation.evaluator import Evaluator
from moe_jax.model.task_moe import parameter_shardings

LENGTHS = {"inputs": 40, "targets": 20}


def test_routes_without_an_expert_by_hand():
    route = np.array([[0.2, 0.3, 0.5], [0, 1, 0]])
    liked = np.array([[0.2, 0.3, 0.5], [0.3, 0.6, 0.1]])
    off = without_each(route, liked)
    assert off.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(off[0, 2], [[0.4, 0.6, 0], [0, 1, 0]])
    np.testing.assert_allclose(off[0, 0], [[0, 0.375, 0.625], [0, 1, 0]])
    np.testing.assert_allclose(off[1, 0], route)  # it was not used
    np.testing.assert_allclose(off[1, 1], [[0.2, 0.3, 0.5], [1, 0, 0]])  # the next choice


@pytest.mark.parametrize("selection", ["softmax", "argmax"])
def test_losses_are_those_of_a_router_that_cannot_choose_the_expert(selection, capsys):
    """With free routes the representations are the route logits; -inf there is an expert off."""
    mixture = toy_mixtures()[0]
    tasks, layers, experts = len(mixture.names), 2, 3
    model = tiny_model(
        tasks=tasks, experts=experts, kind="free", selection=selection, max_positions=48,
        vocabulary_size=mixture.vocabulary.size, representation_dim=layers * experts,
    )  # fmt: skip
    params = tiny_params(model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    ids = {name: i for i, name in enumerate(mixture.names)}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(model, mesh))
        evaluator = Evaluator(model, mixture.vocabulary, LENGTHS, 4, mesh)
        found = disabling(evaluator, placed, 0, mixture, ids, "validation", 6)
    assert "\r" not in capsys.readouterr().err  # of a bar, where nobody watches a terminal

    assert list(found["tasks"]) == list(mixture.names)
    apply = jax.jit(lambda params, batch: model.apply({"params": params}, batch)[0])
    table = np.asarray(params["representations"]).reshape(tasks, layers, experts)
    for name in mixture.names[:2]:
        batches = [
            {key: array[None] for key, array in batch.items()} | {"task_id": np.int32([ids[name]])}
            for batch, _ in eval_batches(
                mixture, name, "validation", lengths=LENGTHS, rows=4, limit=6
            )
        ]

        def loss(logits, batches=batches):
            total = count = 0
            changed = params | {"representations": logits.reshape(tasks, -1)}
            for batch in batches:
                values = np.asarray(apply(changed, batch), np.float64)
                values -= np.log(np.exp(values).sum(-1, keepdims=True))
                chosen = np.take_along_axis(values, batch["targets"][..., None], -1)[..., 0]
                real = batch["target_segments"] > 0
                total, count = total - chosen[real].sum(), count + real.sum()
            return total / count

        actual = found["tasks"][name]
        assert actual["examples"] == 6
        assert actual["loss"] == pytest.approx(loss(table), rel=1e-4)
        for n in range(layers):
            for e in range(experts):
                without = table.copy()
                without[:, n, e] = -1e9
                assert actual["without"][n][e] == pytest.approx(loss(without), rel=1e-4), (n, e)
        assert np.ptp(actual["without"]) > 1e-3  # it matters which expert is off


def test_several_experts_off_by_hand():
    model = tiny_model(experts=3)  # encoder.0 and decoder.0
    off = experts_named(model, ("decoder.0.1", "encoder.0.2", "decoder.0.0"))
    np.testing.assert_array_equal(off, [[0, 0, 1], [1, 1, 0]])
    route = np.float32([[0.2, 0.3, 0.5], [0, 1, 0]])
    liked = np.array([[0.2, 0.3, 0.5], [0.3, 0.6, 0.1]])
    found = without(route, liked, off)
    np.testing.assert_allclose(found, [[0.4, 0.6, 0], [0, 0, 1]], rtol=1e-6)
    assert found.dtype == np.float32
    with pytest.raises(UserError, match=r"no expert 'decoder.0.3'; did you mean 'decoder.0.[0-2]'"):
        experts_named(model, ("decoder.0.3",))
    with pytest.raises(UserError, match=r"all experts of encoder.0 are to be off"):
        experts_named(model, ("encoder.0.0", "encoder.0.1", "encoder.0.2"))
    with pytest.raises(UserError, match=r"eval.without is .*, but with eval.unseen 'weighted'"):
        EvalConfig(without=("encoder.0.0",), unseen="weighted")


def test_a_negative_number_of_examples_is_refused():
    with pytest.raises(UserError, match="disable_examples"):
        EvalConfig(disable_examples=-1)


def test_many_experts_that_are_off_fit_into_a_name():
    layers = [f"{side}.{layer}" for side in ("encoder", "decoder") for layer in range(12)]
    names = {_named([f"{layer}.{expert}" for layer in layers]) for expert in (0, 1)}
    assert len(names) == 2 and all(name.startswith("24_experts_") for name in names)
    assert _named(["decoder.5.2"]) == "decoder.5.2"
