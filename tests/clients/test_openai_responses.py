"""Responses with OpenAI's own packages, of Python and of npm: what they make of the answers is what the engine says."""

import json

import jsonschema
import pytest

import latentrt
from latentrt.runtime.server.tool_calls import with_tools
from latentrt.runtime.structured import Constraint
from tests.clients.truths import TOLERANCE, answer, logprobs, question, text
from tests.clients.workers import ClientError
from tests.runtime.server.serving import until
from tests.runtime.server.test_tool_calls import CLOCK, WEATHER, tools_bundle

pytestmark = pytest.mark.slow

METHOD = "responses.create"
ASKED = "What is seven plus five?"
SCHEMA = WEATHER["function"]["parameters"]
FORM = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
TOOLS = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}]
SAMPLED = {"temperature": 1.0, "extra_body": {"seed": 2}}


@pytest.fixture
def ask(openai, served):
    """A greedy response, or the events of a stream."""

    def ask(input=ASKED, **options):
        greedy = {"model": served.model, "input": input, "temperature": 0}
        return openai.call("call", served.at, METHOD, **greedy | options)

    return ask


@pytest.fixture(scope="module")
def bundle(traced, tmp_path_factory):
    return tools_bundle(traced, tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def tooled(start, bundle):
    """A server of a model whose chat template knows tool calls."""
    with start(bundle=bundle) as served:
        yield served


@pytest.fixture(scope="module")
def its_engine(bundle):
    with latentrt.load(bundle, threads=1) as engine:
        yield engine


def said(response: dict) -> str:
    """The text of its one message."""
    (item,) = response["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    return part["text"]


def check_stream(events: list[dict]) -> dict:
    """The last response of a stream whose events are whole: numbered, each item and its part opened, filled, closed."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and events[0]["response"]["status"] == "in_progress"
    last = events[-1]["response"]
    assert kinds[-1] == last["status"] and events[0]["response"]["id"] == last["id"]
    for index, item in enumerate(last["output"]):
        its = [event for event in events if event.get("output_index") == index]
        assert its[0]["type"] == "response.output_item.added" and its[0]["item"]["status"] == "in_progress"
        assert its[-1] == its[-1] | {"type": "response.output_item.done", "item": item}
        assert all(event["item_id"] == item["id"] for event in its[1:-1])
        name, whole = ("output_text", "text") if item["type"] == "message" else ("function_call_arguments", "arguments")
        pieces = [event["delta"] for event in its if event["type"] == f"response.{name}.delta"]
        (done,) = (event for event in its if event["type"] == f"response.{name}.done")
        expected = item["content"][0]["text"] if item["type"] == "message" else item["arguments"]
        assert "".join(pieces) == done[whole] == expected
    return last


def test_a_response(ask, engine):
    expected, given = answer(engine, question(ASKED), max_new_tokens=20), ask(max_output_tokens=20)
    assert said(given) == expected.text
    assert (given["object"], given["status"], given["model"]) == ("response", "completed", "example")
    assert given["id"].startswith("resp_") and given["output"][0]["status"] == "completed"
    assert (given["error"], given["incomplete_details"], given["previous_response_id"]) == (None, None, None)
    usage = given["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (expected.prompt_tokens, len(expected.token_ids))
    assert usage["total_tokens"] == expected.prompt_tokens + len(expected.token_ids)
    assert given["store"] is False and given["tools"] == [] and given["text"]["format"] == {"type": "text"}


def test_a_stream(ask, engine):
    expected, events = answer(engine, question(ASKED), max_new_tokens=20), ask(max_output_tokens=20, stream=True)
    last = check_stream(events)
    assert said(last) == expected.text and last["usage"]["output_tokens"] == len(expected.token_ids)
    assert len([e for e in events if e["type"] == "response.output_text.delta"]) > 4  # in pieces


@pytest.mark.parametrize("stream", [False, True])
def test_the_longest_answer(ask, engine, stream):
    given = ask(max_output_tokens=4, stream=stream)
    given = check_stream(given) if stream else given
    assert said(given) == answer(engine, question(ASKED), max_new_tokens=4).text
    assert (given["status"], given["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert given["output"][0]["status"] == "incomplete" and given["max_output_tokens"] == 4


def test_instructions_and_a_conversation(ask, engine):
    messages = [{"role": "system", "content": "Short."}, *question("What is x?"), {"role": "assistant", "content": " A name."},
                *question("And y?")]  # fmt: skip
    expected = answer(engine, messages, max_new_tokens=8)
    parts = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is x?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": " A name.", "annotations": []}]},
        {"role": "user", "content": "And y?"},
    ]
    plain = ask(messages[1:], instructions="Short.", max_output_tokens=8)
    assert said(plain) == said(ask(parts, instructions="Short.", max_output_tokens=8)) == expected.text
    assert plain["usage"]["input_tokens"] == expected.prompt_tokens and plain["instructions"] == "Short."
    developer = [{"role": "developer", "content": "Short."}, *messages[1:]]
    assert said(ask(developer, max_output_tokens=8)) == expected.text


def test_what_was_said_can_be_given_back(ask, engine):
    """As clients do that keep conversations themselves."""
    first = ask(max_output_tokens=20)
    given = ask([*question(ASKED), *first["output"], *question("And?")], max_output_tokens=8)
    messages = [*question(ASKED), {"role": "assistant", "content": said(first)}, *question("And?")]
    assert said(given) == answer(engine, messages, max_new_tokens=8).text


def test_sampling_options(ask, engine):
    expected = answer(engine, question(ASKED), temperature=1.0, top_p=0.8, top_k=30, seed=5, max_new_tokens=10)
    given = ask(temperature=1, top_p=0.8, max_output_tokens=10, extra_body={"seed": 5, "top_k": 30})
    assert said(given) == expected.text and (given["temperature"], given["top_p"]) == (1, 0.8)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(ask, engine, stream):
    given = ask(max_output_tokens=6, top_logprobs=3, include=["message.output_text.logprobs"], stream=stream)
    if stream:
        deltas = [event for event in given if event["type"] == "response.output_text.delta"]
        told, given = [token for delta in deltas for token in delta["logprobs"]], check_stream(given)
        assert [t["logprob"] for t in told] == [t["logprob"] for t in given["output"][0]["content"][0]["logprobs"]]
    else:
        told = given["output"][0]["content"][0]["logprobs"]
    expected, prompt = answer(engine, question(ASKED), max_new_tokens=6), engine.chat_tokens(question(ASKED))
    rows = logprobs(engine, [*prompt, *expected.token_ids])[len(prompt) - 1 :]
    assert len(told) == 6
    for token, row, said_of_it in zip(expected.token_ids, rows, told, strict=False):
        assert said_of_it["token"] == text(engine, token)
        assert said_of_it["logprob"] == pytest.approx(row[token], abs=TOLERANCE)
        top = row.argsort()[::-1][:3]
        assert [t["token"] for t in said_of_it["top_logprobs"]] == [text(engine, t) for t in top]


def test_an_answer_follows_a_schema(openai, tooled, its_engine):
    constraint = Constraint("json_schema", SCHEMA)
    expected = answer(its_engine, question(ASKED), constraint=constraint, max_new_tokens=100, temperature=1.0, seed=2)
    given = openai.call("call", tooled.at, METHOD, model=tooled.model, input=ASKED, text=FORM, max_output_tokens=100, **SAMPLED)
    assert said(given) == expected.text
    jsonschema.validate(json.loads(said(given)), SCHEMA)
    assert given["text"]["format"]["name"] == "weather"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_forced_call(openai, tooled, stream, choice):
    given = openai.call("call", tooled.at, METHOD, model=tooled.model, input="Weather in Ulm?", tools=TOOLS, tool_choice=choice,
                        parallel_tool_calls=False, max_output_tokens=200, stream=stream, **SAMPLED)  # fmt: skip
    given = check_stream(given) if stream else given
    (call,) = given["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed") and call["call_id"]
    jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
    assert given["status"] == "completed" and given["tools"][0]["name"] == "get_weather"


def test_a_conversation_with_a_call_goes_on(openai, tooled, its_engine):
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [*question("Time?"), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "noon"}]  # fmt: skip
    items = [*question("Time?"), {"type": "function_call", "call_id": "1", "name": "clock", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "1", "output": "noon"}]  # fmt: skip
    expected = answer(its_engine, with_tools(messages, [CLOCK]), max_new_tokens=10)
    tools = [{"type": "function", **CLOCK["function"]}]
    given = openai.call("call", tooled.at, METHOD, model=tooled.model, input=items, tools=tools, temperature=0,
                        max_output_tokens=10)  # fmt: skip
    assert said(given) == expected.text and given["usage"]["input_tokens"] == expected.prompt_tokens


def test_the_stream_helper_puts_together_what_came(openai_python, served, engine):
    expected = answer(engine, question(ASKED), max_new_tokens=20)
    given = openai_python.call("responses_stream_helper", served.at, model=served.model, input=ASKED, temperature=0,
                               max_output_tokens=20)  # fmt: skip
    assert said(given["final"]) == expected.text and given["kinds"][-1] == "response.completed"


def test_parse_gives_an_object(openai_python, tooled):
    given = openai_python.call("responses_parse", tooled.at, {"days": "int", "sunny": "bool"}, model=tooled.model, input=ASKED,
                               **SAMPLED)  # fmt: skip
    assert given["parsed"] == json.loads(given["text"])


REFUSED = {
    "previous_response_id": {"previous_response_id": "resp_1"}, "conversation": {"conversation": "conv_1"},
    "background": {"background": True}, "truncation": {"truncation": "auto"},
    r"input\[0\] is of type 'item_reference'": {"input": [{"type": "item_reference", "id": "msg_1"}]},
    r"input\[1\].role": {"input": [*question("a"), {"role": "nobody", "content": "b"}]},
    "input is empty": {"input": []}, "type 'input_image'": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    "tools": {"tools": [{"type": "web_search"}]}, "tool_choice": {"tool_choice": "required"},
    "max_output_tokens": {"max_output_tokens": 0}, "knows no tool calls": {"tools": TOOLS},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_done_is_named(ask, words):
    with pytest.raises(ClientError, match=words) as caught:
        ask(**REFUSED[words])
    assert caught.value.kinds[0] == "BadRequestError", caught.value


def test_what_is_not_kept_is_said(openai_python, served):
    asked = {"model": served.model, "input": ASKED, "max_output_tokens": 1, "service_tier": "auto"}
    for store, ignored in ((False, "service_tier"), (True, "service_tier, store")):
        assert openai_python.call("header", served.at, METHOD, "x-ignored-fields", store=store, **asked) == ignored


def test_other_models_are_not_here(openai, served):
    with pytest.raises(ClientError) as caught:
        openai.call("call", served.at, METHOD, model="other", input=ASKED)
    assert caught.value.kinds[0] == "NotFoundError" and caught.value.code == "model_not_found"


def test_a_stream_left_midway_frees_its_pages(openai, served):
    openai.call("leave", served.at, METHOD, 5, model=served.model, input=ASKED, extra_body={"ignore_eos": True})
    until(lambda: served.gauges() == [0, 0, 0])
