"""lm-eval's local-completions on a task of our own, with both of its tokenizers: it writes down what the engine says."""

import json

import pytest

from tests.clients.truths import answer, logprobs
from tests.conftest import EXAMPLE

pytestmark = pytest.mark.slow

CASES = [{"text": "import os\nprint(os.", "a": "path", "b": "zebra"}, {"text": "def main(", "a": "self", "b": "8"},
         {"text": "for Ä in", "a": " range(3):\n    pass", "b": ":"}]  # fmt: skip


@pytest.fixture
def tasks(tmp_path) -> str:
    """A folder with the tasks choices and answers."""
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, CASES)))
    files = {"data_files": {"test": str(tmp_path / "cases.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    data = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{text}}"}
    choices = data | {"task": "choices", "output_type": "multiple_choice", "target_delimiter": "",
                      "doc_to_choice": "{{[a, b]}}", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}  # fmt: skip
    answers = data | {"task": "answers", "output_type": "generate_until", "doc_to_target": "{{a}}",
                      "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.0},
                      "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    for task in (choices, answers):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    return str(tmp_path)


@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_lm_eval(lm_eval, served, engine, tasks, tokenizer):
    options = {"model": served.model, "base_url": f"{served.url}/v1/completions", "tokenizer_backend": tokenizer,
               "num_concurrent": 2, "max_retries": 1}  # fmt: skip
    options |= {"tokenizer": str(EXAMPLE)} if tokenizer == "huggingface" else {}
    samples = lm_eval.call("evaluate", options, tasks, ["choices", "answers"])
    assert [sample["doc"] for sample in samples["choices"]] == [sample["doc"] for sample in samples["answers"]] == CASES
    for case, sample in zip(CASES, samples["choices"], strict=True):
        for name, (value, greedy) in zip("ab", sample["filtered_resps"], strict=True):
            texts = case["text"], case["text"] + case[name]
            before, whole = (engine.tokenizer.encode(text, special=False) for text in texts)  # lm-eval gives ids, without bos
            rows, places = logprobs(engine, whole), range(len(before), len(whole))
            assert float(value) == pytest.approx(sum(rows[n - 1, whole[n]] for n in places), abs=1e-4)
            assert greedy == all(rows[n - 1].argmax() == whole[n] for n in places)
    for case, sample in zip(CASES, samples["answers"], strict=True):
        prompt = engine.tokenizer.encode(case["text"], special=False)
        assert sample["filtered_resps"][0] == answer(engine, prompt, max_new_tokens=8).text.partition("\n")[0]
