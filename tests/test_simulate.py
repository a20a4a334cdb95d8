"""The simulator against figures worked out by hand, and what must hold of any simulation."""

import json
from dataclasses import replace
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import loop_time
from latentrt.errors import UserError
from latentrt.export.models import registry
from latentrt.export.quantization import BFloat16, Fp8
from latentrt.planning import collectives, full_steps, gpus, simulation, traces
from latentrt.planning.assumptions import Assumptions
from latentrt.planning.costs import PAGE, PARTS, ExpertParallel, Measured, Speeds, TensorParallel
from latentrt.planning.paper import DEEPSEEK_67B
from latentrt.planning.roofline import Deployment
from latentrt.planning.routing import LAYERS, Routing
from latentrt.planning.simulator import SimulatedBackend, serve
from latentrt.planning.sizes import Model
from latentrt.planning.traces import Request
from latentrt.plugins.step_graph import Limits
from latentrt.runtime.engine.scheduler import Scheduler
from latentrt.runtime.ranks.lockstep import passes
from tests import planned
from tests.planned import V2

CONFIG = registry.parse(V2)
MODEL = Model.of(CONFIG)
PLAIN_ROUTING = Routing(CONFIG, 8)
IDEAL = Assumptions(hbm=1, cache_hbm=1, bf16=1, fp8=1, attention=1, link=1, latency_us=0, kernels=0, host_ms=0, host_us=0)
NOTHING_MEASURED = Measured({})


def deployment(gpu: str = "H800", count: int = 8, cache: str = "int6r", weights=None, rows: int | None = None) -> Deployment:
    return Deployment(MODEL, gpus.GPUS[gpu], count, weights or Fp8(), cache, rows)


def costs(assumed: Assumptions = IDEAL, exchange: str = "gather", routing: Routing | None = None, **options) -> ExpertParallel:
    found = deployment(**options)
    routing = routing or (PLAIN_ROUTING if found.count == 8 else Routing(CONFIG, found.count))
    return ExpertParallel(found, Speeds(found.gpu, assumed), exchange, routing, NOTHING_MEASURED)


def times(found, batches: list) -> dict[str, float]:
    """Of the one pass that ranks with these batches do together."""
    (together,) = zip(*passes(batches, PAGE, True), strict=True)
    return found.seconds(together)


class Fixed:
    """Every row of a pass takes `row` seconds, every cached token `token`, on the slowest rank."""

    def __init__(self, row: float = 1.0, token: float = 0.0):
        self.row, self.token, self.passes = row, token, []

    def seconds(self, ranks):
        self.passes.append(ranks)
        own = [self.row * len(p.batch.input_ids) + self.token * int(p.batch.cached_lengths.sum()) for p in ranks]
        return {"dense": max(own)}


