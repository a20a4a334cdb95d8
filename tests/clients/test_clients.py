"""Clients that nobody here wrote: what they return must be what the engine says."""

import json
import os
import re
import subprocess

import numpy as np
import pytest

from latentrt.runtime.sampling_params import SamplingParams
from tests.clients.conftest import PYTHON, QUIET
from tests.conftest import EXAMPLE

pytestmark = pytest.mark.slow

QUESTION = "What does os.path.join do?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = "def read(path):\n"


def answer(engine, new: int = 400) -> str:
    return engine.generate([engine.chat_tokens(MESSAGES)], SamplingParams(max_new_tokens=new))[0].text


def completion(engine, prompt=PROMPT, new: int = 12) -> str:
    return engine.generate([prompt], SamplingParams(max_new_tokens=new))[0].text


def test_openai(run, url, engine):
    found = run(f"""
import asyncio, openai
client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
ask = dict(model="tiny", messages={MESSAGES!r}, temperature=0)
found["models"] = [m.id for m in client.models.list()] + [client.models.retrieve("tiny").id]
found["chat"] = client.chat.completions.create(**ask).choices[0].message.content
chunks = list(client.chat.completions.create(**ask, stream=True, n=2, stream_options={{"include_usage": True}}))
found["streams"] = ["".join(c.delta.content or "" for p in chunks for c in p.choices if c.index == n) for n in (0, 1)]
found["usage"] = chunks[-1].usage.completion_tokens
told = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, max_completion_tokens=4).choices[0].logprobs.content
found["logprobs"] = [t.logprob for t in told]
parts = [{{"role": "user", "content": [{{"type": "text", "text": {QUESTION!r}}}]}}]
found["parts"] = client.chat.completions.create(**(ask | {{"messages": parts}})).choices[0].message.content
begun = {MESSAGES!r} + [{{"role": "assistant", "content": "Return the", "prefix": True}}]
found["prefix"] = client.chat.completions.create(**(ask | {{"messages": begun}}), max_tokens=5).choices[0].message.content
seeded = [client.chat.completions.create(**(ask | {{"temperature": 1}}), seed=5).choices[0].message.content for _ in "ab"]
found["seeded"] = seeded[0] == seeded[1]
complete = dict(model="tiny", temperature=0, max_tokens=12)
found["completion"] = client.completions.create(prompt={PROMPT!r}, **complete).choices[0].text
found["echo"] = client.completions.create(prompt={PROMPT!r}, echo=True, **complete).choices[0].text
found["many"] = [c.text for c in client.completions.create(prompt=["import", "class"], **complete).choices]
found["ids"] = [c.text for c in client.completions.create(prompt=[[0, 9], [0, 5, 6]], **complete).choices]
found["stop"] = client.completions.create(prompt={PROMPT!r}, stop=["\\n    "], **complete).choices[0].finish_reason

async def streams():
    many = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    async def one(n):
        stream = await many.completions.create(prompt={PROMPT!r}, stream=True, **complete)
        return "".join([part.choices[0].text async for part in stream])
    return await asyncio.gather(*map(one, range(24)))

found["concurrent"] = sorted(set(asyncio.run(streams())))
found["errors"] = []
long = [{{"role": "user", "content": "word " * 9000}}]
for broken in ({{"model": "other"}}, {{"messages": []}}, {{"messages": long}}):
    try:
        client.chat.completions.create(**(ask | broken))
    except openai.APIStatusError as error:
        found["errors"].append([type(error).__name__, error.code])
import pydantic
class Place(pydantic.BaseModel):
    days: int
found["parsed"] = client.chat.completions.parse(**ask, response_format=Place).choices[0].message.parsed.days
""", url)  # fmt: skip
    whole = answer(engine)
    assert found["models"] == ["tiny", "tiny"]
    assert found["chat"] == found["parts"] == whole and found["streams"] == [whole, whole]
    tokens = engine.generate([engine.chat_tokens(MESSAGES)], SamplingParams(max_new_tokens=400))[0].token_ids
    assert found["usage"] == 2 * len(tokens) and found["seeded"]
    prompt = engine.chat_tokens(MESSAGES)
    logits = engine.logits([[*prompt, *tokens[:4]]])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found["logprobs"], [row[t] for row, t in zip(expected, tokens, strict=False)], atol=2e-5)
    begun = engine.tokenizer.encode(engine.tokenizer.render_chat(MESSAGES) + " Return the", special=False)
    assert found["prefix"] == completion(engine, begun, 5)
    assert found["completion"] == completion(engine) and found["echo"] == PROMPT + completion(engine)
    assert found["many"] == [completion(engine, "import"), completion(engine, "class")]
    assert found["ids"] == [completion(engine, [0, 9]), completion(engine, [0, 5, 6])]
    assert found["concurrent"] == [completion(engine)]
    assert found["stop"] == ("stop" if "\n    " in completion(engine) else "length")
    assert found["errors"] == [["NotFoundError", "model_not_found"], ["BadRequestError", None],
                               ["BadRequestError", "context_length_exceeded"]]  # fmt: skip
    assert isinstance(found["parsed"], int)


