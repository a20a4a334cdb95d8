"""Chats with OpenAI's own packages, of Python and of npm: what they make of the answers is what the engine says."""

import pytest

from tests.clients.truths import REASONS, TOLERANCE, answer, logprobs, question, text

pytestmark = pytest.mark.slow

METHOD = "chat.completions.create"
ASKED = question("What is seven plus five?")


@pytest.fixture
def chat(openai, served):
    """A greedy chat completion, or the chunks of a stream."""

    def ask(messages=ASKED, **options):
        greedy = {"model": served.model, "messages": messages, "temperature": 0}
        return openai.call("call", served.at, METHOD, **greedy | options)

    return ask


def joined(chunks: list[dict]) -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return texts


def test_models(openai, served, engine):
    (card,) = openai.call("call", served.at, "models.list")["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("example", "model", "latentrt")
    assert card["max_model_len"] == engine.limits.max_context
    assert openai.call("call", served.at, "models.retrieve", "example") == card


def test_an_answer(chat, engine):
    expected, given = answer(engine, ASKED, max_new_tokens=20), chat(max_tokens=20)
    (choice,) = given["choices"]
    assert choice["message"]["content"] == expected.text and choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == REASONS[expected.finish_reason] == "stop" and not choice["message"].get("tool_calls")
    usage = given["usage"]
    assert usage["prompt_tokens"] == expected.prompt_tokens and usage["completion_tokens"] == len(expected.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]) == (cached, usage["prompt_tokens"] - cached)
    assert given["model"] == "example" and given["object"] == "chat.completion" and given["id"].startswith("chatcmpl-")


def test_a_stream(chat, engine):
    expected = answer(engine, ASKED, max_new_tokens=20)
    chunks = chat(max_tokens=20, stream=True)
    assert joined(chunks) == {0: expected.text}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert all(chunk["object"] == "chat.completion.chunk" and not chunk.get("usage") for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > 4  # in pieces


@pytest.mark.parametrize("stream", [False, True])
def test_two_choices_of_a_seed_and_their_usage(chat, engine, stream):
    seeded = {"temperature": 0.9, "max_new_tokens": 12}
    expected = [answer(engine, ASKED, seed=7 + n, **seeded) for n in range(2)]
    given = chat(n=2, seed=7, temperature=0.9, max_completion_tokens=12, stream=stream,
                 **({"stream_options": {"include_usage": True}} if stream else {}))  # fmt: skip
    if stream:
        texts, usage = joined(given), given[-1]["usage"]
        assert given[-1]["choices"] == [] and not any(chunk.get("usage") for chunk in given[:-1])
        ends = {c["choices"][0]["index"]: c["choices"][0]["finish_reason"] for c in given[:-1]}
    else:
        texts, usage = {c["index"]: c["message"]["content"] for c in given["choices"]}, given["usage"]
        ends = {c["index"]: c["finish_reason"] for c in given["choices"]}
    assert texts == {n: result.text for n, result in enumerate(expected)} and texts[0] != texts[1]
    assert ends == {n: REASONS[result.finish_reason] for n, result in enumerate(expected)}
    assert usage["completion_tokens"] == sum(len(result.token_ids) for result in expected)


def test_the_same_seed_says_the_same(chat):
    said = [chat(seed=seed, temperature=1, max_tokens=12)["choices"][0]["message"]["content"] for seed in (3, 3, 4)]
    assert said[0] == said[1] != said[2]


def test_a_stop_string(chat, engine):
    whole = answer(engine, ASKED, max_new_tokens=20).text
    stop = whole.split()[2][1:]  # in the midst of a word
    expected = answer(engine, ASKED, max_new_tokens=20, stop=("never said", stop))
    (choice,) = chat(max_tokens=20, stop=["never said", stop])["choices"]
    assert choice["message"]["content"] == expected.text == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert joined(chat(max_tokens=20, stop=stop, stream=True)) == {0: expected.text}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(chat, engine, stream):
    given = chat(max_tokens=6, logprobs=True, top_logprobs=3, stream=stream)
    choices = [c["choices"][0] for c in given] if stream else given["choices"]
    told = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    expected = answer(engine, ASKED, max_new_tokens=6)
    prompt = engine.chat_tokens(ASKED)
    rows = logprobs(engine, [*prompt, *expected.token_ids])[len(prompt) - 1 :]
    assert len(told) == 6
    for token, row, said in zip(expected.token_ids, rows, told, strict=False):
        assert said["token"] == text(engine, token) and bytes(said["bytes"]) == engine.tokenizer.token_bytes(token)
        assert said["logprob"] == pytest.approx(row[token], abs=TOLERANCE)
        top = row.argsort()[::-1][:3]
        assert [t["token"] for t in said["top_logprobs"]] == [text(engine, t) for t in top]
        assert [t["logprob"] for t in said["top_logprobs"]] == pytest.approx(list(row[top]), abs=TOLERANCE)


def test_content_as_parts(chat, engine):
    parts = [{"type": "text", "text": "What is seven"}, {"type": "text", "text": "plus five?"}]
    expected = answer(engine, question("What is seven\nplus five?"), max_new_tokens=12)
    given = chat([{"role": "user", "content": parts}], max_tokens=12)
    assert given["choices"][0]["message"]["content"] == expected.text
    assert given["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_an_answer_goes_on_with_a_prefix(chat, engine):
    messages = [*ASKED, {"role": "assistant", "content": " The class"}]
    prompt = engine.chat_tokens(messages, continue_final=True)
    expected = answer(engine, prompt, max_new_tokens=8)
    given = chat([*ASKED, {"role": "assistant", "content": " The class", "prefix": True}], max_tokens=8)
    assert given["choices"][0]["message"]["content"] == expected.text
    options = {"continue_final_message": True, "add_generation_prompt": False}  # vLLM's words for it
    assert chat(messages, max_tokens=8, extra_body=options)["choices"][0]["message"]["content"] == expected.text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer(chat, engine, name):
    (choice,) = (given := chat(**{name: 4}))["choices"]
    assert choice["message"]["content"] == answer(engine, ASKED, max_new_tokens=4).text
    assert choice["finish_reason"] == "length" and given["usage"]["completion_tokens"] == 4


def test_options_of_other_servers(chat, engine):
    expected = answer(engine, ASKED, temperature=1.0, top_k=3, min_p=0.1, repetition_penalty=1.2, seed=5, max_new_tokens=10)
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2}
    given = chat(temperature=1, seed=5, max_tokens=10, extra_body=extra)
    assert given["choices"][0]["message"]["content"] == expected.text


def test_history_and_system(chat, engine):
    messages = [{"role": "system", "content": "Short."}, *question("What is x?"), {"role": "assistant", "content": " A name."},
                *question("And y?")]  # fmt: skip
    expected = answer(engine, messages, max_new_tokens=12)
    assert chat(messages, max_tokens=12)["choices"][0]["message"]["content"] == expected.text


def test_the_stream_helper_puts_together_what_came(openai, served, engine):
    expected = answer(engine, ASKED, max_new_tokens=20)
    given = openai.call("stream_helper", served.at, model=served.model, messages=ASKED, temperature=0, max_tokens=20)
    assert given["final"]["choices"][0]["message"]["content"] == expected.text
    assert given["final"]["choices"][0]["finish_reason"] == "stop"


def test_fields_that_mean_nothing_are_named(openai_python, served):
    asked = {"model": served.model, "messages": ASKED, "max_tokens": 1, "service_tier": "auto", "extra_body": {"xyzzy": 1}}
    assert openai_python.call("header", served.at, METHOD, "x-ignored-fields", **asked) == "service_tier, xyzzy"
