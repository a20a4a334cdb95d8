"""Tokens chosen by the kernel, in Triton's interpreter, are those of the definition in runtime/engine/sampler.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latentrt.plugins.launch import interpreter
from latentrt.runtime.backends.base import NOT_FINITE, SURE, UNSURE, Draws, StepResult
from latentrt.runtime.backends.passes import JoinedResult
from latentrt.runtime.engine import sampler
from latentrt.runtime.engine.sampler import Sampler, distribution, draw
from latentrt.runtime.errors import EngineError
from latentrt.runtime.sampling_params import SamplingParams

if not interpreter.interpreting():
    pytest.skip("kernels run in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from latentrt.plugins.sampling import kernel

PARAMS = st.builds(
    SamplingParams, temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 10**6]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 1e-6]), min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
)  # fmt: skip


def made(seed: int, vocab: int, scale: float, steps: float) -> np.ndarray:
    """Logits [vocab] float32; with `steps` rounded to multiples, so that many are equal, as those of bfloat16 are."""
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * np.float32(scale)
    return (np.round(logits / steps) * steps).astype(np.float32) if steps else logits


def drawn(logits: np.ndarray, params: list[SamplingParams], uniforms) -> tuple[np.ndarray, ...]:
    numbers = [(p.temperature, p.top_p, p.min_p, u) for p, u in zip(params, uniforms, strict=True)]
    top_k = torch.tensor([p.top_k for p in params], dtype=torch.int32)
    found = kernel.choose(torch.from_numpy(logits), torch.tensor(numbers, dtype=torch.float64), top_k)
    return tuple(t.numpy() for t in found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), vocab=st.sampled_from([1, 2, 31, 320, 4096, 4097, 9000]),
    scale=st.sampled_from([0.0, 0.5, 3.0]),
    steps=st.sampled_from([0.0, 0.25]), params=PARAMS, uniform=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
@example(seed=1, vocab=320, scale=0.0, steps=0.0, params=SamplingParams(temperature=1.0, top_p=0.5), uniform=0.999)
@example(seed=1, vocab=9000, scale=3.0, steps=0.25, params=SamplingParams(temperature=1.0, top_p=0.95), uniform=0.94)
def test_tokens_are_those_of_the_definition(seed, vocab, scale, steps, params, uniform):
    logits = made(seed, vocab, scale, steps)
    ids, probabilities = distribution(logits, params)
    (token,), (state,), (largest,) = drawn(logits[None], [params], [uniform])
    assert largest == logits.max() and state in (SURE, UNSURE)
    assert state == UNSURE or token == ids[draw(probabilities, uniform)]


def test_little_is_too_close_to_call():
    """In a vocabulary as large as V2's and with logits as coarse as bfloat16's."""
    rng, rows = np.random.default_rng(0), 4
    logits = torch.from_numpy(rng.normal(size=(rows, 102400)).astype(np.float32) * 2).bfloat16().float().numpy()
    params = [SamplingParams(temperature=t, top_p=p) for t, p in ((1.0, 1.0), (1.0, 0.95), (0.6, 0.9), (1.3, 0.999))]
    uniforms = rng.random(rows)
    ids, states, _ = drawn(logits, params, uniforms)
    assert (states == SURE).all()
    for row, token, p, uniform in zip(logits, ids, params, uniforms, strict=True):
        kept, probabilities = distribution(row, p)
        assert token == kept[draw(probabilities, uniform)]


def test_what_is_no_number():
    logits = np.zeros((4, 10), np.float32)
    logits[0, 3], logits[1, 4], logits[2] = np.nan, np.inf, -np.inf
    _, states, largest = drawn(logits, [SamplingParams(temperature=1.0)] * 4, [0.55] * 4)
    assert states.tolist() == [NOT_FINITE] * 3 + [SURE]
    assert np.isnan(largest[0]) and largest[1] == np.inf and largest[2] == -np.inf


def test_a_bound_that_the_target_lies_on_is_not_called():
    """Two equal logits: half of the mass is exactly the first's, and the sums' rounding decides."""
    (_,), (state,), _ = drawn(np.zeros((1, 2), np.float32), [SamplingParams(temperature=1.0)], [0.5])
    assert state == UNSURE


class OnDevice(StepResult):
    """Logits that tokens are drawn from by the kernel; `moved` counts the rows that came to the host."""

    can_draw = True

    def __init__(self, logits: np.ndarray):
        super().__init__(logits)
        self.moved = 0

    def rows(self, places):
        self.moved += len(places)
        return self._logits[places]

    def logits(self):
        self.moved += len(self._logits)  # of a batch that holds no row to draw
        return self._logits

    def greedy(self):
        return StepResult(self._logits).greedy()

    def draw(self, draws: Draws):
        return tuple(t.numpy() for t in kernel.choose(*map(torch.from_numpy, (self._logits, draws.numbers, draws.top_k))))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), params=st.lists(PARAMS, min_size=1, max_size=5), split=st.integers(0, 5))
def test_a_batch_gets_the_tokens_of_the_host(seed, params, split):
    """Seeds, greedy rows, rows with a penalty and rows without numbers side by side; some logits on the host already."""
    rng, vocab = np.random.default_rng(seed), 300
    kinds = rng.integers(0, 4, len(params))
    params = [
        replace([p, SamplingParams(), replace(p, repetition_penalty=1.3), p][k], seed=n)
        for n, (p, k) in enumerate(zip(params, kinds, strict=True))
    ]
    here, there = ([Sampler(p, [1, 2]) for p in params] for _ in range(2))
    for _ in range(3):
        logits = np.stack([made(int(rng.integers(10**6)), vocab, 3, 0.25) for _ in params])
        logits[rng.random(len(params)) < 0.1, 7] = np.nan
        cut = min(split, len(params))
        whole = OnDevice(logits)
        if 0 < cut < len(params):
            order = rng.permutation(len(params))
            first, second = np.sort(order[:cut]), np.sort(order[cut:])
            whole = JoinedResult([(StepResult(logits[first]), first), (OnDevice(logits[second]), second)])
        expected, found = sampler.choose(StepResult(logits), here), sampler.choose(whole, there)
        for e, f in zip(expected, found, strict=True):
            assert e == f or (isinstance(e, EngineError) and isinstance(f, EngineError) and str(e) == str(f))


def test_logits_stay_where_they_are():
    result = OnDevice(np.stack([made(n, 300, 3, 0.0) for n in range(3)]))
    params = [dict(temperature=0.8, top_p=0.9), {}, dict(temperature=1.0, presence_penalty=0.5)]
    sampler.choose(result, [Sampler(SamplingParams(**p), [1]) for p in params])
    assert result.moved == 1, "the penalty's row alone"
