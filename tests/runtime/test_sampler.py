"""Sampling against transformers' logits processors, a float64 formula, exact probabilities, and a plain way, token by token.

`Plain` is sampling one row after another with all probabilities written out, as the engine did it at first.
"""

import math
from dataclasses import replace

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

from latentrt.runtime.backends.base import StepResult
from latentrt.runtime.engine import sampler as module
from latentrt.runtime.engine.processors import penalize
from latentrt.runtime.engine.sampler import Sampler, choose, distribution
from latentrt.runtime.errors import EngineError, RequestError
from latentrt.runtime.sampling_params import SamplingParams

VOCAB = 40
logit_arrays = st.integers(0, 2**32 - 1).map(lambda s: np.random.default_rng(s).normal(scale=3, size=VOCAB).astype(np.float32))
settings_of = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3), top_k=st.integers(0, VOCAB + 5), top_p=st.floats(0.05, 1), min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
)  # fmt: skip


class Plain:
    """The state of one request."""

    def __init__(self, params: SamplingParams, prompt: list[int]):
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = set(prompt) if params.repetition_penalty != 1 else None

    def sample(self, logits: np.ndarray) -> int:
        """The next token for logits [vocab] float32. Raises EngineError if they are not numbers."""
        if not np.isfinite(logits.max()):
            raise EngineError(f"logits are not finite (largest is {logits.max()}); the weights or the cache are damaged")
        if self._seen is not None:
            logits = plain_penalty(logits, np.fromiter(self._seen, np.int64), self.params.repetition_penalty)
        token = int(np.argmax(logits)) if self.params.temperature == 0 else self._draw(logits)
        if self._seen is not None:
            self._seen.add(token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        ids, probabilities = plain_distribution(logits, self.params)
        cumulative = np.cumsum(probabilities)
        place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(place, len(ids) - 1)])


