"""Continuous batching, chunks and pages, exactly: every answer must be that of the prompt alone."""

from collections import Counter, deque

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
    assert engine.loop.schedulers.ranks[0].cache.free_tokens == engine.loop.schedulers.ranks[0].cache.capacity
    assert not engine.loop.schedulers.ranks[0].running and not engine.loop.schedulers.ranks[0].waiting


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_seeded_sampling_does_not_depend_on_the_batch(temperature):
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    params = [SamplingParams(temperature=temperature, seed=s, max_new_tokens=20, repetition_penalty=1.2) for s in (1, 2, 1)]
    together = fake_engine(cache_tokens=40).generate(prompts, params)
    alone = [fake_engine().generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_the_youngest_waits_when_pages_run_out_and_goes_on_later():
    engine = fake_engine(cache_tokens=32, page_size=4, max_batch_tokens=20)
    prompts = [[1] * 10, [2] * 10]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=15))
    assert [r.token_ids for r in results] == [greedy(p, 15) for p in prompts]
    lengths = [tuple(b.cached_lengths) for b in engine.backend.batches]
    assert lengths[0] == (0, 0) and sum(len(n) == 1 for n in lengths) > 1  # read together, then one alone
    again = [np.diff(b.query_starts).max() for b in engine.backend.batches[1:]]
    assert sum(rows > 1 for rows in again) == 1  # what had to be forgotten is computed once more


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
    prompts = [list(range(9)), list(range(20, 33))]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=6))
    assert [r.token_ids for r in results] == [greedy(p, 6) for p in prompts]
    rows = [np.diff(b.query_starts).tolist() for b in engine.backend.batches]
    assert rows[:3] == [[8], [1, 3], [1, 3]]


def test_closing_a_stream_frees_its_pages():
    engine = fake_engine()
    stream = engine.stream([[1, 2, 3], [4]], SamplingParams(max_new_tokens=30))
    next(stream)
    stream.close()
    assert engine.loop.schedulers.ranks[0].cache.free_tokens == engine.loop.schedulers.ranks[0].cache.capacity
    assert engine.generate([[5]], SamplingParams(max_new_tokens=3))[0].token_ids == greedy([5], 3)


def test_interleaved_streams_share_the_steps():
    engine = fake_engine()
    streams = [engine.stream([[n, n]], SamplingParams(max_new_tokens=6)) for n in (1, 2)]
    events = [list(pair) for pair in zip(*streams, strict=True)]
    assert [tuple(pair[n].token for pair in events) for n in (0, 1)] == [greedy([1, 1], 6), greedy([2, 2], 6)]
    assert engine.loop.steps < 12


def reused(engine, prompt: list[int], new: int) -> int:
    """How many tokens of a prompt were known; its answer must be right."""
    result = engine.generate([prompt], SamplingParams(max_new_tokens=new))[0]
    assert result.token_ids == greedy(prompt, new)
    return result.reused_tokens


def test_a_prompt_uses_what_is_known_even_of_a_part_of_a_page():
    engine = fake_engine(page_size=8)
    assert reused(engine, [1, 2, 3], 9) == 0
    history = [1, 2, 3, *greedy([1, 2, 3], 9)]  # 11 of them are cached: a page and 3 tokens
    assert reused(engine, [*history[:8], 49, 48], 3) == 8
    assert reused(engine, [*history[:6], 49, 48], 3) == 6  # copied
    assert reused(engine, [*history[:3], 49, 48], 3) == 0  # too little to be worth a copy
    assert reused(engine, [*history, 7], 8) == 8  # of three tokens more, no copy is worth it
    assert reused(engine, [*history, 7, *greedy([*history, 7], 8), 5], 2) == 20  # its tail is taken over, or copied


def test_a_prompt_that_is_cached_entirely_computes_its_last_token_again():
    engine = fake_engine(page_size=8)
    prompt = list(range(16))
    assert reused(engine, prompt, 3) == 0
    assert reused(engine, prompt, 3) == 15
    assert reused(engine, prompt[:8], 3) == 7


def test_requests_that_begin_alike_share_pages_while_they_run():
    engine = fake_engine(page_size=4, cache_tokens=48)
    shared = list(range(20))
    prompts = [[*shared, n] for n in range(6)]  # 6 times 24 tokens, in room for 48
    results = engine.generate(prompts, SamplingParams(max_new_tokens=3))
    assert [r.token_ids for r in results] == [greedy(p, 3) for p in prompts]
    assert [r.reused_tokens for r in results] == [0, 20, 20, 20, 20, 20]
    assert max(len(b.cached_lengths) for b in engine.backend.batches) == 6
    assert sum(len(b.input_ids) for b in engine.backend.batches) == 21 + 5 + 6 * 2


