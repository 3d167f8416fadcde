"""Projections of embeddings, and the files that hold task representations."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from moe_jax.core.errors import UserError
from moe_jax.data.representations import Representations, fit, read_representations, unit_length
from moe_jax.unseen import representations

DATA = Path(__file__).with_name("data") / "hf"

# ------------------------------------------------------------------------------ components

RAW = np.random.default_rng(0).normal(1.0, 1.0, (6, 40)) * 3


def test_components_are_those_of_the_covariance():
    unit = RAW / np.sqrt((RAW**2).sum(1))[:, None]
    values, vectors = np.linalg.eigh(np.cov(unit.T))
    wanted = (unit - unit.mean(0)) @ vectors[:, ::-1][:, :3]
    wanted /= np.sqrt((wanted**2).mean())
    actual = fit(RAW, 3)(RAW)
    assert actual.dtype == np.float32
    signs = np.sign((actual * wanted).sum(0))  # of an axis, free
    np.testing.assert_allclose(actual, wanted * signs, atol=1e-5)
    assert values[-1] > values[-2] > values[-3] > 0


def test_a_new_task_is_projected_as_the_others_were():
    projection = fit(RAW[:4], 3)
    np.testing.assert_allclose(projection(RAW)[:4], projection(RAW[:4]), rtol=1e-6)
    np.testing.assert_allclose(projection(7 * RAW[4:]), projection(RAW[4:]), rtol=1e-5)


def test_more_components_than_tasks_span():
    """All distances are kept; the rest is zero; rows are as long as standard normal ones."""
    rows = fit(RAW, 16)(RAW)
    assert rows.shape == (6, 16) and not rows[:, 5:].any()
    assert np.mean(np.square(rows)) == pytest.approx(1, rel=1e-5)

    def distances(rows):
        return np.array([np.linalg.norm(a - b) for a, b in itertools.combinations(rows, 2)])

    ratio = distances(rows) / distances(unit_length(RAW))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


@pytest.mark.parametrize("raw", [RAW[:1], np.ones((3, 4))])
def test_tasks_that_do_not_differ_have_no_components(raw):
    with pytest.raises(UserError, match=r"two tasks that differ.*pca_from"):
        fit(raw, 3)


def test_affinity_is_that_of_all_shuffles():
    rows = np.random.default_rng(1).normal(size=(6, 4))
    rows[:3] += 0.5
    names = ["a", "a", "a", "b", "b", "b"]

    def difference(names):
        cosines = {True: [], False: []}
        for i, j in itertools.combinations(range(6), 2):
            norms = np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])
            cosines[names[i] == names[j]].append(rows[i] @ rows[j] / norms)
        return np.mean(cosines[True]), np.mean(cosines[False])

    within, between = difference(names)
    shuffles = [np.subtract(*difference(n)) for n in itertools.permutations(names)]
    actual = representations.affinity(np.vstack([rows, rows[:1]]), [*names, ""])
    assert actual[:2] == pytest.approx((within, between))
    assert actual.p == pytest.approx(
        np.mean(np.array(shuffles) >= within - between - 1e-12), abs=0.02
    )
    assert (actual.tasks, actual.categories) == (6, 2)


def test_affinity_needs_both_sorts_of_pairs():
    assert representations.affinity(RAW, ["a"] * 6) is None
    assert representations.affinity(RAW, list("abcdef")) is None
    assert representations.affinity(RAW, [""] * 6) is None


# ------------------------------------------------------------------------------ files


def test_files_of_any_matrix(tmp_path):
    rows = np.arange(6, dtype=np.float64).reshape(3, 2)
    archive, plain = tmp_path / "a.npz", tmp_path / "a.json"
    np.savez(archive, tasks=["x", "y", "z"], representations=rows)
    plain.write_text(json.dumps({"x": [0, 1], "y": [2, 3], "z": [4, 5]}))
    for path in (archive, plain):
        actual = read_representations(path, ["z", "x"], 2)
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, [[4, 5], [0, 1]])


def save(**arrays):
    return lambda path: np.savez(path, **arrays)


NAMED = {"tasks": ["toy_copy", "toy_sum"]}
FAULTS = {
    "absent": ("f.npz", lambda path: None, "cannot read .*f.npz"),
    "text": ("f.npz", lambda path: path.write_text("hello"), "neither a .json file nor an .npz"),
    "cut": ("f.npz", lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "neither"),
    "npy": ("f.npy", lambda path: np.save(path, np.ones(3)), "neither"),
    "pickle": (
        "f.npz",
        save(tasks=np.array(["a", None], object), representations=np.ones((2, 2))),
        "neither",
    ),
    "no names": ("f.npz", save(representations=np.ones((2, 2))), "has no 'tasks'"),
    "no rows": ("f.npz", save(**NAMED, representation=1), "has no 'representations'; did you mean"),
    "numbers": ("f.npz", save(tasks=[1], representations=np.ones((1, 2))), "one name per row"),
    "twice": ("f.npz", save(tasks=["a", "a"], representations=np.ones((2, 2))), "'a' is there tw"),
    "complex": ("f.npz", save(**NAMED, representations=np.ones((2, 2)) * 1j), "must hold as many"),
    "truth": ("f.npz", save(**NAMED, representations=np.ones((2, 2), bool)), "must hold as many"),
    "huge": ("f.npz", save(**NAMED, representations=np.full((2, 2), 1e300)), "that is not finite"),
    "key twice": (
        "f.json",
        lambda path: path.write_text('{"a": [1], "a": [2]}'),
        "'a' is there tw",
    ),
    "count": ("f.npz", save(**NAMED, representations=np.ones((3, 2))), "each of its 2 tasks"),
    "uneven": (
        "f.json",
        lambda path: path.write_text('{"a": [1], "b": [1, 2]}'),
        "as many numbers",
    ),
    "words": ("f.json", lambda path: path.write_text('{"a": ["x"]}'), "as many numbers"),
    "list": ("f.json", lambda path: path.write_text("[1]"), "must be {name: value}"),
    "json": ("f.json", lambda path: path.write_text("{"), "not valid JSON"),
    "infinite": (
        "f.npz",
        save(**NAMED, representations=[[1, 2], [1, np.inf]]),
        "'toy_sum' has a number that is not finite",
    ),
    "missing": (
        "f.npz",
        save(tasks=["toy_som", "a"], representations=np.ones((2, 2))),
        r"no task 'toy_sum' \(nor 1 others\); did you mean 'toy_som'",
    ),
    "length": (
        "f.npz",
        save(**NAMED, representations=np.ones((2, 3))),
        "have 3 numbers, but RouterConfig.representation_dim is 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files(fault, tmp_path):
    name, write, message = FAULTS[fault]
    path = tmp_path / name
    write(path)
    names = ["toy_sum", "toy_sums"] if fault == "missing" else ["toy_sum"]
    with pytest.raises(UserError, match=message) as caught:
        read_representations(path, names, 2)
    assert "\n" not in str(caught.value)


def test_a_file_comes_back_as_it_was(tmp_path):
    projection = fit(RAW, 3)
    names = tuple(f"task_{i}" for i in range(6))
    raw = RAW.astype(np.float32)
    made = Representations(names, projection(raw), raw, projection, {"kind": "text", "a": [1]})
    made.write(tmp_path / "f.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]
    actual = Representations.read(tmp_path / "f.npz")
    assert (actual.tasks, actual.settings) == (names, made.settings)
    np.testing.assert_array_equal(actual.raw_TxD, raw)
    np.testing.assert_array_equal(actual.projection(raw), made.rows_TxK)
    np.testing.assert_array_equal(read_representations(tmp_path / "f.npz", names, 3), made.rows_TxK)
    np.savez(tmp_path / "g.npz", tasks=["a"], representations=np.ones((1, 3)))
    with pytest.raises(UserError, match=r"no 'components', so represent did not write it"):
        Representations.read(tmp_path / "g.npz")
    arrays = dict(np.load(tmp_path / "f.npz"))
    for name, value in {
        "raw": raw[:, 1:], "mean": projection.mean_D * np.nan, "scale": np.array([1.0]),
        "components": projection.components_KxD * 1e300,
    }.items():  # fmt: skip
        np.savez(tmp_path / "g.npz", **arrays | {name: value})
        with pytest.raises(UserError, match="is not what represent writes"):
            Representations.read(tmp_path / "g.npz")
