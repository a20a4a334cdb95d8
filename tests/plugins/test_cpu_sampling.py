"""Tokens chosen by the library of own CPU kernels are those of the definition in runtime/engine/sampler.py."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.plugins.cpu import compile
from latentrt.plugins.cpu.sampling import TokenChooser
from latentrt.runtime.backends.base import NOT_FINITE, SURE, UNSURE, StepResult
from latentrt.runtime.backends.onnxruntime import ChosenResult
from latentrt.runtime.engine import sampler as module
from latentrt.runtime.engine.sampler import Sampler, choose, distribution, draw
from latentrt.runtime.errors import EngineError
from latentrt.runtime.sampling_params import SamplingParams
from tests.plugins import cpu_nodes
from tests.runtime.test_sampler import KINDS, Plain, all_params, make_logits, rows

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
OPTIONS = {
    "temperature": {}, "top-p": {"top_p": 0.95}, "top-k": {"top_k": 50}, "min-p": {"min_p": 0.05},
    "all": {"top_k": 500, "top_p": 0.9, "min_p": 0.01},
}  # fmt: skip


@pytest.fixture(scope="module")
def chooser() -> TokenChooser:
    return TokenChooser(compile.library())


def drawn(chooser: TokenChooser, logits: np.ndarray, params: list[SamplingParams], uniforms) -> list[list]:
    numbers = np.array([(p.temperature, p.top_p, p.min_p, u) for p, u in zip(params, uniforms, strict=True)])
    found = chooser.choose(logits, numbers, np.array([p.top_k for p in params], np.int32))
    return [array.tolist() for array in found]


params_of = st.builds(
    SamplingParams, temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 50, 64, 300, 10**6]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 1e-6, 1 - 2**-53]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1e-9, 1e-300, 1.0]),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(rows, params_of, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5))
def test_tokens_are_those_of_the_definition(chooser, logits, params, uniforms):
    ids, probabilities = distribution(logits, params)
    batch = np.stack([logits] * len(uniforms))
    tokens, states, largest = drawn(chooser, batch, [params] * len(uniforms), uniforms)
    for token, state, uniform in zip(tokens, states, uniforms, strict=True):
        assert state == UNSURE or (state == SURE and token == ids[draw(probabilities, uniform)])
    assert largest == [logits.max()] * len(uniforms)


@settings(max_examples=300, deadline=None)
@given(rows, params_of, st.sampled_from([0, 1e-16, 1e-13, 1e-10, 1e-7, 1e-5]), st.data())
def test_numbers_beside_the_border_of_two_tokens(chooser, logits, params, distance, data):
    ids, probabilities = distribution(logits, params)
    cumulative = np.cumsum(probabilities)
    borders = [cumulative[data.draw(st.integers(0, len(cumulative) - 1))] / cumulative[-1] for _ in range(4)]
    near = [float(v) for b in borders for v in (b - distance, np.nextafter(b, 0), b, b + distance) if 0 <= v < 1]
    tokens, states, _ = drawn(chooser, np.stack([logits] * len(near)), [params] * len(near), near) if near else ([], [], [])
    for token, state, uniform in zip(tokens, states, near, strict=True):
        assert state == UNSURE or token == ids[draw(probabilities, uniform)]


@settings(max_examples=300, deadline=None)
@given(rows, st.floats(0.3, 2), st.sampled_from([0, 2**-53, -(2**-53), 1e-15, -1e-15, 1e-8, -1e-8, 1e-6, -1e-6]), st.data())
def test_top_p_beside_a_sum_of_probabilities(chooser, logits, temperature, distance, data):
    probabilities = np.sort(distribution(logits, SamplingParams(temperature=temperature))[1])[::-1]
    place = data.draw(st.integers(0, len(probabilities) - 1))
    top_p = min(max(float(probabilities[: place + 1].sum()) + distance, 1e-9), 1.0)
    params = SamplingParams(temperature=temperature, top_p=top_p)
    ids, kept = distribution(logits, params)
    last = kept.cumsum()  # the last tokens kept show where the cut was
    uniforms = [float(v) for v in (*last[-3:] - 1e-9, last[0] / 2, 1 - 1e-12) if 0 <= v < 1]
    tokens, states, _ = drawn(chooser, np.stack([logits] * len(uniforms)), [params] * len(uniforms), uniforms)
    for token, state, uniform in zip(tokens, states, uniforms, strict=True):
        assert state == UNSURE or token == ids[draw(kept, uniform)]


@pytest.mark.parametrize("kind", ["peaked", "flat", "halves"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_little_is_too_close_to_call(chooser, kind, options):
    """In a vocabulary as large as V2's: of 100 draws not one."""
    logits, uniforms = make_logits(3, kind, 102400, 0), np.random.default_rng(0).random(100)
    params = SamplingParams(temperature=0.8, **options)
    ids, probabilities = distribution(logits, params)
    for part in np.split(uniforms, 25):
        tokens, states, _ = drawn(chooser, np.stack([logits] * 4), [params] * 4, part)
        assert states == [SURE] * 4
        assert tokens == [ids[draw(probabilities, u)] for u in part]