def test_litellm_and_langchain(run, url, engine):
    found = run(f"""
import litellm
ask = dict(model="openai/tiny", messages={MESSAGES!r}, api_base=url + "/v1", api_key="none", temperature=0)
found["litellm"] = litellm.completion(**ask).choices[0].message.content
found["stream"] = "".join(part.choices[0].delta.content or "" for part in litellm.completion(**ask, stream=True))
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="tiny", base_url=url + "/v1", api_key="none", temperature=0)
found["invoke"] = chat.invoke({QUESTION!r}).content
found["langchain stream"] = "".join(part.content for part in chat.stream({QUESTION!r}))
found["batch"] = [message.content for message in chat.batch([{QUESTION!r}] * 2)]
""", url)  # fmt: skip
    whole = answer(engine)
    assert found == {"litellm": whole, "stream": whole, "invoke": whole, "langchain stream": whole, "batch": [whole] * 2}


@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_lm_eval(run, url, engine, tmp_path, tokenizer):
    """Log likelihoods of choices, and an answer, on a task of our own; what lm-eval writes down must be the engine's."""
    cases = [{"text": "import os\nprint(os.", "a": "path", "b": "zebra"}, {"text": "def main(", "a": "self", "b": "8"}]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    files = {"data_files": {"test": str(tmp_path / "cases.jsonl")}}
    data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    choices = data | {"task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "target_delimiter": "",
                      "doc_to_choice": "{{[a, b]}}", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}  # fmt: skip
    until = data | {"task": "answers", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{a}}",
                    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.0},
                    "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    for task in (choices, until):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    arguments = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend={tokenizer},num_concurrent=2,max_retries=1"
    arguments += f",tokenizer={EXAMPLE}" if tokenizer == "huggingface" else ""
    options = {"--model": "local-completions", "--model_args": arguments, "--include_path": str(tmp_path),
               "--tasks": "choices,answers", "--output_path": str(tmp_path / "out")}  # fmt: skip
    command = [str(PYTHON), "-m", "lm_eval", "--log_samples", *(part for option in options.items() for part in option)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | QUIET)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    samples = {name: [json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}_*")).read_text().splitlines()]
               for name in ("choices", "answers")}  # fmt: skip
    for sample in samples["choices"]:
        for name, (value, _) in zip("ab", sample["filtered_resps"], strict=True):
            case = sample["doc"]
            texts = case["text"], case["text"] + case[name]
            before, whole = (engine.tokenizer.encode(text, special=False) for text in texts)  # lm-eval gives ids, without bos
            logits = engine.logits([whole])[:-1].astype(np.float64)
            told = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = sum(told[n - 1, whole[n]] for n in range(len(before), len(whole)))
            assert float(value) == pytest.approx(expected, abs=1e-4)
    for sample in samples["answers"]:
        text = completion(engine, engine.tokenizer.encode(sample["doc"]["text"], special=False), 8)
        assert sample["filtered_resps"][0] == text.partition("\n")[0]


def test_a_fuzzer_finds_nothing(run, url, tmp_path):
    """schemathesis on the server's own OpenAPI: no status 500, no answer that does not fit its schema."""
    strict = "unsupported_method,positive_data_acceptance"  # OpenAPI cannot say all rules
    command = [str(PYTHON.parent / "st"), "run", f"{url}/openapi.json", "--max-examples", "25", "--seed", "3",
               "--phases", "fuzzing", "--exclude-checks", strict]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | QUIET)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 100
