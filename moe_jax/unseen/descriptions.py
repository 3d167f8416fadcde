"""Tasks by their descriptions, the sentences that say what a task asks for.

A description is a vector of its words' TF-IDF weights, so two tasks are near if they are described
in the same words, rare ones above all. No model is needed, and no example is read.

A *request* is what a description says beyond the task's inputs: its vector less what a ridge
regression predicts from the words of the inputs. 'Find the person of the story' and 'Find the place
of the story' are much alike, but 'story' can be told from the inputs; 'person' cannot.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.core.errors import UserError
from moe_jax.data.cache import PreparedTask


class Descriptions:
    """The descriptions of training tasks, which new ones are compared with.

    Raises:
        UserError: one of them has no description.
    """

    def __init__(self, trained: Sequence[PreparedTask]):
        self._tasks = [task.name for task in trained]
        self._words, self._seen_TxD = _fit(map(_description, trained), "description")

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

    def requests(
        self, tasks: Sequence[PreparedTask], inputs: Mapping[str, Sequence[str]]
    ) -> np.ndarray:
        """What the descriptions say beyond the tasks' inputs: float32 [T, D].

        A training task is predicted from the others.

        Args:
            inputs: texts of some inputs of each of these tasks, and of every training task.

        Raises:
            UserError: a task has no description, or no input has a word.
        """
        texts = {task: " ".join(texts) for task, texts in inputs.items()}
        seen = (texts[task] for task in self._tasks)
        words, seen_SxB = _fit(seen, "input", sublinear_tf=True)
        new_TxB = words.transform([texts[task.name] for task in tasks])
        covariance_SxS = (seen_SxB @ seen_SxB.T).toarray() + np.eye(len(self._tasks))
        hat_TxS = np.linalg.solve(covariance_SxS, (seen_SxB @ new_TxB.T).toarray()).T
        # Without the part of a training task's prediction that comes from itself.
        for row_S, task in zip(hat_TxS, tasks, strict=True):
            if task.name in self._tasks:
                own = self._tasks.index(task.name)
                row_S /= 1 - row_S[own]
                row_S[own] = 0
        return self.vectors(tasks) - (hat_TxS @ self._seen_TxD.toarray()).astype(np.float32)


def _fit(texts: Iterable[str], what: str, **settings: Any) -> tuple[Any, Any]:
    """scikit-learn's vectorizer of the words of training tasks' texts, and these as a matrix.

    Raises:
        UserError: no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    words = TfidfVectorizer(**settings)
    try:
        return words, words.fit_transform(texts)
    except ValueError as e:  # scikit-learn's "empty vocabulary"
        raise UserError(f"no {what} of a training task has a word") from e


def _description(task: PreparedTask) -> str:
    if not task.description:
        raise UserError(
            f"task {task.name!r} has no description: its module must give one in DESCRIPTIONS ="
            " {task name: sentence}"
        )
    return task.description