def backend(found=None, ranks: int = 2, tokens: int = 640, rows: int = 16, assumed: Assumptions = IDEAL) -> SimulatedBackend:
    return SimulatedBackend(found or Fixed(), Limits(4096, rows, rows), [1 + tokens // PAGE] * ranks, assumed)


def requests(*lengths: tuple[int, int], every: float = 0.0) -> list[Request]:
    return [Request(n * every, prompt, answer, f"request {n}") for n, (prompt, answer) in enumerate(lengths)]


def run(capsys, *arguments) -> tuple[int, str, str]:
    return planned.run(capsys, "simulate", *arguments)


@pytest.fixture
def config(tmp_path):
    return planned.config_file(tmp_path)


# what ranks send each other


def test_bytes_of_a_row_by_hand():
    """V2 on 8 ranks: 5,120 elements of 2 bytes to 7 others, ids and weights of 6 experts, and sums of 2 or 4 bytes back."""
    assert collectives.gathered_bytes(CONFIG, 8) == 7 * 10_240 == 71_680
    assert collectives.choices_bytes(CONFIG, 8) == 7 * 6 * 8 == 336
    assert collectives.gathered_bytes(CONFIG, 8) + collectives.summed_bytes(CONFIG, 8, "gather") == 143_360
    assert costs().exchange.row_bytes() == 71_680 + 336 + 71_680 == 143_696
    assert costs(exchange="gather-float32").exchange.row_bytes() == 71_680 + 336 + 143_360


def test_ranks_that_a_row_reaches_by_counting():
    """V2's 6 experts are of 3 groups at most, a group is a rank's: of the best 6 of all 160, as many as lie in 3 groups do it.

    A row reaches min(3, d) ranks where the best 6 lie in d groups; 7 of 8 times a rank is another one.
    """
    ways = comb(160, 6)
    one = 8 * comb(20, 6) / ways
    two = comb(8, 2) * (comb(40, 6) - 2 * comb(20, 6)) / ways
    expected = (3 - 2 * one - two) * 7 / 8
    assert PLAIN_ROUTING.reached == pytest.approx(expected, rel=1e-3)  # of 32,768 rows: one deviation is 1.3e-4
    sent = collectives.dispatched_bytes(CONFIG, expected)
    assert sent == pytest.approx(53_656, rel=1e-3)  # which was drawn, too


def test_without_groups_a_row_reaches_more_ranks():
    free = registry.parse(V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1})
    expected = 8 * (1 - comb(140, 6) / comb(160, 6)) * 7 / 8  # a rank has none of the six
    assert Routing(free, 8).reached == pytest.approx(expected, rel=5e-3)  # of 32,768 rows, each with a deviation of 0.9


@pytest.mark.parametrize(("exchange", "size", "count"), [
    ("gather", 143_696, 4), ("gather-float32", 71_680 + 336 + 143_360, 4),
    ("all-to-all", 20_480 * PLAIN_ROUTING.reached, 2),
])  # fmt: skip
def test_seconds_of_an_exchange_by_hand(exchange, size, count):
    """H800: 200 GB/s in one direction, of which three quarters are assumed; 59 layers have experts."""
    batches, assumed = [full_steps.decoding(16, 100)] * 8, replace(IDEAL, link=0.75, latency_us=10)
    sent = times(costs(assumed, exchange), batches)["collectives"]
    assert sent == pytest.approx(59 * (16 * size / 150e9 + count * 10e-6))
    halved = times(costs(replace(assumed, overlap=0.5), exchange), batches)
    assert halved["collectives"] == pytest.approx(sent / 2)


def test_one_rank_sends_nothing():
    assert times(costs(count=1), [full_steps.decoding(4, 100)])["collectives"] == 0


# kernels


def test_a_decode_step_by_hand():
    """8 ranks with 10 sequences of 1,000 tokens each, bfloat16: padded to 16 rows, weights and caches at the memory's speed."""
    found = costs(weights=BFloat16(), cache="bfloat16")
    took = times(found, [full_steps.decoding(10, 1000)] * 8)
    size = MODEL.weight_bytes(BFloat16())
    assert took["dense"] == pytest.approx(size.rest / 3.35e12)
    cached = 10 * 1001 * 60 * 576 * 2 / 3.35e12
    operations = 10 * 1001 * 60 * 128 * 2 * (512 + 64 + 512) / 989e12
    assert took["attention"] == pytest.approx(max(cached, operations))
    mean = size.routed / 8 * (1 - (1 - 6 / 160) ** 80) / 3.35e12
    assert mean < took["experts"] < 1.1 * mean  # the rank that reads most reads a little more than the mean
    assert took["launches"] == 0
    assert sum(took.values()) > deployment(weights=BFloat16(), cache="bfloat16").decode(80, 1000).seconds


def test_a_prompt_by_hand():
    """256 rows a rank after 768 others, FP8: attention is expanded, with keys and values of what came before made anew."""
    batch = full_steps.prompts(256, 768)
    took = times(costs(), [batch] * 8)
    pairs, heads = 256 * 768 + 256 * 257 // 2, 60 * 128 * 2
    operations = heads * (pairs * (192 + 128) + 768 * 512 * (128 + 128))
    assert took["attention"] == pytest.approx(operations / 989e12)
    reading = 8 * 256 * 6 * 3 * 5120 * 1536 / 8 * 2 * 59 / 1979e12  # a rank's share of the choices' operations
    size = MODEL.weight_bytes(Fp8()).routed / 8 / 3.35e12
    assert took["experts"] == pytest.approx(max(reading, size), rel=0.01)  # of 20 experts one may have no row
    assert took["dense"] == pytest.approx(MODEL.weight_bytes(Fp8()).rest / 3.35e12)  # 256 rows take less to compute


def test_67b_by_hand():
    """Decoding, 32 sequences of 1,000 tokens on 8 H800: weights and cache shared out, two sums of all ranks a layer."""
    found = TensorParallel(DEEPSEEK_67B, 8, Speeds(gpus.GPUS["H800"], replace(IDEAL, latency_us=10)))
    took = times(found, [full_steps.decoding(32, 1000)])
    layer = 2 * 8192 * (64 + 8) * 128 + 3 * 8192 * 22016
    assert took["dense"] == pytest.approx(2 * (95 * layer + 102400 * 8192) / 8 / 3.35e12)
    assert took["attention"] == pytest.approx(32 * 1001 * 95 * 2 * 8 * 128 * 2 / 8 / 3.35e12)
    summed = 2 * 7 / 8 * 32 * 8192 * 2  # of a ring: a part of the sum seven times, then the whole
    assert took["collectives"] == pytest.approx(95 * 2 * (summed / 200e9 + 10e-6))


def test_measured_kernels_take_the_place_of_rooflines(tmp_path):
    file = tmp_path / "times.json"
    file.write_text('{"experts": [[64, 100], [128, 200]], "dense": [[16, 50]]}')
    measured, found = Measured.read(file), deployment()
    own = ExpertParallel(found, Speeds(found.gpu, IDEAL), "gather", PLAIN_ROUTING, measured)
    took = times(own, [full_steps.decoding(12, 100)] * 8)
    assert took["experts"] == pytest.approx(59 * 150e-6)  # 96 rows of all ranks lie between
    head = MODEL.head_bytes(Fp8()) / 3.35e12
    assert took["dense"] == pytest.approx(60 * 50e-6 + head)
    assert measured.seconds("experts", 256, 1) == pytest.approx(400e-6) and measured.seconds("attention", 5, 1) is None


def test_experts_are_as_slow_as_the_rank_with_most_of_them():
    rows = 512
    touched, choices = PLAIN_ROUTING.loads(rows)
    assert touched.shape == choices.shape == (LAYERS, 8)
    assert (choices.sum(1) == rows * 6).all() and (touched <= 20).all()
    batches = [full_steps.prompts(2048, 0)] * 8
    skewed, even = (times(costs(routing=Routing(CONFIG, 8, skew)), batches)["experts"] for skew in (1.2, 0))
    assert skewed > 1.3 * even


# serving


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12),
    every=st.sampled_from([0.0, 0.5, 30.0]), ranks=st.integers(1, 4), tokens=st.sampled_from([192, 320, 1280]),
    batch=st.sampled_from([None, 1, 3]), rows=st.sampled_from([2, 16]), chunk=st.sampled_from([None, 3]),
)  # fmt: skip
def test_every_request_gets_its_answer_and_nothing_else(lengths, every, ranks, tokens, batch, rows, chunk):
    simulated, asked = backend(ranks=ranks, tokens=tokens, rows=rows), requests(*lengths, every=every)
    served = serve(simulated, asked, batch, chunk)
    assert served.told == [answer for _, answer in lengths] and served.ended == len(lengths)
    assert len(served.waits) == len(lengths) and len(served.gaps) == sum(served.told) - len(lengths)
    assert min(served.waits) > 0 and all(gap > 0 for gap in served.gaps)
    needed = sum(prompt + answer - 1 for prompt, answer in lengths)
    assert simulated.rows >= needed, "what gave its pages back is computed again, nothing is left out"
    assert simulated.rows == needed or tokens < 1280
    assert all(sent >= request.arrival for sent, request in zip(served.sent, asked, strict=True))
    assert served.seconds <= simulated.clock and simulated.clock == pytest.approx(served.ends[-1][0])


