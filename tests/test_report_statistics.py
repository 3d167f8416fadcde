"""Statistics of routes against scikit-learn, hand arithmetic, and planted structure."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import adjusted_mutual_info_score

from moe_jax.report import statistics
from moe_jax.report.features import features


def random_routes(tasks, layers, experts, rng):
    return rng.dirichlet(np.ones(experts), (tasks, layers))


def planted_routes(labels, layers, experts, noise, rng):
    centre = {label: random_routes(1, layers, experts, rng)[0] for label in dict.fromkeys(labels)}
    route = np.array([centre[label] for label in labels])
    return (1 - noise) * route + noise * random_routes(len(labels), layers, experts, rng)


def test_similarity_is_the_cosine():
    rng = np.random.default_rng(0)
    route = random_routes(5, 3, 4, rng)
    actual = statistics.similarity(route)
    for i in range(5):
        for j in range(5):
            a, b = route[i].ravel(), route[j].ravel()
            assert actual[i, j] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    one_hot = np.eye(3)[[0, 0, 1]][:, None]
    np.testing.assert_allclose(statistics.similarity(one_hot), [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


def test_planted_clusters_are_found_and_random_routes_are_not():
    rng = np.random.default_rng(1)
    labels = np.repeat(["a", "b", "c", "d"], 8)
    rng.shuffle(labels)
    planted = statistics.tree(statistics.similarity(planted_routes(labels, 6, 3, 0.2, rng)))
    actual = statistics.agreement(labels, statistics.cut(planted, 4), 200)
    assert actual.value == pytest.approx(1)
    assert actual.p_value == pytest.approx(1 / 201)
    assert abs(actual.control_mean) < 0.05

    p_values = []
    for _ in range(40):  # by chance, p is about uniform
        random = statistics.tree(statistics.similarity(random_routes(32, 6, 3, rng)))
        p_values.append(statistics.agreement(labels, statistics.cut(random, 4), 100).p_value)
    assert 0.3 < np.mean(p_values) < 0.75
    assert np.mean(np.array(p_values) <= 0.05) <= 0.2


@pytest.mark.parametrize(("classes", "clusters", "tasks"), [(4, 4, 24), (22, 20, 160), (5, 1, 9)])
def test_ami_and_its_control_are_scikit_learns(classes, clusters, tasks):
    rng = np.random.default_rng(2)
    labels, actual = rng.integers(0, classes, tasks), rng.integers(0, clusters, tasks)
    agreement = statistics.agreement([f"c{x}" for x in labels], actual, 20, seed=3)
    assert agreement.value == pytest.approx(adjusted_mutual_info_score(labels, actual), abs=1e-9)
    names = np.unique([f"c{x}" for x in labels], return_inverse=True)[1]
    shuffled = np.random.default_rng(3).permuted(np.tile(names, (20, 1)), axis=1)
    expected = [adjusted_mutual_info_score(row, actual) for row in shuffled]
    np.testing.assert_allclose(agreement.control, expected, atol=1e-9)
    low, high = agreement.control_range
    assert low <= agreement.control_mean <= high


def test_ami_of_equal_partitions_is_one_whatever_their_names():
    labels = [1, 1, 2, 2, 3, 3]
    assert statistics.agreement(labels, ["x", "x", "b", "b", "q", "q"], 10).value == 1
    singletons = statistics.agreement(range(6), range(6), 10)
    assert singletons.p_value == 1  # every shuffle agrees as well


@pytest.mark.parametrize("labels", ["aab", "aabb", "abcd", "aaab", "aabbc", "aabbcc", "aaabbc"])
def test_the_least_p_of_few_tasks(labels):
    """All shuffles, one by one."""

    def partition(of):
        return {frozenset(i for i, x in enumerate(of) if x == label) for label in of}

    shuffles = [partition(shuffled) for shuffled in itertools.permutations(labels)]
    expected = shuffles.count(partition(labels)) / len(shuffles)
    assert statistics.equal_by_chance(labels) == pytest.approx(expected)


def test_equal_routes_are_one_cluster():
    rng = np.random.default_rng(4)
    similarity = statistics.similarity(np.repeat(random_routes(1, 4, 3, rng), 10, 0))
    assert statistics.distinct_routes(similarity) == 1
    clusters = statistics.cut(statistics.tree(similarity), 4)
    assert set(clusters) == {1}
    actual = statistics.agreement([0, 1] * 5, clusters, 50)
    assert (actual.value, actual.p_value) == (0, 1)


def test_ties_are_not_cut_apart():
    route = np.eye(3)[[0, 0, 0, 1, 1, 2]][:, None]
    similarity = statistics.similarity(route)
    assert statistics.distinct_routes(similarity) == 3
    assert len(set(statistics.cut(statistics.tree(similarity), 5))) == 3


def test_leaves_hold_every_task_once():
    similarity = statistics.similarity(random_routes(9, 2, 3, np.random.default_rng(5)))
    assert sorted(statistics.leaves(statistics.tree(similarity))) == list(range(9))


def test_nearest_neighbours_by_hand():
    similarity = np.array(
        [[1, 0.9, 0.1, 0.1], [0.9, 1, 0.2, 0.9], [0.1, 0.2, 1, 0.3], [0.1, 0.9, 0.3, 1]]
    )
    # 0 -> 1 (same), 1 -> 0 or 3 (half), 2 -> 3 (other), 3 -> 1 (other)
    actual = statistics.neighbour_agreement(["a", "a", "a", "b"], similarity, 50)
    assert actual.value == pytest.approx((1 + 0.5) / 4)
    rng = np.random.default_rng(3)
    labels = ["a", "b", "c"] * 6
    planted = statistics.similarity(planted_routes(labels, 4, 3, 0.1, rng))
    actual = statistics.neighbour_agreement(labels, planted, 200)
    assert actual.value == 1 and actual.p_value == pytest.approx(1 / 201)
    assert actual.control_mean == pytest.approx(5 / 17, abs=0.05)  # of 17 others, 5 are alike


def test_random_routes_keep_each_layer_and_lose_the_tasks():
    rng = np.random.default_rng(4)
    labels = ["a", "b", "c"] * 6
    route = planted_routes(labels, 5, 3, 0.1, rng)
    actual = statistics.random_routes(route, 1)
    for n in range(5):
        np.testing.assert_array_equal(np.sort(actual[:, n], axis=0), np.sort(route[:, n], axis=0))
    value = statistics.neighbour_agreement(labels, statistics.similarity(actual), 10).value
    assert value < 0.8


def test_correlations_are_scipys_permutation_test():
    rng = np.random.default_rng(6)
    categories = statistics.memberships(["a"] * 5 + ["b"] * 7)
    length = rng.normal(size=12)
    length[3] = np.nan
    route = random_routes(12, 2, 3, rng)
    actual = statistics.correlations(route, categories, {"length": length})
    assert actual.names == ["a", "b", "length"] and actual.categories == 2
    assert actual.tests == 18 and actual.permutations == 40 * 18
    known = np.isfinite(length)
    for c, (value, rows) in enumerate([(categories["a"], slice(None)), (None, None),
                                       (length[known], known)]):  # fmt: skip
        if value is None:
            continue
        weight = route[rows][:, 1, 2]
        r = stats.pearsonr(weight, value)[0]
        assert actual.r_NxExC[1, 2, c] == pytest.approx(r)
        method = stats.PermutationMethod(4000, rng=np.random.default_rng(1))
        p = stats.pearsonr(weight, value, method=method).pvalue
        assert actual.p_NxExC[1, 2, c] == pytest.approx(p, abs=0.06)
    np.testing.assert_allclose(actual.r_NxExC[..., 0], -actual.r_NxExC[..., 1])


def test_correction_is_holms():
    """The k-th smallest of m is times m - k + 1, never falling, at most 1."""
    p = np.array([[0.01, 0.04, np.nan], [0.03, 0.005, 0.5]])
    np.testing.assert_allclose(statistics.holm(p), [[0.04, 0.09, np.nan], [0.09, 0.025, 0.5]])


def test_planted_expert_is_significant_and_chance_is_not():
    rng = np.random.default_rng(8)
    labels = ["a", "b", "c", "d"] * 8
    categories = statistics.memberships(labels)
    route = random_routes(32, 4, 3, rng)
    route[[label == "b" for label in labels], 2] = [0.02, 0.96, 0.02]
    strongest = statistics.correlations(route, categories, {}).significant()[0]
    assert strongest == (2, 1, 1)
    false = sum(
        bool(statistics.correlations(random_routes(32, 2, 2, rng), categories, {}).significant())
        for _ in range(40)
    )
    assert false <= 7  # the share of reports with any false find is at most the level, 5 %


def test_what_cannot_be_tested_is_said():
    rng = np.random.default_rng(9)
    assert list(statistics.memberships(["a"] * 6 + ["b"] * 5 + ["lone"] * 2)) == ["a", "b"]
    assert statistics.memberships(["a"] * 4) == {} == statistics.memberships([])

    categories = statistics.memberships(["a", "b"] * 5)
    constant = statistics.correlations(np.full((10, 2, 2), 0.5), categories, {"x": np.ones(10)})
    assert constant.tests == 0 and constant.significant() == []
    assert np.isnan(constant.q_NxExC).all()

    half = random_routes(10, 2, 2, rng)
    half[:, 0] = 0.5
    actual = statistics.correlations(half, categories, {})
    assert actual.tests == 4 and np.isnan(actual.p_NxExC[0]).all()

    assert statistics.correlations(np.zeros((0, 2, 2)), {}, {}).tests == 0


def test_entropy_and_task_information():
    np.testing.assert_allclose(statistics.entropy([[1, 0, 0], [1 / 3] * 3]), [0, 1], atol=1e-12)
    p = np.array([0.7, 0.2, 0.1])
    assert statistics.entropy(p) == pytest.approx(-(p * np.log(p)).sum() / np.log(3))
    assert statistics.entropy(np.ones((4, 1))).tolist() == [0, 0, 0, 0]
    # Layer 0: each task its own expert; layer 1: the same for all; layer 2: undecided.
    route = np.stack([np.eye(3), np.eye(3)[[1, 1, 1]], np.full((3, 3), 1 / 3)], 1)
    np.testing.assert_allclose(statistics.task_information(route), [1, 0, 0], atol=1e-12)


def test_measured_features_by_hand():
    lines = [
        {"task": "copy", "input": "The red fox!", "references": "red"},
        {"task": "copy", "input": "a blue Fox", "references": ["blue fox", "x"]},
        {"task": "label", "input": "good", "references": "yes"},
        {"task": "label", "input": "bad bad", "references": "yes"},
    ]
    found = features(lines)
    assert found["copy"] == {
        "input length": 3, "output length": 1.5, "extractiveness": 1, "label entropy": 1,
        "closed-book": 0,
    }  # fmt: skip
    assert found["label"]["label entropy"] == 0 and found["label"]["extractiveness"] == 0
    assert features([{"task": "t", "input": "who?", "references": x} for x in "ab"])["t"][
        "closed-book"
    ] == pytest.approx(1)
