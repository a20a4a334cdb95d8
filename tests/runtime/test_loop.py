"""The step loop owns its errors: one fault ends what it concerns, frees its pages, and lets nothing else wait."""

import threading
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.api import Engine
from latentrt.runtime.backends.base import StepResult
from latentrt.runtime.errors import EngineError, EngineLostError, StepMemoryError
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.text_stream import TextStream
from tests.runtime.fakes import HistoryBackend, fake_engine, greedy

POISON = 49  # sequences that begin with this token get no numbers from some length on


def poisoned(engine: Engine, from_length: int) -> Engine:
    """The engine, whose backend gives NaN to sequences of POISON that are at least so long."""
    backend, real = engine.backend, engine.backend.step

    def step(batch):
        logits = real(batch).logits().copy()
        for n, row in enumerate(batch.logit_rows):
            owner = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            if backend.pages[batch.block_table[owner, 0], 0] == POISON and batch.positions[row] + 1 >= from_length:
                logits[n, 3] = np.nan
        return StepResult(logits)

    backend.step = step
    return engine


def failing(engine: Engine, steps: set[int], error: Exception) -> Engine:
    """The engine, whose backend raises in these steps, counted from 0, after it has written its rows."""
    real, count = engine.backend.step, iter(range(10**9))

    def step(batch):
        result = real(batch)
        if next(count) in steps:
            raise error
        return result

    engine.backend.step = step
    return engine


def all_free(engine: Engine) -> bool:
    scheduler = engine.loop.schedulers.ranks[0]
    idle = not scheduler.running and not scheduler.waiting
    return idle and scheduler.cache.free_tokens == scheduler.cache.capacity


def tokens_of(events) -> list[int]:
    return [e.token for e in events if e.token is not None]


@settings(deadline=None, max_examples=40)
@given(length=st.integers(5, 9), first=st.booleans(), chunk=st.sampled_from([1, 3, 256]))
def test_logits_that_are_no_numbers_end_one_stream_alone(length, first, chunk):
    engine = poisoned(fake_engine(cache_tokens=64, prefill_chunk=chunk), length)
    params = SamplingParams(max_new_tokens=8)
    guilty, other = engine.stream([[POISON, 1, 2]], params), engine.stream([[4, 5, 6]], params)
    found = []
    if first:
        with pytest.raises(EngineError, match="not finite"):
            list(guilty)
        found = tokens_of(other)
    else:
        found = tokens_of(other)
        with pytest.raises(EngineError, match="not finite"):
            list(guilty)
    assert tuple(found) == greedy([4, 5, 6], 8) and all_free(engine)


def test_the_guilty_request_has_its_error_in_its_last_event_and_the_others_go_on():
    engine, events = poisoned(fake_engine(cache_tokens=64), 5), []
    with pytest.raises(EngineError, match="not finite"):
        events.extend(engine.stream([[POISON, 1, 2], [4, 5, 6]], SamplingParams(max_new_tokens=6)))
    seen: list = []
    with pytest.raises(EngineError, match="not finite"):
        engine.generate([[POISON, 1, 2], [4, 5, 6]], SamplingParams(max_new_tokens=6), seen.append)
    last = [e for e in seen if e.index == 0][-1]
    assert last.error and last.result is None
    (result,) = [e.result for e in seen if e.result]
    assert result.token_ids == greedy([4, 5, 6], 6) and all_free(engine)


def test_a_backend_that_raises_ends_the_requests_of_that_step_only():
    engine = failing(fake_engine(cache_tokens=64, max_sequences=2), {1}, RuntimeError("out of luck"))
    params = SamplingParams(max_new_tokens=4)
    streams = [engine.stream([[n, 1]], params) for n in (2, 3, 4)]  # the third has to wait
    for stream in streams[:2]:
        with pytest.raises(EngineError, match=r"the step failed \(RuntimeError: out of luck\)") as caught:
            list(stream)
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert tuple(tokens_of(streams[2])) == greedy([4, 1], 4) and all_free(engine)
    assert engine.generate([[7]], params)[0].token_ids == greedy([7], 4), "the next request works"


def short_of_memory(engine: Engine, rows: int, sequences: int = 99) -> Engine:
    """The engine, whose steps fail for want of memory with more than `rows` rows or `sequences`."""
    real = engine.backend.step

    def step(batch):
        if len(batch.input_ids) > rows or len(batch.cached_lengths) > sequences:
            raise StepMemoryError("the step needs more memory than is free")
        return real(batch)

    engine.backend.step = step
    return engine