def test_a_step_lasts_as_long_as_its_slowest_rank():
    """Rank 0 has a sequence of 60 tokens, rank 1 one of 10: both wait for the longer."""
    simulated = backend(Fixed(row=0.0, token=1.0), ranks=2, rows=64)
    served = serve(simulated, requests((60, 3), (10, 3)))
    assert list(served.gaps) == [60.0, 60.0, 61.0, 61.0]  # of both requests in each step
    ranks = simulated.costs.passes[-1]
    assert [int(p.batch.cached_lengths.sum()) for p in ranks] == [61, 11] and {p.least.rows for p in ranks} == {1}


def test_an_idle_rank_waits_as_well():
    lone = serve(backend(ranks=4), requests((10, 5)))
    assert lone.told == [5] and lone.waits[0] == 10.0 and set(lone.gaps) == {1.0}


def test_the_slowest_rank_decides_a_real_step():
    long, short, found = full_steps.decoding(16, 8000), full_steps.decoding(16, 100), costs()

    def attention(batches):
        return times(found, batches)["attention"]

    assert attention([short] * 7 + [long]) == attention([long] * 8) > 10 * attention([short] * 8)


def test_rows_are_padded_to_those_of_the_fullest_rank():
    few, many = full_steps.decoding(16, 100), full_steps.decoding(64, 100)

    def sent(batches, exchange):
        return times(costs(exchange=exchange), batches)["collectives"]

    for exchange in ("gather", "all-to-all"):
        assert sent([few] * 7 + [many], exchange) == sent([many] * 8, exchange) == pytest.approx(4 * sent([few] * 8, exchange))


