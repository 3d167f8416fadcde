"""Packing: every example once, rows that fit, arrays equal to those of a plain loop."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import packing
from moe_jax.data.example import Example
from moe_jax.data.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=60)
LIMITS = st.tuples(st.integers(2, 30), st.integers(2, 15))


def _example(inputs: int, targets: int, seed: int = 0) -> Example:
    rng = np.random.default_rng([inputs, targets, seed])
    inputs, targets = (np.append(rng.integers(3, 259, n - 1), 1) for n in (inputs, targets))
    return Example(inputs.astype(np.int32), targets.astype(np.int32), "", [])


def _check(plan: packing.Plan, lengths: np.ndarray, limits: tuple[int, int]) -> None:
    assert sorted(plan.examples) == list(range(len(lengths)))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(lengths)
    for row in range(plan.rows):
        assert len(plan[row])
        assert (np.minimum(lengths[plan[row]], limits).sum(0) <= limits).all()


@settings(deadline=None)
@given(LENGTHS, LIMITS, st.integers(1, 70))
def test_every_example_in_one_row_that_fits(lengths, limits, window):
    lengths = np.array(lengths)
    plan = packing.pack(lengths, limits, window)
    _check(plan, lengths, limits)
    shares = np.minimum(lengths, limits) / limits
    assert plan.rows >= np.ceil(shares.sum(0).max() - 1e-9)


@settings(deadline=None)
@given(LENGTHS, LIMITS, st.integers(0, 5))
def test_shuffled_plans_fit_and_keep_the_number_of_rows(lengths, limits, seed):
    lengths = np.array(lengths)
    plan = packing.pack(lengths, limits)
    shuffled, order = plan.shuffled(np.random.default_rng(seed))
    _check(shuffled, lengths, limits)
    assert shuffled.rows == plan.rows
    assert sorted(order) == list(range(plan.rows))


@settings(deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=6), LIMITS, st.integers(1, 4))
def test_every_task_fits_into_its_shape(tasks, limits, count):
    lengths = [np.array(task) for task in tasks]
    shapes = packing.choose_shapes(lengths, [1.0] * len(tasks), limits, count)
    assert len(shapes) == len(tasks) and len(set(shapes)) <= count
    for task, shape in zip(lengths, shapes, strict=True):
        assert (np.minimum(task, limits).max(0) <= shape).all()
        assert shape[0] <= limits[0]
    if count == 1:
        assert set(shapes) == {limits}


def test_more_shapes_leave_less_padding():
    rng = np.random.default_rng(0)
    means = [(200, 2), (60, 3), (40, 40), (120, 20), (20, 2), (100, 60)]
    tasks = [1 + rng.poisson(mean, (200, 2)) for mean in means]
    limits = (256, 64)

    def padding(shapes):
        real = sum(np.minimum(task, limits).sum() for task in tasks)
        rows = [packing.pack(np.minimum(task, limits), shape).rows
                for task, shape in zip(tasks, shapes, strict=True)]  # fmt: skip
        computed = sum(n * sum(shape) for n, shape in zip(rows, shapes, strict=True))
        return 1 - real / computed

    actual = [padding(packing.choose_shapes(tasks, [1.0] * 6, limits, n)) for n in (1, 2, 3, 4)]
    assert actual == sorted(actual, reverse=True)
    assert actual[2] < 0.6 * actual[0]


def test_a_task_of_the_longest_inputs_has_rows_of_their_length():
    """Also if the limit is not a multiple of the rounding of shapes."""
    tasks = [np.array([[500, 3]] * 20), np.array([[30, 60]] * 20)]
    shapes = packing.choose_shapes(tasks, [1.0, 1.0], (500, 64), 3)
    assert shapes[0] == (500, 8)


def test_shuffling_deals_examples_of_equal_length_anew():
    lengths = np.repeat([[5, 2], [9, 3]], 50, axis=0)
    plan = packing.pack(lengths, (20, 10))
    neighbours = {frozenset(plan.shuffled(np.random.default_rng(s))[0][0]) for s in range(20)}
    assert len(neighbours) > 10


def test_one_per_row_shuffles_everything():
    plan, order = packing.one_per_row(50).shuffled(np.random.default_rng(0))
    dealt = [int(plan[row][0]) for row in order]
    assert sorted(dealt) == list(range(50)) and dealt != sorted(dealt)


@pytest.mark.parametrize("targets", [8, 30])
def test_many_examples_are_packed_tightly(targets):
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(5, 60, 20_000), rng.integers(2, targets, 20_000)], 1)
    plan = packing.pack(lengths, (128, 64))
    bound = (lengths.sum(0) / (128, 64)).max()
    assert plan.rows < 1.05 * bound


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_truncation_keeps_eos(size, limit):
    ids = np.append(np.arange(10, 9 + size), 1)
    cut = packing.truncate(ids, limit, eos_id=1)
    assert len(cut) == min(size, limit)
    assert cut[-1] == 1
    np.testing.assert_array_equal(cut[:-1], ids[: len(cut) - 1])
    plain = packing.truncate(ids[:-1], limit, eos_id=1)
    np.testing.assert_array_equal(plain, ids[:-1][:limit])


@settings(deadline=None)
@given(LENGTHS, LIMITS)
def test_arrays_agree_with_a_plain_loop(lengths, limits):
    examples = [_example(*pair, seed=i) for i, pair in enumerate(lengths)]
    plan = packing.pack(np.array(lengths), limits)
    rows = [[examples[i] for i in plan[row]] for row in range(plan.rows)] + [[]]
    batch = packing.build(rows, {"inputs": limits[0], "targets": limits[1]}, VOCABULARY)
    for r, row in enumerate(rows):
        want = {name: [] for name in batch}
        for segment, example in enumerate(row, 1):
            inputs = packing.truncate(example.inputs, limits[0], 1).tolist()
            targets = packing.truncate(example.targets, limits[1], 1).tolist()
            want["inputs"] += inputs
            want["input_segments"] += [segment] * len(inputs)
            want["input_positions"] += range(len(inputs))
            want["targets"] += targets
            want["decoder_inputs"] += [0, *targets[:-1]]
            want["target_segments"] += [segment] * len(targets)
            want["target_positions"] += range(len(targets))
        for name, values in want.items():
            assert batch[name].dtype == np.int32
            padded = values + [0] * (batch[name].shape[1] - len(values))
            assert batch[name][r].tolist() == padded, name


def test_decoding_starts_with_the_vocabularys_start_token():
    vocabulary = SimpleNamespace(pad_id=0, eos_id=1, decoder_start_id=7)
    vocabulary.inputs = vocabulary
    rows = [[_example(3, 3), _example(2, 2)]]
    batch = packing.build(rows, {"inputs": 6, "targets": 6}, vocabulary)
    targets = batch["targets"][0]
    want = [7, targets[0], targets[1], 7, targets[3], 0]
    assert batch["decoder_inputs"][0].tolist() == want


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="9 tokens in a row of 8"):
        packing.build([[_example(4, 2), _example(5, 2)]], {"inputs": 8, "targets": 8}, VOCABULARY)


def test_encode_inputs():
    batch = packing.encode_inputs(VOCABULARY, ["ab", "abcdefgh"], 5)
    a = ord("a") + 3
    want = [[a, a + 1, 1, 0, 0], [a, a + 1, a + 2, a + 3, 1]]
    assert batch["inputs"].tolist() == want
    assert batch["input_segments"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["input_positions"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]


def test_padding_share():
    rows = [[_example(4, 2), _example(2, 1)], [_example(3, 1)]]
    batch = packing.build(rows, {"inputs": 8, "targets": 4}, VOCABULARY)
    got = packing.padding_share(batch)
    assert got["inputs"] == pytest.approx(1 - 9 / 16)
    assert got["targets"] == pytest.approx(1 - 4 / 8)
    assert got["all"] == pytest.approx(1 - 13 / 24)
    assert got["unpacked"] == pytest.approx(1 - 13 / 36)
