"""Generation on real bundles: the tokens of transformers' greedy generate, whatever the batch, the chunk or the pages."""

import subprocess
import sys
from collections import deque
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import latentrt
from latentrt.runtime import backends
from latentrt.runtime.api import Engine
from latentrt.runtime.backends.base import BackendOptions
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.chat import Conversation
from latentrt.runtime.engine.sampler import SamplingParams
from latentrt.runtime.errors import BundleError, RequestError
from tests import checkpoints
from tests.conftest import EXAMPLE, VOCAB_SIZE

NEW = 40
TEXTS = ["def main():\n    ", "import", "Raises ValueError if the argument", "x"]


@pytest.fixture(scope="module")
def plain_bundle(traced, tmp_path_factory):
    """No q_lora_rank, greedy routing, no dense layer, default RoPE; without a tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    changes = {"q_lora_rank": None, "topk_method": "greedy", "first_k_dense_replace": 0, "num_hidden_layers": 2}
    checkpoints.write(folder / "checkpoint", seed=3, rope_parameters=checkpoints.PLAIN_ROPE, **changes)
    return traced.build_once("plain", folder / "checkpoint", folder / "bundle", "cpu", "fp32")


@pytest.fixture(scope="module")
def engine(tiny_bundle) -> Engine:
    return latentrt.load(tiny_bundle)


@pytest.fixture(scope="module")
def example(example_bundle) -> Engine:
    return latentrt.load(example_bundle)


def check_greedy(model, prompts: list[list[int]], results) -> None:
    """Every token is the largest of transformers' logits after what came before it: so is the whole greedy answer."""
    for prompt, result in zip(prompts, results, strict=True):
        logits = checkpoints.reference_logits(model, [*prompt, *result.token_ids[:-1]])
        assert result.token_ids == tuple(logits[len(prompt) - 1 :].argmax(-1).tolist())


@torch.no_grad()
def generated(model, prompt: list[int], new: int) -> tuple[int, ...]:
    """transformers' own greedy answer; stops after its eos token."""
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                         max_new_tokens=new, pad_token_id=1)  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


def random_prompts(lengths: list[int], vocab_size: int) -> list[list[int]]:
    return checkpoints.random_tokens(lengths, seed=len(lengths), vocab_size=vocab_size)


def test_equals_transformers_past_the_original_context(engine, tiny_checkpoint):
    model = checkpoints.reference(tiny_checkpoint)
    prompts = random_prompts([1, 17, 64, 100], VOCAB_SIZE)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
    check_greedy(model, prompts, results)
    assert results[1].token_ids[:10] == generated(model, prompts[1], 10)


@pytest.mark.slow
def test_equals_transformers_without_q_lora_yarn_and_groups(plain_bundle):
    model = checkpoints.reference(plain_bundle.parent / "checkpoint")
    prompts = random_prompts([2, 9, 33], checkpoints.CONFIG["vocab_size"])
    results = latentrt.load(plain_bundle).generate(prompts, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    check_greedy(model, prompts, results)
    assert all(r.text is None for r in results)


@pytest.mark.slow
def test_equals_transformers_on_the_example(example):
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    prompts = [example.prompt_tokens(text) for text in TEXTS]
    results = example.generate(TEXTS, SamplingParams(max_new_tokens=NEW))
    check_greedy(model, prompts, results)
    assert [r.text for r in results] == [example.tokenizer.decode(r.token_ids) for r in results]


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.95, "repetition_penalty": 1.1}])
def test_a_batch_gives_what_each_prompt_gives_alone(example, params):
    chosen = SamplingParams(max_new_tokens=NEW, **params)
    together = example.generate(TEXTS, chosen)
    alone = [example.generate([text], chosen)[0] for text in TEXTS]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_small_chunks_and_a_full_cache_change_nothing(engine, tiny_bundle):
    prompts = random_prompts([100, 70, 5], VOCAB_SIZE)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    expected = [r.token_ids for r in engine.generate(prompts, params)]
    tight = latentrt.load(tiny_bundle, cache_tokens=192)
    chunked = Engine(tight.bundle, tight.backend, chunk=7)
    assert [r.token_ids for r in chunked.generate(prompts, params)] == expected
    assert chunked.loop.schedulers.ranks[0].cache.free_tokens == 192


def test_unwritten_cache_does_not_leak(tiny_bundle, engine):
    poisoned = latentrt.load(tiny_bundle)
    for cache in poisoned.backend.caches:
        cache.fill(np.nan)
    prompts = random_prompts([3, 66, 130], VOCAB_SIZE)
    params = SamplingParams(max_new_tokens=10)
    assert poisoned.generate(prompts, params)[1].token_ids == engine.generate(prompts, params)[1].token_ids
    np.testing.assert_array_equal(poisoned.logits(prompts), engine.logits(prompts))
    assert any(np.isnan(cache).any() for cache in poisoned.backend.caches)  # the buffers are the ones that the graph reads