def test_what_is_no_number(chooser):
    logits = np.zeros((4, 70), np.float32)
    logits[0, 3], logits[1, 64], logits[2] = np.nan, np.inf, -np.inf
    _, states, largest = drawn(chooser, logits, [SamplingParams(temperature=1.0)] * 4, [0.55] * 4)
    assert states == [NOT_FINITE] * 3 + [SURE]
    assert np.isnan(largest[0]) and largest[1:] == [np.inf, -np.inf, 0]
    assert chooser.choose(logits)[1].tolist() == states


@given(st.integers(1, 300), st.data())
def test_the_largest_is_the_first_of_equal_ones(chooser, vocab, data):
    logits = np.array(data.draw(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 2.0]), min_size=vocab, max_size=vocab)), np.float32)
    ids, states, largest = chooser.choose(logits[None])
    assert (ids[0], states[0], largest[0]) == (logits.argmax(), SURE, logits.max())


def test_a_bound_that_the_target_lies_on_is_not_called(chooser):
    """Two equal logits: half of the mass is exactly the first's, and the sums' rounding decides."""
    assert drawn(chooser, np.zeros((1, 2), np.float32), [SamplingParams(temperature=1.0)], [0.5])[1] == [UNSURE]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5000), st.lists(st.tuples(st.sampled_from(KINDS), all_params), min_size=1, max_size=20), st.integers(0, 99)
)  # fmt: skip
def test_a_batch_gets_the_tokens_of_the_plain_way(chooser, vocab, requests, seed):
    """Seeds, greedy rows, rows with a penalty, and rows without numbers side by side, three steps."""
    rng = np.random.default_rng(seed)
    fast, plain = [Sampler(p, []) for _, p in requests], [Plain(p, []) for _, p in requests]
    for _ in range(3):
        logits = np.stack([make_logits(int(rng.integers(10**6)), kind, vocab, 0.1) for kind, _ in requests])
        logits[rng.random(len(requests)) < 0.1, 0] = np.nan
        for row, got, other in zip(logits, choose(ChosenResult(logits, chooser), fast), plain, strict=True):
            if isinstance(got, EngineError):
                with pytest.raises(EngineError) as expected:
                    other.sample(row)
                assert str(got) == str(expected.value)
            else:
                assert got == other.sample(row)


def test_the_host_draws_nothing(chooser, monkeypatch):
    monkeypatch.setattr(module, "_on_host", None)
    logits = np.stack([make_logits(n, "peaked", 4096, 0) for n in range(3)])
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 1}, {}, {"temperature": 1.0, "top_k": 5, "seed": 2}
    params = [SamplingParams(**given) for given in options]
    found = choose(ChosenResult(logits, chooser), [Sampler(p, []) for p in params])
    monkeypatch.undo()
    assert found == choose(StepResult(logits), [Sampler(p, []) for p in params])


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu_nodes.ISAS)
def test_other_processors_choose_the_same(isa):
    """A process with the kernels of another processor passes the tests above."""
    tests = [__file__, "-q", "-p", "no:cacheprovider", "-k", "definition or close or number or largest or border"]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], env=os.environ | {"LATENTRT_CPU_ISA": isa},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout
