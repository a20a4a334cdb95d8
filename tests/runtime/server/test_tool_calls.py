"""Tool calls: the parser on any cut of any text, the grammar that forces calls, and both behind the API."""

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import latentrt
from latentrt.runtime.engine.sampler import Sampler
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.server.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    ToolCallParser,
    required_grammar,
    with_tools,
)  # fmt: skip
from latentrt.runtime.structured import Guides
from latentrt.runtime.tokenizer import Tokenizer
from tests.conftest import EXAMPLE
from tests.runtime.server.serving import serving

TEMPLATE = (  # the form of V2.5's and V3's: calls in the history are rendered, tools are not
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' and m['content'] is none %}{{ '<｜Assistant｜>" + CALLS_BEGIN + "' }}"
    "{% for t in m['tool_calls'] %}{{ ('\n' if loop.index > 1 else '') + '" + CALL_BEGIN + "' + t['type'] + '" + SEPARATOR +
    "' + t['function']['name'] + '\n```json\n' + t['function']['arguments'] + '\n```" + CALL_END + "' }}{% endfor %}{{ '" +
    CALLS_END + "' + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"], "additionalProperties": False}}}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}

words = st.text("ab {}\"'`\n<｜tool▁calls", max_size=12)
arguments = st.dictionaries(words, st.recursive(st.integers() | words, lambda v: st.lists(v, max_size=2)), max_size=3)
calls = st.lists(st.tuples(st.text("abc_", min_size=1, max_size=6).filter(lambda n: n != "function"), arguments), max_size=3)