def test_logits_equal_transformers_at_all_positions(engine, tiny_checkpoint):
    model = checkpoints.reference(tiny_checkpoint)
    lists = random_prompts([1, 256, 100, 200], VOCAB_SIZE)  # 200 begins in one step and ends in the next
    expected = np.concatenate([checkpoints.reference_logits(model, tokens).numpy() for tokens in lists])
    blocks = list(engine.logit_blocks(lists))
    assert max(map(len, blocks)) <= 256
    np.testing.assert_allclose(engine.logits(lists), expected, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(np.concatenate(blocks), engine.logits(lists))


def test_the_context_ends_an_answer(engine):
    limit = engine.limits.max_context
    result = engine.generate(random_prompts([limit - 3], VOCAB_SIZE), SamplingParams(max_new_tokens=9, ignore_eos=True))[0]
    assert (result.finish_reason, len(result.token_ids)) == ("context", 3)
    with pytest.raises(RequestError, match=f"prompt 0 has {limit + 1} tokens, accepted: up to {limit}"):
        engine.generate(random_prompts([limit + 1], VOCAB_SIZE))


@pytest.mark.slow
def test_the_end_of_sequence_token_stops_and_is_not_in_the_text(example):
    answer = example.generate([TEXTS[0]], SamplingParams(max_new_tokens=20, ignore_eos=True))[0]
    example.eos_ids, before = frozenset([answer.token_ids[5]]), example.eos_ids
    try:
        at = answer.token_ids.index(answer.token_ids[5])
        result = example.generate([TEXTS[0]], SamplingParams(max_new_tokens=20))[0]
    finally:
        example.eos_ids = before
    assert (result.finish_reason, result.token_ids) == ("stop", answer.token_ids[: at + 1])
    assert result.text == example.tokenizer.decode(answer.token_ids[:at])


@pytest.mark.slow
def test_stop_strings_end_the_text_before_them(example):
    full = example.generate([TEXTS[0]], SamplingParams(max_new_tokens=30))[0]
    for start, length in ((3, 4), (11, 1), (17, 7)):
        stop = full.text[start : start + length]
        events = list(example.stream([TEXTS[0]], SamplingParams(max_new_tokens=30, stop=(stop,))))
        result = events[-1].result
        assert result.finish_reason == "stop" and result.text == full.text[: full.text.index(stop)]
        assert "".join(event.text for event in events) == result.text
        assert result.token_ids == full.token_ids[: len(result.token_ids)]


def test_a_stop_string_that_is_a_special_token_stops(engine, monkeypatch):
    """`decode` leaves special tokens out, so only the token itself can tell."""
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    full = engine.generate([[5, 6, 7]], params)[0]
    at = next(n for n in range(3, 20) if full.token_ids[n] not in full.token_ids[:n])
    monkeypatch.setitem(vars(engine.tokenizer), "hidden_tokens", {full.token_ids[at]: "<|EOT|>"})
    result = engine.generate([[5, 6, 7]], replace(params, stop="<|EOT|>"))[0]
    assert (result.finish_reason, result.token_ids) == ("stop", full.token_ids[: at + 1])
    assert result.text == engine.tokenizer.decode(full.token_ids[:at])


@pytest.mark.slow
def test_events_carry_every_token_and_all_text(example):
    seen = []
    results = example.generate(TEXTS, [SamplingParams(max_new_tokens=n) for n in (1, 5, 9, 20)], seen.append)
    for index, result in enumerate(results):
        mine = [event for event in seen if event.index == index]
        assert tuple(event.token for event in mine) == result.token_ids
        assert "".join(event.text for event in mine) == result.text
        assert [event.result for event in mine] == [None] * (len(mine) - 1) + [result]
        assert result.timings.prefill_seconds > 0 and asdict(result)["timings"]["queue_seconds"] >= 0


@pytest.mark.slow
def test_a_bundle_without_tokenizer_takes_token_ids_only(plain_bundle):
    engine = latentrt.load(plain_bundle)
    assert engine.logits([[1, 2, 3]]).shape == (3, engine.vocab_size)
    with pytest.raises(BundleError, match="has no tokenizer; give token ids"):
        engine.generate(["text"])
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        engine.generate([[1]], SamplingParams(stop="x"))
    with pytest.raises(BundleError, match="has no tokenizer"):
        Conversation(engine, SamplingParams())


@pytest.mark.slow
def test_a_conversation_computes_only_what_is_new(example):
    params = SamplingParams(max_new_tokens=16)
    conversation = Conversation(example, params, system="You know Python.")
    results = [list(conversation.say(text))[-1].result for text in ("What does os.path.join do?", "And shutil.copy?")]
    assert results[0].reused_tokens == 0
    assert results[1].reused_tokens >= results[0].prompt_tokens + 1
    messages = conversation.messages[:-1]
    anew = example.generate([example.chat_tokens(messages)], params)[0]
    assert anew.token_ids == results[1].token_ids
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "You know Python."}]
    assert example.loop.schedulers.ranks[0].cache.free_tokens == example.loop.schedulers.ranks[0].cache.capacity