def test_prompts_beside_decoding_take_a_pass_of_their_own():
    simulated = backend(ranks=2, rows=64)
    serve(simulated, [Request(0.0, 8, 9), Request(10.0, 40, 2)])
    kinds = [ranks[0].decoding for ranks in simulated.costs.passes]
    both = kinds.index(True) + kinds[kinds.index(True) :].index(False)
    assert kinds[both : both + 2] == [False, True], "a rank reads a prompt, another one decodes"


def test_the_projects_own_scheduler_decides_who_waits(monkeypatch):
    """A rank's cache of 128 tokens holds one request of 90: the others queue, and enter in their order."""
    planned = []
    plan = Scheduler.plan
    monkeypatch.setattr(Scheduler, "plan", lambda self, decodes: planned.append(self) or plan(self, decodes))
    full = serve(backend(ranks=1, tokens=128), requests((90, 10), (90, 10), (90, 10)))
    assert planned and full.most_waiting == 3
    assert list(full.waits) == sorted(full.waits) and full.waits[1] >= full.waits[0] + 9 + 90
    roomy = serve(backend(ranks=1, tokens=1280), requests((90, 10), (90, 10), (90, 10)))
    assert roomy.waits[2] < full.waits[2]


def test_pages_given_back_are_computed_again():
    """Two requests that fit while they are short: the younger one gives way, and its tokens count twice."""
    simulated = backend(ranks=1, tokens=128, rows=64)
    served = serve(simulated, requests((40, 60), (40, 60)))
    assert served.told == [60, 60] and simulated.rows > 2 * (40 + 60 - 1)


def test_a_client_sends_when_an_answer_has_ended():
    served = serve(backend(ranks=1), requests((4, 2), (4, 2)), batch=1)
    assert served.sent == [0.0, 5.0] and list(served.waits) == [4.0, 4.0], "rows of a second each"


def test_waiting_counts_from_arrival_where_nobody_holds_back():
    served = serve(backend(ranks=1), [Request(0.0, 8, 1), Request(2.0, 4, 1)])
    assert list(served.waits) == [8.0, 8 - 2 + 4.0], "the second one arrives in the middle of a step"


def test_the_hosts_part_is_added_to_every_step():
    assumed = replace(IDEAL, host_ms=500, host_us=250_000)
    served = serve(backend(ranks=2, assumed=assumed), requests((4, 3), (4, 3), (4, 3)))
    assert set(served.gaps) == {2 + 0.5 + 3 * 0.25}, "a rank has two rows of a second each; three sequences in all"


def test_rates_by_hand():
    """One request: a prompt of 8 seconds, then a token a second."""
    simulated = backend(ranks=1)
    served = serve(simulated, [Request(5.0, 8, 9)])
    found = simulation.summary(served, simulated)
    assert (found["seconds"], found["steps"], found["generated_tokens"], found["recomputed_tokens"]) == (16.0, 9, 9, 0)
    assert (found["generated_tokens_per_second"], found["prompt_tokens_per_second"]) == (9 / 16, 8 / 16)
    assert found["steady_generated_tokens_per_second"] == 1.0
    assert (found["first_token"][99], found["between_tokens"][50], found["sequences_per_step"]) == (8.0, 1.0, 1.0)
    assert found["time_shares"]["dense"] == 1


def test_full_steps_hold_whole_prompts_or_chunks():
    (short,) = full_steps.reading(100, 256)
    assert list(np.diff(short.query_starts)) == [100, 100] and list(short.cached_lengths) == [0, 0]
    long = full_steps.reading(1000, 256)
    assert [len(b.input_ids) for b in long] == [256] * 3 and [int(b.cached_lengths[0]) for b in long] == [0, 256, 512]