def test_a_salt_keeps_tokens_apart():
    engine = fake_engine()
    results = []
    for salt in ("a", "b", "a", ""):
        sequence = engine.sequence(list(range(9)), SamplingParams(max_new_tokens=2), deque(), salt=salt)
        results.append(list(engine.loop.stream([sequence]))[-1].result)
    assert [r.reused_tokens for r in results] == [0, 0, 8, 0]
    assert {r.token_ids for r in results} == {greedy(list(range(9)), 2)}


def test_who_reads_the_same_prompt_is_not_waited_for_after_an_abort():
    engine = fake_engine(chunk=4)
    streams = [engine.stream([list(range(14))], SamplingParams(max_new_tokens=4)) for _ in range(2)]
    engine.loop.step()
    streams[0].close()
    assert [event.token for event in streams[1]] == list(greedy(list(range(14)), 4))


def test_who_had_to_wait_goes_on_before_those_who_came_later():
    engine = fake_engine(cache_tokens=32, page_size=4)
    prompts = [[n] * 10 for n in range(3)]
    events = []
    results = engine.generate(prompts, SamplingParams(max_new_tokens=15), events.append)
    first_ended = next(n for n, event in enumerate(events) if event.result)
    last_began = next(n for n, event in enumerate(events) if event.index == 2)
    assert events[first_ended].index == 0 and last_began > first_ended  # pages for it were free before, but not its turn
    assert [r.token_ids for r in results] == [greedy(p, 15) for p in prompts]


def test_what_is_known_yields_to_running_requests_the_oldest_first():
    engine = fake_engine(cache_tokens=16, page_size=4)
    assert reused(engine, [1, 2, 3, 4, 5], 4) == 0  # 8 tokens stay known
    assert reused(engine, [7] * 5, 4) == 0
    assert reused(engine, [8] * 5, 4) == 0  # needs the first one's pages
    assert reused(engine, [7] * 6, 1) == 5 - 5 % 4
    assert reused(engine, [1, 2, 3, 4, 5], 1) == 0


@settings(max_examples=150, deadline=None)
@given(data=st.data(), page_size=st.sampled_from([1, 2, 4, 8]), cache_tokens=st.sampled_from([24, 40, 64]))
def test_any_admissions_aborts_and_evictions_lose_no_page_and_change_no_token(data, page_size, cache_tokens):
    """Prompts begin alike often. Every answer is that of the prompt alone, and in the end every page can be had."""
    chunk, new_tokens = data.draw(st.sampled_from([2, 7, 64])), st.lists(token, min_size=1, max_size=6)
    engine = fake_engine(chunk, cache_tokens=cache_tokens, page_size=page_size, max_sequences=3)
    cache, streams = engine.loop.schedulers.ranks[0].cache, []
    for _ in range(data.draw(st.integers(1, 14))):
        action = data.draw(st.sampled_from(["ask", "ask", "step", "step", "abort"]))
        if action == "ask":
            prompt = [*[1, 2, 3, 4, 5, 6, 7, 8, 9][: data.draw(st.integers(0, 9))], *data.draw(new_tokens)]
            new = data.draw(st.integers(1, 8))
            streams.append((prompt, new, engine.stream([prompt], SamplingParams(max_new_tokens=new))))
        elif action == "step":
            engine.loop.step()
        elif streams:
            streams.pop(data.draw(st.integers(0, len(streams) - 1)))[2].close()
        owned(cache)
    for prompt, new, stream in streams:
        assert tuple(event.token for event in stream) == greedy(prompt, new)
    owned(cache)
    assert cache.free_tokens == cache.capacity


def owned(cache) -> None:
    """Every page is free, known and unused, or used as often as the books say; shared pages are full and known."""
    used = Counter(page for held in cache._held.values() for page in held.pages) + Counter(cache._copies.values())
    assert sorted([*cache._free, *cache._unused, *used]) == list(range(1, cache.num_pages))
    assert {page: n for page, n in enumerate(cache._users) if n} == used
    for page, n in used.items():
        assert n == 1 or page in cache._known
    assert {page for pages in cache._after.values() for _, page in pages} == cache._known.keys() >= cache._unused.keys()


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
    assert engine.loop.schedulers.ranks[0].cache.free_tokens == engine.loop.schedulers.ranks[0].cache.capacity


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
    assert engine.loop.steps == 0 and not engine.loop.schedulers.ranks[0].waiting


def test_a_prompt_larger_than_the_cache_is_refused():
    with pytest.raises(RequestError, match="prompt 0 has 20 tokens, the latent cache holds 16"):
        fake_engine(cache_tokens=16).generate([[1] * 20])


def test_the_number_of_params_must_fit():
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        fake_engine().generate([[1]], [SamplingParams()] * 2)
    assert fake_engine().generate([]) == []
