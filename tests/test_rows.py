"""Rows of many tasks in one batch: layout, sorting by expert, and decoding as in single-task
batches."""

import functools

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from toy_run import decoder, pack_rows, random_backbone, random_examples, tiny_model

from moe_jax.decoding import cache as cached
from moe_jax.decoding import rows
from moe_jax.decoding.rows import RowModel, by_expert, row_routes
from moe_jax.decoding.scoring import log_likelihoods
from moe_jax.decoding.search import DecodingConfig

R, T, E, LENGTH = 14, 5, 4, 6
LAYERS = {"encoder_layers": 2, "encoder_vanilla_layers": (0,), "decoder_layers": 2,
          "decoder_vanilla_layers": (1,)}  # fmt: skip
N = 2  # routed layers


def sparse_routes(rng, tasks: int, layers: int, experts: int, kept: int) -> np.ndarray:
    """[T, N, E] with `kept` non-zero weights; few different ones, so that tasks share experts."""
    order = rng.permuted(np.tile(np.arange(experts), (tasks, layers, 1)), axis=-1)
    weights = np.where(order < kept, rng.integers(1, 9, order.shape), 0).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_row_routes(data):
    """Slots name each row's largest experts; slots are wasted only to reach a power of two."""
    draw = data.draw
    tasks, layers, experts = (
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        draw(st.integers(2, 6)),
    )
    count = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    route_TxNxE = rng.permuted(
        np.tile(rng.dirichlet(np.ones(experts)), (tasks, layers, 1)), axis=-1
    )
    task_R = rng.integers(0, tasks, draw(st.integers(1, 9)))
    experts_NxS, slots_NxRxK, weights_NxRxK = row_routes(route_TxNxE, task_R, count)
    slots = experts_NxS.shape[1]
    assert weights_NxRxK.dtype == np.float32
    most = 0
    for n in range(layers):
        actual = experts_NxS[n][slots_NxRxK[n]]
        largest = np.argsort(-route_TxNxE[task_R, n], axis=-1)[:, :count]
        np.testing.assert_array_equal(actual, np.sort(largest, axis=-1))
        expected = np.take_along_axis(route_TxNxE[task_R, n], actual, -1)
        np.testing.assert_array_equal(weights_NxRxK[n], expected.astype(np.float32))
        used = np.unique(actual)
        np.testing.assert_array_equal(experts_NxS[n, : len(used)], used)
        most = max(most, len(used))
    assert slots == count == most or (slots in (experts, 2, 4, 8) and most <= slots < 2 * most)
    if slots == count:  # every row uses all slots, in order
        np.testing.assert_array_equal(
            slots_NxRxK, np.broadcast_to(np.arange(count), slots_NxRxK.shape)
        )


@functools.cache
def routed_layer(experts: int, block: int):
    """Compiled: y = sum over a row's experts of weight * (a * x + other), through `by_expert`."""

    def expert(params, x_VxD, other_V):
        return {"y": params["a"] * x_VxD + other_V[:, None], "even": other_V * 2}

    @jax.jit
    def run(stack, routes, x_RxD, other_R):
        places = jax.tree.map(lambda a: a[0], rows.all_places(routes, experts))
        params_S = places.experts(jax.tree.map(lambda p: p[0], stack))
        entered = (places.enter(x_RxD), places.enter(other_R))
        result = by_expert(expert, params_S, places, block, *entered)
        return jax.tree.map(places.leave, result)

    return run


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 6, 11]), st.sampled_from([(3, 1), (3, 2), (4, 1), (4, 3), (4, 4)]),
    st.sampled_from([1, 3, 16]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_by_expert(count, experts_and_kept, block, seed):
    """Against a loop over rows and experts; blocks extend into the next expert's rows."""
    experts, kept = experts_and_kept
    rng = np.random.default_rng(seed)
    route_TxE = sparse_routes(rng, T, 2, experts, kept)
    task_R = rng.integers(0, rng.integers(1, T + 1), count)
    x_RxD = rng.normal(size=(count, 2)).astype(np.float32)
    other_R = rng.normal(size=count).astype(np.float32)
    a_E = rng.normal(size=experts).astype(np.float32)
    run = routed_layer(experts, block)
    actual = run({"a": a_E[None]}, row_routes(route_TxE, task_R, kept), x_RxD, other_R)
    for r in range(count):
        route_E = route_TxE[task_R[r], 0]
        y_D = sum(w * (a * x_RxD[r] + other_R[r]) for w, a in zip(route_E, a_E, strict=True))
        np.testing.assert_allclose(actual["y"][r], y_D, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(actual["even"][r], 2 * other_R[r], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- whole models


@functools.cache
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return pack_rows([[example] for example in random_examples(rng, R)], 6, LENGTH)


# Kinds of routes: one expert of 4, two of 3 and of 4, all 3.
KINDS = {"one": (4, 1), "two of 3": (3, 2), "two of 4": (4, 2), "soft": (3, 3)}


@functools.cache
def model(experts: int):
    return tiny_model(experts=experts, d_model=8, d_ff=8, **LAYERS)


def compiled(experts: int, count: int):
    """(backbone, routes, batch) -> (tokens decoded [R, L], log-likelihoods of targets [R])."""
    decode = decoder(model(experts), DecodingConfig(num_beams=count), LENGTH)

    @jax.jit
    def run(backbone, routes, arrays):
        likelihoods_R, _ = log_likelihoods(RowModel(model(experts), backbone, routes), arrays)
        return decode(backbone, routes, arrays), likelihoods_R

    return run


@functools.cache
def alone(kind: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(routes, tokens [T, R, L], log-likelihoods [T, R]): all rows, computed for each single
    task."""
    experts, kept = KINDS[kind]
    route_TxNxE = sparse_routes(np.random.default_rng(2), T, N, experts, kept)
    run = compiled(experts, count)
    backbone = random_backbone(model(experts))
    of_task = [
        run(backbone, row_routes(route_TxNxE, np.full(R, task), kept), batch()) for task in range(T)
    ]
    return route_TxNxE, *map(np.stack, zip(*of_task, strict=True))


@pytest.mark.parametrize(
    ("kind", "count", "block"),
    [("one", 1, None), ("one", 3, 4), ("two of 3", 1, 4), ("two of 4", 2, 1), ("soft", 1, None)],
)  # fmt: skip
def test_mixed_rows_as_alone(kind, count, block, monkeypatch):
    """Vanilla layers between routed ones; blocks of one row, of some, and all at once."""
    if block:
        for module in (rows, cached):
            monkeypatch.setattr(module, "input_block", lambda length: block)
        monkeypatch.setattr(cached, "step_block", lambda rows, slots, beams: block)
    experts, kept = KINDS[kind]
    route_TxNxE, tokens_TxRxL, likelihood_TxR = alone(kind, count)
    assert len(np.unique(tokens_TxRxL[:, :, 0], axis=0)) > 1
    run = compiled(experts, count)
    rng = np.random.default_rng(3)
    backbone = random_backbone(model(experts))
    for tasks in (range(T), [4, 4, 3, 4, 0, 4]):
        task_R = rng.permutation(np.resize(tasks, R))
        tokens, likelihood_R = run(backbone, row_routes(route_TxNxE, task_R, kept), batch())
        np.testing.assert_array_equal(tokens, tokens_TxRxL[task_R, np.arange(R)])
        expected = likelihood_TxR[task_R, np.arange(R)]
        np.testing.assert_allclose(likelihood_R, expected, rtol=1e-5, atol=1e-5)
