"""Packed latent caches on plain ONNX Runtime, built and run: against transformers, and against torch over the same format."""

import shutil

import numpy as np
import pytest
import torch

from latentrt import cli
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.onnxruntime import native
from latentrt.export.models.deepseek_v2 import weights
from latentrt.export.models.deepseek_v2.model import DeepseekV2Step
from latentrt.plugins import cache_formats
from latentrt.plugins.cache_formats import onnx_words, rotation
from latentrt.plugins.cache_formats.integers import Integers
from latentrt.runtime import backends
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import RequestError
from tests import checkpoints, ragged
from tests.builds import build
from tests.conftest import EXAMPLE
from tests.export.conftest import PACKED_KL

pytestmark = pytest.mark.usefixtures("fast_trace")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LENGTHS = [60, 9, 1, 70]
SCHEDULE = [[50, 3, 0, 64], [1, 1, 1, 1], [2, 0, 0, 3]]
# Latents differ in float32's last bits between torch and ONNX Runtime, so that now and then a code is another, one step away:
# measured up to 9e-7 nats on the example, where the format itself costs 4e-4 to 3e-3.
SAME_FORMAT_KL = 1e-5


def tokens(vocab_size: int) -> list[list[int]]:
    return checkpoints.random_tokens(LENGTHS, vocab_size=vocab_size)


def engine_logits(path, **options) -> torch.Tensor:
    bundle = Bundle(path)
    with backends.load(bundle, cache_tokens=640, **options) as engine:
        step = ragged.engine_step(engine)
        pages = ragged.Pages(LENGTHS, engine.target.cache.page_size)
        return log_probs(ragged.run(step, tokens(bundle.manifest.config["vocab_size"]), SCHEDULE, pages))


def torch_logits(folder, name: str) -> torch.Tensor:
    checkpoint, pages = Checkpoint(folder), ragged.Pages(LENGTHS, 64)
    model = DeepseekV2Step(checkpoint.config, name).load_weights(checkpoint.read)
    step = ragged.torch_step(model, pages, cache_formats.get(name).dtype)
    return log_probs(ragged.run(step, tokens(checkpoint.config.vocab_size), SCHEDULE, pages))


def transformers_logits(folder) -> torch.Tensor:
    model = checkpoints.reference(folder)
    return log_probs([checkpoints.reference_logits(model, t).numpy() for t in tokens(model.config.vocab_size)])


def log_probs(logits: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(logits)).double().log_softmax(-1)


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


@pytest.mark.parametrize("name", PACKED_KL)
def test_fp32_with_a_packed_cache(packable, tmp_path, name):
    """A rank of 96, a rope of 8, biases, gains far from 1, over ragged steps that cross a page."""
    build(packable, tmp_path / "b", "cpu", "fp32", cache_format=name)
    found = engine_logits(tmp_path / "b")
    assert kl(torch_logits(packable, name), found) < SAME_FORMAT_KL
    assert kl(transformers_logits(packable), found) < PACKED_KL[name]


@pytest.mark.parametrize("name", PACKED_KL)
def test_the_example_in_fp32(traced, tmp_path, capsys, name):
    """As torch over the same format; and `latentrt info` says what is allocated."""
    path = traced.build_once(f"example.fp32.{name}", EXAMPLE, tmp_path / "b", "cpu", "fp32", cache_format=name)
    assert kl(torch_logits(EXAMPLE, name), engine_logits(path)) < SAME_FORMAT_KL
    assert cli.main(["info", str(path)]) == 0
    c, layout = Bundle(path).manifest.config, cache_formats.get(name)
    size = c["num_hidden_layers"] * layout.bytes_per_token(c["kv_lora_rank"], c["qk_rope_head_dim"])
    assert f"{name}, pages of 64: {size:,} B per token" in " ".join(capsys.readouterr().out.split())
    with backends.load(Bundle(path), cache_tokens=640) as engine:
        assert sum(cache.nbytes for cache in engine.caches) == engine.num_pages * 64 * size


def doubled_scale(real):
    """Of the latent, whose scale comes first of the two."""
    return lambda f, words, dtype, elements: f(
        "Mul", real(f, words, dtype, elements), f.constant([2.0, *[1.0] * (elements - 1)], np.float32)
    )


def swapped_nibbles(real):
    """Of every byte: elements e and e + 1 of the lower plane."""

    def fields(f, words, bits, elements):
        found = real(f, words, bits, elements)
        return f("Gather", found, f.constant(np.arange(elements) ^ 1), axis=-1) if bits == 4 else found

    return fields


