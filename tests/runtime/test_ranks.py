"""A target of several ranks in real processes over gloo, against the same model in one process."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import latentrt
from latentrt.runtime.errors import EngineLostError, RequestError
from latentrt.runtime.sampling_params import SamplingParams
from tests.conftest import EXAMPLE

pytestmark = pytest.mark.slow  # processes, and builds

PROMPTS = ["def main():\n", "import os, sys\n\n\nclass Parser:\n    def __init__(self, text):\n        self.text = text\n", "x"]
# float32 products of the same numbers, the sum over experts in another order: measured 1e-5 of logits up to 12.6
CLOSE = {"rtol": 0, "atol": 1e-4}


def bundle_of(traced, tmp_path_factory, ranks: int):
    out = tmp_path_factory.mktemp("ranks") / f"of-{ranks}"
    return traced.build_once(f"ranks-{ranks}", EXAMPLE, out, "torch", "fp32", ranks=ranks)


@pytest.fixture(scope="module")
def one(traced, tmp_path_factory):
    with latentrt.load(bundle_of(traced, tmp_path_factory, 1), device="cpu", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def two_bundle(traced, tmp_path_factory):
    return bundle_of(traced, tmp_path_factory, 2)


@pytest.fixture(scope="module")
def two(two_bundle):
    with latentrt.load(two_bundle, device="cpu", threads=2, cache_tokens=4096) as engine:
        yield engine


def token_lists(rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(3, 4000, size).tolist() for size in (1, 130, 7, 300)]


def test_logits_are_those_of_one_process(one, two):
    lists = token_lists(np.random.default_rng(1))
    np.testing.assert_allclose(two.logits(lists), one.logits(lists), **CLOSE)


@pytest.mark.parametrize("params", [
    SamplingParams(max_new_tokens=24),
    SamplingParams(max_new_tokens=24, temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(max_new_tokens=24, temperature=1.0, top_k=20, repetition_penalty=1.1, seed=6),
])  # fmt: skip
def test_answers_are_those_of_one_process(one, two, params):
    """Three ragged sequences on two ranks, so that one rank has two and the other one."""
    assert [r.token_ids for r in two.generate(PROMPTS, params)] == [r.token_ids for r in one.generate(PROMPTS, params)]


def test_one_sequence_leaves_a_rank_idle(one, two):
    params = SamplingParams(max_new_tokens=12)
    assert two.generate(PROMPTS[:1], params)[0].token_ids == one.generate(PROMPTS[:1], params)[0].token_ids


def test_sequences_end_at_different_steps(one, two):
    params = [SamplingParams(max_new_tokens=n) for n in (2, 30, 9)]
    both = two.generate(PROMPTS, params), one.generate(PROMPTS, params)
    assert [r.token_ids for r in both[0]] == [r.token_ids for r in both[1]]


def test_guesses_change_no_token(two_bundle, one):
    params = SamplingParams(max_new_tokens=40)
    with latentrt.load(two_bundle, device="cpu", threads=2, cache_tokens=1024, drafts=3) as guessing:
        assert guessing.generate(PROMPTS, params)[1].token_ids == one.generate(PROMPTS, params)[1].token_ids
        assert guessing.loop.schedulers.total("accepted_tokens") > 0


def test_prefixes_are_found_again_on_their_rank(two):
    """Pages lie in the cache of one rank, so a second request must go there, partly filled pages copied."""
    prompt = list(range(100, 300))
    params = SamplingParams(max_new_tokens=4)
    first = two.generate([prompt], params)[0]
    again = two.generate([[*prompt, *first.token_ids[:1]], [9, 9, 9]], params)
    assert again[0].reused_tokens >= 192 and again[0].token_ids[:3] == first.token_ids[1:]


def test_every_rank_has_sequences_of_its_own(two):
    prompts = np.random.default_rng(3).integers(3, 4000, (6, 8)).tolist()
    with two.stream(prompts, SamplingParams(max_new_tokens=30, ignore_eos=True)) as stream:
        next(stream)
        assert all(len(rank.running) == 3 for rank in two.loop.schedulers.ranks)


@pytest.mark.deep
def test_four_ranks(traced, tmp_path_factory, one):
    params = SamplingParams(max_new_tokens=16)
    with latentrt.load(bundle_of(traced, tmp_path_factory, 4), device="cpu", threads=4, cache_tokens=1024) as four:
        prompts = [*PROMPTS, "while True:\n", "raise"]
        assert [r.token_ids for r in four.generate(prompts, params)] == [r.token_ids for r in one.generate(prompts, params)]
        lists = token_lists(np.random.default_rng(2))
        np.testing.assert_allclose(four.logits(lists), one.logits(lists), **CLOSE)


def process_of(engine, rank: int) -> int:
    return engine.backend.group.who[rank].pid


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all_requests_with_its_name(two_bundle, rank):
    with latentrt.load(two_bundle, device="cpu", threads=2, cache_tokens=1024) as engine:
        pids = [process_of(engine, r) for r in range(2)]
        events = []
        with pytest.raises(EngineLostError, match=rf"rank {rank} \(process {pids[rank]} on .*\) was ended by SIGKILL"):
            for event in engine.stream(PROMPTS, SamplingParams(max_new_tokens=500, ignore_eos=True)):
                events.append(event)
                if len(events) == 20:
                    os.kill(pids[rank], signal.SIGKILL)
                    killed = time.monotonic()
        assert time.monotonic() - killed < 10, "what users wait for the news"
        assert {e.index for e in events if e.error} == {0, 1, 2}, "every request got the error"
        assert all(map(gone, pids)), "no rank is left behind"
        with pytest.raises(EngineLostError, match="SIGKILL"):
            engine.generate(["x"])
        assert not engine.backend.alive


def test_a_rank_that_dies_idle_is_seen(two_bundle):
    with latentrt.load(two_bundle, device="cpu", threads=2, cache_tokens=1024) as engine:
        assert engine.backend.alive
        os.kill(process_of(engine, 1), signal.SIGTERM)
        engine.backend.group.children[1].wait(10)
        assert not engine.backend.alive
        with pytest.raises(EngineLostError, match=r"rank 1 .* was ended by SIGTERM"):
            engine.generate(["x"])


def test_a_rank_that_fails_is_named(two_bundle):
    """What one rank raises in a step, and not the broken connections of the others."""
    with latentrt.load(two_bundle, device="cpu", threads=2, cache_tokens=1024) as engine:
        with pytest.raises(EngineLostError, match=r"rank 1 failed \(AttributeError: .*'batch'\)"):
            engine.backend.group.call("step", {0: ((), engine_pass()), 1: ((), [None])})


def engine_pass():
    from latentrt.runtime.backends.base import SequenceRows, pack
    from latentrt.runtime.ranks.lockstep import passes

    return passes([pack([SequenceRows([5], 0, [0])], np.array([[1]])), None], 64, two=False)[0]


def test_ranks_end_with_their_process(two_bundle):
    """Even when that has no chance to say so."""
    code = (
        "import os, sys, latentrt\n"
        f"engine = latentrt.load({str(two_bundle)!r}, device='cpu', threads=2, cache_tokens=1024)\n"
        "print(*(who.pid for who in engine.backend.group.who), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pids = [int(word) for word in done.stdout.split()]
    end = time.monotonic() + 10
    while not all(map(gone, pids)) and time.monotonic() < end:
        pass
    assert len(pids) == 2 and all(map(gone, pids))


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "latentrt", *arguments], capture_output=True, text=True, timeout=300)


def test_commands_start_the_ranks(two_bundle, one):
    found = command("generate", str(two_bundle), "--ranks", "2", "--device", "cpu", "--threads", "2", "--cache-tokens", "1024",
                    "--prompt", PROMPTS[0], "--max-new-tokens", "8", "--json")  # fmt: skip
    assert found.returncode == 0, found.stderr
    (answer,) = json.loads(found.stdout)["results"]
    assert tuple(answer["token_ids"]) == one.generate(PROMPTS[:1], SamplingParams(max_new_tokens=8))[0].token_ids


def test_another_number_of_ranks_is_refused(two_bundle):
    with pytest.raises(RequestError, match=re.escape("ranks is 4, but target torch was built for 2; leave it out")):
        latentrt.load(two_bundle, ranks=4)


def test_info_tells_the_memory_of_a_rank(two_bundle):
    shown = command("info", str(two_bundle)).stdout
    assert "2, each with" in shown and "of experts" in shown


def launched(two_bundle, rank: int, port: int, *more: str, ranks: int = 2, **changes: str) -> subprocess.Popen:
    """One process of a cluster launcher; all run the same command."""
    told = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "LATENTRT_RANKS_SECRET": "of this test"} | changes  # fmt: skip
    arguments = ["generate", str(two_bundle), "--device", "cpu", "--threads", "2", "--cache-tokens", "1024", "--json",
                 "--prompt", PROMPTS[0], "--max-new-tokens", "8", *more]  # fmt: skip
    command = [sys.executable, "-m", "latentrt", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | told, stdout=pipe, stderr=pipe, text=True)


def free_port() -> int:
    """A port with a free one above it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one, contextlib.suppress(OSError):
            port = one.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