def test_a_step_without_memory_is_made_smaller(capsys):
    """No request pays for it, and prompts go on in chunks that fit."""
    engine = short_of_memory(fake_engine(max_batch_tokens=256, max_context=200, lone_prefill_chunk=256), 40)
    prompts = [[n % 47 + 1 for n in range(length)] for length in (150, 3, 90)]
    results = engine.generate(prompts, SamplingParams(max_new_tokens=4))
    assert [r.token_ids for r in results] == [greedy(p, 4) for p in prompts] and all_free(engine)
    assert engine.loop.schedulers.ranks[0].lone_chunk <= 40 and "in chunks of" in capsys.readouterr().err


def test_guesses_are_given_up_before_memory_is_short():
    engine = short_of_memory(fake_engine(max_batch_tokens=64, drafts=8, memory=1), 16)
    prompt = [1, 2, 3] * 3
    (result,) = engine.generate([prompt], SamplingParams(max_new_tokens=30))
    assert result.token_ids == greedy(prompt, 30, 1)
    engine = short_of_memory(fake_engine(max_batch_tokens=64, drafts=8, memory=1), 2)
    (result,) = engine.generate([[1]], SamplingParams(max_new_tokens=40))
    assert result.token_ids == greedy([1], 40, 1) and engine.loop.schedulers.ranks[0].drafts == 0


def test_where_no_step_is_small_enough_the_youngest_request_ends():
    engine = short_of_memory(fake_engine(cache_tokens=256), 99, sequences=2)
    streams = [engine.stream([[n, 1]], SamplingParams(max_new_tokens=4)) for n in (2, 3, 4)]
    with pytest.raises(StepMemoryError, match="more memory than is free"):
        list(streams[2])
    for n, stream in zip((2, 3), streams, strict=False):
        assert tuple(tokens_of(stream)) == greedy([n, 1], 4)
    assert all_free(engine)


def test_a_lost_engine_ends_all_and_refuses_later_requests_by_name():
    engine = failing(fake_engine(cache_tokens=64, max_sequences=1), {1}, EngineLostError("the GPU failed"))
    streams = [engine.stream([[n]], SamplingParams(max_new_tokens=4)) for n in (2, 3)]
    for stream in streams:
        with pytest.raises(EngineLostError, match="the GPU failed"):
            list(stream)
    assert all_free(engine)
    with pytest.raises(EngineLostError, match="the GPU failed"):
        engine.generate([[7]])


def test_a_text_that_cannot_be_decoded_ends_one_request():
    calls = iter(range(10**9))

    def decode(ids):
        if next(calls) == 5:
            raise ValueError("no such token")
        return "x" * len(ids)

    engine = fake_engine(cache_tokens=64)
    broken = engine.sequence([1], SamplingParams(max_new_tokens=6), deque())
    broken.text = TextStream(decode, ())
    guilty, other = engine.loop.stream([broken]), engine.stream([[4]], SamplingParams(max_new_tokens=6))
    with pytest.raises(EngineError, match="no such token"):
        list(guilty)
    assert tuple(tokens_of(other)) == greedy([4], 6) and all_free(engine)


def test_closing_a_stream_frees_its_pages():
    engine = fake_engine(cache_tokens=64)
    running, waiting = engine.stream([[1] * 9]), engine.stream([[2] * 9])
    next(running)
    waiting.close()  # never pulled
    running.close()
    assert all_free(engine) and list(running) == []
    engine.stream([[1] * 9])  # nobody holds it
    assert all_free(engine)


def test_an_unread_pass_of_logits_makes_no_stream_wait_for_ever():
    engine = fake_engine(cache_tokens=16, max_batch_tokens=4)
    blocks = engine.logit_blocks([[1] * 16])
    for _ in range(4):
        next(blocks)
    with pytest.raises(EngineError, match="nothing can run: logits that are being read hold the latent cache"):
        engine.generate([[2] * 5])
    blocks.close()
    assert engine.generate([[2] * 5], SamplingParams(max_new_tokens=3))[0].token_ids == greedy([2] * 5, 3)
    assert all_free(engine)


def test_streams_pulled_by_several_threads():
    engine, found = fake_engine(cache_tokens=96, max_batch_tokens=8), {}

    def pull(n: int, stream) -> None:
        found[n] = tuple(tokens_of(stream))

    streams = {n: engine.stream([[n, 1, 2]], SamplingParams(max_new_tokens=20)) for n in range(5)}
    threads = [threading.Thread(target=pull, args=item) for item in streams.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: greedy([n, 1, 2], 20) for n in range(5)} and all_free(engine)


def test_engines_and_backends_are_context_managers():
    class Closed(HistoryBackend):
        closed = 0

        def close(self):
            self.closed += 1

    backend = Closed(cache_tokens=16)
    with backend as entered:
        assert entered is backend
    engine = fake_engine(cache_tokens=16)
    engine.loop.backend = backend
    with engine:
        pass
    assert backend.closed == 2
