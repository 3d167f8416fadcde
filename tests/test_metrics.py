"""Metrics against hand-computed numbers, NumPy, properties and real files."""

import json
import math
import string
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import metrics
from moe_jax.core.errors import UserError

texts = st.text(alphabet="abcT he.,!\n'é1", max_size=20)
examples = st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), texts), min_size=1)
TEXT_METRICS = [metrics.exact_match, metrics.accuracy, metrics.qa_f1, metrics.rouge_l]


def _score(metric, targets, predictions):
    ((_, score),) = metric(targets, predictions).items()
    return score


def test_names_are_crossfits():
    for name, metric in metrics.METRICS.items():
        labels = (
            [["acceptable"], ["unacceptable"]] if name.startswith("Matthew") else [["1"], ["2"]]
        )
        assert metric(labels, [t[0] for t in labels]) == {name: pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("metric", "target", "prediction", "score"),
    [
        (metrics.exact_match, ["The  Cat!"], "cat", 1),
        (metrics.exact_match, ["theory"], "ory", 0),  # an article is a whole word
        (metrics.exact_match, ["dog", "a cat"], "CAT", 1),
        (metrics.exact_match, "cat", "cat", 1),  # a plain string: one valid output
        (metrics.accuracy, ["Yes"], "yes", 1),
        (metrics.accuracy, ["the yes"], "yes", 0),
        (metrics.qa_f1, ["the red cat"], "a red dog house", 2 * (1 / 3) * (1 / 2) / (5 / 6)),
        (metrics.qa_f1, ["cat cat"], "cat", 2 / 3),  # multisets
        (metrics.qa_f1, ["the"], "the", 0),
        (metrics.qa_f1, ["no", "red cat"], "red", 2 / 3),
        # subsequence "a c d" of 4 and 5 words
        (metrics.rouge_l, ["a b c d"], "a c x d y", 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),
        (metrics.rouge_l, ["b a"], "a b", 1 / 2),  # order counts
        (metrics.rouge_l, ["One. Two"], "One Two", 1),  # full stops separate
        (metrics.rouge_l, ["one"], "One", 0),  # case counts
        (metrics.rouge_l, ["ночь день"], "ночь", 2 / 3),  # not only [a-z0-9]
        (metrics.rouge_l, ["a"], "...", 0),
    ],
)
def test_text_metric_by_hand(metric, target, prediction, score):
    assert _score(metric, [target], [prediction]) == pytest.approx(score)
    # a mean over examples: one more, all wrong, halves it
    assert _score(metric, [target, ["zz"]], [prediction, ""]) == pytest.approx(score / 2)


def test_macro_f1_counts_classes_outside_the_label_set():
    targets = [["yes"], ["yes"], ["no"], ["no"]]
    # yes: P 1, R 1/2, F1 2/3; no: P 2/3, R 1, F1 4/5
    within = _score(metrics.classification_f1, targets, ["yes", "no", "no", "no"])
    assert within == pytest.approx((2 / 3 + 4 / 5) / 2)
    # the same but for one prediction outside: yes 2/3, no 1, and a third class with 0
    outside = _score(metrics.classification_f1, targets, ["yes", "Yes", "no", "no"])
    assert outside == pytest.approx((2 / 3 + 1 + 0) / 3)
    # only the first valid output is the class
    assert _score(metrics.classification_f1, [["a", "b"]], ["b"]) == 0


def _macro_f1(gold, predicted):
    """F1 per class from the confusion counts."""
    f1 = []
    for label in sorted(set(gold) | set(predicted)):
        true = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        f1.append(2 * true / (gold.count(label) + predicted.count(label)))
    return np.mean(f1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1))
def test_macro_f1_against_confusion_counts(pairs):
    gold, predicted = [g for g, _ in pairs], [p for _, p in pairs]
    score = _score(metrics.classification_f1, [[g] for g in gold], predicted)
    assert score == pytest.approx(_macro_f1(gold, predicted))


def test_free_text_as_classes_gives_no_warning():
    targets = [[f"label {i}"] for i in range(40)]
    assert _score(metrics.classification_f1, targets, [f"text {i}" for i in range(40)]) == 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_matthews_is_the_correlation_of_indicators(pairs):
    gold = ["acceptable" if g else "unacceptable" for g, _ in pairs]
    predicted = ["acceptable " if p else "nonsense" for _, p in pairs]
    x, y = np.array(pairs, dtype=float).T
    expected = 0.0 if x.std() == 0 or y.std() == 0 else np.corrcoef(x, y)[0, 1]
    assert _score(metrics.matthews, [[g] for g in gold], predicted) == pytest.approx(expected)


def test_matthews_refuses_other_labels():
    with pytest.raises(UserError, match=r"'acceptable' or 'unacceptable', one is 'good'"):
        metrics.matthews([["acceptable"], ["good"]], ["good", "good"])


numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 2))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=20))
def test_pearson_against_numpy(pairs):
    x, y = np.array(pairs).T
    constant = len(set(x)) == 1 or len(set(y)) == 1
    expected = 0.0 if constant else np.corrcoef(x, y)[0, 1]
    score = _score(metrics.pearson, [[str(v)] for v in x], [str(v) for v in y])
    assert score == pytest.approx(expected, abs=1e-6)


