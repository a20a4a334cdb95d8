"""Continuous batching, chunks and pages, exactly: every answer must be that of the prompt alone."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.backends.base import StepResult
from latentrt.runtime.engine.sampler import SamplingParams
from latentrt.runtime.errors import EngineError, RequestError
from tests.runtime.fakes import VOCAB, fake_engine, greedy

token = st.integers(0, VOCAB - 1)


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(st.lists(token, min_size=1, max_size=20), min_size=1, max_size=7),
    new=st.lists(st.integers(1, 25), min_size=7, max_size=7),
    cache_tokens=st.sampled_from([64, 80, 128, 400]),
    page_size=st.sampled_from([1, 3, 4, 16]),
    chunk=st.sampled_from([1, 3, 256]),
    max_batch_tokens=st.integers(1, 20),
    max_sequences=st.integers(1, 5),
)
def test_answers_do_not_depend_on_the_batch(prompts, new, cache_tokens, page_size, chunk, max_batch_tokens, max_sequences):
    engine = fake_engine(
        chunk, cache_tokens=cache_tokens, page_size=page_size, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences
    )
    params = [SamplingParams(max_new_tokens=n) for n in new[: len(prompts)]]
    results = engine.generate(prompts, params)
    for prompt, n, result in zip(prompts, new, results, strict=False):
        assert result.token_ids == greedy(prompt, n)
        assert (result.finish_reason, result.prompt_tokens) == ("length", len(prompt))
    assert engine.loop.scheduler.cache.free_tokens == engine.loop.scheduler.cache.capacity
    assert not engine.loop.scheduler.running and not engine.loop.scheduler.waiting


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_seeded_sampling_does_not_depend_on_the_batch(temperature):
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    params = [SamplingParams(temperature=temperature, seed=s, max_new_tokens=20, repetition_penalty=1.2) for s in (1, 2, 1)]
    together = fake_engine(cache_tokens=40).generate(prompts, params)
    alone = [fake_engine().generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_the_youngest_waits_when_pages_run_out_and_goes_on_later():
    engine = fake_engine(cache_tokens=32, page_size=4)
    prompts = [[1] * 10, [2] * 10]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=15))
    assert [r.token_ids for r in results] == [greedy(p, 15) for p in prompts]
    lengths = [tuple(b.cached_lengths) for b in engine.backend.batches]
    assert any(len(n) == 2 for n in lengths) and sum(0 in n for n in lengths) == 2  # prefilled together, one of them again


def test_a_sequence_that_fills_the_cache_alone_ends_with_cache():
    engine = fake_engine(cache_tokens=16, page_size=4)
    long, short = engine.generate([[1, 2, 3], [4]], [SamplingParams(max_new_tokens=40), SamplingParams(max_new_tokens=5)])
    assert (long.finish_reason, short.finish_reason) == ("cache", "length")
    assert long.token_ids == greedy([1, 2, 3], 14)  # 16 tokens cached, one more known
    assert short.token_ids == greedy([4], 5)


def test_a_prompt_as_long_as_the_cache_gets_one_token():
    result = fake_engine(cache_tokens=8).generate([list(range(8))])[0]
    assert (result.finish_reason, result.token_ids) == ("cache", greedy(list(range(8)), 1))


def test_context_ends_an_answer():
    engine = fake_engine(max_context=10)
    results = engine.generate([[1, 2], list(range(10))], SamplingParams(max_new_tokens=50))
    assert [(r.finish_reason, len(r.token_ids)) for r in results] == [("context", 8), ("context", 0)]


def test_steps_keep_to_the_chunk_and_mix_prompts_with_decoding():
    engine = fake_engine(chunk=4, max_batch_tokens=16)
    engine.generate([[1], list(range(13))], SamplingParams(max_new_tokens=6))
    rows = [np.diff(b.query_starts).tolist() for b in engine.backend.batches]
    assert rows[:4] == [[1, 4], [1, 4], [1, 4], [1, 1]]


@pytest.mark.parametrize(("chunk", "prefill_chunk", "expected"), [
    (None, 5, [[1, 5], [1, 5], [1, 3]]), (None, 2048, [[1, 13]]), (3, 2048, [[1, 3]] * 4 + [[1, 1]]),
    (None, 13, [[1, 13]]), (2048, 5, [[1, 13]]),
])  # fmt: skip
def test_the_chunk_is_the_backends_unless_it_is_given(chunk, prefill_chunk, expected):
    """In a step of 16 rows, beside a sequence that decodes; a chunk larger than the step is cut to it."""
    engine = fake_engine(chunk, max_batch_tokens=16, prefill_chunk=prefill_chunk)
    prompts = [[1], list(range(13))]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=6))
    assert [r.token_ids for r in results] == [greedy(p, 6) for p in prompts]
    assert [np.diff(b.query_starts).tolist() for b in engine.backend.batches][: len(expected)] == expected


def test_prompts_alone_go_in_longer_chunks():
    """A prompt by 8 while nothing decodes, the next one by 3 beside the first one's tokens."""
    engine = fake_engine(max_batch_tokens=16, prefill_chunk=3, lone_prefill_chunk=8)
    prompts = [list(range(9)), list(range(13))]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=6))
    assert [r.token_ids for r in results] == [greedy(p, 6) for p in prompts]
    rows = [np.diff(b.query_starts).tolist() for b in engine.backend.batches]
    assert rows[:3] == [[8], [1, 3], [1, 3]]


