"""Corruption of texts: what is lost, how much, in what pieces, and that it can be restored."""

import numpy as np
import pytest

from moe_jax.builtin_tasks import denoising

MASK = 999


def texts(seed: int = 0, count: int = 200, least: int = 2):
    """(a text of distinct tokens, a generator) of many lengths."""
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        yield rng.permutation(500)[: rng.integers(least, 130)].astype(np.int32), rng


def lost_spans(original: np.ndarray, corrupted: np.ndarray) -> list[list[int]]:
    """The tokens that each mask stands for. Tokens are distinct, so the rest can be lined up."""
    original, spans = original.tolist(), []
    at = 0
    for i, token in enumerate(corrupted.tolist()):
        if token == MASK:
            following = corrupted[i + 1] if i + 1 < len(corrupted) else None
            assert following != MASK  # no two masks touch
            end = len(original) if following is None else original.index(following)
            spans.append(original[at:end])
            at = end
        else:
            assert original[at] == token
            at += 1
    assert at == len(original)
    return spans


def test_infilling_loses_a_share_of_every_text():
    most = 0
    for tokens, rng in texts():
        spans = lost_spans(tokens, denoising.infill(tokens, rng, MASK))
        assert sum(map(len, spans)) == round(0.3 * len(tokens))
        most = max(most, len(spans))
    assert most > 10


def test_infilling_loses_poisson_spans():
    """In a long text, where the last span, which is cut, hardly counts."""
    tokens = np.arange(1000, 10_000, dtype=np.int32)
    spans = lost_spans(tokens, denoising.infill(tokens, np.random.default_rng(0), MASK))
    lengths = [len(span) for span in spans]
    # The mean is the variance, and exp(-3) of all are empty. Bounds are four standard errors.
    assert np.mean(lengths) == pytest.approx(3, abs=0.25)
    assert np.var(lengths) == pytest.approx(3, abs=0.6)
    assert np.mean(np.equal(lengths, 0)) == pytest.approx(np.exp(-3), abs=0.03)


def test_infilling_loses_every_place_alike():
    """But for the ends, which fewer spans reach."""
    kept = np.zeros(40)
    for _, rng in texts(1, 2000):
        corrupted = denoising.infill(np.arange(40, dtype=np.int32), rng, MASK)
        kept[corrupted[corrupted != MASK]] += 1 / 2000
    assert kept.mean() == pytest.approx(0.7)
    np.testing.assert_allclose(kept[8:-8], kept[8:-8].mean(), atol=0.04)


@pytest.mark.parametrize("rate", [0.05, 0.9])
def test_infilling_at_other_rates(rate):
    for tokens, rng in texts(2, 50):
        spans = lost_spans(tokens, denoising.infill(tokens, rng, MASK, rate, mean_length=1.0))
        assert sum(map(len, spans)) == round(rate * len(tokens))


def test_sentences_change_their_order_and_nothing_else():
    ends = np.zeros(20, bool)
    ends[[3, 7]] = True
    text = np.array([1, 3, 2, 2, 7, 3, 5, 6], np.int32)  # the last sentence has no end
    wanted = {(1, 3), (2, 2, 7), (3,), (5, 6)}
    orders = set()
    for seed in range(200):
        found = denoising.permute(text, np.random.default_rng(seed), ends).tolist()
        assert sorted(found) == sorted(text.tolist())
        orders.add(tuple(found))
    by_hand = {
        (*a, *b, *c, *d)
        for a in wanted for b in wanted - {a} for c in wanted - {a, b} for d in wanted - {a, b, c}
    }  # fmt: skip
    assert orders == by_hand


def restored(inputs: np.ndarray, targets: np.ndarray, sentinels: list[int]) -> list[int]:
    """A text from T5's two sides: each sentinel is replaced by what follows it in the targets."""
    spans: dict[int, list[int]] = {}
    for token in targets.tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert list(spans) == sentinels[: len(spans)]
    text = []
    for token in inputs.tolist():
        text += spans.pop(token) if token in sentinels else [token]
    assert not spans
    return text


def test_spans_are_restored_exactly_and_have_t5s_counts():
    sentinels = list(range(599, 559, -1))
    lengths = []
    for tokens, rng in texts(3):
        inputs, targets = denoising.spans(tokens, rng, sentinels)
        assert inputs.dtype == targets.dtype == np.int32
        assert restored(inputs, targets, sentinels) == tokens.tolist()
        # As published: the noise rounded, at least 1, never all; about 3 tokens a span.
        noise = min(max(int(np.round(len(tokens) * 0.15)), 1), len(tokens) - 1)
        count = max(int(np.round(noise / 3)), 1)
        assert denoising.span_counts(len(tokens)) == (noise, count)
        assert len(targets) == noise + count and len(inputs) == len(tokens) - noise + count
        assert inputs[0] not in sentinels  # a text begins with what is kept, and ends with a span
        assert inputs[-1] == sentinels[count - 1]
        starts = np.flatnonzero(np.isin(targets, sentinels))
        lengths += np.diff([*starts, len(targets)]).tolist()
    lengths = np.array(lengths) - 1
    assert lengths.min() == 1 and lengths.mean() == pytest.approx(3, abs=0.3)


def test_all_ways_to_place_spans_are_equally_likely():
    """7 tokens, 4 of them in 2 spans: gaps of 1 + 2 or 2 + 1, spans of 1 + 3, 2 + 2 or 3 + 1."""
    counts: dict[tuple, int] = {}
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        inputs, _ = denoising.spans(np.arange(7, dtype=np.int32), rng, [99, 98], 4 / 7, 2.0)
        counts[tuple(inputs.tolist())] = counts.get(tuple(inputs.tolist()), 0) + 1
    assert len(counts) == 6
    np.testing.assert_allclose([*counts.values()], 500, rtol=0.2)
