"""A server over an engine of two ranks, in real processes."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import latentrt
from tests.conftest import EXAMPLE
from tests.runtime.server.serving import serving, until

pytestmark = pytest.mark.slow  # processes, and builds

@pytest.fixture(scope="module")
def bundle(traced, tmp_path_factory):
    return traced.build_once("ranks-2", EXAMPLE, tmp_path_factory.mktemp("ranks") / "of-2", "torch", "fp32", ranks=2)


@pytest.fixture
def live(bundle):
    with serving(latentrt.load(bundle, device="cpu", threads=2, cache_tokens=4096, ranks=2)) as live:
        yield live


def test_answers_of_both_ranks_come_together(live):
    prompts = [f"def function_{n}(" for n in range(8)]
    asked = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
    alone = [live.complete(prompt, **asked)["choices"][0]["text"] for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        found = list(threads.map(lambda prompt: live.complete(prompt, **asked)["choices"][0]["text"], prompts))
    assert found == alone
    metrics = live.client.get("/metrics").text
    total = live.engine.loop.schedulers.total("asked_tokens")
    assert f'vllm:prefix_cache_queries_total{{model_name="model"}} {float(total)}' in metrics
    until(lambda: live.engine.loop.schedulers.cache_usage == 0)


def test_a_rank_that_dies_ends_every_stream_with_its_name(live):
    """No stream without an end: an error event, and then nothing is served."""
    body = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(live.stream, "/v1/completions", prompt=f"x{n} =", **body) for n in range(4)]
        until(lambda: len(live.engine.loop.schedulers.running) == 4)
        until(lambda: all(len(s.tokens) > s.prompt_tokens + 3 for s in live.engine.loop.schedulers.running))
        os.kill(live.engine.backend.group.who[1].pid, signal.SIGKILL)
        for stream in streams:
            assert "rank 1" in stream.result()[-1]["error"]["message"]
    assert live.client.get("/health").status_code == 503
    refused = live.post("/v1/completions", prompt="x", max_tokens=1)
    assert refused.status_code == 503 and "SIGKILL" in refused.text


def test_a_rank_that_dies_idle_makes_the_server_ill(live):
    assert live.client.get("/health").status_code == 200
    os.kill(live.engine.backend.group.who[0].pid, signal.SIGKILL)
    until(lambda: live.client.get("/health").status_code == 503)
