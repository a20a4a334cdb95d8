"""langchain-openai's chat model."""

import pytest

from tests.clients.truths import answer, question
from tests.clients.workers import ClientError

pytestmark = pytest.mark.slow

TEXT = "What is seven plus five?"


@pytest.fixture
def at(served):
    return {"model": served.model, "base_url": f"{served.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 20}


def test_invoke(langchain, at, engine):
    expected, given = answer(engine, question(TEXT), max_new_tokens=20), langchain.call("invoke", at, TEXT)
    assert given["content"] == expected.text and given["response_metadata"]["finish_reason"] == "stop"
    assert given["usage_metadata"]["input_tokens"] == expected.prompt_tokens
    assert given["usage_metadata"]["output_tokens"] == len(expected.token_ids)


def test_stream(langchain, at, engine):
    expected, parts = answer(engine, question(TEXT), max_new_tokens=20), langchain.call("stream", at, TEXT)
    assert "".join(part["content"] for part in parts) == expected.text and len(parts) > 4
    told = [part["usage_metadata"] for part in parts if part["usage_metadata"]]
    assert [usage["output_tokens"] for usage in told] == [len(expected.token_ids)]


def test_batch(langchain, at, engine):
    texts = [TEXT, "What is os.path?", "What is a class?"]
    expected = [answer(engine, question(text), max_new_tokens=20).text for text in texts]
    assert langchain.call("batch", at, texts) == expected


def test_a_chain(langchain, at, engine):
    messages = [{"role": "system", "content": "Answer in short."}, *question("What is x?")]
    expected = answer(engine, messages, max_new_tokens=20).text
    assert langchain.call("chain", at, {"manner": "short", "thing": "x"}) == expected


def test_an_over_long_conversation_is_known_as_such(langchain, at):
    with pytest.raises(ClientError) as caught:
        langchain.call("invoke", at, "word " * 3000)
    assert caught.value.kinds[0] == "OpenAIContextOverflowError"
