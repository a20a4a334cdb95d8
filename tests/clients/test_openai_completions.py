"""Completions, many at once, errors and streams left midway, with OpenAI's own packages."""

import json
import urllib.request
from contextlib import ExitStack

import pytest

from latentrt import SamplingParams
from tests.clients.truths import TOLERANCE, answer, logprobs, question, text
from tests.clients.workers import ClientError
from tests.runtime.server.serving import until

pytestmark = pytest.mark.slow

METHOD, CHAT = "completions.create", "chat.completions.create"
TEXTS = ["def add(a, b):\n", "import os\n\n", "class Ünïcode:"]


@pytest.fixture
def complete(openai, served):
    """A greedy completion, or the chunks of a stream."""

    def ask(prompt, **options):
        return openai.call("call", served.at, METHOD, **{"model": served.model, "prompt": prompt, "temperature": 0} | options)

    return ask


def refused(openai, served, kind: str, method: str = METHOD, **asked) -> ClientError:
    """The error that a client raises, which must be of OpenAI's class `kind`."""
    with pytest.raises(ClientError) as caught:
        openai.call("call", served.at, method, **{"model": served.model} | asked)
    assert caught.value.kinds[0] == kind, caught.value
    return caught.value


def joined(chunks: list[dict]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_a_text_goes_on(complete, engine):
    for stream in (False, True):
        given = complete(TEXTS[0], max_tokens=24, stream=stream)
        texts = joined(given) if stream else {c["index"]: c["text"] for c in given["choices"]}
        assert texts == {0: answer(engine, TEXTS[0], max_new_tokens=24).text}
    assert len(given) > 12  # a stream in pieces


def test_sixteen_tokens_where_nobody_says(complete):
    given = complete(TEXTS[0], extra_body={"ignore_eos": True})
    assert given["usage"]["completion_tokens"] == 16 and given["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("form", ["texts", "ids", "lists of ids"])
def test_prompts_of_all_forms(complete, engine, form):
    ids = [engine.tokenizer.encode(given) for given in TEXTS]
    prompt = {"texts": TEXTS, "ids": ids[0], "lists of ids": ids}[form]
    expected = [answer(engine, tokens, max_new_tokens=8) for tokens in (ids[:1] if form == "ids" else ids)]
    given = complete(prompt, max_tokens=8)
    assert [c["text"] for c in given["choices"]] == [result.text for result in expected]
    assert [c["index"] for c in given["choices"]] == list(range(len(expected)))
    assert given["usage"]["prompt_tokens"] == sum(result.prompt_tokens for result in expected)
    assert joined(complete(prompt, max_tokens=8, stream=True)) == {n: result.text for n, result in enumerate(expected)}


def test_choices_of_several_prompts_stand_together(complete, engine):
    given = complete(TEXTS[:2], n=2, seed=1, temperature=0.8, max_tokens=6)["choices"]
    expected = [answer(engine, prompt, seed=1 + n, temperature=0.8, max_new_tokens=6) for prompt in TEXTS[:2] for n in range(2)]
    assert [c["text"] for c in given] == [result.text for result in expected]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_logprobs(complete, engine, stream):
    prompt = engine.tokenizer.encode(TEXTS[2])
    expected = answer(engine, prompt, max_new_tokens=5)
    given = complete(TEXTS[2], max_tokens=5, echo=True, logprobs=2, stream=stream)
    choices = [c["choices"][0] for c in given] if stream else given["choices"]
    said = "".join(choice["text"] for choice in choices)
    assert said == TEXTS[2] + expected.text
    told = {name: [x for c in choices if c["logprobs"] for x in c["logprobs"][name]] for name in choices[0]["logprobs"]}
    tokens = [*prompt, *expected.token_ids]
    rows = logprobs(engine, tokens)
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx([rows[i, t] for i, t in enumerate(tokens[1:])], abs=TOLERANCE)
    for row, token, top in zip(rows, tokens[1:], told["top_logprobs"][1:], strict=False):
        likeliest = {*row.argsort()[::-1][:2].tolist(), token}
        assert len(top) == len(likeliest)
        assert sorted(top.values()) == pytest.approx(sorted(row[list(likeliest)]), abs=TOLERANCE)
    assert len(told["tokens"]) == len(told["text_offset"]) == len(tokens)
    names = [text(engine, t) for t in tokens]
    assert [b for a, b in zip(told["tokens"], names, strict=True) if a != b and not a.startswith("bytes:")] == []


def test_offsets_of_logprobs_are_places_in_the_text(complete, engine):
    prompt = engine.tokenizer.encode(TEXTS[0], special=False)
    (choice,) = complete(prompt, max_tokens=4, echo=True, logprobs=0)["choices"]
    told = choice["logprobs"]
    assert all(choice["text"][o:].startswith(t) for o, t in zip(told["text_offset"], told["tokens"], strict=True))


def test_scores_of_a_text_alone(complete, engine):
    prompt = engine.tokenizer.encode(TEXTS[0])
    given = complete(TEXTS[0], max_tokens=0, echo=True, logprobs=1)
    rows = logprobs(engine, prompt)
    expected = [rows[i, t] for i, t in enumerate(prompt[1:])]
    assert given["choices"][0]["text"] == TEXTS[0] and given["usage"]["completion_tokens"] == 0
    assert given["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=TOLERANCE)


def test_many_streams_at_once(openai, served, engine):
    greedy = {"model": served.model, "temperature": 0}
    asked = [greedy | {"prompt": TEXTS[n % 3] + str(n), "max_tokens": 20 + n} for n in range(48)]
    streams = openai.call("many", served.at, METHOD, asked)
    params = [SamplingParams(max_new_tokens=one["max_tokens"]) for one in asked]
    expected = engine.generate([one["prompt"] for one in asked], params)
    assert [joined(chunks) for chunks in streams] == [{0: result.text} for result in expected]


def test_a_stream_that_is_left_midway_gives_back_what_it_had(openai, served):
    asked = {"model": served.model, "prompt": TEXTS[0], "max_tokens": 1900, "extra_body": {"ignore_eos": True}, "n": 4}
    assert openai.call("leave", served.at, METHOD, 5, **asked) == 5
    until(lambda: served.gauges() == [0, 0, 0])


@pytest.mark.parametrize(("asked", "words"), [
    ({"suffix": "\n    return c"}, "suffix needs a tokenizer with <｜fim▁begin｜>"),
    ({"temperature": -1}, "temperature: "), ({"max_tokens": 0}, "max_tokens is 0"), ({"best_of": 4}, "best_of is 4"),
    ({"logprobs": 99}, "logprobs: "), ({"prompt": []}, "prompt"), ({"prompt": [4096]}, "accepted: 0 to 4095"),
])  # fmt: skip
def test_bad_requests(openai, served, asked, words):
    error = refused(openai, served, "BadRequestError", **{"prompt": "a"} | asked)
    assert error.status == 400 and words in error.message


def test_an_unknown_model(openai, served):
    for method, asked in ((METHOD, {"prompt": "a"}), (CHAT, {"messages": question("a")})):
        error = refused(openai, served, "NotFoundError", method, model="other", **asked)
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert "'other' is not here, accepted: 'example'" in error.message
    with pytest.raises(ClientError, match="NotFoundError"):
        openai.call("call", served.at, "models.retrieve", "other")


def test_what_is_not_served(openai, served):
    with pytest.raises(ClientError, match="NotFoundError"):
        openai.call("call", served.at, "embeddings.create", model=served.model, input="x")


def test_an_over_long_prompt(openai, served):
    error = refused(openai, served, "BadRequestError", CHAT, messages=question("word " * 3000))
    assert error.code == "context_length_exceeded" and "2048" in error.message


@pytest.fixture(scope="module")
def guarded(start):
    """A server that wants a key, where nothing may wait."""
    with start("--api-key", "first", "--api-key", "secret", "--max-waiting", "0", key="secret") as served:
        yield served


def test_keys(openai, guarded):
    assert openai.call("call", guarded.at, "models.list")["data"][0]["id"] == "example"
    for key in ("wrong", "secre", "none"):
        with pytest.raises(ClientError) as caught:
            openai.call("call", guarded.at | {"api_key": key}, "models.list")
        assert (caught.value.kinds[0], caught.value.status) == ("AuthenticationError", 401)
        assert caught.value.code == "invalid_api_key"


def test_a_request_that_never_fits_is_no_busy_server(openai, guarded):
    error = refused(openai, guarded, "BadRequestError", prompt=["a"] * 257, max_tokens=1)
    assert "asks for 257 answers, accepted: up to 256 at once" in error.message
    given = openai.call("call", guarded.at, METHOD, model="example", prompt=["a"] * 256, max_tokens=1)
    assert len(given["choices"]) == 256


def test_a_full_server_says_when_to_come_again(openai, guarded):
    body = {"prompt": "a", "max_tokens": 2000, "n": 128, "stream": True, "ignore_eos": True}
    headers = {"authorization": "Bearer secret", "content-type": "application/json"}
    with ExitStack() as streams:
        for _ in range(2):  # 256 answers take part in steps
            asked = urllib.request.Request(f"{guarded.url}/v1/completions", json.dumps(body).encode(), headers)
            streams.enter_context(urllib.request.urlopen(asked, timeout=60))
        until(lambda: guarded.gauges()[0] == 256)
        error = refused(openai, guarded, "RateLimitError", CHAT, messages=question("a"))
    assert (error.status, error.code) == (429, "rate_limit_exceeded") and 1 <= int(error.retry_after) <= 60
    until(lambda: guarded.gauges() == [0, 0, 0])
    given = openai.call("call", guarded.at, CHAT, model="example", messages=question("a"), max_tokens=1)
    assert given["usage"]["completion_tokens"] == 1
