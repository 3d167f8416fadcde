"""Draws against exact probabilities, computed in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from toy_run import (
    EOS,
    PAD,
    START,
    decoder,
    pack_rows,
    random_backbone,
    random_examples,
    tiny_model,
)

from moe_jax.decoding.sampling import sample
from moe_jax.decoding.search import DecodingConfig
from moe_jax.model.backbone import EncoderDecoder

V, DRAWS = 24, 20_000


def exact(logits_V, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Probabilities after the three settings, one token after the other."""
    logits_V = np.asarray(logits_V, np.float64) / temperature
    likeliest = np.argsort(-logits_V, kind="stable")[: top_k or None]
    kept = np.full(len(logits_V), -np.inf)
    kept[likeliest] = logits_V[likeliest]
    probabilities = softmax(kept)
    total, result = 0.0, np.zeros_like(probabilities)
    for token in likeliest:
        if total >= top_p:
            break
        total += probabilities[token]
        result[token] = probabilities[token]
    return result / result.sum()


def check_frequencies(drawn: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square over the outcomes that are expected five times or more; none is impossible."""
    counts = np.bincount(drawn, minlength=len(expected))
    assert not np.any(counts[expected == 0])
    often = expected * len(drawn) >= 5
    observed = [*counts[often], counts[~often].sum()]
    wanted = np.array([*expected[often], expected[~often].sum()]) * len(drawn)
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * sum(observed[:-1]) / wanted[:-1].sum()
    assert len(observed) > 1
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def draws(logits_V, seed: int, temperature: float, top_k: int, top_p: float) -> jax.Array:
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return sample(jnp.tile(logits_V, (DRAWS, 1)), keys, temperature, top_k, top_p)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.5, 9, 0.8), (1.0, 99, 0.999)],
)
def test_frequencies(temperature, top_k, top_p):
    logits_V = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5
    drawn = np.asarray(draws(logits_V, 1, temperature, top_k, top_p))
    expected = exact(logits_V, temperature, top_k, top_p)
    check_frequencies(drawn, expected)
    # The settings matter: another temperature or another set of tokens fails the check.
    with pytest.raises(AssertionError):
        check_frequencies(drawn, exact(logits_V, temperature * 1.3, top_k, top_p))
    if top_k or top_p < 1:
        assert np.count_nonzero(expected) < V


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(3, 1.0, 3), (1, 1.0, 1), (0, 1e-6, 1), (0, 0.49, 1), (0, 0.51, 2), (0, 0.74, 2),
     (0, 0.76, 3), (2, 0.65, 1), (2, 0.68, 2), (0, 0.9999, 6)],
)  # fmt: skip
def test_how_many_tokens_are_kept(top_k, top_p, kept):
    """Probabilities 1/2, 1/4, ..., 1/32, 1/32 in mixed order; the last two are equal."""
    order = np.array([3, 0, 5, 1, 4, 2])
    probabilities = 0.5 ** np.array([1, 2, 3, 4, 5, 5])
    logits_V = np.log(probabilities)[np.argsort(order)].astype(np.float32)
    drawn = np.unique(draws(logits_V, 0, 1.0, top_k, top_p))
    np.testing.assert_array_equal(drawn, np.sort(order[:kept]))


def test_ties_are_cut():
    """Exactly k of equal tokens."""
    assert len(np.unique(draws(np.zeros(V, np.float32), 0, 1.0, 4, 1.0))) == 4


# ------------------------------------------------------------------------ while decoding


MODEL = tiny_model(experts=1)


def sampler(length: int, **settings):
    """(arrays, row numbers) -> tokens [R, length]."""
    run = decoder(MODEL, DecodingConfig(sample=True, **settings), length)
    backbone = random_backbone(MODEL)
    return lambda arrays, row_R: np.asarray(run(backbone, None, arrays, row_R))


def take(arrays, rows) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in arrays.items()}


def test_a_rows_draws_are_its_own():
    """Draws depend on the row's number and the seed, not on other rows or the place in the
    batch."""
    rng = np.random.default_rng(0)
    rows = 16
    arrays = pack_rows([[example] for example in random_examples(rng, rows)], 6, 6)
    numbers = np.arange(100, 100 + rows)
    run = sampler(6, temperature=3.0)
    tokens = run(arrays, numbers)
    order = rng.permutation(rows)
    np.testing.assert_array_equal(run(take(arrays, order), numbers[order]), tokens[order])
    # Replaces the second half by other rows.
    half = np.where(np.arange(rows) < 8, np.arange(rows), 0)
    other = run(take(arrays, half), np.where(np.arange(rows) < 8, numbers, 7))
    np.testing.assert_array_equal(other[:8], tokens[:8])
    # The same row under many numbers; and another seed.
    same = run(take(arrays, np.zeros(rows, int)), numbers)
    assert len(np.unique(same, axis=0)) > rows / 2
    np.testing.assert_array_equal(same[0], tokens[0])
    assert np.any(sampler(6, temperature=3.0, seed=1)(arrays, numbers) != tokens)


def test_two_steps():
    """Pairs of tokens: every step draws again, given the previous token."""
    settings = {"temperature": 1.5, "top_k": 3, "top_p": 0.95}
    rows = 2_000
    arrays = take(pack_rows([random_examples(np.random.default_rng(4), 1)], 6, 6), [0] * rows)
    tokens = sampler(2, min_length=2, **settings)(arrays, np.arange(rows))
    backbone = random_backbone(MODEL)
    whole = jax.jit(EncoderDecoder(MODEL.config).apply)

    def following(*decoded) -> np.ndarray:
        batch = take(arrays, [0])
        batch["decoder_inputs"] = np.array([[START, *decoded, PAD][:2]], np.int32)
        batch["target_positions"] = np.array([[0, 1]], np.int32)
        batch["target_segments"] = np.ones((1, 2), np.int32)
        logits = np.array(whole({"params": backbone}, batch, None))[0, len(decoded)]
        logits[EOS] = -np.inf
        return exact(logits, **settings)

    first_V = following()
    expected = np.concatenate(
        [p * following(token) if p else np.zeros(V) for token, p in enumerate(first_V)]
    )
    assert 5 < np.count_nonzero(expected) <= 9
    check_frequencies(tokens[:, 0] * V + tokens[:, 1], expected)
