"""Statistics of routes: pure functions of NumPy arrays.

Axes: T tasks, N routed layers, E experts, C categories.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from sklearn.metrics.cluster import expected_mutual_information

LINKAGE = "average"
# Routes closer than this (cosine distance) count as equal: the precision of a float32 softmax.
SAME_ROUTE = 1e-9
# Tasks inside and outside of a category: with fewer, a correlation means little.
FEWEST = 3
_AT_ONCE = 2000  # permutations in memory


def similarity(route_TxNxE: np.ndarray) -> np.ndarray:
    """Cosine similarity [T, T] float64 of the flattened routes, in 0..1."""
    route_TxF = np.asarray(route_TxNxE, np.float64).reshape(len(route_TxNxE), -1)
    route_TxF = route_TxF / np.linalg.norm(route_TxF, axis=-1, keepdims=True)
    similarity_TxT = np.clip(route_TxF @ route_TxF.T, -1, 1)
    np.fill_diagonal(similarity_TxT, 1)
    return (similarity_TxT + similarity_TxT.T) / 2


def tree(similarity_TxT: np.ndarray) -> np.ndarray:
    """Average linkage [T-1, 4] of the cosine distances 1 - similarity, T >= 2.

    Distances below `SAME_ROUTE` are set to 0, so that equal routes are never separated. Leaves are
    in optimal order (Bar-Joseph et al. 2001).
    """
    distance_TxT = 1 - similarity_TxT
    distance_TxT[distance_TxT < SAME_ROUTE] = 0
    return hierarchy.linkage(squareform(distance_TxT, checks=False), LINKAGE, True)


def leaves(tree_: np.ndarray) -> np.ndarray:
    """Order [T] in which the tree draws its leaves."""
    return hierarchy.leaves_list(tree_)


def cut(tree_: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster label [T] int, from 1, of the cut with at most `clusters` clusters.

    There may be fewer because of tied distances: one if all routes are the same.
    """
    return hierarchy.fcluster(tree_, clusters, "maxclust")


