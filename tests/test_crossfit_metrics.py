"""Metrics against CrossFit's definitions, written again in plain Python, on random lists.

The definitions are those of `dataloader/metrics.py` in CrossFit's code. Deviations that
`moe_jax.metrics` declares are marked here: ROUGE-L is the plain longest common subsequence, and a
Pearson correlation that is NaN there is a number here.
"""

import itertools
import math
import random
import statistics
import string

import pytest

from moe_jax import metrics

LISTS = 2000
WORDS = [
    *("the", "a", "an", "The", "cat", "Cat", "cats", "red", "theory", "don't", "U.S.", "3.5", "-2"),
    *(
        "café",
        "cafe\u0301",
        "a\u0301",
        "Straße",
        "STRASSE",
        "İzmir",
        "ﬁne",
        "ночь",
        "猫",
        "٣",
        "🙂",
    ),
    *("yes", "no", "a_the", "the-cat", "...", "!", "“the”", "a\u00a0b", "the\u200bcat", "\t", ""),
]
LABELS = ["yes", "no", "Yes", "maybe", " no", ""]
JUDGEMENTS = ["acceptable", "unacceptable"]
NUMBERS = ["1", "2", "2.0", " 3.5 ", "-4", "1e2", "0", "5"]


# ------------------------------------------------------------------------------ definitions


def words_of(text):
    """Normalised words: lower case, no ASCII punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    # A maximal run of letters, digits and underscores that is an article becomes a space.
    runs = itertools.groupby(text, key=lambda c: c.isalnum() or c == "_")
    runs = ("".join(run) for _, run in runs)
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def exact_match(answer, prediction):
    return words_of(answer) == words_of(prediction)


def accuracy(answer, prediction):
    return answer.lower() == prediction.lower()


def qa_f1(answer, prediction):
    answer, prediction = words_of(answer), words_of(prediction)
    left, common = list(answer), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer, prediction):
    """Plain longest common subsequence, where CrossFit's package unites those of sentences."""
    if all(c in string.punctuation for c in prediction):
        return 0  # CrossFit's rule; also for an empty text
    answer, prediction = (t.replace(".", " ").split() for t in (answer, prediction))
    row = [0] * (len(prediction) + 1)
    for word in answer:
        new = [0]
        for j, other in enumerate(prediction):
            new.append(row[j] + 1 if word == other else max(row[j + 1], new[j]))
        row = new
    if not row[-1]:
        return 0
    precision, recall = row[-1] / len(prediction), row[-1] / len(answer)
    return 2 * precision * recall / (precision + recall)


def best_of(score):
    def mean(targets, predictions):
        pairs = zip(targets, predictions, strict=True)
        return statistics.fmean(max(score(a, p) for a in answers) for answers, p in pairs)

    return mean


def classification_f1(targets, predictions):
    """Macro F1 of the first answers; classes are all that occur in either list."""
    pairs = [(answers[0], p) for answers, p in zip(targets, predictions, strict=True)]
    of_class = []
    for label in {label for pair in pairs for label in pair}:
        hit = sum(gold == p == label for gold, p in pairs)
        miss = sum((gold == label) != (p == label) for gold, p in pairs)
        of_class.append(2 * hit / (2 * hit + miss))
    return statistics.fmean(of_class)


def matthews(targets, predictions):
    pairs = [
        (answers[0] == "acceptable", p.strip() == "acceptable")
        for answers, p in zip(targets, predictions, strict=True)
    ]
    tp, tn, fn, fp = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    under = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(under) if under else 0.0


def pearson(targets, predictions):
    """NaN, as in CrossFit, if a prediction is no number or either list is constant."""
    gold = [float(answers[0]) for answers in targets]
    try:
        predicted = [float(p) for p in predictions]
    except ValueError:
        return math.nan
    if len(set(gold)) == 1 or len(set(predicted)) == 1:
        return math.nan
    return statistics.correlation(gold, predicted)


TEXT = {
    "EM": best_of(exact_match),
    "ACC": best_of(accuracy),
    "QA-F1": best_of(qa_f1),
    "Rouge-L": best_of(rouge_l),
    "Classification-F1": classification_f1,
}


# ------------------------------------------------------------------------------ lists


def lists(draw):
    """`LISTS` pairs of (targets, predictions); `draw(rng)` -> a function from rng to a text."""
    rng = random.Random(0)
    for _ in range(LISTS):
        text = draw(rng)
        length = rng.choice((1, 2, 3, 8, 20))
        targets = [[text() for _ in range(rng.choice((1, 1, 2, 3)))] for _ in range(length)]
        kind = rng.choice(("near", "near", "any", "constant", "one class", "right"))
        if kind == "one class":
            targets = [targets[0]] * length
        constant = text()
        predictions = [
            {"near": altered(rng, rng.choice(a)), "constant": constant, "right": a[0]}.get(
                kind, text()
            )
            for a in targets
        ]
        yield targets, predictions


def altered(rng, text):
    """The text with other case, punctuation, spaces, articles or order, or something else."""
    words = text.split()
    rng.shuffle(words)
    return rng.choice(
        (text, text.upper(), f"The {text}!", f" {text}\n", " ".join(words), " ".join(words[1:]), "")
    )


def text_or_label(rng):
    if rng.random() < 0.5:
        return lambda: rng.choice(LABELS)
    return lambda: rng.choice((" ", "  ", ". ")).join(rng.choices(WORDS, k=rng.randrange(6)))


def one_of(texts):
    return lambda rng: lambda: rng.choice(texts)


# ------------------------------------------------------------------------------ tests


def score(name, targets, predictions):
    return metrics.METRICS[name](targets, predictions)[name]


@pytest.mark.parametrize("name", TEXT)
def test_of_texts(name):
    found = set()
    for targets, predictions in lists(text_or_label):
        expected = TEXT[name](targets, predictions)
        assert score(name, targets, predictions) == pytest.approx(expected, abs=1e-12)
        found.add(round(expected, 6))
    assert {0, 1} < found  # and others between: the lists tell definitions apart


def test_matthews():
    found = set()
    for targets, predictions in lists(one_of(JUDGEMENTS)):
        expected = matthews(targets, predictions)
        assert score("Matthew-Correlation", targets, predictions) == pytest.approx(expected)
        found.add(round(expected, 6))
    assert {-1, 0, 1} < found


def test_pearson():
    undefined = 0
    for targets, predictions in lists(one_of(NUMBERS)):
        expected = pearson(targets, predictions)
        found = score("Pearson-Correlation", targets, predictions)
        if math.isnan(expected):
            undefined += 1
            assert -1 - 1e-9 <= found <= 1 + 1e-9
        else:
            assert found == pytest.approx(expected, abs=1e-12)
    assert LISTS / 10 < undefined < LISTS * 0.9


def test_rouge_l_of_punctuation():
    """CrossFit scores a prediction of nothing but punctuation 0, whatever the answer."""
    assert score("Rouge-L", [["!"], ["- -"]], ["!", "- -"]) == 0.5  # a space is no punctuation