def neighbours_slot(real):
    def encode_onnx(self, f, latent, k_pe, sizes):
        rows = real(self, f, latent, k_pe, sizes)
        first, last, end = f.constant([0]), f.constant([-1]), f.constant([2**62])
        return f("Concat", f("Slice", rows, last, end, first), f("Slice", rows, first, last, first), axis=0)

    return encode_onnx


def turned_once_more(real):
    def rotated(c, weight):
        turned = real(c, weight)
        if not weight.name.endswith("w_uk"):
            return turned
        return weights.replace(turned, make=lambda *sources: rotation.rotate(turned.make(*sources)))

    return rotated


@pytest.mark.parametrize(("place", "name", "fault"), [
    (onnx_words, "unpack_halves", doubled_scale), (onnx_words, "fields", swapped_nibbles),
    (Integers, "encode_onnx", neighbours_slot), (weights, "_rotated", turned_once_more),
], ids=["scale", "planes", "neighbour", "rotation"])  # fmt: skip
def test_faults_are_seen(packable, tmp_path, monkeypatch, place, name, fault):
    """Each costs many times what int6 does, so that the tests above catch it."""
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    build(packable, tmp_path / "b", "cpu", "fp32", cache_format="int6")
    assert kl(transformers_logits(packable), engine_logits(tmp_path / "b")) > 10 * PACKED_KL["int6"]


@pytest.mark.parametrize(("precision", "name", "limit"), [
    ("int8", "int6", 0.0022), ("int8", "fp8", 9e-4), ("int4", "int4", 0.013),
])  # fmt: skip
def test_accuracy_exact_with_a_packed_cache(traced, tmp_path, precision, name, limit):
    """Beside the same weights over a float32 cache: what the format costs on these random tokens, twice what was measured."""
    paths = [
        traced.build_once(f"example.{precision}.exact.{cache}", EXAMPLE, tmp_path / cache, "cpu", precision, accuracy="exact",
                          cache_format=cache) for cache in ("float32", name)
    ]  # fmt: skip
    plain, packed = map(engine_logits, paths)
    assert Bundle(paths[1]).target(None)[1].engines["absorbed"].native is None
    assert 0 < kl(plain, packed) < limit


@pytest.fixture(scope="module")
def fast(traced, tmp_path_factory):
    """The example in int8, fast, over int6, which has both graphs."""
    path = tmp_path_factory.mktemp("fast") / "bundle"
    return traced.build_once("example.int8.int6", EXAMPLE, path, "cpu", "int8", cache_format="int6")


@needs_compiler
def test_both_graphs_of_a_bundle_read_the_same_cache(fast):
    """As near to each other as either is to float32 weights: both round activations, each in its own order (2e-3, 1e-3)."""
    bundle = Bundle(fast)
    files = bundle.target(None)[1].engines["absorbed"]
    assert files.native and files.native != files.graph
    own, theirs = (engine_logits(fast, kernels=kernels) for kernels in ("native", "onnxruntime"))
    expected = torch_logits(EXAMPLE, "int6")
    assert kl(expected, own) < 0.004 and kl(expected, theirs) < 0.004 and kl(own, theirs) < 0.004


def test_without_a_compiler_a_packed_cache_is_read_all_the_same(fast, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    with backends.load(Bundle(fast), cache_tokens=640) as backend:
        assert not backend.native
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "latentrt: no own CPU kernels, ONNX Runtime's are slower: g++ is not installed"
    with pytest.raises(RequestError, match=r"kernels is 'native', but g\+\+ is not installed"):
        backends.load(Bundle(fast), cache_tokens=640, kernels="native")


def test_a_recipe_may_keep_absorbed_weights_plain(tmp_path):
    """Of one layer: its attention is ONNX Runtime's in both graphs, beside layers whose is our own."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('plain = ["model.layers.2.self_attn.kv_b_proj"]')
    build(EXAMPLE, tmp_path / "b", "cpu", "int8", cache_format="int6", recipe=recipe)
    expected = torch_logits(EXAMPLE, "int6")
    files = Bundle(tmp_path / "b").target(None)[1].engines["absorbed"]
    assert files.native, "a recipe must not cost own kernels"
    for kernels in ("onnxruntime", *(["native"] if shutil.which("g++") else [])):
        assert kl(expected, engine_logits(tmp_path / "b", kernels=kernels)) < 0.004


def test_a_format_that_own_kernels_do_not_read_needs_none(packable, tmp_path, monkeypatch):
    """As one that was just added."""
    monkeypatch.delitem(native._MLA, "int6")
    build(packable, tmp_path / "b", "cpu", "int8", cache_format="int6")
    assert Bundle(tmp_path / "b").target(None)[1].engines["absorbed"].native is None
    assert kl(transformers_logits(packable), engine_logits(tmp_path / "b")) < 5e-3
