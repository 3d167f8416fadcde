"""Batches: content, proportions, exact resume, equal batches for any number of processes."""

import collections
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy import toy_cache, toy_mixtures

from moe_jax.core.errors import UserError
from moe_jax.data import pipeline
from moe_jax.data.packing import padding_share
from moe_jax.data.pipeline import TaskRows, eval_batches, train_batches
from moe_jax.data.schedule import Schedule

LENGTHS = {"inputs": 48, "targets": 24}
KEYS_IN = {"inputs", "input_segments", "input_positions"}
KEYS_OUT = {"decoder_inputs", "targets", "target_segments", "target_positions"}


@pytest.fixture(scope="module")
def train():
    return toy_mixtures()[0]


def _batches(mixture, count, **changes):
    settings = {"lengths": LENGTHS, "groups": 4, "rows": 2, "threads": 0} | changes
    return list(itertools.islice(train_batches(mixture, **settings), count))


def _equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def _inputs(batch, vocabulary):
    """(task id, input text) of every example in a batch."""
    for g, r in np.ndindex(batch["inputs"].shape[:2]):
        segments = batch["input_segments"][g, r]
        for segment in range(1, segments.max() + 1):
            ids = batch["inputs"][g, r][segments == segment]
            yield int(batch["task_id"][g]), vocabulary.decode(ids)


