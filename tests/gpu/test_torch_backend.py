"""The torch backend on a GPU: captured decode steps equal eager ones, and both equal the CPU's."""

import numpy as np
import pytest
import torch

from tests import ragged
from tests.runtime.test_torch_backend import LENGTHS, SCHEDULE, bfloat16_graph, sequences  # noqa: F401

SIZES = (1, 2, 4, 8)


def make_runner(graph, device: str, capture: bool):
    from latentrt.runtime.backends.forms import FormChooser
    from latentrt.runtime.backends.torch.graph import StepProgram
    from latentrt.runtime.backends.torch.step import StepRunner

    proto, weights, c = graph
    weights = {name: w.to(device) for name, w in weights.items()}
    shape = (12, 64, c.kv_lora_rank + c.qk_rope_head_dim)
    caches = {
        f"latent_cache.{i}": torch.full(shape, float("nan"), dtype=torch.bfloat16, device=device)
        for i in range(c.num_hidden_layers)
    }
    program = StepProgram(proto, weights, device, "triton" if device == "cuda" else "reference")
    return StepRunner({"absorbed": program}, caches, FormChooser(("absorbed",)), sizes=SIZES, capture=capture)


def logits_of(runner) -> np.ndarray:
    from latentrt.plugins.step_graph import StepBatch

    decode = [[1] * len(LENGTHS)] * 3  # every sequence one token: captured steps
    found = ragged.run(lambda i: runner.step(StepBatch(**i)).logits(), sequences(320), [*decode, *SCHEDULE], _pages())
    return np.concatenate(found)


def _pages() -> ragged.Pages:
    return ragged.Pages(LENGTHS, 64)


@pytest.fixture(scope="module")
def eager(bfloat16_graph):  # noqa: F811
    return logits_of(make_runner(bfloat16_graph, "cuda", False))


def errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


def test_captured_steps_equal_eager_ones(bfloat16_graph, eager):  # noqa: F811
    runner = make_runner(bfloat16_graph, "cuda", True)
    # padding changes which tiles and library kernels are chosen, and so the order of sums
    assert np.median(errors(logits_of(runner), eager)) <= 0.02
    assert runner._graphs, "decode steps were captured"


def test_captured_prompts_equal_eager_ones(bfloat16_graph):  # noqa: F811
    from latentrt.runtime.backends.base import SequenceRows, pack

    prompts, pages = sequences(320), _pages()
    batch = pack([SequenceRows(p, 0, [len(p) - 1]) for p in prompts], pages.table)
    eager = make_runner(bfloat16_graph, "cuda", False).step(batch).logits()
    runner = make_runner(bfloat16_graph, "cuda", True)
    for count in range(4):  # a sequence of one token is a pass of its own
        found = runner.step(batch).logits()
        assert np.median(errors(found, eager)) <= 0.02 and len(runner._prompts) == bool(count)


def test_equals_the_cpu(bfloat16_graph, eager):  # noqa: F811
    expected = logits_of(make_runner(bfloat16_graph, "cpu", False))
    assert np.median(errors(eager, expected)) <= 0.03


def test_bundle_on_the_gpu(tiny_bundle):
    """The float32 graph of the cpu target needs the plain ops: kernels take bf16 and f16."""
    from latentrt.plugins.step_graph import StepBatch
    from latentrt.runtime import backends
    from latentrt.runtime.bundle.reader import Bundle

    bundle = Bundle(tiny_bundle)
    reference = backends.load(bundle, "cpu", cache_tokens=1024)
    options = dict(device="cuda", custom_ops="reference", capture=False, cache_tokens=1024)
    mine = backends.load(bundle, "cpu", backend="torch", **options)
    expected = ragged.run(ragged.engine_step(reference), sequences(320), SCHEDULE, _pages())
    found = ragged.run(lambda i: mine.step(StepBatch(**i)).logits(), sequences(320), SCHEDULE, _pages())
    assert np.median(errors(np.concatenate(found), np.concatenate(expected))) <= 1e-3