def test_closing_a_stream_frees_its_pages():
    engine = fake_engine()
    stream = engine.stream([[1, 2, 3], [4]], SamplingParams(max_new_tokens=30))
    next(stream)
    stream.close()
    assert engine.loop.scheduler.cache.free_tokens == engine.loop.scheduler.cache.capacity
    assert engine.generate([[5]], SamplingParams(max_new_tokens=3))[0].token_ids == greedy([5], 3)


def test_interleaved_streams_share_the_steps():
    engine = fake_engine()
    streams = [engine.stream([[n, n]], SamplingParams(max_new_tokens=6)) for n in (1, 2)]
    events = [list(pair) for pair in zip(*streams, strict=True)]
    assert [tuple(pair[n].token for pair in events) for n in (0, 1)] == [greedy([1, 1], 6), greedy([2, 2], 6)]
    assert engine.loop.steps < 12


def test_a_kept_sequence_is_taken_over_as_far_as_it_agrees():
    engine = fake_engine(page_size=4)
    first = engine.sequence([1, 2, 3], SamplingParams(max_new_tokens=8), deque(), keep=True)
    answer = list(engine.loop.stream([first]))[-1].result.token_ids
    prompt = [1, 2, 3, *answer[:5], 49, 48]  # leaves the history in the middle of a page
    second = engine.sequence(prompt, SamplingParams(max_new_tokens=8), deque(), keep=True)
    result = list(engine.loop.stream([second], after=first))[-1].result
    assert (result.token_ids, result.reused_tokens) == (greedy(prompt, 8), 8)
    engine.loop.forget(second)
    assert engine.loop.scheduler.cache.free_tokens == engine.loop.scheduler.cache.capacity


def keep(engine, prompt: list[int], new: int):
    """A finished sequence whose pages stay."""
    sequence = engine.sequence(prompt, SamplingParams(max_new_tokens=new), deque(), keep=True)
    list(engine.loop.stream([sequence]))
    return sequence


def test_pages_given_back_by_a_take_over_may_go_to_others_at_once():
    engine = fake_engine(page_size=4, cache_tokens=40)
    first = keep(engine, [1, 2, 3], 14)
    prompt = [*first.tokens[:9], 49]
    other = engine.stream([[7] * 20], SamplingParams(max_new_tokens=3))  # queued before, so served before
    again = engine.sequence(prompt, SamplingParams(max_new_tokens=4), deque())
    result = list(engine.loop.stream([again], after=first))[-1].result
    assert (result.token_ids, result.reused_tokens) == (greedy(prompt, 4), 9)
    assert tuple(event.token for event in other) == greedy([7] * 20, 3)


def test_a_prompt_that_is_cached_entirely_computes_its_last_token_again():
    engine = fake_engine()
    first = keep(engine, [1, 2, 3], 6)
    prompt = first.tokens[: first.cached]
    again = engine.sequence(prompt, SamplingParams(max_new_tokens=3), deque())
    result = list(engine.loop.stream([again], after=first))[-1].result
    assert (result.token_ids, result.reused_tokens) == (greedy(prompt, 3), len(prompt) - 1)


def test_a_waiting_sequence_does_not_give_up_its_own_prefix():
    engine = fake_engine(page_size=4, cache_tokens=32)
    first = keep(engine, [1, 2, 3], 6)
    other = engine.stream([[7] * 19], SamplingParams(max_new_tokens=1))  # leaves too little for the second turn
    prompt = [*first.tokens[:8], *[5] * 8]
    again = engine.sequence(prompt, SamplingParams(max_new_tokens=2), deque())
    result = list(engine.loop.stream([again], after=first))[-1].result
    assert (result.token_ids, result.reused_tokens) == (greedy(prompt, 2), 8)
    assert next(other).token == greedy([7] * 19, 1)[0]


