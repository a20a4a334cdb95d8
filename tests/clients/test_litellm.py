"""litellm, which names its providers: OpenAI's, vLLM's and DeepSeek's ways to the same server."""

import pytest

from tests.clients.truths import answer, question
from tests.clients.workers import ClientError

pytestmark = pytest.mark.slow

ASKED = question("What is seven plus five?")


@pytest.fixture
def asked(served):
    address = {"api_base": f"{served.url}/v1", "api_key": "none", "num_retries": 0}
    return address | {"temperature": 0, "max_tokens": 20}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "deepseek"])
def test_a_chat(litellm, asked, engine, provider):
    expected = answer(engine, ASKED, max_new_tokens=20)
    given = litellm.call("completion", model=f"{provider}/example", messages=ASKED, **asked)
    assert given["choices"][0]["message"]["content"] == expected.text and given["choices"][0]["finish_reason"] == "stop"
    assert given["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert given["usage"]["completion_tokens"] == len(expected.token_ids)
    chunks = litellm.call("completion", model=f"{provider}/example", messages=ASKED, stream=True,
                          stream_options={"include_usage": True}, **asked)  # fmt: skip
    assert "".join(c["choices"][0]["delta"]["content"] or "" for c in chunks if c["choices"]) == expected.text
    assert chunks[-1]["usage"]["completion_tokens"] == len(expected.token_ids)


def test_a_text_goes_on(litellm, asked, engine):
    given = litellm.call("text_completion", model="text-completion-openai/example", prompt="def add(a, b):\n", **asked)
    assert given["choices"][0]["text"] == answer(engine, "def add(a, b):\n", max_new_tokens=20).text


@pytest.mark.parametrize(("model", "text", "kind"), [
    ("other", "a", "NotFoundError"), ("example", "word " * 3000, "ContextWindowExceededError"),
])  # fmt: skip
def test_errors_are_of_the_right_kind(litellm, asked, model, text, kind):
    with pytest.raises(ClientError) as caught:
        litellm.call("completion", model=f"openai/{model}", messages=question(text), **asked)
    assert kind in caught.value.kinds, caught.value