def test_ranks_of_a_cluster_launcher(two_bundle, one):
    """Each process was started by somebody else; the first one schedules and prints."""
    port = free_port()
    processes = [launched(two_bundle, rank, port) for rank in (1, 0)]
    (other, others_errors), (first, errors) = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], (errors, others_errors)
    assert other == ""
    (answer,) = json.loads(first)["results"]
    assert tuple(answer["token_ids"]) == one.generate(PROMPTS[:1], SamplingParams(max_new_tokens=8))[0].token_ids


@pytest.mark.parametrize(("ranks", "changes", "message"), [
    (4, {}, "a launcher started 4 ranks (WORLD_SIZE), the target was built for 2; start as many, or unset WORLD_SIZE"),
    (2, {"LATENTRT_RANKS_SECRET": ""}, "but LATENTRT_RANKS_SECRET is not set; set it to one secret for all"),
    (2, {"MASTER_ADDR": ""}, "but MASTER_ADDR is not set; set it or unset WORLD_SIZE to start all ranks from here"),
    (2, {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', accepted: a number"),
])  # fmt: skip
def test_a_launcher_that_says_something_else_is_told_so(two_bundle, ranks, changes, message):
    process = launched(two_bundle, 0, free_port(), ranks=ranks, **changes)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and message in errors


def test_strangers_at_the_door_are_passed_over(two_bundle, one):
    """Who connects to the port and does not know the secret is none of the ranks."""
    port = free_port()
    first = launched(two_bundle, 0, port)
    connected = False
    while not connected and first.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port + 1), timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connected = True
    other = launched(two_bundle, 1, port)
    told, errors = first.communicate(timeout=300)
    other.communicate(timeout=60)
    assert connected and first.returncode == other.returncode == 0, errors
    (answer,) = json.loads(told)["results"]
    assert tuple(answer["token_ids"]) == one.generate(PROMPTS[:1], SamplingParams(max_new_tokens=8))[0].token_ids


def test_an_interrupt_waits_for_the_ranks(two_bundle, one, monkeypatch):
    """Else the next step would read the answers of this one, or wait for ranks that never got it. A second one ends all."""
    expected = one.generate(PROMPTS[:1], SamplingParams(max_new_tokens=8))[0].token_ids
    with latentrt.load(two_bundle, device="cpu", threads=2, cache_tokens=1024) as engine:
        group, times = engine.backend.group, 1
        answers = group._answers

        def interrupted(*arguments):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            return answers(*arguments)

        for times in (1, 2):
            monkeypatch.setattr(group, "_answers", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPTS[1:2], SamplingParams(max_new_tokens=4))
            monkeypatch.setattr(group, "_answers", answers)
            if times == 1:
                assert engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=8))[0].token_ids == expected
        with pytest.raises(EngineLostError, match="the ranks were interrupted"):
            engine.generate(PROMPTS[:1])