def test_who_had_to_wait_goes_on_before_those_who_came_later():
    engine = fake_engine(cache_tokens=32, page_size=4)
    prompts = [[n] * 10 for n in range(3)]
    events = []
    results = engine.generate(prompts, SamplingParams(max_new_tokens=15), events.append)
    first_ended = next(n for n, event in enumerate(events) if event.result)
    last_began = next(n for n, event in enumerate(events) if event.index == 2)
    assert events[first_ended].index == 0 and last_began > first_ended  # pages for it were free before, but not its turn
    assert [r.token_ids for r in results] == [greedy(p, 15) for p in prompts]


def test_a_kept_sequence_yields_to_running_ones():
    engine = fake_engine(cache_tokens=16, page_size=4)
    kept = engine.sequence([1, 2, 3], SamplingParams(max_new_tokens=8), deque(), keep=True)
    list(engine.loop.stream([kept]))
    assert engine.generate([[7] * 12], SamplingParams(max_new_tokens=4))[0].token_ids == greedy([7] * 12, 4)
    assert kept.cached == 0
    again = engine.sequence([1, 2, 3, 4], SamplingParams(max_new_tokens=2), deque())
    result = list(engine.loop.stream([again], after=kept))[-1].result
    assert (result.token_ids, result.reused_tokens) == (greedy([1, 2, 3, 4], 2), 0)


def test_logits_that_are_not_numbers_are_an_error_and_the_engine_lives_on():
    engine = fake_engine()
    step = engine.backend.step
    engine.backend.step = lambda batch: StepResult(np.full_like(step(batch).logits(), np.nan))
    with pytest.raises(EngineError, match="not finite"):
        engine.generate([[1]])
    engine.backend.step = step
    assert engine.generate([[1]], SamplingParams(max_new_tokens=2))[0].token_ids == greedy([1], 2)


@settings(max_examples=40, deadline=None)
@given(
    lists=st.lists(st.lists(token, min_size=1, max_size=40), min_size=1, max_size=6),
    cache_tokens=st.sampled_from([40, 64, 400]),
    max_batch_tokens=st.integers(1, 50),
    max_sequences=st.integers(1, 4),
)
def test_teacher_forced_rows_come_in_order(lists, cache_tokens, max_batch_tokens, max_sequences):
    from tests.runtime.fakes import logits_after

    engine = fake_engine(cache_tokens=cache_tokens, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
    expected = [logits_after(tokens[: n + 1]) for tokens in lists for n in range(len(tokens))]
    np.testing.assert_array_equal(engine.logits(lists), expected)
    assert engine.loop.scheduler.cache.free_tokens == engine.loop.scheduler.cache.capacity


def test_teacher_forcing_beside_requests_that_fill_the_cache_is_an_error():
    engine = fake_engine(cache_tokens=16)
    stream = engine.stream([[1] * 12], SamplingParams(max_new_tokens=3))
    next(stream)
    with pytest.raises(RequestError, match="running requests fill"):
        engine.logits([[1] * 10])
    assert [e.token for e in stream] == list(greedy([1] * 12, 3)[1:])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("text", "prompts is str"),
        (5, "prompts is int"),
        ([5], "prompt 0 is int"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, VOCAB]], f"token 1 is {VOCAB}, accepted: 0 to {VOCAB - 1}"),
        ([[-1]], "token 0 is -1"),
        ([[1.0]], "token 0 is 1.0, accepted: integers"),
        ([[True]], "token 0 is True"),
        ([[1], [1] * 65], "prompt 1 has 65 tokens, accepted: up to 64"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(prompts, message):
    engine = fake_engine()
    with pytest.raises(RequestError, match=message):
        engine.stream(prompts)
    assert engine.loop.steps == 0 and not engine.loop.scheduler.waiting


def test_a_prompt_larger_than_the_cache_is_refused():
    with pytest.raises(RequestError, match="prompt 0 has 20 tokens, the latent cache holds 16"):
        fake_engine(cache_tokens=16).generate([[1] * 20])


def test_the_number_of_params_must_fit():
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        fake_engine().generate([[1]], [SamplingParams()] * 2)
    assert fake_engine().generate([]) == []
