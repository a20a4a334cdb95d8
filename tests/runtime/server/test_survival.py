"""Whatever a client or a step does, it ends what it concerns and nothing else: no page is lost, no stream is without an end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

import latentrt
from latentrt.runtime.backends.base import StepResult
from latentrt.runtime.errors import EngineLostError
from tests.runtime.fakes import fake_engine, greedy
from tests.runtime.server.serving import events, serving, until

PROMPT = [1, 2, 3]
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


def answer(choice: dict) -> tuple[int, ...]:
    """The ids of an answer of the fake engine, which has no tokenizer: logprobs name them."""
    return tuple(int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"])


def ask(prompt, new: int, **body) -> dict:
    return {"prompt": prompt, "max_tokens": new, "temperature": 0, "logprobs": 0} | body


def refused(response: httpx.Response, status: int) -> dict:
    """The error of a refusal, which must have OpenAI's form."""
    assert response.status_code == status, (response.status_code, response.text)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(("content", "status"), [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'{"prompt": "\xff\xfe"}', 400), (b"\xff" * 100, 400),
    (b"[" * 100_000, 400), (b'{"a":' * 50_000, 400), (b'{"prompt": {"a": 1}}', 400), (b'{"prompt": []}', 400),
    (b'{"prompt": [[]]}', 400), (b'{"prompt": [-1]}', 400), (b'{"prompt": [4e9]}', 400), (b'{"prompt": [999999]}', 400),
    (b'{"prompt": "a", "max_tokens": -1}', 400), (b'{"prompt": "a", "max_tokens": 1e400}', 400),
    (b'{"prompt": "a", "temperature": NaN}', 400), (b'{"prompt": "a", "n": 100000}', 400),
    (b'{"prompt": "a", "max_tokens": 0}', 400), (b'{"prompt": "\\ud800"}', 400), (b'{"prompt": ""}', 200),
    (b'{"prompt": "a", "suffix": "b"}', 400), (b'{"prompt": "a", "stop_token_ids": [99999]}', 400),
    (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400), (b'{"prompt": "a", "seed": -5, "max_tokens": 1}', 200),
    (b'{"prompt": [true]}', 400), (b'{"prompt": "a", "repetition_penalty": 5e-324}', 400), (b'{"prompt": "a", "n": true}', 400),
    (b'{"prompt": "a", "model": "other"}', 404), (b'{"prompt": "a", "best_of": 3}', 400),
])  # fmt: skip
def test_bodies_of_completions(live, content, status):
    response = live.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    if status == 200:
        assert response.status_code == 200, response.text
    else:
        refused(response, status)
    assert live.client.get("/health").status_code == 200


