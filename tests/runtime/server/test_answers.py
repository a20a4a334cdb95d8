"""What the endpoints answer is what the engine says, in OpenAI's form."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

from latentrt.runtime.errors import RequestError
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.server.completions import FIM, prompt_tokens
from latentrt.runtime.server.protocol import CompletionRequest
from latentrt.runtime.service import Request
from latentrt.runtime.tokenizer import Tokenizer
from tests.conftest import EXAMPLE

PROMPT = "def read(path):\n"
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
GREEDY = SamplingParams(max_new_tokens=12)


def said(live, prompt, params=GREEDY) -> str:
    return live.engine.generate([prompt], params)[0].text


def log_softmax(logits: np.ndarray) -> np.ndarray:
    scores = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_a_completion_is_the_engines(live):
    answer = live.complete(PROMPT, max_tokens=12, temperature=0)
    (choice,) = answer["choices"]
    assert choice["text"] == said(live, PROMPT) and choice["finish_reason"] == "length"
    count = len(live.engine.tokenizer.encode(PROMPT))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (count, 12)
    assert answer["object"] == "text_completion" and answer["model"] == "model"


def test_prompts_of_all_forms(live):
    """Text, ids, lists of both; choices come in the order of prompts, n of each."""
    texts = [PROMPT, "import os"]
    ids = [live.engine.tokenizer.encode(t) for t in texts]
    expected = [said(live, t) for t in texts]
    for given, wanted in ((texts, expected), (ids, expected), (ids[1], expected[1:]), (texts[:1], expected[:1])):
        choices = live.complete(given, max_tokens=12, temperature=0)["choices"]
        assert [c["text"] for c in choices] == wanted and [c["index"] for c in choices] == list(range(len(wanted)))
    twice = live.complete(texts, max_tokens=12, temperature=0, n=2)["choices"]
    assert [c["text"] for c in twice] == [expected[0]] * 2 + [expected[1]] * 2


def test_a_seed_gives_each_choice_its_own(live):
    body = dict(max_tokens=12, temperature=1.0, seed=7, n=3)
    first, second = (live.complete(PROMPT, **body)["choices"] for _ in range(2))
    assert [c["text"] for c in first] == [c["text"] for c in second]
    assert [c["text"] for c in first] == [
        said(live, PROMPT, SamplingParams(temperature=1.0, seed=7 + n, max_new_tokens=12)) for n in range(3)
    ]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_logits(live, echo, stream):
    body = dict(prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3, echo=echo)
    if stream:
        parts = [c["choices"][0] for c in live.stream("/v1/completions", **body)]
        told = {key: [x for p in parts for x in p["logprobs"][key]] for key in parts[0]["logprobs"]}
        text = "".join(p["text"] for p in parts)
    else:
        told, text = (live.complete(**body)["choices"][0][key] for key in ("logprobs", "text"))
    prompt = live.engine.tokenizer.encode(PROMPT)
    answer = live.engine.generate([PROMPT], replace(GREEDY, max_new_tokens=5))[0]
    tokens = [*prompt, *answer.token_ids]
    expected = log_softmax(live.engine.logits([tokens]))
    first = 1 if echo else len(prompt)
    values = [expected[n - 1, tokens[n]] for n in range(first, len(tokens))]
    assert text == (PROMPT if echo else "") + answer.text
    given = told["token_logprobs"][1:] if echo else told["token_logprobs"]
    np.testing.assert_allclose(given, values, atol=2e-5)  # float32 logits of other chunks
    assert not echo or (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    for n, top in zip(range(first, len(tokens)), told["top_logprobs"][1 if echo else 0 :], strict=True):
        best = sorted(expected[n - 1])[-3:][::-1]
        np.testing.assert_allclose(sorted(top.values(), reverse=True)[:3], best, atol=2e-5)
    visible = [live.engine.tokenizer.token_bytes(t).decode() for t in tokens[0 if echo else len(prompt) :]]
    assert told["tokens"] == visible
    assert told["text_offset"][:2] == [0, len(visible[0])]


def test_echo_without_an_answer(live):
    choice = live.complete(PROMPT, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert choice["text"] == PROMPT and len(choice["logprobs"]["tokens"]) == len(live.engine.tokenizer.encode(PROMPT))


def test_streams_bring_the_same_text(live):
    parts = live.stream("/v1/completions", prompt=[PROMPT, "import os"], max_tokens=12, temperature=0,
                        stream_options={"include_usage": True})  # fmt: skip
    texts = ["".join(c["text"] for part in parts for c in part["choices"] if c["index"] == n) for n in (0, 1)]
    assert texts == [said(live, PROMPT), said(live, "import os")]
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 24
    assert not any("usage" in part for part in parts[:-1])


def test_chat_is_the_engines(live):
    answer = live.chat(QUESTION, temperature=0)
    expected = live.engine.generate([live.engine.chat_tokens(QUESTION)], SamplingParams(max_new_tokens=400))[0]
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] is None
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(live):
    parts = live.stream("/v1/chat/completions", messages=QUESTION, temperature=0,
                        stream_options={"include_usage": True, "continuous_usage_stats": True})  # fmt: skip
    choices = [c for part in parts for c in part["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
    text = "".join(c["delta"].get("content", "") for c in choices)
    assert text == live.chat(QUESTION, temperature=0)["choices"][0]["message"]["content"]
    counts = [part["usage"]["completion_tokens"] for part in parts[1:]]
    assert counts == sorted(counts) and counts[-1] == parts[-1]["usage"]["completion_tokens"]


def test_chat_logprobs(live):
    content = live.chat(QUESTION, temperature=0, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    tokens = live.engine.generate([live.engine.chat_tokens(QUESTION)], SamplingParams(max_new_tokens=400))[0].token_ids
    assert [bytes(c["bytes"]) for c in content] == [live.engine.tokenizer.token_bytes(t) for t in tokens]
    prompt = live.engine.chat_tokens(QUESTION)
    expected = log_softmax(live.engine.logits([[*prompt, *tokens]]))[len(prompt) - 1 : -1]
    values = [row[t] for row, t in zip(expected, tokens, strict=True)]
    np.testing.assert_allclose([c["logprob"] for c in content], values, atol=2e-5)
    assert all(c["top_logprobs"][0]["logprob"] == c["logprob"] and len(c["top_logprobs"]) == 2 for c in content)


def test_an_answer_goes_on_with_a_prefix(live):
    whole = live.chat(QUESTION, temperature=0)["choices"][0]["message"]["content"]
    begun = whole[:12].strip()
    asked = [*QUESTION, {"role": "assistant", "content": begun, "prefix": True}]
    rest = live.chat(asked, temperature=0, max_tokens=8)["choices"][0]["message"]["content"]
    rendered = live.engine.tokenizer.render_chat(QUESTION) + " " + begun
    tokens = live.engine.tokenizer.encode(rendered, special=False)
    assert rest == live.engine.generate([tokens], replace(GREEDY, max_new_tokens=8))[0].text
    asked[-1].pop("prefix")
    same = live.chat(asked, temperature=0, max_tokens=8, continue_final_message=True)
    assert same["choices"][0]["message"]["content"] == rest


def test_stop_strings_and_tokens(live):
    text = live.complete(PROMPT, max_tokens=30, temperature=0)["choices"][0]["text"]
    stop = text.strip()[5:8]
    choice = live.complete(PROMPT, max_tokens=30, temperature=0, stop=[stop, "never"])["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    tokens = live.engine.generate([PROMPT], GREEDY)[0].token_ids
    choice = live.complete(PROMPT, max_tokens=12, temperature=0, stop_token_ids=[tokens[4]])["choices"][0]
    assert choice["stop_reason"] == tokens[4] and choice["text"] == live.engine.tokenizer.decode(tokens[:4])
    parts = live.stream("/v1/chat/completions", messages=QUESTION, temperature=0, stop="<｜end▁of▁sentence｜>")
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_answers_end_early_only_where_they_may(live):
    natural = live.chat(QUESTION, temperature=0)["usage"]["completion_tokens"]
    on = live.chat(QUESTION, temperature=0, max_tokens=natural + 10, ignore_eos=True)
    assert on["usage"]["completion_tokens"] == natural + 10 and on["choices"][0]["finish_reason"] == "length"
    later = live.chat(QUESTION, temperature=0, max_tokens=natural + 10, min_tokens=natural + 5)
    assert later["usage"]["completion_tokens"] >= natural + 5


def test_biases_and_penalties_change_what_is_said(live):
    first = live.complete(PROMPT, max_tokens=1, temperature=0, logprobs=0)["choices"][0]["logprobs"]["tokens"][0]
    (banned,) = live.engine.tokenizer.encode(first, special=False)
    other = live.complete(PROMPT, max_tokens=1, temperature=0, logit_bias={str(banned): -100})["choices"][0]["text"]
    assert other != first
    repeated = live.complete("a a a a a a", max_tokens=24, temperature=0)["choices"][0]["text"]
    varied = live.complete("a a a a a a", max_tokens=24, temperature=0, frequency_penalty=2.0)["choices"][0]["text"]
    assert len(set(varied.split())) > len(set(repeated.split()))


def test_content_as_parts_and_unknown_fields(live):
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    response = live.post("/v1/chat/completions", messages=parts, temperature=0, store=True, reasoning_effort="low")
    assert response.json()["choices"] == live.chat(QUESTION, temperature=0)["choices"]
    assert response.headers["x-ignored-fields"] == "reasoning_effort, store"


def test_cached_tokens_are_told(live):
    prompt = [5] * 301
    first, second = (live.complete(prompt, max_tokens=2)["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] == 300
    assert (second["prompt_cache_hit_tokens"], second["prompt_cache_miss_tokens"]) == (300, 1)
    assert first["prompt_cache_miss_tokens"] > 1
    salted = live.complete(prompt, max_tokens=2, cache_salt="mine")["usage"]
    assert salted["prompt_cache_hit_tokens"] == 0


def test_the_tokenizers_endpoints(live):
    tokenizer = live.engine.tokenizer
    found = live.post("/tokenize", prompt=PROMPT, return_token_strs=True).json()
    assert found["tokens"] == tokenizer.encode(PROMPT) and found["count"] == len(found["tokens"])
    assert "".join(found["token_strs"][1:]) == PROMPT and found["max_model_len"] == live.engine.limits.max_context
    bare = live.post("/tokenize", prompt=PROMPT, add_special_tokens=False).json()["tokens"]
    assert bare == found["tokens"][1:]
    chat = live.post("/tokenize", messages=QUESTION).json()["tokens"]
    assert chat == live.engine.chat_tokens(QUESTION)
    assert live.post("/detokenize", tokens=bare).json() == {"prompt": PROMPT}
    info = live.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<｜end▁of▁sentence｜>" and "Assistant" in info["chat_template"]


def test_models_and_state(live):
    (card,) = live.client.get("/v1/models").json()["data"]
    assert card["id"] == "model" and card == live.client.get("/v1/models/model").json()
    assert live.client.get("/version").json() == {"version": "1.2.3"}
    assert live.client.get("/health").status_code == live.client.get("/ping").status_code == 200
    assert live.client.head("/metrics").status_code == 200
    assert live.client.get("/", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_metrics_count(live):
    def metrics() -> dict[str, float]:
        lines = live.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}

    label = '{model_name="model"}'
    before = metrics()
    live.complete([7] * 100, max_tokens=5, ignore_eos=True)
    after = metrics()
    grown = {name: after[name] - before[name] for name in after if after[name] != before.get(name, 0)}
    assert grown[f"vllm:prompt_tokens_total{label}"] == 100 and grown[f"vllm:generation_tokens_total{label}"] == 5
    assert grown['vllm:request_success_total{finished_reason="length",model_name="model"}'] == 1
    assert grown[f"vllm:inter_token_latency_seconds_count{label}"] == 4
    times = "time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"
    assert [grown[f"vllm:{name}_seconds_count{label}"] for name in times] == [1] * 5
    assert after[f"vllm:num_requests_running{label}"] == after[f"vllm:kv_cache_usage_perc{label}"] == 0


def test_events_of_several_steps_at_once_are_a_stream_all_the_same(live, monkeypatch):
    """The event loop may be late: then it gets the end of an answer together with what came before."""
    real = Request.__anext__

    async def late(request):
        while sum(1 for event in request._events if event.result) < request._open:
            await asyncio.sleep(0)
        return await real(request)

    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "n": 2, "logprobs": 1}
    whole = live.complete(**asked)["choices"]
    chat = live.chat(QUESTION, temperature=0)["choices"][0]
    monkeypatch.setattr(Request, "__anext__", late)
    parts = [p["choices"][0] for p in live.stream("/v1/completions", **asked)]
    for n in (0, 1):
        mine = [p for p in parts if p["index"] == n]
        assert [p["finish_reason"] for p in mine] == [None] * 11 + ["length"]
        assert "".join(p["text"] for p in mine) == whole[n]["text"]
        assert [t for p in mine for t in p["logprobs"]["tokens"]] == whole[n]["logprobs"]["tokens"]
    parts = [p["choices"][0] for p in live.stream("/v1/chat/completions", messages=QUESTION, temperature=0)]
    assert "".join(p["delta"].get("content", "") for p in parts) == chat["message"]["content"]
    assert [p["finish_reason"] for p in parts].count(None) == len(parts) - 1


def test_a_suffix_goes_around_the_hole(live, tmp_path, monkeypatch):
    """The ids of Coder-V2's own text for it: <fim begin> prefix <fim hole> suffix <fim end>, bos before them."""
    known = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    known.add_special_tokens(list(FIM))
    known.save(str(tmp_path / "tokenizer.json"))
    bos = {"bos_token": "<｜begin▁of▁sentence｜>"}
    monkeypatch.setattr(live.engine, "tokenizer", Tokenizer("fim", tmp_path / "tokenizer.json", bos, {}))
    monkeypatch.setattr(live.engine, "vocab_size", known.get_vocab_size())
    body = CompletionRequest(prompt=["def add(a, b):\n    ", "x"], suffix="\n    return c")
    begin, hole, end = FIM
    expected = [known.encode(f"{begin}{prefix}{hole}{body.suffix}{end}").ids for prefix in body.prompt]
    assert prompt_tokens(live.engine, body) == expected
    with pytest.raises(RequestError, match="as text"):
        prompt_tokens(live.engine, CompletionRequest(prompt=[5, 6], suffix="x"))
