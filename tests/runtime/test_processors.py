"""What requests change about logits, and log probabilities, beside plain formulas and transformers' processors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from latentrt.runtime.engine.logprobs import token_logprobs
from latentrt.runtime.engine.processors import Processors
from latentrt.runtime.engine.sampler import Sampler
from latentrt.runtime.errors import EngineError, RequestError
from latentrt.runtime.sampling_params import SamplingParams
from tests.runtime import fakes

VOCAB = 40
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
penalty = st.sampled_from([0.0, 0.5, -1.5, 2.0])


def row(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 4


@settings(max_examples=100, deadline=None)
@given(tokens, tokens, penalty, penalty, st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
       st.sampled_from([1.0, 1.3]), st.integers(0, 15), st.integers(0, 99))  # fmt: skip
def test_logits_are_changed_as_the_formula_says(prompt, answer, presence, frequency, bias, repetition, least, seed):
    """OpenAI's: logit - frequency x count - presence x (count > 0), of the answer alone."""
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency, logit_bias=tuple(bias.items()),
                            repetition_penalty=repetition, min_new_tokens=least, max_new_tokens=50)  # fmt: skip
    processors, logits = Processors(params, prompt, frozenset({1, 5})), row(seed)
    given = logits.copy()
    for token in answer:
        processors.accept(token)
    expected = logits.astype(np.float64)
    for token, value in bias.items():
        expected[token] += value
    if repetition != 1 and prompt + answer:
        seen, scores = torch.tensor([prompt + answer]), torch.tensor(expected[None])
        expected = RepetitionPenaltyLogitsProcessor(repetition)(seen, scores)[0].numpy().copy()
    for token in set(answer):
        expected[token] -= frequency * answer.count(token) + presence
    ids, scores = torch.tensor([[0] * len(answer)], dtype=torch.long), torch.tensor(expected[None])
    expected = MinNewTokensLengthLogitsProcessor(0, least, [1, 5], device="cpu")(ids, scores)[0].numpy()
    np.testing.assert_allclose(processors.apply(logits), expected, rtol=1e-6, atol=3e-5)  # float32, values to 100
    assert (logits == given).all()
    assert processors.active or (processors.apply(logits) == logits).all()


class Only:
    """A guide that allows one token after another."""

    def __init__(self, *allowed: int):
        self.allowed, self.taken = allowed, []

    def mask(self, logits: np.ndarray) -> np.ndarray:
        masked = np.full_like(logits, -np.inf)
        masked[list(self.allowed[len(self.taken) : len(self.taken) + 1])] = logits[0]
        return masked

    def accept(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1}, {"repetition_penalty": 1.5},
])  # fmt: skip
def test_a_guide_has_the_last_word_in_every_way_of_sampling(options):
    guide = Only(7, 3, 9)
    sampler = Sampler(SamplingParams(seed=1, **options), [7], guide=guide)
    assert [sampler.next(row(n)) for n in range(3)] == [7, 3, 9] == guide.taken
    assert isinstance(error := sampler.next(row(4)), EngineError) and "no token is allowed" in str(error)


def test_a_token_that_the_guide_refuses_is_an_error():
    guide = Only(7)
    guide.accept = lambda token: (_ for _ in ()).throw(EngineError("refused"))
    assert str(Sampler(SamplingParams(), [], guide=guide).next(row(0))) == "refused"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(0, VOCAB - 1), st.integers(0, VOCAB + 5), st.sampled_from([1.0, 1e4, 0.0]))
def test_log_probabilities(seed, token, count, scale):
    """Beside torch's log_softmax in float64; where logits are equal the lowest ids come first."""
    logits = row(seed) * np.float32(scale)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    told = token_logprobs(logits, token, count)
    assert (told.token, told.rank) == (token, 1 + int((logits > logits[token]).sum()))
    assert told.logprob == pytest.approx(expected[token], rel=1e-6, abs=1e-6)  # exponentials are float32
    order = sorted(range(VOCAB), key=lambda i: (-logits[i], i))[:count]
    assert [i for i, _ in told.top] == order
    np.testing.assert_allclose([p for _, p in told.top], expected[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [
    {"min_new_tokens": -1}, {"min_new_tokens": 65}, {"presence_penalty": 2.1}, {"frequency_penalty": float("nan")},
    {"logprobs": -1}, {"prompt_logprobs": 1.5}, {"stop_token_ids": (-1,)}, {"logit_bias": ((1, 101),)},
    {"logit_bias": (("a", 1),)},
])  # fmt: skip
def test_values_that_are_not_accepted(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))}.*accepted"):
        SamplingParams(**wrong)


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, fakes.VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=4),
    told=st.lists(st.sampled_from([None, 0, 3]), min_size=4, max_size=4), drafts=st.sampled_from([0, 3]),
    cache_tokens=st.sampled_from([48, 400]), rows=st.integers(1, 40), chunk=st.sampled_from([3, 64]),
)  # fmt: skip
def test_log_probabilities_of_prompts_and_answers(prompts, told, drafts, cache_tokens, rows, chunk):
    """In any batch, with pages that run out, beside requests that want none: those of the logits after each prefix."""
    engine = fakes.fake_engine(chunk, drafts, cache_tokens=cache_tokens, max_batch_tokens=rows)
    params = [SamplingParams(max_new_tokens=4, prompt_logprobs=n, logprobs=n) for n in told[: len(prompts)]]
    events = list(engine.stream(prompts, params))
    for index, (prompt, count) in enumerate(zip(prompts, told, strict=False)):
        mine = [e for e in events if e.index == index]
        result, answer = mine[-1].result, [e.token for e in mine]
        assert tuple(answer) == fakes.greedy(prompt, 4)
        if count is None:
            assert result.prompt_logprobs is None and all(e.logprobs is None for e in mine)
            continue
        tokens = [*prompt, *answer]
        given = [*result.prompt_logprobs, *(e.logprobs for e in mine)]
        assert given[0] is None
        expected = [token_logprobs(fakes.logits_after(tokens[:n]), tokens[n], count) for n in range(1, len(tokens))]
        assert given[1:] == expected