def test_pearson_of_what_is_no_number():
    targets = [["1"], ["2"], ["3"], ["5"]]
    # 'great' and 'nan' count as the mean of 1 and 4
    expected = np.corrcoef([1, 2, 3, 5], [1, 2.5, 2.5, 4])[0, 1]
    assert _score(metrics.pearson, targets, ["1", "great", "nan", "4"]) == pytest.approx(expected)
    # The mean of three times 0.1 is not 0.1 in floats, and still no correlation.
    for predictions in (["", "x", "y", "z"], ["2"] * 4, ["inf"] * 4, ["0.1", "0.1", "0.1", "x"]):
        assert _score(metrics.pearson, targets, predictions) == 0.0
    huge = _score(metrics.pearson, targets, ["1e308", "-1e308", "1e308", "2"])
    assert math.isfinite(huge)
    assert _score(metrics.pearson, [["1"]], ["1"]) == 0.0  # one example: constant
    with pytest.raises(UserError, match=r"needs numbers as targets, one is 'good'"):
        metrics.pearson([["1"], ["good"]], ["1", "2"])


@settings(deadline=None)
@given(examples, st.randoms())
def test_text_metrics_are_means_of_bests(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    for metric in TEXT_METRICS:
        targets, predictions = [t for t, _ in pairs], [p for _, p in pairs]
        score = _score(metric, targets, predictions)
        assert 0 <= score <= 1
        assert score == pytest.approx(
            _score(metric, [t for t, _ in shuffled], [p for _, p in shuffled])
        )
        # one more valid output never hurts, and the order of outputs does not matter
        more = [[*t, p] for t, p in pairs]
        assert _score(metric, more, predictions) >= score
        assert _score(metric, [t[::-1] for t in targets], predictions) == pytest.approx(score)
        # each example on its own
        each = [_score(metric, [t], [p]) for t, p in pairs]
        assert np.mean(each) == pytest.approx(score)


def _lcs(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return table[-1, -1]


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abcd")))
def test_rouge_l_against_dynamic_programming(answer, prediction):
    common = _lcs(answer, prediction)
    expected = 2 * common / (len(answer) + len(prediction)) if common else 0.0
    score = _score(metrics.rouge_l, [[" ".join(answer)]], [" ".join(prediction)])
    assert score == pytest.approx(expected)


@given(st.text(max_size=30))
def test_normalize_is_idempotent_and_clean(text):
    clean = metrics.normalize(text)
    assert metrics.normalize(clean) == clean
    assert not set(clean) & set(string.punctuation)
    assert not {"a", "an", "the"} & set(clean.split())


@pytest.mark.parametrize("metric", metrics.METRICS.values(), ids=metrics.METRICS)
def test_bad_calls(metric):
    with pytest.raises(UserError, match="at least one example"):
        metric([], [])
    with pytest.raises(ValueError, match="1 targets but 2 predictions"):
        metric([["1"]], ["1", "2"])
    with pytest.raises(ValueError, match="no valid output"):
        metric([[]], ["1"])


def test_answers_or_target():
    post = metrics.answers_or_target
    assert post(" x ") == "x"
    assert post("x ", example={"answers": [b"y"]}) == "x"
    assert post("x ", example={}, is_target=True) == ["x"]
    assert post(
        "x", example={"answers": np.array([b"x", " \u00e9 ".encode()], object)}, is_target=True
    ) == ["x", "é"]
    assert post("x", is_target=True) == ["x"]
    assert post("x", example={"answers": np.array([], object)}, is_target=True) == ["x"]


def test_targets_as_predictions_are_perfect_on_real_files(gym):
    by_task = json.loads((gym / "metrics.json").read_text())
    scored = set()
    for directory in sorted((gym / "crossfit").iterdir()):
        metric = by_task[directory.name]
        lines = min(directory.glob("*_test.tsv")).read_text(encoding="utf-8").splitlines()[:100]
        targets = [[o.strip() for o in line.split("\t")[1:]] for line in lines]
        score = _score(metrics.METRICS[metric], targets, [t[0] for t in targets])
        # the exceptions: answers such as "the" or "a"; CoLA's or a rating's first lines alike
        assert score == pytest.approx(1.0, abs=0.02), directory.name
        scored.add(metric)
    assert scored == set(metrics.METRICS)


def test_macro_f1_of_the_majority_class_on_real_files(gym):
    """The majority class gets F1 2p/(1+p), the other k-1 classes 0."""
    for task in ("ag_news", "tweet_eval-emotion", "trec"):
        path = min((gym / "crossfit" / task).glob("*_test.tsv"))
        gold = [line.split("\t")[1] for line in path.read_text(encoding="utf-8").splitlines()]
        counts = {label: gold.count(label) for label in set(gold)}
        majority = max(counts, key=counts.get)
        share = counts[majority] / len(gold)
        score = _score(metrics.classification_f1, [[g] for g in gold], [majority] * len(gold))
        assert score == pytest.approx(2 * share / (1 + share) / len(counts))


def test_imports_no_tensorflow():
    code = (
        "import sys; from moe_jax import metrics as m; [f([['1'], ['2']], ['1', '2']) "
        "for n, f in m.METRICS.items() if n[0] != 'M']; "
        "assert not {'tensorflow', 'seqio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
