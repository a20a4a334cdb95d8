"""Guesses ahead change when tokens come, never which."""

from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.engine.drafts import Drafter
from latentrt.runtime.sampling_params import SamplingParams
from tests.runtime.fakes import fake_engine, greedy
from tests.runtime.test_scheduler import owned, token


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4), st.integers(1, 6), st.integers(0, 40))
def test_a_guess_is_what_followed_the_same_tokens_the_last_time(tokens, ngram, count, known):
    drafter = Drafter(ngram)
    drafter.draft(tokens[:known], count)  # a list that grows gives the same
    expected = []
    for end in range(ngram, len(tokens)):
        if tokens[end - ngram : end] == tokens[len(tokens) - ngram :]:
            expected = tokens[end : end + count]
    assert drafter.draft(tokens, count) == expected


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=5),
    new=st.integers(1, 40), drafts=st.integers(1, 5), memory=st.sampled_from([1, 2, 0]),
    cache_tokens=st.sampled_from([64, 80, 400]), page_size=st.sampled_from([1, 4, 16]), rows=st.integers(1, 20),
)  # fmt: skip
def test_answers_are_those_without_guesses(prompts, new, drafts, memory, cache_tokens, page_size, rows):
    """With a memory of one token answers soon repeat themselves, and most guesses are right."""
    engine = fake_engine(drafts=drafts, cache_tokens=cache_tokens, page_size=page_size, max_batch_tokens=rows,
                         memory=memory or None)  # fmt: skip
    results = engine.generate(prompts, SamplingParams(max_new_tokens=new))
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == greedy(prompt, new, memory)
        assert (result.finish_reason, result.prompt_tokens) == ("length", len(prompt))
    owned(engine.loop.schedulers.ranks[0].cache)
    assert engine.loop.schedulers.ranks[0].cache.free_tokens == engine.loop.schedulers.ranks[0].cache.capacity


def test_seeds_stops_and_logprobs_are_the_same():
    params = SamplingParams(max_new_tokens=40, temperature=0.4, seed=3, stop_token_ids=(11,), logprobs=2)
    events = {}
    for drafts in (0, 4):
        engine = fake_engine(drafts=drafts, memory=1)
        events[drafts] = [(e.token, e.logprobs) for e in engine.stream([[7], [8, 9]], params)]
    assert sorted(events[0], key=str) == sorted(events[4], key=str)


def test_right_guesses_save_steps_and_are_counted():
    engine = fake_engine(drafts=4, memory=1)
    answer = engine.generate([[7]], SamplingParams(max_new_tokens=50))[0].token_ids
    scheduler = engine.loop.schedulers.ranks[0]
    assert answer == greedy([7], 50, 1)
    assert engine.loop.steps + scheduler.accepted_tokens == 50  # each step gives one token, and one for each right guess
    assert 0 < scheduler.accepted_tokens <= scheduler.drafted_tokens


def test_guesses_keep_to_the_context_and_the_cache():
    engine = fake_engine(drafts=6, memory=1, max_context=30, cache_tokens=400)
    result = engine.generate([[7]], SamplingParams(max_new_tokens=100))[0]
    assert (result.finish_reason, result.token_ids) == ("context", greedy([7], 29, 1))
    engine = fake_engine(drafts=6, memory=1, max_context=64, cache_tokens=20)
    result = engine.generate([[7]], SamplingParams(max_new_tokens=100))[0]
    assert (result.finish_reason, result.token_ids) == ("cache", greedy([7], 20, 1))
