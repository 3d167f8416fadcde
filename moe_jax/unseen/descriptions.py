"""Tasks by their descriptions, the sentences that say what a task asks for.

A description is a vector of its words' TF-IDF weights, so two tasks are near if they are described
in the same words, rare ones above all. No model is needed, and no example is read.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.core.errors import UserError
from moe_jax.data.cache import PreparedTask


class Descriptions:
    """The descriptions of training tasks, which new ones are compared with.

    Raises:
        UserError: one of them has no description.
    """

    def __init__(self, trained: Sequence[PreparedTask]):
        from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

        self._tasks = [task.name for task in trained]
        self._words = TfidfVectorizer()
        try:
            self._seen_TxD = self._words.fit_transform([_description(task) for task in trained])
        except ValueError as e:  # scikit-learn's "empty vocabulary"
            raise UserError("no description of a training task has a word") from e

    def vectors(self, tasks: Sequence[PreparedTask]) -> np.ndarray:
        """The descriptions' vectors, of unit length: float32 [T, D].

        Raises:
            UserError: a task has no description.
        """
        rows_TxD = self._words.transform([_description(task) for task in tasks])
        return rows_TxD.toarray().astype(np.float32)

    def nearest(self, description: str) -> str:
        """The training task with the most similar description.

        Raises:
            UserError: it shares no word with any of them.
        """
        similarity_T = (self._seen_TxD @ self._words.transform([description]).T).toarray()[:, 0]
        if not similarity_T.any():
            raise UserError(
                f"the description {description!r} shares no word with that of a training task, so"
                " it leads to no route"
            )
        return self._tasks[int(np.argmax(similarity_T))]

    def nearest_of(self, tasks: Sequence[PreparedTask]) -> dict[str, str]:
        """Each of these tasks -> the training task with the most similar description.

        Raises:
            UserError: a task has no description, or no word in common with any.
        """
        return {task.name: self.nearest(_description(task)) for task in tasks}


def _description(task: PreparedTask) -> str:
    if not task.description:
        raise UserError(
            f"task {task.name!r} has no description: its module must give one in DESCRIPTIONS ="
            " {task name: sentence}"
        )
    return task.description