@pytest.mark.parametrize("body", [
    {}, {"messages": "hello"}, {"messages": []}, {"messages": [{}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"},
    {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}},
    {"messages": [{"role": "user", "content": "a"}], "max_tokens": 0},
    {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"},
    {"messages": [{"role": "user", "content": "a", "prefix": True}]},
    {"messages": [{"role": "user", "content": "word " * 5000}]},
])  # fmt: skip
def test_bodies_of_chats(live, body):
    refused(live.post("/v1/chat/completions", **body), 400)


@pytest.mark.parametrize("body", [
    {}, {"input": None}, {"input": 5}, {"input": [5]}, {"input": [[]]}, {"input": [{}]}, {"input": [{"type": ["a"]}]},
    {"input": [{"role": "user"}]}, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
    {"input": [{"type": "function_call", "name": "a"}]}, {"input": "a", "text": {"format": {"type": "json_schema"}}},
    {"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, {"input": "a", "n": 2},
    {"input": "a", "max_tokens": 5}, {"input": "a", "top_logprobs": 99}, {"input": "a", "metadata": {"a": 1}},
    {"input": "a", "tool_choice": {"type": "function", "name": "b"}}, {"input": "word " * 9000},
])  # fmt: skip
def test_bodies_of_responses(live, body):
    assert refused(live.post("/v1/responses", **body), 400)["type"] == "invalid_request_error"


def test_a_response_whose_step_raises_says_so(live, monkeypatch):
    real, steps = live.engine.backend.step, iter(range(10**6))

    def step(batch):
        if next(steps) >= 3:
            raise RuntimeError("out of luck")
        return real(batch)

    monkeypatch.setattr(live.engine.backend, "step", step)
    told = live.stream("/v1/responses", input="What is x?", ignore_eos=True)
    last = told[-1]["response"]
    assert (told[-1]["type"], last["status"]) == ("response.failed", "failed") and "out of luck" in last["error"]["message"]
    assert last["output"][0]["content"][0]["text"]
    monkeypatch.undo()
    assert live.post("/v1/responses", input="What is x?", max_output_tokens=2).json()["status"] == "incomplete"


def test_an_over_long_prompt_is_named(live):
    error = refused(live.post("/v1/completions", prompt="word " * 5000), 400)
    assert error["code"] == "context_length_exceeded" and "2048 (max_context)" in error["message"]


def test_the_wrong_content_type_is_named(live):
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        response = live.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert "application/json" in refused(response, 400)["message"]


def test_wrong_addresses_and_methods(live):
    refused(live.client.get("/v1/nothing"), 404)
    refused(live.client.get("/v1/completions"), 405)
    assert refused(live.client.get("/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.fixture
def fake():
    with serving(fake_engine(cache_tokens=64, page_size=4, max_context=64)) as live:
        yield live


def test_a_body_that_is_too_large():
    with serving(fake_engine(), max_body=1000) as live:
        refused(live.client.post("/v1/completions", content=b" " * 1001), 413)
        refused(live.client.post("/v1/completions", content=iter([b" " * 600] * 2)), 413)  # chunked: no length is declared
        assert live.complete(**ask(PROMPT, 2))["choices"]


def test_keys():
    with serving(fake_engine(), api_keys=("right", "other")) as live:
        assert refused(live.client.get("/v1/models"), 401)["code"] == "invalid_api_key"
        for wrong in ("Bearer wrong", "Bearer", "Basic right", "right", "Bearer r\xefght"):
            refused(live.client.get("/v1/models", headers={"authorization": wrong.encode("latin-1")}), 401)
        for key in ("right", "other"):
            assert live.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert live.client.get("/health").status_code == 200


def test_origins():
    with serving(fake_engine(), origins=("https://a.example",)) as live:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        allowed = live.client.options("/v1/completions", headers=headers)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = live.client.options("/v1/completions", headers=headers | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def slow(live, gate: threading.Event) -> None:
    """Steps of the server's engine wait for the gate."""
    real = live.engine.backend.step

    def step(batch):
        assert gate.wait(60)
        return real(batch)

    live.engine.backend.step = step


@pytest.mark.parametrize("stream", [True, False])
def test_pages_of_a_client_that_vanishes_are_free_within_a_step(fake, stream):
    gate = threading.Event()
    slow(fake, gate)
    request = fake.client.build_request("POST", "/v1/completions", json=ask(PROMPT, 60, stream=stream))
    with socket.create_connection(fake.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(HEAD % len(request.content) + request.content)
        until(lambda: fake.engine.loop.schedulers.ranks[0].running or fake.engine.loop.schedulers.ranks[0].waiting)
    until(lambda: all(not request._open for request in fake.server.service._requests))
    steps = fake.engine.loop.steps
    gate.set()
    until(fake.all_free)
    assert fake.engine.loop.steps <= steps + 1
    assert answer(fake.complete(**ask(PROMPT, 4))["choices"][0]) == greedy(PROMPT, 4)


def test_many_streams_in_room_for_eight(fake):
    """64 at once; the cache holds 8 of their 8 tokens."""
    def one(n: int) -> bool:
        with httpx.Client(base_url=fake.url, timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=ask([n % 50, 1], 6, stream=True)) as response:
                parts = events("".join(response.iter_text()))
        tokens = tuple(t for part in parts for t in answer(part["choices"][0]))
        return tokens == greedy([n % 50, 1], 6)

    with ThreadPoolExecutor(64) as threads:
        assert all(threads.map(one, range(64)))
    assert fake.all_free()


def test_more_than_may_wait_are_told_when_to_come_again():
    with serving(fake_engine(max_sequences=2), max_waiting=1) as live:
        gate = threading.Event()
        slow(live, gate)
        with ThreadPoolExecutor(3) as threads:
            taken = [threads.submit(live.post, "/v1/completions", **ask([n], 5)) for n in range(3)]
            until(lambda: sum(len(r.sequences) for r in live.server.service._requests) == 3)
            response = live.post("/v1/completions", **ask(PROMPT, 5))
            assert refused(response, 429)["type"] == "rate_limit_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
            gate.set()
            assert [answer(t.result().json()["choices"][0]) for t in taken] == [greedy([n], 5) for n in range(3)]
        refused(live.post("/v1/completions", **ask(PROMPT, 5, n=4)), 400)  # never fits: no use to come again


def test_a_slow_reader_does_not_hold_up_others(fake):
    request = fake.client.build_request("POST", "/v1/completions", json=ask(PROMPT, 60, stream=True, n=1))
    with socket.create_connection(fake.url.removeprefix("http://").split(":")) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(HEAD % len(request.content) + request.content)
        assert answer(fake.complete(**ask([9], 6))["choices"][0]) == greedy([9], 6)
        until(fake.all_free)
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(4096) or pytest.fail("the stream has no end")


def test_a_step_that_raises_ends_only_its_own_requests(fake):
    real, broken = fake.engine.backend.step, []

    def step(batch):
        if 49 in batch.input_ids and not broken:
            broken.append(True)
            raise ValueError("kernel fault")
        return real(batch)

    fake.engine.backend.step = step
    assert "kernel fault" in refused(fake.post("/v1/completions", **ask([49], 5)), 500)["message"]
    broken.clear()
    parts = fake.stream("/v1/completions", **ask([49], 5))
    assert "kernel fault" in parts[-1]["error"]["message"]
    assert answer(fake.complete(**ask([49], 5))["choices"][0]) == greedy([49], 5)
    assert fake.all_free()


def test_a_nan_ends_only_its_sequence(fake):
    real = fake.engine.backend.step

    def step(batch):
        logits = real(batch).logits().copy()
        for n, row in enumerate(batch.logit_rows):
            owner = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            if fake.engine.backend.pages[batch.block_table[owner, 0], 0] == 49:
                logits[n, 3] = np.nan
        return StepResult(logits)

    fake.engine.backend.step = step
    with ThreadPoolExecutor(2) as threads:
        guilty, other = [threads.submit(fake.post, "/v1/completions", **ask([first, 1], 20)) for first in (49, 5)]
    assert "not finite" in refused(guilty.result(), 500)["message"]
    assert answer(other.result().json()["choices"][0]) == greedy([5, 1], 20)
    until(fake.all_free)


@pytest.mark.parametrize("error", [EngineLostError("the GPU fell off"), None])
def test_a_lost_engine_says_so(fake, error):
    """An engine that is lost, and a defect in the scheduler."""
    def fail(*args):
        raise error or KeyError("a defect")

    if error:
        fake.engine.backend.step = fail
    else:
        fake.engine.loop.schedulers.schedule = fail
    assert refused(fake.post("/v1/completions", **ask(PROMPT, 5)), 503)["code"] == "engine_lost"
    refused(fake.post("/v1/completions", **ask(PROMPT, 5)), 503)
    refused(fake.client.get("/health"), 503)


@contextmanager
def held_up(seconds: float, new: int):
    """A server that drains for so long. Its step waits for the gate, and so does the stream of an answer."""
    with serving(fake_engine(), drain_seconds=seconds) as live, ThreadPoolExecutor(1) as threads:
        gate = threading.Event()
        slow(live, gate)
        stream = threads.submit(live.stream, "/v1/completions", **ask(PROMPT, new))
        until(lambda: live.engine.loop.schedulers.ranks[0].running)
        yield live, gate, stream


def test_draining_lets_answers_end_and_refuses_new_ones():
    with held_up(60, 5) as (live, gate, stream):
        live.server.service.closing = True
        refused(live.post("/v1/completions", **ask(PROMPT, 5)), 503)
        refused(live.client.get("/health"), 503)
        gate.set()
        assert tuple(t for part in stream.result() for t in answer(part["choices"][0])) == greedy(PROMPT, 5)


def test_what_takes_too_long_to_drain_is_told():
    with held_up(0.2, 60) as (live, gate, stream):
        service = live.server.service
        future = asyncio.run_coroutine_threadsafe(service.drain(0.2), service._loop)
        until(lambda: service._inbox)
        gate.set()
        future.result(60)
        assert "shutting down" in stream.result()[-1]["error"]["message"]


def test_signals_end_a_process_that_serves(example_bundle, tmp_path):
    """SIGTERM while a stream runs: it ends whole, and the process leaves with status 0."""
    command = [sys.executable, "-m", "latentrt", "serve", str(example_bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        url = child.stdout.readline().split()[3].removesuffix("/v1")
        assert url.startswith("http://127.0.0.1:"), url
        body = {"prompt": "def", "max_tokens": 400, "ignore_eos": True, "stream": True}
        until(lambda: _healthy(url))
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            pieces = response.iter_text()
            text = next(pieces)
            child.send_signal(signal.SIGTERM)
            parts = events(text + "".join(pieces))
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
        assert child.wait(60) == 0


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_an_address_in_use_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    from latentrt.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tmp_path / "none"), "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


def test_the_engine_of_a_bundle_serves_what_load_gives(example_bundle):
    with serving(latentrt.load(example_bundle, cache_tokens=256)) as live:
        assert json.loads(live.client.get("/openapi.json").text)["info"]["version"] == "1.2.3"
        refused(live.post("/v1/completions", prompt=[5] * 300), 400)
