"""Metrics against hand-made cases and float64 formulas, and what must hold for any logits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from latentrt.validation.judge import metrics

ROWS = arrays(np.float32, (3, 7), elements=st.floats(-50, 50, width=32))


def test_log_softmax_of_a_known_case():
    logits = np.log(np.array([[1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(np.exp(metrics.log_softmax(logits)), [[0.125, 0.25, 0.625]], rtol=1e-15)


def test_log_softmax_of_huge_logits():
    two = math.log(2)
    np.testing.assert_allclose(metrics.log_softmax(np.array([[1e4, 1e4, -1e4]])), [[-two, -two, -2e4 - two]])


def test_kl_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(metrics.kl_divergence(np.log(p)[None], np.log(q)[None]), [expected], rtol=1e-12)


@given(ROWS, ROWS)
@settings(max_examples=60, deadline=None)
def test_kl_is_never_negative_and_zero_for_equal(a, b):
    assert (metrics.kl_divergence(a, b) >= 0).all()
    assert (metrics.kl_divergence(a, a) == 0).all()


@given(ROWS, ROWS, st.floats(-20, 20))
@settings(max_examples=60, deadline=None)
def test_kl_and_likelihood_ignore_a_shift_of_the_logits(a, b, shift):
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(metrics.kl_divergence(a, b + shift), metrics.kl_divergence(a, b), atol=1e-9)
    ids = np.array([0, 3, 6])
    np.testing.assert_allclose(
        metrics.negative_log_likelihood(a + shift, ids), metrics.negative_log_likelihood(a, ids), atol=1e-9
    )


@given(ROWS, st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_cosine_ignores_scale(a, scale):
    a = a.astype(np.float64) + 1e-3
    np.testing.assert_allclose(metrics.cosine(a, a * scale), 1.0, atol=1e-9)
    np.testing.assert_allclose(metrics.cosine(a, -a), -1.0, atol=1e-9)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    nll = metrics.negative_log_likelihood(np.zeros((5, 320)), np.arange(5))
    assert metrics.perplexity(nll) == pytest.approx(320)


def test_relative_error():
    assert metrics.relative_error([3.0, 4.0], [3.0, 4.5]) == pytest.approx(0.1)
    assert metrics.relative_error([0.0], [0.0]) == 0
    assert metrics.relative_error([1.0], [np.nan]) == np.inf


def test_nan_is_infinitely_wrong():
    assert metrics.max_abs_error(np.zeros((1, 2)), np.array([[np.nan, 0.0]]))[0] == np.inf


def test_comparison_accumulates_windows():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 11)), rng.normal(size=(6, 11))
    whole, parts = metrics.LogitComparison(), metrics.LogitComparison()
    whole.add(a, b)
    for rows in (slice(0, 1), slice(1, 6)):
        parts.add(a[rows], b[rows])
    assert whole.summary() == pytest.approx(parts.summary())
    assert whole.summary()["tokens"] == 6
    assert whole.summary()["max_abs_error"] == np.abs(a - b).max()


def test_the_worst_row_stands_out_and_tiny_rows_do_not():
    reference = np.ones((100, 4))
    found = reference.copy()
    found[7] *= 1.5
    assert metrics.relative_error(reference, found) == pytest.approx(0.05)
    assert metrics.largest_row_error(reference, found) == pytest.approx(0.5)
    reference[7], found[7] = 1e-9, 2e-9  # off by its own size, which is nothing beside the others
    assert metrics.largest_row_error(reference, found) < 1e-7
    found[3] = np.nan
    assert metrics.largest_row_error(reference, found) == np.inf
    assert metrics.largest_row_error(np.zeros((2, 3)), np.zeros((2, 3))) == 0
