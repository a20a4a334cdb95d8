"""Steps of several ranks cut into passes, and requests spread over ranks: without processes."""

from collections import deque
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.plugins.step_graph import Limits
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.backends.padding import StepShape, fill
from latentrt.runtime.engine.pages import LatentCache
from latentrt.runtime.engine.scheduler import Scheduler
from latentrt.runtime.engine.schedulers import Schedulers
from latentrt.runtime.engine.sequence import Sequence
from latentrt.runtime.ranks.lockstep import passes
from latentrt.runtime.sampling_params import SamplingParams

PAGE = 4


@st.composite
def rank_batches(draw):
    """A ragged step of a few ranks; some have nothing to do."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9), st.booleans()), max_size=4))
        if not sizes:
            found.append(None)
            continue
        rows = [SequenceRows(range(1, n + 1), cached, [n - 1] if told else []) for n, cached, told in sizes]
        pages = max(-(-(n + cached) // PAGE) for n, cached, _ in sizes)
        found.append(pack(rows, np.arange(1, 1 + len(rows) * pages).reshape(len(rows), pages)))
    return found


@given(rank_batches(), st.booleans())
def test_all_ranks_run_the_same_passes_and_nothing_is_lost(batches, two):
    cut = passes(batches, PAGE, two)
    assert len(cut) == len(batches) and len({len(own) for own in cut}) == 1, "a rank with fewer passes hangs all"
    for together in zip(*cut, strict=True):
        assert len({(p.least, p.decoding) for p in together}) == 1
        sizes = np.array([astuple(StepShape.of(p.batch)) for p in together])
        assert astuple(together[0].least) == tuple(np.maximum(sizes.max(0), 1)), "nobody pads more than the largest asks for"
    for batch, own in zip(batches, cut, strict=True):
        tokens = np.concatenate([p.batch.input_ids for p in own]) if own else np.zeros(0)
        places = np.concatenate([p.places for p in own]) if own else np.zeros(0)
        assert sorted(tokens) == (sorted(batch.input_ids) if batch is not None else [])
        assert sorted(places) == list(range(len(batch.logit_rows) if batch is not None else 0))
        assert all(p.batch.num_tokens[0] == len(p.batch.input_ids) for p in own)


def test_an_idle_rank_runs_padding_only():
    busy = pack([SequenceRows([5, 6, 7], 0, [2])], np.array([[1]]))
    (_,), (idle,) = passes([busy, None], PAGE, two=True)
    shape = StepShape.of(idle.batch).at_least(idle.least)
    assert shape == StepShape(3, 1, 1, 1)
    buffer = np.full(shape.offsets()[1], 99, np.int32)
    fill(idle.batch, shape, buffer)
    assert not buffer.any(), "no tokens, no pages but the scratch page, every sequence empty"


def ranks(count: int, pages: int = 9, running: int = 2) -> Schedulers:
    limits = Limits(max_context=32, max_batch_tokens=16, max_sequences=running)
    return Schedulers([Scheduler(limits, LatentCache(pages, PAGE), 16) for _ in range(count)])


def request(tokens: list[int]) -> Sequence:
    return Sequence(0, tokens, SamplingParams(max_new_tokens=4), None, frozenset(), deque())


def run(schedulers: Schedulers) -> list[list[int]]:
    """One step; the tokens that every rank computes."""
    plans = schedulers.schedule()
    for part in (part for plan in plans for part in plan):
        part.sequence.scheduler.advance(part.sequence, part.rows)
    return [[part.rows for part in plan] for plan in plans]


def test_requests_go_where_the_least_is_to_be_computed():
    both = ranks(2)
    first, second, third = request([1] * 10), request([2] * 4), request([3] * 4)
    for sequence in (first, second, third):
        both.add(sequence)
    assert first.scheduler is both.ranks[0] and second.scheduler is third.scheduler is both.ranks[1]
    assert run(both) == [[10], [4, 4]]


def test_requests_go_where_their_prefix_is_cached():
    both, known = ranks(2), [7, 8, 9, 10, 11, 12, 13, 14]
    both.ranks[1].add(first := request(known))
    run(both)
    first.scheduler.retire(first)
    both.ranks[1].add(request([1] * 3))  # a little work there is less than computing the prefix anew
    both.add(second := request([*known, 5]))
    assert second.scheduler is both.ranks[1]
    run(both)
    assert second.reused == 8


def test_what_waits_moves_to_an_idle_rank():
    both = ranks(2, running=1)
    sequences = [request([n] * 4) for n in (1, 2, 3)]
    for sequence in sequences:
        both.ranks[0].add(sequence)
    assert run(both) == [[4], [4]] and len(both.waiting) == 1
    assert {s.scheduler for s in both.running} == set(both.ranks)


def test_chunks_are_short_where_another_rank_decodes():
    limits = Limits(max_context=32, max_batch_tokens=16, max_sequences=4)
    both = Schedulers([Scheduler(limits, LatentCache(9, PAGE), 2, 8) for _ in range(2)])
    both.ranks[0].add(decoding := request([1]))
    run(both)
    decoding.tokens.append(5)
    both.ranks[1].add(request([2] * 12))
    assert run(both) == [[1], [2]]


@pytest.mark.parametrize(("name", "expected"), [("cache.capacity", 64), ("asked_tokens", 8)])
def test_books_are_those_of_all_ranks(name, expected):
    both = ranks(2)
    for n in (1, 2):
        both.add(request([n] * 4))
    run(both)
    assert both.total(name) == expected and both.max_running == 4 and both.cache_usage == pytest.approx(4 / 16)
