"""Tool calls and answers in a form, as every client asks for them."""

import json
import re

import jsonschema
import pytest

import latentrt
from latentrt.runtime.server.tool_calls import with_tools
from latentrt.runtime.structured import Constraint
from tests.clients.truths import answer, question
from tests.clients.workers import ClientError
from tests.runtime.server.test_tool_calls import CLOCK, WEATHER, tools_bundle

pytestmark = pytest.mark.slow

METHOD = "chat.completions.create"
ASKED = question("Weather in Ulm?")
SCHEMA = WEATHER["function"]["parameters"]
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
SAMPLED = {"temperature": 1.0, "seed": 2}
FIELDS = {"days": "int", "sunny": "bool"}


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


@pytest.fixture
def ask(openai, tooled):
    def ask(messages=ASKED, **options):
        return openai.call("call", tooled.at, METHOD, **{"model": tooled.model, "messages": messages} | SAMPLED | options)

    return ask


def content(given) -> str:
    """Of an answer, or of the chunks of a stream."""
    if isinstance(given, dict):
        return given["choices"][0]["message"]["content"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in given if chunk["choices"])


def fits(arguments: str) -> dict:
    parsed = json.loads(arguments)
    jsonschema.validate(parsed, SCHEMA)
    return parsed


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_a_schema(ask, its_engine, stream):
    expected = answer(its_engine, ASKED, constraint=Constraint("json_schema", SCHEMA), max_new_tokens=100, **SAMPLED)
    text = content(ask(response_format=FORM, max_tokens=100, stream=stream))
    assert text == expected.text and fits(text)


def test_any_json_object(ask, its_engine):
    expected = answer(its_engine, ASKED, constraint=Constraint("json_object"), max_new_tokens=40, **SAMPLED)
    assert content(ask(response_format={"type": "json_object"}, max_tokens=40)) == expected.text
    assert expected.text.startswith("{")


def test_choices_and_regular_expressions(ask):
    chosen = ask(extra_body={"structured_outputs": {"choice": ["rain", "sun"]}})
    assert content(chosen) in ("rain", "sun") and chosen["choices"][0]["finish_reason"] == "stop"
    assert re.fullmatch(r"\d{2} degrees", content(ask(extra_body={"guided_regex": r"[0-9]{2} degrees"})))


def test_parse_gives_an_object(openai_python, tooled):
    given = openai_python.call("parse", tooled.at, FIELDS, model=tooled.model, messages=ASKED, **SAMPLED)
    assert given["parsed"] == json.loads(given["content"])
    assert [type(given["parsed"][name]) for name in FIELDS] == [int, bool]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call(ask, choice):
    options = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    given = ask(**options)["choices"][0]
    (call,) = given["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "get_weather" and fits(call["function"]["arguments"])
    assert given["message"]["content"] is None
    assert given["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    chunks = ask(stream=True, **options)
    deltas = [d for chunk in chunks for d in chunk["choices"][0]["delta"].get("tool_calls") or []]
    assert "".join(d["function"]["arguments"] or "" for d in deltas) == call["function"]["arguments"]
    assert deltas[0]["id"] and deltas[0]["function"]["name"] == "get_weather" and {d["index"] for d in deltas} == {0}
    assert chunks[-1]["choices"][0]["finish_reason"] == given["finish_reason"]


def test_the_stream_helper_puts_a_call_together(openai, tooled):
    asked = {"model": tooled.model, "messages": ASKED, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 200}
    given = openai.call("stream_helper", tooled.at, **asked, **SAMPLED, parallel_tool_calls=False)["final"]["choices"][0]
    (call,) = given["message"]["tool_calls"]
    assert given["finish_reason"] == "tool_calls" and fits(call["function"]["arguments"])


def test_a_call_is_parsed_into_an_object(openai_python, tooled):
    given = openai_python.call("parse_tool", tooled.at, FIELDS, model=tooled.model, messages=ASKED, **SAMPLED,
                               parallel_tool_calls=False, max_tokens=200)  # fmt: skip
    assert given["name"] == "form" and given["parsed"] == json.loads(given["arguments"])
    assert [type(given["parsed"][name]) for name in FIELDS] == [int, bool]


def test_a_conversation_with_a_call_goes_on(ask, its_engine):
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [*question("Time?"), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "noon"}]  # fmt: skip
    expected = answer(its_engine, with_tools(messages, [CLOCK]), max_new_tokens=10)
    given = ask(messages, tools=[CLOCK], temperature=0, max_tokens=10)
    assert content(given) == expected.text and given["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_a_model_that_was_not_trained_on_tools_says_so(openai, served):
    with pytest.raises(ClientError, match="knows no tool calls; leave tools out") as caught:
        openai.call("call", served.at, METHOD, model=served.model, messages=ASKED, tools=[CLOCK])
    assert caught.value.kinds[0] == "BadRequestError"


@pytest.mark.parametrize("asked", [
    {"response_format": {"type": "json_schema"}}, {"extra_body": {"guided_regex": "(["}},
    {"response_format": FORM, "tools": [WEATHER], "tool_choice": "required"},
    {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, {"tool_choice": "required"},
])  # fmt: skip
def test_bad_requests(ask, asked):
    with pytest.raises(ClientError) as caught:
        ask(**asked)
    assert caught.value.kinds[0] == "BadRequestError", caught.value


def langchain_at(served) -> dict:
    return {"model": served.model, "base_url": f"{served.url}/v1", "api_key": "none", "max_tokens": 200} | SAMPLED


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gives_an_object(langchain, tooled, method):
    schema = SCHEMA | {"title": "weather", "description": "The weather."}
    fits(json.dumps(langchain.call("structured", langchain_at(tooled), schema, method, "Weather in Ulm?")))


def test_langchain_calls_tools(langchain, tooled):
    calls = langchain.call("bound", langchain_at(tooled), WEATHER, "required", "Weather in Ulm?")
    assert calls
    for call in calls:
        assert call["name"] == "get_weather" and fits(json.dumps(call["args"]))


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_calls_tools(litellm, tooled, stream):
    asked = {"api_base": f"{tooled.url}/v1", "api_key": "none", "max_tokens": 200, "parallel_tool_calls": False} | SAMPLED
    given = litellm.call("completion", model="openai/example", messages=ASKED, tools=[WEATHER], tool_choice="required",
                         stream=stream, **asked)  # fmt: skip
    parts = [c["choices"][0]["delta"] for c in given if c["choices"]] if stream else [given["choices"][0]["message"]]
    calls = [call["function"] for part in parts for call in part.get("tool_calls") or []]
    assert calls[0]["name"] == "get_weather" and fits("".join(call["arguments"] or "" for call in calls))