def written(name: str, given: str, fenced: bool) -> str:
    if fenced:
        return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{given}\n```{CALL_END}"
    return f"{CALL_BEGIN}{name}{SEPARATOR}{given}{CALL_END}"


def parse(pieces: list[str]):
    """Content, calls as deltas join to, and the parser."""
    parser, content, joined = ToolCallParser(iter(map(str, range(99))).__next__), "", {}
    for part in [*(parser.add(p) for p in pieces), parser.finish()]:
        content += part[0]
        for delta in part[1]:
            assert (delta.id is None) == (delta.index in joined) == (delta.name is None)
            call = joined.setdefault(delta.index, [delta.id, delta.name, ""])
            call[2] += delta.arguments
    assert list(joined) == list(range(len(joined)))
    assert [tuple(call) for call in joined.values()] == [(c.id, c.name, c.arguments) for c in parser.calls]
    return content, [tuple(call[1:]) for call in joined.values()]


def cut(data, text: str) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=200, deadline=None)
@given(st.data(), words, calls, words, st.booleans(), st.sampled_from(["", "\n"]))
def test_calls_survive_any_cut(data, before, called, after, fenced, between):
    """Arguments byte for byte, content around them as it is."""
    texts = [(name, json.dumps(given, ensure_ascii=data.draw(st.booleans()))) for name, given in called]
    text = before + (CALLS_BEGIN + between.join(written(*t, fenced) for t in texts) + CALLS_END if texts else "") + after
    assert parse(cut(data, text)) == (before + after, texts)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.sampled_from([
    CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END, "function", "name", "\n```json\n", "\n```", '{"a": 1}', "x", "<",
    "\n",
]), max_size=10))  # fmt: skip
def test_nonsense_gives_the_same_however_it_is_cut(data, parts):
    text = "".join(parts)
    whole = parse([text])
    assert parse(cut(data, text)) == whole == parse(list(text))
    if not whole[1]:  # then nothing is lost
        assert whole[0] == text


def test_an_answer_that_is_cut_short_keeps_what_there_is():
    text = CALLS_BEGIN + written("f", '{"a": [1, 2]}', True)
    assert parse([text[: text.index("2]")]]) == ("", [("f", '{"a": [1, ')])
    assert parse([text[: text.index(CALL_END)]]) == ("", [("f", '{"a": [1, 2]}')])
    assert parse([CALLS_BEGIN + CALL_BEGIN + "func"]) == (CALLS_BEGIN + CALL_BEGIN + "func", [])


def test_a_history_reads_as_it_was_written():
    """What the template makes of calls, the parser takes back."""
    from latentrt.runtime import chat_template

    given = [("get_weather", '{"city": "Paris"}'), ("clock", "{}")]
    message = {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": name, "arguments": text}} for name, text in given]}  # fmt: skip
    special = {"bos_token": "", "eos_token": ""}
    text = chat_template.render(chat_template.compile_template(TEMPLATE), [message], special, None, False)
    assert parse([text.removeprefix("<｜Assistant｜>")]) == ("", given)


def test_tools_are_told_in_the_system_message():
    messages = with_tools([{"role": "user", "content": "Hi"}], [CLOCK])
    assert messages[0]["content"] == (
        "You are a helpful Assistant.\n\n## Tools\n\n### Function\n\nYou have the following functions available:\n\n"
        '- `clock`:\n```json\n{\n    "name": "clock",\n    "description": "The time."\n}\n```\n'
    )
    own = with_tools([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}], [CLOCK])
    assert own[0]["content"].startswith("Be short.\n\n## Tools") and [m["role"] for m in own] == ["system", "user"]


def marked_tokenizer(tmp_path) -> Tokenizer:
    """The example's, with the marks as tokens of their own."""
    tokenizer = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    tokenizer.add_special_tokens([CALLS_BEGIN, CALLS_END, CALL_BEGIN, SEPARATOR, CALL_END])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer("marked", tmp_path / "tokenizer.json", {}, {})


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize(("name", "parallel"), [(None, True), (None, False), ("get_weather", True)])
def test_a_forced_call_fits_its_schema(tmp_path, marked, fenced, name, parallel):
    tokenizer = marked_tokenizer(tmp_path) if marked else Tokenizer("example", EXAMPLE / "tokenizer.json", {}, {})
    guides, random = Guides(tokenizer, tokenizer.vocab_size + 8, frozenset({1})), np.random.default_rng(0)
    for _ in range(4):
        guide, tokens = guides.guide(required_grammar(tokenizer, [WEATHER, CLOCK], name, parallel, fenced)), []
        sampler = Sampler(SamplingParams(), [], guide=guide)
        while not guide.ended and len(tokens) < 600:
            tokens.append(sampler.next(random.normal(size=tokenizer.vocab_size + 8).astype(np.float32)))
        content, called = parse([tokenizer.decode(tokens, skip_special=False)])
        assert (not content and called) or len(tokens) == 600  # an object without a schema may go on for long
        assert (parallel and name is None) or len(called) == 1
        for tool, text in called:
            assert tool == "get_weather" if name else tool in ("get_weather", "clock")
            if tool == "get_weather":
                jsonschema.validate(json.loads(text), WEATHER["function"]["parameters"])


def tools_bundle(traced, folder: Path) -> Path:
    """The example model with a chat template that knows tool calls, in a new folder."""
    shutil.copytree(EXAMPLE, folder / "checkpoint")
    file = folder / "checkpoint" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return traced.build_once("tools", folder / "checkpoint", folder / "bundle", "cpu", "fp32")


@pytest.fixture(scope="module")
def live(traced, tmp_path_factory):
    with serving(latentrt.load(tools_bundle(traced, tmp_path_factory.mktemp("tools")))) as live:
        yield live


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_required_calls_come_through_the_api(live, choice):
    asked = {"tools": [WEATHER], "tool_choice": choice, "temperature": 1.0, "seed": 1, "parallel_tool_calls": False}
    (answer,) = live.chat("Weather in Ulm?", **asked)["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather" and call["id"].startswith("call_") and answer["message"]["content"] is None
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])
    assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    messages = [{"role": "user", "content": "Weather in Ulm?"}]
    parts = [p["choices"][0] for p in live.stream("/v1/chat/completions", messages=messages, **asked)]
    deltas = [d for p in parts for d in p["delta"].get("tool_calls", [])]
    assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
    assert [d.get("id") is not None for d in deltas] == [True] + [False] * (len(deltas) - 1) and len(deltas) > 2
    assert parts[-1]["finish_reason"] == answer["finish_reason"]


def test_a_conversation_with_calls_goes_on(live):
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Time?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "noon"}]  # fmt: skip
    answer = live.chat(messages, tools=[CLOCK], max_tokens=8, temperature=0)
    told = with_tools(messages, [CLOCK])
    rendered = live.engine.tokenizer.render_chat(told)
    assert CALL_BEGIN + "function" + SEPARATOR + "clock" in rendered and "noon" in rendered
    assert answer["usage"]["prompt_tokens"] == len(live.engine.tokenizer.encode(rendered, special=False))


def test_answers_in_json(live):
    schema = WEATHER["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    for asked in ({"response_format": form}, {"structured_outputs": {"json": schema}}, {"guided_json": schema}):
        text = live.chat("Weather?", temperature=1.0, seed=2, **asked)["choices"][0]["message"]["content"]
        jsonschema.validate(json.loads(text), schema)
    text = live.chat("Weather?", temperature=0, response_format={"type": "json_object"}, max_tokens=1)["choices"][0]
    assert text["message"]["content"].startswith("{")
    chosen = live.complete("I say", max_tokens=9, structured_outputs={"choice": ["yes", "no"]})["choices"][0]
    assert chosen["text"] in ("yes", "no") and chosen["finish_reason"] == "stop"
    refused = live.post("/v1/completions", prompt="a", guided_regex="([")
    assert refused.status_code == 400 and "regex" in refused.json()["error"]["message"]
    both = live.post("/v1/completions", prompt="a", guided_regex="a", structured_outputs={"regex": "b"})
    assert both.status_code == 400
