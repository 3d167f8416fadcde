"""What a task is like, measured on its examples rather than named by a human.

The features that Ye, Zha and Ren (arXiv 2205.12701, section 5) relate to experts are assigned by
hand; these are computed from inputs and references.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

FEATURES = {
    "input length": "mean number of words in an input",
    "output length": "mean number of words in an answer",
    "extractiveness": "mean share of an answer's words that occur in the input",
    "label entropy": "entropy of the answers in bits: low where a few labels recur",
    "closed-book": "1 - extractiveness, times label entropy as a share of its maximum: high where "
    "answers are neither in the input nor a few labels",
}


def features(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{task: {feature: value}} from lines of predictions.jsonl, whatever was predicted.

    The first reference of an example is its answer. See `FEATURES`.
    """
    of_task: dict[str, list[tuple[list[str], str]]] = {}
    for line in lines:
        example = (words(line["input"]), answer(line["references"]))
        of_task.setdefault(line["task"], []).append(example)
    return {task: _measured(examples) for task, examples in of_task.items()}


def words(text: str) -> list[str]:
    """Lower-case words; punctuation separates them."""
    return re.findall(r"\w+", text.lower())


def answer(references: Any) -> str:
    """The first of the references as text."""
    if isinstance(references, Mapping):
        references = next(iter(references.values()), "")
    if isinstance(references, list | tuple):
        return answer(references[0]) if references else ""
    return str(references)


def _measured(examples: list[tuple[list[str], str]]) -> dict[str, float]:
    inside, lengths = [], []
    for given, text in examples:
        wanted, known = words(text), set(given)
        lengths.append(len(wanted))
        inside.append(np.mean([word in known for word in wanted]) if wanted else 0.0)
    share = np.array(list(Counter(text for _, text in examples).values())) / len(examples)
    entropy = float(-(share * np.log2(share)).sum()) + 0.0
    extractive, most = float(np.mean(inside)), np.log2(len(examples)) if len(examples) > 1 else 1
    return {
        "input length": float(np.mean([len(given) for given, _ in examples])),
        "output length": float(np.mean(lengths)),
        "extractiveness": extractive,
        "label entropy": entropy,
        "closed-book": float((1 - extractive) * entropy / most),
    }
