"""Task metrics as SeqIO metric functions, with CrossFit's definitions. Imports no TensorFlow.

Every metric has the signature

    metric(targets, predictions) -> {name: score}

where `targets` is a list with, per example, the list of valid outputs (a plain string counts as
the only valid output) and `predictions` a list of strings of the same length. Scores are Python
floats: 0 to 1, or -1 to 1 for the two correlations, and never NaN. `rank_classification` is a
metric of scores and not of predictions: see there.

The definitions are those of the NLP Few-shot Gym (Ye, Lin & Ren, *CrossFit*, EMNLP 2021, arXiv
2104.08835). Differences from its code are stated where they occur: a constant or unreadable
Pearson correlation, and sentence handling in ROUGE-L.
"""

import functools
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.core.errors import UserError

Answers = Sequence[str] | str

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answers_or_target(
    text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> list[str] | str:
    """SeqIO postprocess function: returns the value that a metric compares.

    Args:
        text: decoded target or prediction.
        example: features of the example; `answers` [n] (str or UTF-8 bytes) holds all valid outputs
            if there are several.
        is_target: whether `text` is the target.

    Returns:
        For a target the list of valid outputs; for a prediction the stripped text.
    """
    if not is_target:
        return text.strip()
    answers = () if example is None else np.ravel(example.get("answers", ())).tolist()
    if not answers:
        answers = [text]
    return [(a.decode() if isinstance(a, bytes) else a).strip() for a in answers]


def label_of_choice(
    text: str,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
    labels: Mapping[str, str] | None = None,
) -> list[str] | str:
    """SeqIO postprocess function of prompts: as `answers_or_target`, choices by their labels.

    Args:
        labels: answer choice -> the label that the metric compares; to be bound by
            `functools.partial`.
    """
    found, labels = answers_or_target(text, example, is_target), labels or {}
    return [labels.get(a, a) for a in found] if is_target else labels.get(found, found)


def choice_target(
    score: Any, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> Any:
    """SeqIO postprocess function of tasks that have a row for every answer choice.

    The counterpart of T5's `rank_classification` (`t5.data.postprocessors`), in the same form.

    Args:
        score: the text of the target, or a model's score, which is returned as it is.
        example: features `idx` int [2] (question, choice), `is_correct` bool, optionally `weight`
            float, and `targets` [n] tokens.
        is_target: whether `score` is the target.

    Returns:
        Of a target ((question, choice), is it correct, weight, number of tokens).
    """
    if not is_target:
        return score
    index = tuple(int(i) for i in example["idx"])
    weight = float(example.get("weight", 1.0))
    return index, bool(example["is_correct"]), weight, len(example["targets"])


def rank_classification(
    targets: Sequence[tuple[Sequence[int], bool, float, int]],
    scores: Sequence[float],
    length_penalty: float = 1.0,
) -> dict[str, float]:
    """Weighted share of questions whose best scored choice is correct; the first of equal ones.

    Args:
        targets: one per choice, in any order, as `choice_target` makes them.
        scores: log-likelihood of each choice, summed over its tokens.
        length_penalty: scores are divided by the number of tokens to this power. 1 is the mean per
            token; 0 the sum, by which T0 was published (Sanh et al. 2022, arXiv 2110.08207).
    """
    if len(targets) != len(scores):
        raise ValueError(f"{len(targets)} targets but {len(scores)} scores")
    if not targets:
        raise UserError("a metric needs at least one example, got none")
    best: dict[int, tuple[float, int, bool, float]] = {}
    for ((question, choice), correct, weight, tokens), score in zip(targets, scores, strict=True):
        found = (score / tokens**length_penalty, -choice, correct, weight)
        best[question] = max(found, best.get(question, found))
    right = [correct for _, _, correct, _ in best.values()]
    weights = [weight for _, _, _, weight in best.values()]
    return {"ACC": float(np.average(right, weights=weights))}


def exact_match(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions equal to a valid output after `normalize`."""
    return {"EM": _mean_of_best(_same_normalized, targets, predictions)}


def accuracy(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions equal to a valid output, ignoring case."""
    return {"ACC": _mean_of_best(_same_lowercase, targets, predictions)}


def qa_f1(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Mean F1 of the token multisets of prediction and valid output, each after `normalize`.

    Texts without a common token score 0, even if both are empty after normalisation (as in
    CrossFit: the answer "the" cannot be matched).
    """
    return {"QA-F1": _mean_of_best(_token_f1, targets, predictions)}


def rouge_l(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-L F1: the longest common subsequence of the words of the two whole texts.

    Words are separated by spaces and full stops and keep case and other punctuation, as in the
    package `rouge`, which CrossFit used; the subsequence and its F1 are those of `rouge-score`.
    `rouge` instead takes the union of the common subsequences of all pairs of sentences and counts
    each distinct word once. On the gym's tasks, with copied, shuffled and thinned outputs, the two
    means differ by at most 0.05, `rouge` mostly higher (`rouge-score` with its own lower-cased
    words of [a-z0-9] differs by up to 0.3). A prediction without words, or of nothing but
    punctuation, scores 0, as in CrossFit.
    """

    def score(answer: str, prediction: str) -> float:
        return _rouge_l_f1(answer, prediction) if prediction.translate(_NO_PUNCTUATION) else 0.0

    return {"Rouge-L": _mean_of_best(score, targets, predictions)}


def stemmed_rouge_l(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-L F1 of stemmed, lower-case words of [a-z0-9]: Super-NaturalInstructions' own.

    That of `rouge-score` with its stemmer (Wang et al. 2022, arXiv 2204.07705).
    """
    score = functools.partial(_rouge_l_f1, stemmed=True)
    return {"ROUGE-L": _mean_of_best(score, targets, predictions)}


def match(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions equal to a valid output but for case, punctuation and spaces.

    Super-NaturalInstructions' exact match; other than in `exact_match`, articles count.
    """

    def same(answer: str, prediction: str) -> float:
        plain = (text.lower().translate(_NO_PUNCTUATION).split() for text in (answer, prediction))
        return float(next(plain) == next(plain))

    return {"match": _mean_of_best(same, targets, predictions)}


def classification_f1(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Macro F1 over the classes that occur in the targets *or the predictions*.

    The class of a target is its first valid output; case counts. A prediction outside the label
    set is a class of its own with F1 0, so an untrained generator scores lower than one that errs
    within the labels: CrossFit's definition, kept.
    """
    from sklearn.metrics import f1_score  # imported here: 1 s, and most processes never score

    _check(targets, predictions)
    with warnings.catch_warnings():
        # Free text makes nearly as many classes as examples; scikit-learn takes it for regression.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        score = f1_score(_firsts(targets), list(predictions), average="macro", zero_division=0.0)
    return {"Classification-F1": float(score)}


def matthews(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Matthews correlation of "acceptable" against everything else (CoLA's labels).

    0.0 if targets or predictions are constant.

    Raises:
        UserError: a target is neither "acceptable" nor "unacceptable".
    """
    from sklearn.metrics import matthews_corrcoef

    _check(targets, predictions)
    labels = _firsts(targets)
    for label in labels:
        if label not in ("acceptable", "unacceptable"):
            raise UserError(
                "Matthew-Correlation needs targets 'acceptable' or 'unacceptable', "
                f"one is {label!r}; use classification_f1 or accuracy for other labels"
            )
    gold = [label == "acceptable" for label in labels]
    predicted = [p.strip() == "acceptable" for p in predictions]
    constant = len(set(gold)) == 1 or len(set(predicted)) == 1
    return {"Matthew-Correlation": 0.0 if constant else float(matthews_corrcoef(gold, predicted))}


def pearson(targets: Sequence[Answers], predictions: Sequence[str]) -> dict[str, float]:
    """Pearson correlation of the first valid outputs and the predictions, read as numbers.

    Two cases are NaN in CrossFit and defined here. A correlation with a constant is 0.0. A
    prediction that is not a finite number is replaced by the mean of the others.

    Raises:
        UserError: a target is not a finite number.
    """
    from scipy import stats

    _check(targets, predictions)
    gold = np.array([_number(label) for label in _firsts(targets)])
    if not np.isfinite(gold).all():
        bad = _firsts(targets)[int(np.argmin(np.isfinite(gold)))]
        raise UserError(f"Pearson-Correlation needs numbers as targets, one is {bad!r}")
    predicted = np.array([_number(p) for p in predictions])
    finite = np.isfinite(predicted)
    # Before the mean takes its places: rounded, it may differ from numbers that are all the same.
    if len(set(gold)) == 1 or len(set(predicted[finite])) <= 1:
        return {"Pearson-Correlation": 0.0}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # A prediction such as 1e300 may overflow; the result is then not finite.
        warnings.simplefilter("ignore", RuntimeWarning)
        predicted[~finite] = predicted[finite].mean()
        score = float(stats.pearsonr(gold, predicted).statistic)
    return {"Pearson-Correlation": score if np.isfinite(score) else 0.0}


# CrossFit's name of each metric -> function.
METRICS: dict[str, Callable[[Sequence[Answers], Sequence[str]], dict[str, float]]] = {
    "EM": exact_match,
    "ACC": accuracy,
    "QA-F1": qa_f1,
    "Classification-F1": classification_f1,
    "Matthew-Correlation": matthews,
    "Pearson-Correlation": pearson,
    "Rouge-L": rouge_l,
}


def normalize(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _same_normalized(answer: str, prediction: str) -> float:
    return float(normalize(answer) == normalize(prediction))


def _same_lowercase(answer: str, prediction: str) -> float:
    return float(answer.lower() == prediction.lower())


def _token_f1(answer: str, prediction: str) -> float:
    answer_counts = Counter(normalize(answer).split())
    predicted_counts = Counter(normalize(prediction).split())
    # 2PR/(P+R) with P = common/predicted and R = common/answer is 2 common/(predicted + answer).
    common = (answer_counts & predicted_counts).total()
    return 2 * common / (answer_counts.total() + predicted_counts.total()) if common else 0.0


def _rouge_l_f1(answer: str, prediction: str, stemmed: bool = False) -> float:
    return _rouge_scorer(stemmed).score(answer, prediction)["rougeL"].fmeasure


class _Words:
    """`rouge-score` tokenizer: words between spaces and full stops."""

    def tokenize(self, text: str) -> list[str]:
        return text.replace(".", " ").split()


@functools.cache
def _rouge_scorer(stemmed: bool):
    from rouge_score import rouge_scorer

    # With its own tokenizer, `rouge-score` stems.
    return rouge_scorer.RougeScorer(
        ["rougeL"], use_stemmer=True, tokenizer=None if stemmed else _Words()
    )


def _mean_of_best(
    score: Callable[[str, str], float], targets: Sequence[Answers], predictions: Sequence[str]
) -> float:
    """Mean over examples of the best `score(answer, prediction)` over the valid answers."""
    _check(targets, predictions)
    pairs = zip(targets, predictions, strict=True)
    return float(np.mean([max(score(answer, p) for answer in _answers(t)) for t, p in pairs]))


def _check(targets: Sequence[Answers], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets but {len(predictions)} predictions")
    if not len(targets):
        raise UserError("a metric needs at least one example, got none")
    if not all(_answers(t) for t in targets):
        raise ValueError("an example has no valid output")


def _answers(target: Answers) -> Sequence[str]:
    return [target] if isinstance(target, str) else target


def _firsts(targets: Sequence[Answers]) -> list[str]:
    return [_answers(t)[0] for t in targets]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