def plain_penalty(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    logits = logits.copy()
    chosen = logits[seen]
    logits[seen] = np.where(chosen < 0, chosen * logits.dtype.type(penalty), chosen / logits.dtype.type(penalty))
    return logits


def plain_distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Ids [C] ascending and their probabilities [C] float64."""
    ids = np.arange(len(logits))
    with np.errstate(over="ignore"):
        scores = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    if 0 < params.top_k < len(scores):
        kept = scores >= np.partition(scores, -params.top_k)[-params.top_k]
        ids, scores = ids[kept], scores[kept]
    weights = np.exp(scores)
    if params.top_p < 1:
        kept = plain_nucleus(weights / weights.sum(), params.top_p)
        ids, weights = ids[kept], weights[kept]
    kept = weights >= params.min_p * weights.max()
    ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def plain_nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    large = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))[::-1]
    tail = probabilities.sum() - probabilities[large].sum()
    order = large[np.argsort(probabilities[large], kind="stable")]
    kept = tail + np.cumsum(probabilities[order]) > 1 - top_p
    kept[-1] = True
    return np.sort(order[kept])


def sample(sampler: Sampler, logits: np.ndarray) -> int:
    """The next token of one request alone."""
    return choose(StepResult(logits[None]), [sampler])[0]


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
    assert sample(Sampler(SamplingParams(), []), logits) == 1
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


@pytest.mark.slow
def test_frequencies_fit_the_probabilities():
    """Hoeffding: |count/n - p| > t has probability 2 exp(-2 n t^2); the union over VOCAB tokens is held below 1e-9."""
    logits = np.random.default_rng(5).normal(scale=2, size=VOCAB).astype(np.float32)
    params = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=7)
    n = 20000
    sampler = Sampler(params, [])
    counts = np.bincount([sample(sampler, logits) for _ in range(n)], minlength=VOCAB)
    bound = math.sqrt(math.log(2 * VOCAB / 1e-9) / (2 * n))
    expected = theirs(logits, [], params)
    assert np.abs(counts / n - expected).max() < bound
    assert not counts[expected == 0].any()


def test_a_seed_fixes_the_draws_and_no_seed_does_not():
    logits = np.zeros(1000, np.float32)

    def draws(seed) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, seed=seed), [])
        return [sample(sampler, logits) for _ in range(8)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_the_penalty_sees_prompt_and_answer():
    sampler = Sampler(SamplingParams(repetition_penalty=10.0), [0])
    logits = np.array([9, 8, 7, -1], np.float32)
    assert [sample(sampler, logits) for _ in range(3)] == [1, 2, 0]
    assert logits.tolist() == [9, 8, 7, -1]  # the caller's array is left alone


KINDS = ("flat", "steep", "peaked", "ties", "equal", "close", "closest", "huge", "halves")


def make_logits(seed: int, kind: str, vocab: int, hidden: float) -> np.ndarray:
    """Logits [vocab] float32 of a shape that a shortcut could get wrong; a share `hidden` of them is -inf."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=vocab) * {"flat": 0.5, "steep": 30, "closest": 1e-16, "huge": 1e37}.get(kind, 3)
    if kind == "peaked":  # as language models have it: a few far above the others
        logits[random.integers(vocab, size=min(vocab, 30))] += random.uniform(5, 20, size=min(vocab, 30))
    elif kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = logits[0]
    elif kind == "close":  # apart as logits, and some of them equal as scores
        logits = logits * 1e-17
        logits[random.integers(vocab)] = 3
    elif kind == "halves":
        logits = logits.astype(np.float16)
    logits[random.random(vocab) < hidden] = -np.inf
    logits[random.integers(vocab)] = 0 if kind == "closest" else 1.5  # never all of them
    return logits.astype(np.float32)


vocabs = st.integers(1, 300) | st.sampled_from([4095, 4096, 6000, 20000])
rows = st.builds(make_logits, st.integers(0, 2**32 - 1), st.sampled_from(KINDS), vocabs, st.sampled_from([0, 0, 0.3, 1]))
all_params = st.builds(
    SamplingParams,
    temperature=st.floats(0.3, 2) | st.sampled_from([0, 5e-324, 1e-300, 1e-35, 1e-5, 0.05, 10, 1e5, 1e35, 1e308]),
    top_k=st.sampled_from([0, 0, 0, 1, 2, 50, 64, 1000, 10**6]) | st.integers(0, 300),
    top_p=st.sampled_from([1, 1, 0.5, 0.95, 0.999, 1e-17, 1 - 2**-53]) | st.floats(1e-3, 1),
    min_p=st.sampled_from([0, 0, 0, 0.05, 1e-9, 1e-300, 1]) | st.floats(0, 1),
    repetition_penalty=st.sampled_from([1, 1, 1.3, 0.6]),
    seed=st.integers(0, 2**32 - 1),
)


class Uniforms:
    """A random generator that gives these numbers in turn."""

    def __init__(self, values):
        self.random = iter(values).__next__


def assert_same_tokens(logits: np.ndarray, params: SamplingParams, uniforms) -> None:
    """Of both ways, for each of the uniform numbers."""
    fast, plain = Sampler(params, []), Plain(params, [])
    fast._random, plain._random = Uniforms(uniforms), Uniforms(uniforms)
    got = [sample(fast, logits) for _ in uniforms]
    assert got == [plain.sample(logits) for _ in uniforms]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(rows, st.lists(st.tuples(all_params, st.lists(st.integers(0, 10**6), max_size=20)), min_size=1, max_size=6))
def test_tokens_are_those_of_the_plain_way(logits, requests):
    """Three steps of a batch whose rows are the same logits, turned."""
    requests = [(params, [t % len(logits) for t in prompt]) for params, prompt in requests]
    fast, plain = [Sampler(*r) for r in requests], [Plain(*r) for r in requests]
    for step in range(3):
        batch = np.stack([np.roll(logits, 7 * step + row) for row in range(len(requests))])
        before = batch.copy()
        tokens = choose(StepResult(batch), fast)
        assert tokens == [p.sample(row) for p, row in zip(plain, batch, strict=True)]
        assert all(type(t) is int for t in tokens)
        np.testing.assert_array_equal(batch, before)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(rows, all_params, st.sampled_from([0, 1e-16, 1e-13, 1e-10, 1e-7, 1e-6, 1e-5, 1e-4]), st.data())
def test_numbers_beside_the_border_of_two_tokens_fall_as_in_the_plain_way(logits, params, distance, data):
    params = replace(params, temperature=params.temperature or 1.0, repetition_penalty=1)
    cumulative = np.cumsum(plain_distribution(logits, params)[1])
    borders = [cumulative[data.draw(st.integers(0, len(cumulative) - 1))] / cumulative[-1] for _ in range(4)]
    borders = [v for b in borders for v in (b - distance, np.nextafter(b, 0), b, np.nextafter(b, 1), b + distance)]
    assert_same_tokens(logits, params, [float(b) for b in borders if 0 <= b < 1])


@settings(max_examples=300, deadline=None)
@given(rows, st.floats(0.3, 2), st.sampled_from([0, 2**-53, -(2**-53), 1e-15, -1e-15, 1e-8, -1e-8, 1e-6, -1e-6]), st.data())
def test_top_p_beside_a_sum_of_probabilities_cuts_as_in_the_plain_way(logits, temperature, distance, data):
    probabilities = np.sort(plain_distribution(logits, SamplingParams(temperature=temperature))[1])[::-1]
    place = data.draw(st.integers(0, len(probabilities) - 1))
    top_p = min(max(float(probabilities[: place + 1].sum()) + distance, 1e-9), 1.0)
    params = SamplingParams(temperature=temperature, top_p=top_p)
    last = plain_distribution(logits, params)[1].cumsum()  # the last tokens kept show where the cut was
    uniforms = [float(v) for v in (*last[-3:] - 1e-9, last[0] / 2, 1 - 1e-12) if 0 <= v < 1]
    assert_same_tokens(logits, params, uniforms)


@settings(max_examples=200, deadline=None)
@given(rows, st.floats(0.3, 2), st.sampled_from([1.0, 0.9]), st.integers(0, 50), st.data())
def test_min_p_at_a_tokens_own_probability_keeps_it(logits, temperature, top_p, top_k, data):
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    weight = data.draw(st.sampled_from(sorted(set(weights.tolist()))[-20:]))
    min_p = min(float(np.nextafter(weight, data.draw(st.sampled_from([0, weight, 2])))), 1.0)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    last = plain_distribution(logits, params)[1].cumsum()
    assert_same_tokens(logits, params, [float(v) for v in last[-4:] - 1e-9 if 0 <= v < 1])


@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.95}, {"top_p": 0.95, "min_p": 0.1}])
def test_a_large_vocabulary_seldom_needs_all_probabilities(kind, options, monkeypatch):
    """And gives the same tokens: of 20 draws none is expected to be too close to call."""
    logits = make_logits(3, kind, 102400, 0)
    plain = Plain(SamplingParams(temperature=0.8, seed=5, **options), [])
    expected = [plain.sample(logits) for _ in range(20)]
    monkeypatch.setattr(module, "distribution", None)
    sampler = Sampler(plain.params, [])
    assert [sample(sampler, logits) for _ in range(20)] == expected


