"""What stands before replicas, without Ray or Dynamo: the relay of requests, and which replica is asked."""

import asyncio
import json
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.replicas import card, relay
from latentrt.runtime.replicas.affinity import BLOCK, Affinity, blocks
from latentrt.runtime.server.app import Settings, create_app
from latentrt.runtime.tokenizer import Tokenizer
from tests.runtime.server.test_survival import fake_engine

SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
         "root_path": "", "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
         "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "app": object()}  # fmt: skip
JSON = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream; charset=utf-8")]}


def piece(content: bytes, more: bool) -> dict:
    return {"type": "http.response.body", "body": content, "more_body": more}


def asked(answers: list[list], body: bytes = b"{}") -> tuple[list[dict], int]:
    """What a client gets of a front whose replicas give `answers` in turn; an exception in one is where it dies. And how many
    were asked."""
    turns, sent = iter(answers), []
    count = 0

    async def ask(scope, given):
        nonlocal count
        count += 1
        assert given == body and "app" not in scope
        for message in next(turns):
            if isinstance(message, Exception):
                raise message
            yield message

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(relay.Front(ask)(SCOPE, receive, send))
    return sent, count


GONE = relay.ReplicaGoneError("ActorDiedError")


def text(sent: list[dict]) -> str:
    return b"".join(m.get("body", b"") for m in sent).decode()


def test_an_answer_passes_unchanged():
    answer = [JSON, piece(b'{"a": ', True), piece(b"1}", False)]
    assert asked([answer]) == (answer, 1)


@pytest.mark.parametrize("died", [[GONE], [JSON, GONE], [JSON, piece(b"{", True), GONE], [STREAM, GONE], []])
def test_a_replica_that_dies_before_anything_was_sent_is_asked_again_elsewhere(died):
    answer = [JSON, piece(b"{}", False)]
    assert asked([died, answer]) == (answer, 2)


def test_a_stream_that_breaks_off_ends_with_an_error_and_done():
    sent, count = asked([[STREAM, piece(b"data: {}\n\n", True), GONE]])
    events = text(sent).split("\n\n")
    assert count == 1 and events[0] == "data: {}" and events[2:] == ["data: [DONE]", ""]
    error = json.loads(events[1].removeprefix("data: "))["error"]
    assert error["code"] == "replica_gone" and "ActorDiedError" in error["message"]
    assert sent[-1]["more_body"] is False


def test_where_all_die_the_answer_is_503():
    sent, count = asked([[GONE]] * relay.ATTEMPTS)
    assert count == relay.ATTEMPTS and sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"2" and json.loads(text(sent))["error"]["code"] == "replica_gone"


def served(body: dict, read: int | None = None) -> tuple[list[dict], object]:
    """The messages of the real server over an engine without a model, through `respond`; all, or the first `read`."""
    async def run():
        engine = fake_engine()
        app = create_app(engine, Settings("model"))
        found = []
        async with app.router.lifespan_context(app):
            async with aclosing(relay.respond(app, relay.portable(SCOPE), json.dumps(body).encode())) as messages:
                async for message in messages:
                    found.append(message)
                    if len(found) == read:
                        break
            schedulers = engine.loop.schedulers
            while schedulers.running or schedulers.waiting:
                await asyncio.sleep(0)
            return found, schedulers.cache_usage

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_a_server_answers_through_the_relay():
    found, usage = served({"prompt": [5, 1], "max_tokens": 3})
    assert found[0]["status"] == 200 and json.loads(text(found))["usage"]["completion_tokens"] == 3 and usage == 0
    streamed, _ = served({"prompt": [5, 1], "max_tokens": 3, "stream": True})
    assert text(streamed).endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_frees_what_its_request_held():
    found, usage = served({"prompt": [5, 1], "max_tokens": 50, "stream": True}, read=2)
    assert len(found) == 2 and usage == 0


def chat(*contents: str, **more) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": c} for c in contents]} | more).encode()


def test_blocks_name_everything_before_them():
    texts = "a" * 3 * BLOCK, "a" * 3 * BLOCK + "b" * BLOCK, "b" + "a" * 3 * BLOCK
    one, longer, other = (blocks(chat(text)) for text in texts)
    assert len(one) >= 3 and longer[:2] == one[:2] and not set(one) & set(other)
    assert blocks(chat("a" * 999, tools=[{"type": "function"}])) != blocks(chat("a" * 999)), "tools come before the messages"
    plain, instructed = (blocks(json.dumps({"input": "a" * 999} | more).encode()) for more in ({}, {"instructions": "b"}))
    assert plain and plain != instructed
    assert blocks(chat("short")) == blocks(b"[1]") == blocks(b"\xff") == blocks(b'{"prompt": null}') == []


def test_what_begins_alike_goes_together_unless_that_replica_is_much_busier():
    known, names = Affinity(slack=2), blocks(chat("x" * 900))
    assert known.best(names, ["a", "b"]) is None
    known.sent(names, "b")
    assert known.best(names[:1], ["a", "b"]) == known.best([*names, b"unknown"], ["a", "b"]) == "b"
    assert known.best(names, ["a"]) is None, "it is not among the candidates"
    known.sent([], "b")
    known.sent([], "b")
    assert known.best(names, ["a", "b"]) is None, "three requests against none"
    known.ended("b")
    assert known.best(names, ["a", "b"]) == "b"
    known.died("b")
    assert known.best(names, ["a", "b"]) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), max_size=60))
def test_the_table_stays_small_and_tells_the_last_replica(sent):
    known, last = Affinity(remembered=4, slack=1 << 20), {}
    for number, replica in sent:
        known.sent([bytes([number])], replica)
        last[number] = replica
        assert len(known._replicas) <= 4
        assert known.best([bytes([number])], "abc") == replica


def test_a_bundles_card_is_what_transformers_reads(example_bundle, tmp_path, monkeypatch):
    """Dynamo's frontend tokenizes and templates from it, and must do as the engine does."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    bundle = Bundle(example_bundle)
    folder = card.kept(bundle)
    assert card.kept(bundle) == folder and [f.name for f in folder.parent.iterdir()] == [folder.name], "and no drafts"
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.of(bundle)
    assert theirs.encode("def main():\n") == ours.encode("def main():\n")
    messages = [{"role": "user", "content": "What is a list?"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(text, add_special_tokens=False) == ours.encode_chat(messages)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end.id for end in bundle.manifest.text.end_of_text]