@pytest.mark.slow
def test_a_stopped_answer_stays_in_the_history(example):
    conversation = Conversation(example, SamplingParams(max_new_tokens=50, ignore_eos=True))
    events = conversation.say("Hello")
    said = "".join(next(events).text for _ in range(6))
    events.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said.strip()}
    assert list(conversation.say("Go on"))[-1].result.reused_tokens > 0
    before = list(conversation.messages)
    with pytest.raises(RequestError, match=r"the conversation has \d+ tokens.*/reset"):
        conversation.say("word " * example.limits.max_context)
    assert conversation.messages == before
    conversation.reset()


@pytest.mark.parametrize("options", [{"cache_tokens": 0}, {"cache_tokens": 10**15}, {"threads": -1}])
def test_wrong_load_options_are_named(tiny_bundle, options):
    name, value = next(iter(options.items()))
    with pytest.raises(RequestError, match=f"{name} is {value}"):
        latentrt.load(tiny_bundle, **options)


def test_what_is_empty_is_said_in_its_own_words(engine, monkeypatch):
    with pytest.raises(RequestError, match="prompt is empty; give one token id or more"):
        engine.prompt_tokens([])
    monkeypatch.setattr(engine, "_encode", lambda text, where: [])  # a tokenizer that adds no bos
    with pytest.raises(RequestError, match="prompt is empty; give some text"):
        engine.prompt_tokens("")


@pytest.mark.parametrize(("device", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_device_of_a_gpu_target(device, number):
    bundle = SimpleNamespace(target=lambda name: ("sm89", SimpleNamespace(backend="tensorrt_rtx")))
    options = BackendOptions(device=device)
    assert backends.check(bundle, None, None, options) == "tensorrt_rtx" and options.gpu == number
    assert backends.check(bundle, None, "torch", BackendOptions(device="cpu")) == "torch"
    with pytest.raises(RequestError, match=r"'cpu', but target sm89 runs on a GPU .*choose backend torch"):
        backends.check(bundle, None, None, BackendOptions(device="cpu"))


def test_running_on_the_cpu_imports_neither_torch_nor_the_exporter(tiny_bundle):
    code = f"""
import sys, latentrt
from latentrt.runtime.sampling_params import SamplingParams
import latentrt.cli, latentrt.runtime.chat
engine = latentrt.load({str(tiny_bundle)!r})
assert engine.generate(["a"], SamplingParams(max_new_tokens=2))
print(sorted(m for m in sys.modules if m in ("torch", "transformers", "onnx") or m.startswith("latentrt.export.models")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_answers_end_where_those_of_transformers_end(engine, tiny_checkpoint):
    model = checkpoints.reference(tiny_checkpoint)
    prompt = random_prompts([12], VOCAB_SIZE)[0]
    third = generated(model, prompt, 3)[2]
    model.generation_config.eos_token_id = third
    engine.eos_ids, before = frozenset([third]), engine.eos_ids
    try:
        result = engine.generate([prompt], SamplingParams(max_new_tokens=9))[0]
    finally:
        engine.eos_ids = before
    assert (result.token_ids, result.finish_reason) == (generated(model, prompt, 9), "stop")


def test_the_vocabulary_is_that_of_the_graph(tiny_bundle, engine):
    outputs = {o.name: o.shape for o in Bundle(tiny_bundle).target()[1].outputs}
    assert outputs["logits"][-1] == engine.vocab_size == VOCAB_SIZE


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "torch"])
def test_what_is_reused_changes_no_token(example_bundle, backend):
    """A prompt again, one that leaves it in the middle of a page (copied), and many that begin like it at once."""
    text = (EXAMPLE / "held_out.txt").read_text()
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    with latentrt.load(example_bundle, backend=backend) as fresh, latentrt.load(example_bundle, backend=backend) as engine:
        prompt = fresh.tokenizer.encode(text)[:301]
        prompts = [prompt, prompt, prompt[:250] + prompt[5:40], *([*prompt[:200], n] for n in range(7, 11))]
        expected = []
        for p in prompts:
            sequence = fresh.sequence(p, params, deque(), salt=str(len(expected)))
            expected.append(list(fresh.loop.stream([sequence]))[-1].result)
        found = [engine.generate([p], params)[0] for p in prompts[:3]] + engine.generate(prompts[3:], params)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert [r.reused_tokens for r in expected] == [0] * 7
    assert [r.reused_tokens for r in found] == [0, 300, 250, 200, 200, 200, 200]