def test_shapes_and_types(train):
    (batch,) = _batches(train, 1)
    assert batch.keys() == KEYS_IN | KEYS_OUT | {"task_id"}
    assert all(array.dtype == np.int32 for array in batch.values())
    assert all(batch[key].shape == (4, 2, 48) for key in KEYS_IN)
    assert all(batch[key].shape == (4, 2, 24) for key in KEYS_OUT)
    assert batch["task_id"].shape == (4,)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_their_tasks_examples_whole(train, pack):
    known = {(i, e.inputs_text): e for i, t in enumerate(train.tasks) for e in t.records("train")}
    for batch in _batches(train, 10, pack=pack):
        for key in _inputs(batch, train.vocabulary):
            assert key in known
        np.testing.assert_array_equal(
            batch["input_segments"].max(-1), batch["target_segments"].max(-1)
        )
        if not pack:
            assert (batch["input_segments"].max(-1) == 1).all()


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_example_once_and_the_next_is_in_another_order(train, pack):
    task = train.task("toy_copy")
    settings = {"lengths": LENGTHS, "shape": (48, 24), "vocabulary": train.vocabulary, "pack": pack}
    stream = TaskRows(task, "train", **settings, seed=3)
    rows = stream.plan.rows
    epochs = [[tuple(stream.examples(e * rows + r)) for r in range(rows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(60))
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.examples(rows + 1) == pytest.approx(epochs[1][1])  # random access
    other = TaskRows(task, "train", **settings, seed=4)
    assert [tuple(other.examples(r)) for r in range(rows)] != epochs[0]


def test_a_task_smaller_than_a_group_wraps_around_without_padding_rows():
    _, unseen = toy_mixtures()
    (batch,) = _batches(unseen, 1, split="fewshot_13_train", pack=False, groups=1, rows=20)
    assert (batch["input_segments"].max(-1) == 1).all()
    counts = collections.Counter(_inputs(batch, unseen.vocabulary))
    assert sum(counts.values()) == 20 and set(counts.values()) <= {2, 3, 4, 5, 6}
    texts = {e.inputs_text for e in unseen.tasks[0].records("fewshot_13_train")}
    assert {text for _, text in counts} == texts


def test_resuming_is_exact(train):
    want = _batches(train, 12)
    for threads in (0, 2):
        data = train_batches(train, lengths=LENGTHS, groups=4, rows=2, threads=threads)
        iterator = iter(data)
        for b in range(5):
            _equal(next(iterator), want[b])
        state = iterator.get_state()
        next(iterator)
        fresh = iter(train_batches(train, lengths=LENGTHS, groups=4, rows=2, threads=threads))
        fresh.set_state(state)
        for b in range(5, 12):
            _equal(next(fresh), want[b])


def _groups(batches):
    """The groups of all batches, as (shape of rows, task, bytes), in order."""
    return [
        (b["inputs"].shape[2], int(b["task_id"][g]), b["inputs"][g].tobytes())
        for b in batches
        for g in range(len(b["task_id"]))
    ]


@pytest.mark.parametrize("shapes", [1, 2])
def test_batches_of_another_size_go_on_with_the_next_groups(shapes, train):
    """Of each shape of rows: the same groups in the same order, none left out, none twice."""
    settings = {"lengths": {"inputs": 96, "targets": 48}, "rows": 2, "threads": 0, "shapes": shapes}
    whole = _groups(_batches(train, 60, groups=6, **settings))
    parts, found = [(3, 6), (5, 2), (4, 9), (4, 3)], []
    for i, (count, groups) in enumerate(parts):
        batches = iter(train_batches(train, groups=groups, earlier=parts[:i], **settings))
        state = batches.get_state()
        state["next_index"] = sum(n for n, _ in parts[:i])
        batches.set_state(state)
        found += _groups(itertools.islice(batches, count))
    assert len(found) == sum(count * groups for count, groups in parts)
    widths = {width for width, _, _ in whole}
    assert len(widths) == shapes
    for width in widths:
        mine = [group for group in found if group[0] == width]
        assert mine == [group for group in whole if group[0] == width][: len(mine)]


def test_a_batch_of_an_earlier_size_cannot_be_asked_for(train):
    batches = iter(train_batches(train, lengths=LENGTHS, groups=4, rows=2, earlier=[(2, 8)],
                                 threads=0))  # fmt: skip
    with pytest.raises(ValueError, match="batch 0 is of an earlier part of the run"):
        next(batches)


def test_rows_of_several_shapes(train):
    """Proportions, resuming and several processes work; a batch has one shape, rows are full."""
    limits = {"inputs": 48, "targets": 48}  # targets are far shorter
    settings = {"lengths": limits, "shapes": 3, "mixing": "equal"}
    batches = _batches(train, 300, **settings)
    sizes = collections.Counter(b["inputs"].shape[1:] + b["targets"].shape[2:] for b in batches)
    assert 1 < len(sizes) <= 3
    for rows, l_in, l_out in sizes:
        assert rows == max(1, round(2 * 96 / (l_in + l_out)))
    known = {(i, e.inputs_text): e for i, t in enumerate(train.tasks) for e in t.records("train")}
    examples = collections.Counter()
    for batch in batches:
        for key in _inputs(batch, train.vocabulary):
            assert key in known
            examples[key[0]] += 1
    counts = np.array([examples[i] for i in range(len(train.names))])
    np.testing.assert_allclose(counts / counts.sum(), 1 / len(train.names), atol=0.03)
    real = np.mean([1 - padding_share(b)["all"] for b in batches])
    plain = np.mean([1 - padding_share(b)["all"] for b in _batches(train, 300, lengths=limits)])
    assert real > plain + 0.05
    iterator = iter(train_batches(train, groups=4, rows=2, threads=0, **settings))
    iterator.set_state({"next_index": 250})
    _equal(next(iterator), batches[250])
    parts = [_batches(train, 3, part=(p, 2), **settings) for p in range(2)]
    for b in range(3):
        _equal({k: np.concatenate([part[b][k] for part in parts]) for k in batches[b]}, batches[b])


def test_far_batches_are_as_cheap_as_near_ones(train):
    iterator = iter(train_batches(train, lengths=LENGTHS, groups=4, rows=2, threads=0))
    iterator.set_state({"next_index": 10**9})
    far = next(iterator)
    assert (far["input_segments"].max(-1) > 0).all()


def test_processes_share_the_batches_of_one(train):
    whole = _batches(train, 6)
    parts = [_batches(train, 6, part=(p, 2)) for p in range(2)]
    for b in range(6):
        joined = {k: np.concatenate([part[b][k] for part in parts]) for k in whole[b]}
        _equal(joined, whole[b])
    with pytest.raises(UserError, match="4 groups cannot be shared equally by 3"):
        _batches(train, 1, part=(0, 3))


def test_no_tensorflow_in_a_process_that_reads_a_prepared_cache():
    script = """
        import sys
        from toy import REQUEST
        from moe_jax.data.pipeline import eval_batches, train_batches
        from moe_jax.data.prepared import ensure_prepared
        train = ensure_prepared(CACHE, REQUEST)["toy_train"]
        lengths = {"inputs": 48, "targets": 24}
        next(iter(train_batches(train, lengths=lengths, groups=2, rows=2)))
        next(eval_batches(train, "toy_sum", "test", lengths=lengths, rows=2))
        train.task("toy_sum").metric_fns(), train.vocabulary.decode([5])
        print(sorted({"tensorflow", "seqio", "tensorflow_text"} & set(sys.modules)))
    """
    assert _run(script).splitlines()[-1] == "[]"


def _run(script: str) -> str:
    """The output of a Python process in which CACHE is the toy cache."""
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", f"CACHE = {str(toy_cache())!r}\n" + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- mixing ----


@pytest.mark.parametrize("shares", [[1.0], [1, 1, 1], [5, 1, 1], [1000, 1, 30, 30], [1] * 50])
def test_schedule_has_its_shares_everywhere_and_numbers_each_task(shares):
    schedule = Schedule(shares, seed=0)
    drawn = [schedule(j) for j in range(6000)]
    share = np.array(shares) / np.sum(shares)
    for task in range(len(shares)):
        numbers = [n for t, n in drawn if t == task]
        assert numbers == list(range(len(numbers)))
        for start in range(0, 6000, 500):
            count = sum(t == task for t, _ in drawn[start : start + 500])
            assert abs(count - 500 * share[task]) <= 3 + 0.02 * 500 * share[task]
    assert [schedule(j) for j in (5999, 0, 2048, 1023)] == [drawn[j] for j in (5999, 0, 2048, 1023)]


def test_groups_of_a_batch_are_of_different_tasks_and_the_order_varies():
    schedule = Schedule([1] * 20, seed=1)
    batches = [[schedule(8 * b + g)[0] for g in range(8)] for b in range(500)]
    assert np.mean([len(set(batch)) for batch in batches]) > 7.8
    assert len({tuple(batch) for batch in batches}) == 500
    other = Schedule([1] * 20, seed=2)
    assert [[other(8 * b + g)[0] for g in range(8)] for b in range(10)] != batches[:10]


@pytest.mark.parametrize(
    "mixing, options, want",
    [
        ("equal", {}, [1, 1]),
        ("examples", {}, [60, 60]),
        ("seqio", {}, [1, 2]),
        ("temperature", {"temperature": 2.0}, [1, 1]),
    ],
)
@pytest.mark.parametrize("pack", [True, False])
def test_rates_count_examples(train, mixing, options, want, pack):
    counts = collections.Counter()
    for batch in _batches(train, 150, mixing=mixing, pack=pack, **options):
        counts.update(task for task, _ in _inputs(batch, train.vocabulary))
    share = counts[0] / sum(counts.values())
    assert share == pytest.approx(want[0] / sum(want), abs=0.02)


def test_rates_with_cap_and_temperature(train):
    tasks = [SimpleNamespace(examples=lambda split, n=n: n, rate=7.0) for n in (100, 10_000)]
    got = [[pipeline._rate(t, "train", *o) for t in tasks] for o in (
        ("examples", None, 1.0), ("examples", 400, 1.0), ("temperature", None, 2.0),
        ("temperature", 400, 2.0), ("equal", 400, 2.0), ("seqio", 400, 2.0),
    )]  # fmt: skip
    assert got == [[100, 10_000], [100, 400], [10, 100], [10, 20], [1, 1], [7, 7]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mixing": "equals"}, "did you mean 'equal'"),
        ({"temperature": 0, "mixing": "temperature"}, "temperature=0 must be above 0"),
        ({"task_ids": {"toy_copy": 0}}, "'toy_sum' is not in the task table"),
        ({"split": "dev"}, "has no split 'dev'"),
        ({"tasks": ["toy_cop"]}, "did you mean 'toy_copy'"),
        ({"rows": 0}, "must be at least 1"),
        ({"lengths": {"inputs": 0, "targets": 4}}, "must be at least 1"),
    ],
)
def test_bad_arguments(train, changes, message):
    with pytest.raises(UserError, match=message):
        _batches(train, 1, **changes)


def test_task_ids_and_restriction(train):
    ids = {"another": 0, "toy_sum": 5, "toy_copy": 3}
    assert {int(i) for b in _batches(train, 10, task_ids=ids) for i in b["task_id"]} == {3, 5}
    only = _batches(train, 10, task_ids=ids, tasks=["toy_sum"])
    assert {int(i) for b in only for i in b["task_id"]} == {5}


def test_packing_saves_padding(train):
    lengths = {"inputs": 96, "targets": 32}
    shares = [padding_share(batch) for batch in _batches(train, 20, lengths=lengths)]
    plain = [padding_share(b) for b in _batches(train, 20, lengths=lengths, pack=False)]
    mean = {k: np.mean([s[k] for s in shares]) for k in shares[0]}
    assert mean["all"] < 0.4 < mean["unpacked"]
    assert mean["unpacked"] == pytest.approx(np.mean([s["all"] for s in plain]), abs=0.02)


# ---- evaluation ----


def test_evaluation_reads_a_split_once_in_order(train):
    records = train.task("toy_sum").records("test")
    seen = []
    for batch, examples in eval_batches(train, "toy_sum", "test", lengths=LENGTHS, rows=8):
        assert all(batch[k].shape == (8, 48) for k in KEYS_IN)
        assert all(batch[k].shape == (8, 24) for k in KEYS_OUT)
        for row, (index, example) in enumerate(examples):
            assert example.references == records[index].references
            ids = batch["inputs"][row]
            assert train.vocabulary.decode(ids) == records[index].inputs_text
            seen.append(index)
        assert (batch["input_segments"][len(examples) :] == 0).all()
        assert (batch["target_segments"][len(examples) :] == 0).all()
    assert seen == list(range(20)) and len(examples) == 4


def test_limited_evaluation_is_spread_over_the_split(train):
    batches = eval_batches(train, "toy_sum", "test", lengths=LENGTHS, rows=3, limit=5)
    assert [i for _, examples in batches for i, _ in examples] == [0, 4, 8, 12, 16]
    batches = eval_batches(train, "toy_sum", "test", lengths=LENGTHS, rows=3, limit=99)
    assert sum(len(examples) for _, examples in batches) == 20