@pytest.mark.parametrize("options", [{"top_k": 50}, {"min_p": 0.05}])
def test_few_logits_go_through_the_definition(options, monkeypatch):
    logits, sizes = make_logits(3, "peaked", 102400, 0), []
    monkeypatch.setattr(module, "distribution", lambda row, params: sizes.append(len(row)) or distribution(row, params))
    params = SamplingParams(temperature=0.8, seed=5, **options)
    assert sample(Sampler(params, []), logits) == Plain(params, []).sample(logits)
    assert len(sizes) == 1 and sizes[0] <= 200


class OnDevice(StepResult):
    """A result that must not be copied to the host."""

    def logits(self) -> np.ndarray:
        raise AssertionError("logits left the device")

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        return StepResult(self._logits).greedy()


def test_greedy_requests_leave_the_logits_where_they_are():
    logits = np.array([[1, 5, 5], [9, 0, 1], [np.nan, 0, 1], [0, 1, 2]], np.float32)
    tokens = choose(OnDevice(logits), [Sampler(SamplingParams(), [0]) for _ in logits])
    assert [tokens[i] for i in (0, 1, 3)] == [1, 0, 2]
    assert isinstance(tokens[2], EngineError)
    with pytest.raises(AssertionError, match="left the device"):
        choose(OnDevice(logits), [Sampler(SamplingParams(repetition_penalty=2.0), [0]) for _ in logits])


DAMAGED = {"a NaN": [0, np.nan, 3, 1], "inf": [0, np.inf, 3, 1], "all -inf": [-np.inf] * 4}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 2.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_a_damaged_row_is_an_error_of_its_own(damaged, options):
    """The error is that of the plain way; the others and the row's own sampler go on as if there had been no such step."""
    params = SamplingParams(seed=3, **options)
    good = np.array([0.5, 1, 2, 1.5], np.float32)
    bad = np.array(damaged, np.float32)
    fast, plain = [Sampler(params, [2]) for _ in range(3)], [Plain(params, [2]) for _ in range(3)]
    first, error, third = choose(StepResult(np.stack([good, bad, good])), fast)
    assert (first, third) == (plain[0].sample(good), plain[2].sample(good))
    with pytest.raises(EngineError) as expected:
        plain[1].sample(bad)
    assert isinstance(error, EngineError) and str(error) == str(expected.value)
    for _ in range(5):
        assert choose(StepResult(np.stack([good] * 3)), fast) == [p.sample(good) for p in plain]


def test_a_penalty_beyond_float32_is_an_error_that_names_it():
    logits = np.array([[1, 2, 0], [1, 2, 0]], np.float32)
    samplers = [Sampler(SamplingParams(temperature=1, repetition_penalty=v, seed=0), [0]) for v in (1e-45, 1.1)]
    error, token = choose(StepResult(logits), samplers)
    assert isinstance(error, EngineError) and "repetition_penalty 1e-45" in str(error)
    assert token in (0, 1, 2)


def test_every_row_has_its_sampler():
    with pytest.raises(ValueError):
        choose(StepResult(np.zeros((2, 3), np.float32)), [Sampler(SamplingParams(temperature=1), [])])
    assert choose(StepResult(np.zeros((0, 3), np.float32)), []) == []


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