def distinct_routes(similarity_TxT: np.ndarray) -> int:
    """Number of different routes: clusters at cosine distance `SAME_ROUTE`."""
    if len(similarity_TxT) < 2:
        return len(similarity_TxT)
    return int(hierarchy.fcluster(tree(similarity_TxT), SAME_ROUTE, "distance").max())


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A measure of agreement beside what chance gives.

    `control` [P] are values by chance; `p_value` = (1 + number of controls at least as high) /
    (1 + P).
    """

    value: float
    control: np.ndarray

    @property
    def p_value(self) -> float:
        # The tolerance makes values equal that differ only by rounding.
        as_high = np.count_nonzero(self.control >= self.value - 1e-12)
        return float((1 + as_high) / (1 + len(self.control)))

    @property
    def control_mean(self) -> float:
        return float(self.control.mean())

    @property
    def control_range(self) -> list[float]:
        """The range that holds 95 % of the controls."""
        return [float(x) for x in np.percentile(self.control, [2.5, 97.5])]


def equal_by_chance(labels_T: Sequence) -> float:
    """The share of shuffles of labels [T] that give the same partition: no p can be lower."""
    sizes = [*Counter(labels_T).values()]
    shuffles = math.factorial(sum(sizes)) // math.prod(map(math.factorial, sizes))
    same = math.prod(map(math.factorial, Counter(sizes).values()))  # classes of one size exchanged
    return same / shuffles


def agreement(
    labels_T: Sequence, clusters_T: Sequence, permutations: int = 1000, seed: int = 0
) -> Agreement:
    """Adjusted mutual information of two labelings [T] of the same tasks, against shuffled labels.

    It is 1 for equal partitions and about 0 by chance (Vinh, Epps and Bailey 2010).
    """
    _, clusters_T = np.unique(np.asarray(clusters_T), return_inverse=True)
    labels_PxT = _shuffled(labels_T, permutations, seed)
    ami, *control = _adjusted_mutual_information(labels_PxT, clusters_T)
    return Agreement(float(ami), np.array(control))


def neighbour_agreement(
    labels_T: Sequence, similarity_TxT: np.ndarray, permutations: int, seed: int = 0
) -> Agreement:
    """The share of tasks whose nearest neighbour has the same label, against shuffled labels.

    Of several neighbours that are equally near, each counts in part.
    """
    near_TxT = similarity_TxT.copy()
    np.fill_diagonal(near_TxT, -np.inf)
    nearest_TxT = near_TxT >= near_TxT.max(-1, keepdims=True) - SAME_ROUTE
    weight_TxT = nearest_TxT / nearest_TxT.sum(-1, keepdims=True) / len(near_TxT)
    value, *control = (
        float(weight_TxT[labels[:, None] == labels].sum())
        for labels in _shuffled(labels_T, permutations, seed)
    )
    return Agreement(value, np.array(control))


def random_routes(route_TxNxE: np.ndarray, seed: int) -> np.ndarray:
    """Routes [T, N, E] that do not depend on the task: each layer's are shuffled among the tasks.

    So each layer keeps how decided it is and how much it uses each expert.
    """
    rng = np.random.default_rng(seed)
    layers = [rng.permutation(route_TxE) for route_TxE in np.moveaxis(route_TxNxE, 1, 0)]
    return np.stack(layers, 1)


def _shuffled(labels_T: Sequence, permutations: int, seed: int) -> np.ndarray:
    """Labels as numbers [1 + P, T]: in their order, then shuffled."""
    _, labels_T = np.unique(np.asarray(labels_T), return_inverse=True)
    rng = np.random.default_rng(seed)
    shuffled_PxT = rng.permuted(np.tile(labels_T, (permutations, 1)), axis=1)
    return np.vstack([labels_T, shuffled_PxT])


def _adjusted_mutual_information(labels_PxT: np.ndarray, clusters_T: np.ndarray) -> np.ndarray:
    """AMI [P] of each row of labels with the clusters; rows are permutations of one another.

    All rows have the same marginals, so entropies and expected mutual information are computed
    once. This is hundreds of times faster than calling scikit-learn's function for each row.
    """
    tasks, width = len(clusters_T), int(clusters_T.max()) + 1
    cells = (int(labels_PxT.max()) + 1) * width
    count_PxF = np.stack(
        [np.bincount(labels_T * width + clusters_T, minlength=cells) for labels_T in labels_PxT]
    )
    count_PxCxK = count_PxF.reshape(len(labels_PxT), -1, width)
    entropy_labels = stats.entropy(np.bincount(labels_PxT[0]))
    entropy_clusters = stats.entropy(np.bincount(clusters_T))
    information_P = entropy_labels + entropy_clusters - stats.entropy(count_PxF, axis=-1)
    expected = expected_mutual_information(count_PxCxK[0], tasks)
    highest = (entropy_labels + entropy_clusters) / 2  # reached by equal partitions only
    return np.where(
        np.isclose(information_P, highest, rtol=0, atol=1e-12),
        1.0,
        (information_P - expected) / max(highest - expected, np.finfo(np.float64).eps),
    )


@dataclasses.dataclass(frozen=True)
class Correlations:
    """Correlation of each expert's weight with properties of tasks: categories, then features.

    `r_NxExC`, `p_NxExC` (two-sided, by permutation) and `q_NxExC` (Holm over all tests) are NaN
    if not tested because the weight or the property is the same for every task.
    """

    names: list[str]
    categories: int
    r_NxExC: np.ndarray
    p_NxExC: np.ndarray
    q_NxExC: np.ndarray
    permutations: int

    @property
    def tests(self) -> int:
        return int(np.isfinite(self.p_NxExC).sum())

    def significant(self, level: float = 0.05) -> list[tuple[int, int, int]]:
        """Indices (n, e, c) with q <= level, the strongest correlation first."""
        with np.errstate(invalid="ignore"):
            indices = np.argwhere(self.q_NxExC <= level)
        order = sorted(indices.tolist(), key=lambda i: (-abs(self.r_NxExC[tuple(i)]), i))
        return [tuple(i) for i in order]


def memberships(categories_T: Sequence[str]) -> dict[str, np.ndarray]:
    """{category: 0 or 1 [T]} of categories with at least `FEWEST` tasks inside and outside."""
    result = {}
    for name in dict.fromkeys(categories_T):
        member_T = np.array([c == name for c in categories_T], np.float64)
        if FEWEST <= member_T.sum() <= len(member_T) - FEWEST:
            result[name] = member_T
    return result


def membership(route_TxNxE: np.ndarray, labels_T: Sequence[str], label: str) -> np.ndarray:
    """Correlation [N * E] of every expert's weight with having the label; NaN where one of them
    is the same for every task."""
    weight_TxF = np.asarray(route_TxNxE, np.float64).reshape(len(labels_T), -1)
    member_Tx1 = np.array([[value == label] for value in labels_T], np.float64)
    return _correlated(weight_TxF, member_Tx1, 0, 0)[0][0]


def correlations(
    route_TxNxE: np.ndarray,
    categories: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    seed: int = 0,
) -> Correlations:
    """Pearson correlation of every expert's weight with every property.

    There are 40 permutations of the tasks for each test, so that Holm's correction leaves room
    for p-values below 0.05.

    Args:
        categories, features: {name: value of each task [T]}; a task with a NaN is left out of
            that feature's tests.
    """
    route_TxNxE = np.asarray(route_TxNxE, np.float64)
    _, layers, experts = route_TxNxE.shape
    named = {**categories, **features}
    permutations = 40 * layers * experts * len(named)
    value_CxT = np.array([*named.values()]).reshape(len(named), len(route_TxNxE))
    r_CxF, p_CxF = (np.full((len(named), layers * experts), np.nan) for _ in range(2))
    masks_CxT = np.isfinite(value_CxT)
    for known_T in np.unique(masks_CxT, axis=0):
        these_C = np.all(masks_CxT == known_T, axis=-1)
        weight_TxF = route_TxNxE[known_T].reshape(known_T.sum(), -1)
        value_TxC = value_CxT[these_C][:, known_T].T
        r_CxF[these_C], p_CxF[these_C] = _correlated(weight_TxF, value_TxC, permutations, seed)
    full = (layers, experts, len(named))
    r_FxC, p_FxC = r_CxF.T, p_CxF.T
    q_FxC = holm(p_FxC)
    arrays = (a.reshape(full) for a in (r_FxC, p_FxC, q_FxC))
    return Correlations(list(named), len(categories), *arrays, permutations)


def _correlated(
    weight_TxF: np.ndarray, value_TxC: np.ndarray, permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(correlation, two-sided p) [C, F]; NaN where nothing varies."""
    tasks, shape = len(weight_TxF), (value_TxC.shape[1], weight_TxF.shape[1])
    r_CxF, p_CxF = (np.full(shape, np.nan) for _ in range(2))
    if tasks < 3:
        return r_CxF, p_CxF
    varies_C, varies_F = np.ptp(value_TxC, axis=0) > 0, np.ptp(weight_TxF, axis=0) > 1e-6

    def standard(x):
        x = x - x.mean(0)
        return x / np.linalg.norm(x, axis=0)

    value_TxV, weight_TxW = standard(value_TxC[:, varies_C]), standard(weight_TxF[:, varies_F])
    r_VxW = value_TxV.T @ weight_TxW
    rng = np.random.default_rng(seed)
    as_far_VxW = np.zeros(r_VxW.shape)
    for start in range(0, permutations, _AT_ONCE):
        count = min(_AT_ONCE, permutations - start)
        order_PxT = rng.permuted(np.tile(np.arange(tasks), (count, 1)), axis=1)
        for v, value_T in enumerate(value_TxV.T):
            shuffled_PxW = np.abs(value_T[order_PxT] @ weight_TxW)
            as_far_VxW[v] += (shuffled_PxW >= np.abs(r_VxW[v]) - 1e-12).sum(0)
    varies = np.ix_(varies_C, varies_F)
    r_CxF[varies], p_CxF[varies] = r_VxW, (1 + as_far_VxW) / (1 + permutations)
    return r_CxF, p_CxF


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction (1979) of p-values of any shape over all that are not NaN."""
    known = np.isfinite(p)
    values = p[known]
    order = np.argsort(values, kind="stable")
    scaled = values[order] * np.arange(len(values), 0, -1)
    result = np.empty_like(values)
    result[order] = np.minimum(1, np.maximum.accumulate(scaled))
    full = np.full_like(p, np.nan)
    full[known] = result
    return full


def entropy(distribution: np.ndarray) -> np.ndarray:
    """Shannon entropy over the last axis as a share of its maximum log E: 0 decided, 1 uniform.

    With one expert there is nothing to decide: 0.
    """
    p = np.asarray(distribution, np.float64)
    if p.shape[-1] == 1:
        return np.zeros(p.shape[:-1])
    return stats.entropy(p, axis=-1) / np.log(p.shape[-1])


def task_information(route_TxNxE: np.ndarray) -> np.ndarray:
    """The mutual information of task and expert in each layer, [N], as a share of log E.

    Tasks are equally likely, so it is the entropy of the mean route minus the mean entropy of
    routes. 0 where all tasks route alike, 1 where each task takes one expert and every expert is
    used equally.
    """
    route_TxNxE = np.asarray(route_TxNxE, np.float64)
    return np.clip(entropy(route_TxNxE.mean(0)) - entropy(route_TxNxE).mean(0), 0, 1)