def test_requests_that_no_rank_can_hold_are_refused_by_name():
    with pytest.raises(UserError, match=r"request 1: prompt and answer have 700 tokens, but the cache of one rank holds 640;"):
        serve(backend(), requests((5, 5), (600, 100)))
    with pytest.raises(UserError, match=r"request 0: prompt and answer have 5,000 tokens, accepted: up to 4,096 \(max_pos"):
        serve(backend(tokens=12800), requests((4900, 100)))


def test_an_error_of_the_costs_is_not_taken_for_an_answer():
    class Broken:
        def seconds(self, ranks):
            raise ZeroDivisionError("costs")

    with pytest.raises(Exception, match="costs"):
        serve(backend(Broken()), requests((5, 5)))


def test_the_loops_own_time_is_that_of_every_step():
    found = loop_time.measure(2, 3)
    assert found["sequences"] == 6 and found["us_a_sequence"] * 6 == pytest.approx(1e3 * found["ms"])


# what must hold of any step


@settings(max_examples=40, deadline=None)
@given(
    own=st.integers(1, 300), context=st.integers(1, 20_000), cache=st.sampled_from(["bfloat16", "int6r", "fp8"]),
    exchange=st.sampled_from(list(collectives.EXCHANGES)),
)  # fmt: skip
def test_more_work_takes_no_less_time(own, context, cache, exchange):
    def seconds(own=own, context=context, assumed=Assumptions()):
        found = costs(assumed, exchange, cache=cache)
        return full_steps.seconds(found, 8, full_steps.decoding(own, context))

    now = seconds()
    assert seconds(context=context + 500) >= now
    assert seconds(own=own + 1) >= now
    assert seconds(assumed=Assumptions(hbm=0.4)) >= now
    assert seconds(assumed=Assumptions(latency_us=50)) > now
    assert seconds(assumed=Assumptions(link=0.2)) > now
    ideal = seconds(assumed=IDEAL)
    assert ideal <= now


@settings(max_examples=30, deadline=None)
@given(own=st.integers(4, 256), context=st.integers(1, 20_000), weights=st.sampled_from([Fp8(), BFloat16()]))
def test_no_step_is_faster_than_its_roofline(own, context, weights):
    """With every fraction at 1 and no overhead: kernels one after another take no less than all bytes, or all operations."""
    found = costs(weights=weights)
    assert full_steps.seconds(found, 8, full_steps.decoding(own, context)) >= deployment(weights=weights).decode(
        8 * own, context
    ).seconds * 0.999  # experts are drawn: of 160 the mean number that is chosen may lie a little below what is expected


# requests


def test_drawn_requests_follow_their_seed_and_means():
    found = traces.draw(400, 100, 50, rate=2.0, spread=0.5, seed=7)
    assert found == traces.draw(400, 100, 50, rate=2.0, spread=0.5, seed=7) != traces.draw(400, 100, 50, rate=2.0, seed=8)
    assert {50, 150} >= {min(r.prompt_tokens for r in found), max(r.prompt_tokens for r in found)} - set(range(50, 151))
    assert np.mean([r.prompt_tokens for r in found]) == pytest.approx(100, abs=5)  # 29 / sqrt(400) is one deviation
    assert found[-1].arrival == pytest.approx(200, rel=0.2)  # 400 exponential gaps: one deviation is a twentieth
    assert traces.draw(3, 100, 50, spread=0)[0] == Request(0.0, 100, 50, "drawn request 1")


GOOD = '{"arrival": 0.5, "prompt_tokens": 100, "answer_tokens": 4}'


