"""lm-eval's local-completions, with both of its tokenizers: the log likelihoods that it writes down are the engine's."""

import json
import subprocess

import pytest

from tests.clients.truths import answer, logprobs
from tests.clients.workers import PYTHON, environment, needed
from tests.conftest import EXAMPLE

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_lm_eval(served, engine, tmp_path, tokenizer):
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
    arguments = f"model={served.model},base_url={served.url}/v1/completions,tokenizer_backend={tokenizer}"
    arguments += ",num_concurrent=2,max_retries=1" + (f",tokenizer={EXAMPLE}" if tokenizer == "huggingface" else "")
    options = {"--model": "local-completions", "--model_args": arguments, "--include_path": str(tmp_path),
               "--tasks": "choices,answers", "--output_path": str(tmp_path / "out")}  # fmt: skip
    command = [str(needed(PYTHON)), "-m", "lm_eval", "--log_samples", *(part for option in options.items() for part in option)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    samples = {name: [json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}_*")).read_text().splitlines()]
               for name in ("choices", "answers")}  # fmt: skip
    for sample in samples["choices"]:
        for name, (value, _) in zip("ab", sample["filtered_resps"], strict=True):
            case = sample["doc"]
            texts = case["text"], case["text"] + case[name]
            before, whole = (engine.tokenizer.encode(text, special=False) for text in texts)  # lm-eval gives ids, without bos
            rows = logprobs(engine, whole)
            expected = sum(rows[n - 1, whole[n]] for n in range(len(before), len(whole)))
            assert float(value) == pytest.approx(expected, abs=1e-4)
    for sample in samples["answers"]:
        prompt = engine.tokenizer.encode(sample["doc"]["text"], special=False)
        text = answer(engine, prompt, max_new_tokens=8).text
        assert sample["filtered_resps"][0] == text.partition("\n")[0]
