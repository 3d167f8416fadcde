"""Statistics of routes: pure functions of NumPy arrays.

Axes: T tasks, N routed layers, E experts, C categories.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from sklearn.metrics.cluster import expected_mutual_information
from sklearn.metrics.pairwise import cosine_similarity

LINKAGE = "average"
# Routes closer than this (cosine distance) count as equal: the precision of a float32 softmax.
SAME_ROUTE = 1e-9


def similarity(route_TxNxE: np.ndarray) -> np.ndarray:
    """Cosine similarity [T, T] float64 of the flattened routes, in 0..1."""
    route_TxF = np.asarray(route_TxNxE, np.float64).reshape(len(route_TxNxE), -1)
    similarity_TxT = np.clip(cosine_similarity(route_TxF), -1, 1)
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
    """Adjusted mutual information of two labelings against shuffled labels.

    `ami` is 1 for equal partitions and about 0 by chance (Vinh, Epps and Bailey 2010);
    `control` [P] are its values with one labeling shuffled; `p_value` = (1 + number of controls
    at least as high) / (1 + P).
    """

    ami: float
    control: np.ndarray
    p_value: float

    @property
    def control_mean(self) -> float:
        return float(self.control.mean())

    @property
    def control_range(self) -> list[float]:
        """The range that holds 95 % of the controls."""
        return [float(x) for x in np.percentile(self.control, [2.5, 97.5])]


def agreement(
    labels_T: Sequence, clusters_T: Sequence, permutations: int = 1000, seed: int = 0
) -> Agreement:
    """Compares two labelings [T] of the same tasks with a permutation test."""
    _, labels_T = np.unique(np.asarray(labels_T), return_inverse=True)
    _, clusters_T = np.unique(np.asarray(clusters_T), return_inverse=True)
    rng = np.random.default_rng(seed)
    shuffled_PxT = rng.permuted(np.tile(labels_T, (permutations, 1)), axis=1)
    ami, *control = _adjusted_mutual_information(np.vstack([labels_T, shuffled_PxT]), clusters_T)
    # The tolerance makes values equal that differ only by rounding.
    p_value = (1 + np.count_nonzero(np.array(control) >= ami - 1e-12)) / (1 + permutations)
    return Agreement(float(ami), np.array(control), float(p_value))


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
    """Point-biserial correlation of each expert's weight with membership in each category.

    `r_NxExC`, `p_NxExC` (two-sided) and `q_NxExC` (Benjamini-Hochberg over all tests) are NaN
    if not tested because the expert's weight is the same for every task.
    """

    categories: list[str]
    untested: list[str]
    r_NxExC: np.ndarray
    p_NxExC: np.ndarray
    q_NxExC: np.ndarray

    @property
    def tests(self) -> int:
        return int(np.isfinite(self.p_NxExC).sum())

    def significant(self, level: float = 0.05) -> list[tuple[int, int, int]]:
        """Indices (n, e, c) with q <= level, the strongest correlation first."""
        with np.errstate(invalid="ignore"):
            indices = np.argwhere(self.q_NxExC <= level)
        order = sorted(indices.tolist(), key=lambda i: (-abs(self.r_NxExC[tuple(i)]), i))
        return [tuple(i) for i in order]


def correlations(
    route_TxNxE: np.ndarray, categories_T: Sequence[str], minimum: int = 3
) -> Correlations:
    """Correlates every expert's weight with membership in every category.

    A category is tested where at least `minimum` tasks are in it and as many outside: with
    fewer, the t distribution of the correlation means little. Others are named in `untested`.
    """
    route_TxNxE = np.asarray(route_TxNxE, np.float64)
    tasks, layers, experts = route_TxNxE.shape
    names = list(dict.fromkeys(categories_T))
    member_CxT = np.array([[c == name for c in categories_T] for name in names], np.float64)
    size_C = member_CxT.sum(-1) if names else np.zeros(0)
    tested_C = (size_C >= minimum) & (tasks - size_C >= minimum)
    categories = [n for n, tested in zip(names, tested_C, strict=True) if tested]
    shape = (layers * experts, len(categories))
    r_FxC, p_FxC, q_FxC = (np.full(shape, np.nan) for _ in range(3))
    weight_FxT = route_TxNxE.reshape(tasks, layers * experts).T
    varies_F = np.ptp(weight_FxT, axis=-1) > 1e-6 if tasks else np.zeros(len(weight_FxT), bool)
    if categories and varies_F.any():
        result = stats.pearsonr(weight_FxT[varies_F][:, None], member_CxT[tested_C][None], axis=-1)
        r_FxC[varies_F], p_FxC[varies_F] = result.statistic, result.pvalue
        q = stats.false_discovery_control(result.pvalue, axis=None, method="bh")
        q_FxC[varies_F] = q.reshape(result.pvalue.shape)
    full = (layers, experts, len(categories))
    untested = [n for n in names if n not in categories]
    return Correlations(
        categories, untested, r_FxC.reshape(full), p_FxC.reshape(full), q_FxC.reshape(full)
    )


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