def test_a_trace_is_read_in_the_order_of_arrival(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(GOOD + '\n\n{"arrival": 0, "prompt_tokens": 7, "answer_tokens": 1}\n')
    assert traces.read(file) == [Request(0, 7, 1, f"{file}:3"), Request(0.5, 100, 4, f"{file}:1")]


@pytest.mark.parametrize(("line", "words"), [
    ("{", "trace.jsonl:2: not valid JSON, accepted: {"),
    ("[1]", "trace.jsonl:2: found list, accepted: {"),
    ('{"arrival": 0, "prompt_tokens": 7}', "trace.jsonl:2: found arrival, prompt_tokens, accepted: {"),
    (GOOD[:-1] + ', "model": "x"}', "trace.jsonl:2: found arrival, prompt_tokens, answer_tokens, model, accepted: {"),
    (GOOD.replace("0.5", "-1"), "trace.jsonl:2: arrival is -1, accepted: seconds, 0 or more"),
    (GOOD.replace("0.5", "NaN"), "trace.jsonl:2: arrival is nan, accepted: seconds"),
    (GOOD.replace("100", "0"), "trace.jsonl:2: prompt_tokens is 0, accepted: 1 or more"),
    (GOOD.replace("100", "1.5"), "trace.jsonl:2: prompt_tokens is 1.5, accepted: 1 or more"),
    (GOOD.replace("4}", "true}"), "trace.jsonl:2: answer_tokens is True, accepted: 1 or more"),
    (GOOD.replace("4}", '"4"}'), "trace.jsonl:2: answer_tokens is '4', accepted: 1 or more"),
])  # fmt: skip
def test_malformed_traces_are_refused_by_line(capsys, config, tmp_path, line, words):
    file = tmp_path / "trace.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    code, _, err = run(capsys, config, "--trace", file)
    assert code == 2 and words in err


def test_an_empty_or_missing_trace_is_refused(capsys, config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "empty.jsonl has no requests, accepted: one line or more of {" in run(capsys, config, "--trace", empty)[2]
    assert "no.jsonl cannot be read (No such file" in run(capsys, config, "--trace", tmp_path / "no.jsonl")[2]
    empty.write_bytes(b"\xff\xfe")
    assert "cannot be read (not UTF-8 text)" in run(capsys, config, "--trace", empty)[2]


# the command


def test_json_of_a_trace(capsys, config, tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(f'{{"arrival": {n / 10}, "prompt_tokens": 300, "answer_tokens": 20}}\n' for n in range(20)))
    code, out, _ = run(capsys, config, "--trace", file, "--target", "H200", "--cache-format", "int6r", "--beside-67b", "--json")
    found = json.loads(out)
    (row,) = found["rows"]
    assert code == 0 and row["served"]["generated_tokens"] == 400 and row["served_67b"]["generated_tokens"] == 400
    assert (row["gpu"], row["precision"], row["served"]["requests"]) == ("H200", "fp8", 20)
    assert row["served"]["first_token"]["99"] >= row["served"]["first_token"]["50"] > 0
    assert sum(row["served"]["time_shares"].values()) == pytest.approx(1) and set(row["served"]["time_shares"]) == set(PARTS)
    assert found["paper"]["generated_tokens_per_second"] == 50_000
    rates = [row[kind]["generated_tokens_per_second"] for kind in ("served", "served_67b")]
    assert row["ratio_67b"] == pytest.approx(rates[0] / rates[1])


def test_all_ranks_serve(capsys, config):
    """Eight prompts that fill a rank's step each: all are read in the first step."""
    out = run(capsys, config, "--prompt", 256, "--answer", 2, "--spread", 0, "--requests", 8, "--json")[1]
    served = json.loads(out)["rows"][0]["served"]
    assert served["steps"] == 2 and served["first_token"]["50"] == served["first_token"]["99"]


def test_a_row_does_not_depend_on_others(capsys, config):
    options = ("--prompt", 300, "--answer", 8, "--batch", 8, "--json")
    rows = json.loads(run(capsys, config, *options, "--exchange", "all-to-all", "--exchange", "gather")[1])["rows"]
    assert json.loads(run(capsys, config, *options)[1])["rows"] == rows[1:]


def test_each_row_stands_beside_the_same_requests_on_67b(capsys, config):
    options = ("--prompt", 300, "--answer", 4, "--requests", 24, "--beside-67b", "--json")
    several = ("--rows", 16, "--rows", 64, "--batch", 4, "--batch", 12)
    rows = json.loads(run(capsys, config, *options, *several)[1])["rows"]
    assert [(row["rows_per_rank"], row["batch"]) for row in rows] == [(16, 4), (16, 12), (64, 4), (64, 12)]
    for row in rows:
        alone = run(capsys, config, *options, "--rows", row["rows_per_rank"], "--batch", row["batch"])[1]
        assert json.loads(alone)["rows"][0]["served_67b"] == row["served_67b"]
    assert len({row["served_67b"]["seconds"] for row in rows}) == 4


def test_the_same_seed_gives_the_same_answer(capsys, config):
    options = ("--batch", 16, "--prompt", 64, "--answer", 8, "--skew", 1, "--seed", 5, "--json")
    assert run(capsys, config, *options) == run(capsys, config, *options)


def test_tables_fit_120_columns_and_name_every_assumption(capsys, config):
    options = ("--target", "H800", "--target", "H200", "--precision", "bf16", "--batch", 16, "--batch", 32, "--prompt", 64)
    code, out, _ = run(capsys, config, *options, "--answer", 4, "--beside-67b", "--assume", "hbm=0.7")
    assert code == 0 and max(map(len, out.splitlines())) <= 120
    assert "does not fit: the weights leave no room" in out, "bfloat16 on 8 H800"
    assert all(row["name"] in out for row in Assumptions().table()) and "0.7 (default 0.8)" in out
    assert "not a measurement on any GPU" in out and "5.76" in out and "50,000" in out


@pytest.mark.parametrize(("options", "words"), [
    (["--ranks", "3"], "--ranks is 3, accepted: 1, 2, 4, 5"),
    (["--ranks", "0"], "--ranks is 0, accepted: 1 or more"),
    (["--target", "H20"], "--target is 'H20', accepted:"),
    (["--precision", "int3"], "precision 'int3' is not to be had on sm90; accepted: auto, fp8, bf16, fp8-int4"),
    (["--cache-format", "int5"], "--cache-format is 'int5', accepted: float32"),
    (["--exchange", "mail"], "--exchange is 'mail', accepted: gather, gather-float32, all-to-all"),
    (["--assume", "hbm"], "--assume is 'hbm', accepted: a number after hbm="),
    (["--assume", "hbm=2"], "--assume hbm is 2, accepted: 0.01 to 1"),
    (["--assume", "hbm=nan"], "--assume hbm is nan, accepted: 0.01 to 1"),
    (["--assume", "speed=1"], "--assume is 'speed=1', accepted: NAME=NUMBER with a name of hbm, cache_hbm"),
    (["--batch", "0"], "--batch is 0, accepted: 1 or more"),
    (["--prompt", "0"], "--prompt is 0, accepted: 1 or more"),
    (["--requests", "-1"], "--requests is -1, accepted: 1 or more"),
    (["--rate", "0"], "--rate is 0, accepted: above 0"),
    (["--spread", "2"], "--spread is 2, accepted: 0 (all alike) to 1"),
    (["--seed", "-1"], "--seed is -1, accepted: 0 or more"),
    (["--skew", "-1"], "--skew is -1, accepted: 0"),
    (["--rows", "0"], "--rows is 0, accepted: 1 or more"),
    (["--prompt", "200000"], "max_position_embeddings"),
    (["--trace", "t.jsonl", "--rate", "3"], "--trace is given, which says what --rate would; leave one of them out"),
    (["--kernel-times", "no.json"], "--kernel-times: no.json cannot be read (No such file"),
])  # fmt: skip
def test_wrong_options_are_refused_by_name(capsys, config, options, words):
    code, _, err = run(capsys, config, *options)
    assert code == 2 and words in " ".join(err.split())


@pytest.mark.parametrize("content", ["[", "[]", '{"head": [[1, 2]]}', '{"dense": []}', '{"dense": [[2, 1], [1, 2]]}',
                                     '{"dense": [[1, 0]]}', '{"dense": [[1]]}', '{"dense": [1, 2]}'])  # fmt: skip
def test_malformed_kernel_times_are_refused(capsys, config, tmp_path, content):
    file = tmp_path / "times.json"
    file.write_text(content)
    code, _, err = run(capsys, config, "--kernel-times", file)
    assert code == 2 and "--kernel-times: " in err and "times.json" in err


def test_a_row_whose_cache_is_too_small_says_so_and_others_go_on(capsys, config):
    options = ("--ranks", 4, "--cache-format", "bfloat16", "--cache-format", "int6r", "--prompt", 17_000, "--answer", 1)
    code, out, _ = run(capsys, config, *options, "--requests", 1, "--spread", 0, "--json")
    small, large = json.loads(out)["rows"]
    assert code == 0 and small["served"] is None and large["served"]["generated_tokens"] == 1
    held = small["memory_per_rank"]["cache_tokens"]
    assert f"17,001 tokens, but the cache of one rank holds {held:,};" in small["refusal"]
