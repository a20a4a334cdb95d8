"""Sampling against transformers' logits processors, a float64 formula, and exact probabilities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.errors import EngineError, RequestError
from runtime.sampler import Sampler, SamplingParams, distribution, penalize

VOCAB = 40
logit_arrays = st.integers(0, 2**32 - 1).map(lambda s: np.random.default_rng(s).normal(scale=3, size=VOCAB).astype(np.float32))
settings_of = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3), top_k=st.integers(0, VOCAB + 5), top_p=st.floats(0.05, 1), min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
)  # fmt: skip


def theirs(logits: np.ndarray, seen: list[int], params: SamplingParams) -> np.ndarray:
    """Probabilities [vocab] of transformers' processors, in its order, computed in float64."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)] if seen else [])
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits).double()[None]
    return processors(torch.tensor([seen], dtype=torch.long), scores).softmax(-1)[0].numpy()


def ours(logits: np.ndarray, seen: list[int], params: SamplingParams) -> np.ndarray:
    penalized = penalize(logits.astype(np.float64), np.array(seen, np.int64), params.repetition_penalty) if seen else logits
    ids, probabilities = distribution(penalized, params)
    assert (np.diff(ids) > 0).all()
    dense = np.zeros(len(logits))
    dense[ids] = probabilities
    return dense


@settings(max_examples=300, deadline=None)
@given(logit_arrays, st.lists(st.integers(0, VOCAB - 1), max_size=10), settings_of)
def test_equals_the_processors_of_transformers(logits, seen, params):
    np.testing.assert_allclose(ours(logits, seen, params), theirs(logits, seen, params), rtol=1e-9, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(logit_arrays, settings_of)
def test_equals_the_formula(logits, params):
    scores = logits.astype(np.float64) / params.temperature
    p = np.exp(scores - scores.max())
    if params.top_k:
        p[scores < np.sort(scores)[::-1][min(params.top_k, VOCAB) - 1]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])  # mass of the likelier ones
    if params.top_p < 1:
        p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    np.testing.assert_allclose(ours(logits, [], params), p / p.sum(), rtol=1e-9, atol=1e-12)


def test_ties_go_to_the_lowest_index():
    logits = np.array([1, 5, 5, 0, 5], np.float32)
    assert Sampler(SamplingParams(), []).sample(logits) == 1
    ids, probabilities = distribution(logits, SamplingParams(temperature=1, top_p=0.4))
    assert ids.tolist() == [1, 2] and probabilities.tolist() == [0.5, 0.5]
    ids, _ = distribution(logits, SamplingParams(temperature=1, top_k=1))  # as in transformers: ties of the k-th stay
    assert ids.tolist() == [1, 2, 4]


def test_the_smallest_nucleus_is_one_token():
    assert distribution(np.array([1, 3, 2], np.float32), SamplingParams(temperature=1, top_p=1e-17))[0].tolist() == [1]


def test_a_large_vocabulary_is_cut_to_the_nucleus_exactly():
    logits = np.random.default_rng(0).normal(scale=2, size=102400).astype(np.float32)
    for top_p in (0.01, 0.5, 0.95, 0.999):
        params = SamplingParams(temperature=0.7, top_p=top_p)
        np.testing.assert_allclose(ours(logits, [], params), theirs(logits, [], params), rtol=1e-7, atol=0)


def test_extreme_temperatures_are_greedy_and_uniform():
    logits = np.array([0, 1, 2, 700], np.float32)
    assert distribution(logits, SamplingParams(temperature=1e-300))[1].tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(distribution(logits, SamplingParams(temperature=1e12))[1], 0.25, rtol=1e-8)


def test_frequencies_fit_the_probabilities():
    """Hoeffding: |count/n - p| > t has probability 2 exp(-2 n t^2); the union over VOCAB tokens is held below 1e-9."""
    logits = np.random.default_rng(5).normal(scale=2, size=VOCAB).astype(np.float32)
    params = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=7)
    n = 20000
    sampler = Sampler(params, [])
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=VOCAB)
    bound = math.sqrt(math.log(2 * VOCAB / 1e-9) / (2 * n))
    expected = theirs(logits, [], params)
    assert np.abs(counts / n - expected).max() < bound
    assert not counts[expected == 0].any()


def test_a_seed_fixes_the_draws_and_no_seed_does_not():
    logits = np.zeros(1000, np.float32)

    def draws(seed) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, seed=seed), [])
        return [sampler.sample(logits) for _ in range(8)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_the_penalty_sees_prompt_and_answer():
    sampler = Sampler(SamplingParams(repetition_penalty=10.0), [0])
    logits = np.array([9, 8, 7, -1], np.float32)
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]
    assert logits.tolist() == [9, 8, 7, -1]  # the caller's array is left alone


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(EngineError, match="not finite"):
        Sampler(SamplingParams(), []).sample(np.full(4, value, np.float32))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("temperature", True), ("top_k", -1), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("seed", -1), ("seed", 0.5), ("max_new_tokens", 0),
        ("max_new_tokens", None), ("stop", ("a", "")), ("stop", (1,)), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_wrong_options_are_named(option, value):
    with pytest.raises(RequestError, match=f"^{option} (is|has) .*accepted: "):
        SamplingParams(**{option: value})


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="ab").stop == ("ab",)
