"""The 95 % bootstrap intervals of means over tasks, and over tasks and seeds: all are made here.

Seeds and tasks are crossed: a seed's model, lucky or not, is scored on all tasks, and a task, easy
or not, under all seeds. So neither alone says how far chance goes. Each sample draws tasks with
replacement and seeds with replacement, and has the values of the drawn tasks under the drawn seeds
(the pigeonhole bootstrap: Owen 2007, arXiv 0712.1111). With one seed, it draws tasks alone.

Two corrections make them hold the truth about as often as they say, also of few tasks and seeds
(docs/method.md, Gains, has how often):

- A sample draws one task and one seed less than there are. With as many, the variance of a mean of
  n would be too small by (n - 1)/n, half of it for two (Rao and Wu 1988, Journal of the American
  Statistical Association 83).
- The ends are not the quantiles 0.025 and 0.975 of the samples, which are right for a variance that
  is known. They are Phi(t) and 1 - Phi(t), with the normal distribution Phi and t the quantile
  0.025 of Student's: for 6 tasks, 0.005 and 0.995 (the expanded percentile interval: Hesterberg
  2015, What Teachers Should Know About the Bootstrap, arXiv 1411.5279). There are T - 1 degrees of
  freedom; with several seeds, those of Satterthwaite (1946, Biometrics Bulletin 2).

No end for a mean leaves the range of the values, as one of Student's or of a studentised bootstrap
can.
"""

import math

import numpy as np
from scipy import stats

# Of five values, all have one sign by chance in 6 % of cases: no interval of theirs that excludes 0
# is one of 95 %.
FEWEST = 6


class Bootstrap:
    """Samples of T tasks under K seeds.

    Attributes:
        task_BxT: the share of each task in each sample.
        seed_BxK: the share of each seed.
    """

    def __init__(self, tasks: int, seeds: int = 1, samples: int = 5000, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.task_BxT, self.seed_BxK = (_shares(rng, samples, n) for n in (tasks, seeds))

    def interval(
        self, values_TxK: np.ndarray, over_TxK: np.ndarray | None = None
    ) -> tuple[float, float] | None:
        """95 % interval of the mean of values, or of its ratio to the mean of `over_TxK`.

        A ratio is infinite, with the sign of the values' mean, where the other mean is 0 or below.

        Returns:
            (low, high), or None: of fewer than `FEWEST` tasks, or where an end is infinite.
        """
        if len(values_TxK) < FEWEST:
            return None
        value_B = self._means(values_TxK)
        if over_TxK is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio_B = value_B / np.maximum(self._means(over_TxK), 0)
            value_B = np.nan_to_num(ratio_B, posinf=np.inf, neginf=-np.inf)
        # The ratio's too: so both intervals include 0, or neither.
        level = stats.norm.cdf(stats.t.ppf(0.025, _degrees_of_freedom(values_TxK)))
        low, high = np.quantile(value_B, (level, 1 - level), method="inverted_cdf").tolist()
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def _means(self, values_TxK: np.ndarray) -> np.ndarray:
        """[B]: the mean of each sample."""
        return np.einsum("bt,bt->b", self.task_BxT, self.seed_BxK @ values_TxK.T)


def bootstrap_interval(values_T, samples: int = 5000, seed: int = 0) -> list[float] | None:
    """95 % interval of the mean of [T] floats, one for each task; None if T < `FEWEST`."""
    values_Tx1 = np.asarray(values_T, np.float64).reshape(-1, 1)
    found = Bootstrap(len(values_Tx1), 1, samples, seed).interval(values_Tx1)
    return None if found is None else list(found)


def _shares(rng: np.random.Generator, samples: int, n: int) -> np.ndarray:
    """[B, n]: the share of each of n things in n - 1 draws with replacement (n = 1: all of it)."""
    if n < 2:
        return np.ones((samples, n))
    return rng.multinomial(n - 1, np.full(n, 1 / n), size=samples) / (n - 1)


def _degrees_of_freedom(values_TxK: np.ndarray) -> float:
    """Of the variance of the mean: between T - 1 or K - 1, if one of them makes it all, and the
    sum of both."""
    of_tasks, of_seeds = (
        means.var(ddof=1) / len(means) if len(means) > 1 else 0.0
        for means in (values_TxK.mean(1), values_TxK.mean(0))
    )
    if of_tasks + of_seeds == 0:
        return math.inf  # all values are equal
    tasks, seeds = values_TxK.shape
    share = of_seeds / (of_tasks + of_seeds)
    return 1 / ((1 - share) ** 2 / (tasks - 1) + share**2 / max(1, seeds - 1))
