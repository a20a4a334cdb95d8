"""The torch backend against ONNX Runtime on the same bundle, on the CPU; GPU graphs with the plain torch ops."""

import gc
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack, pages_for
from latentrt.runtime.backends.forms import FormChooser
from latentrt.runtime.backends.torch import backend as torch_backend
from latentrt.runtime.backends.torch.graph import StepProgram
from latentrt.runtime.backends.torch.step import StepRunner
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError
from tests import gpu_graphs, ragged

LENGTHS = [37, 5, 64, 1, 130]
# prompt chunks, decode steps, a sequence without new tokens, a mixture
SCHEDULE = [[20, 5, 64, 1, 100], [1, 0, 0, 0, 1], [1, 0, 0, 0, 20]]


def sequences(vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in LENGTHS]


def single(program, caches, **options) -> StepRunner:
    """A runner of one form."""
    return StepRunner({"absorbed": program}, caches, FormChooser(("absorbed",)), **options)


def step_of(backend):
    for cache in backend.caches:
        cache.fill_(float("nan"))
    return lambda inputs: backend.step(StepBatch(**inputs)).logits()


@pytest.fixture(scope="module")
def pair(tiny_bundle):
    """The cpu target on ONNX Runtime, and interpreted by torch."""
    bundle = Bundle(tiny_bundle)
    return [backends.load(bundle, "cpu", backend=b, cache_tokens=1024) for b in ("onnxruntime", "torch")]


def test_equals_onnx_runtime(pair):
    reference, mine = pair
    pages = ragged.Pages(LENGTHS, 64)
    tokens = sequences(320)
    expected = ragged.run(ragged.engine_step(reference), tokens, SCHEDULE, pages, padding=(0, 3))
    found = ragged.run(step_of(mine), tokens, SCHEDULE, pages, padding=(0, 3))
    for e, f in zip(expected, found, strict=True):
        assert np.abs(f - e).max() <= 1e-5 * np.abs(e).max()


def test_chunks_change_nothing(pair):
    tokens, pages = sequences(320, 1), ragged.Pages(LENGTHS, 64, seed=1)
    whole = ragged.run(step_of(pair[1]), tokens, [], pages)
    for a, b in zip(whole, ragged.run(step_of(pair[1]), tokens, SCHEDULE, pages), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


@pytest.fixture(scope="module")
def bfloat16_graph(tiny_checkpoint, traced):
    return gpu_graphs.bfloat16(tiny_checkpoint, traced)


@pytest.fixture(scope="module")
def float32_logits(tiny_bundle):
    backend = backends.load(Bundle(tiny_bundle), "cpu", cache_tokens=1024)
    return ragged.run(ragged.engine_step(backend), sequences(320), SCHEDULE, ragged.Pages(LENGTHS, 64))


@pytest.fixture(scope="module")
def float8_graph(tiny_checkpoint, bfloat16_graph):
    return gpu_graphs.quantized(bfloat16_graph, tiny_checkpoint)


@pytest.fixture(scope="module")
def static_float8_graph(tiny_checkpoint, bfloat16_graph):
    """The same with one constant scale of activations for every weight: 0.01, so that 4.48 is the largest of them."""
    return gpu_graphs.quantized(bfloat16_graph, tiny_checkpoint, dict.fromkeys(bfloat16_graph[1], 0.01))


def row_errors(graph, expected: list[np.ndarray], fuse: bool) -> np.ndarray:
    """Relative error of every row of logits, of a graph run by the plain torch ops."""
    proto, weights, c = graph
    width = c.kv_lora_rank + c.qk_rope_head_dim
    names = [f"latent_cache.{i}" for i in range(c.num_hidden_layers)]
    caches = {name: torch.full((12, 64, width), float("nan"), dtype=torch.bfloat16) for name in names}
    runner = single(StepProgram(proto, weights, "cpu", "reference", fuse), caches)
    found = ragged.run(lambda i: runner.step(StepBatch(**i)).logits(), sequences(320), SCHEDULE, ragged.Pages(LENGTHS, 64))
    expected, found = np.concatenate(expected), np.concatenate(found)
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_bfloat16_graph(bfloat16_graph, float32_logits, fuse):
    errors = row_errors(bfloat16_graph, float32_logits, fuse)
    # three layers of bfloat16: 8 bits, some dozen roundings; a router's near tie may fall to the other side
    assert np.median(errors) <= 0.03 and np.quantile(errors, 0.9) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_float8_graph(float8_graph, float32_logits, fuse):
    errors = row_errors(float8_graph, float32_logits, fuse)
    # e4m3 has 4 bits: 2 to 4 % a product of rows and weights, about a dozen in a row
    assert np.median(errors) <= 0.2


@pytest.mark.slow
def test_static_scales_fused_equal_plain(static_float8_graph, float32_logits):
    plain, fused = (row_errors(static_float8_graph, float32_logits, fuse) for fuse in (False, True))
    assert np.median(fused) <= 0.2 and abs(np.median(fused) - np.median(plain)) <= 0.01


@pytest.mark.slow
def test_float8_products_are_fused(float8_graph, static_float8_graph):
    for (proto, *_), scales in ((float8_graph, {"smallest": 1e-10}), (static_float8_graph, {"static": 0.01})):
        fused = fused_nodes(proto)
        assert not {n.op_type for n in fused} & {"QuantizeLinear", "DequantizeLinear"}
        found = [n.attributes for n in fused if n.op_type == "Float8Linear"]
        assert found and all(a == pytest.approx(scales) for a in found)


@pytest.mark.slow
def test_rows_of_products_are_quantized_by_what_makes_them(float8_graph):
    """All but o_proj's, which products head by head make."""
    from latentrt.runtime.backends.torch import quantizing as torch_quantizing

    proto, _, c = float8_graph
    products = [n for n in torch_quantizing.quantize(fused_nodes(proto)) if n.op_type == "Float8Linear"]
    assert sum(len(n.inputs) == 3 for n in products) == c.num_hidden_layers < len(products) / 2


@pytest.mark.slow
def test_what_a_layer_runs(bfloat16_graph):
    """Small products and rotations of attention are groups; nothing is turned or cast outside of one."""
    proto, _, c = bfloat16_graph
    count = Counter(n.op_type for n in fused_nodes(proto) if n.name.startswith("model.layers."))
    moe = sum(map(c.is_moe_layer, range(c.num_hidden_layers)))
    assert (count["Latent"], count["MatMulByHead"]) == (c.num_hidden_layers, 2 * c.num_hidden_layers)
    assert count["WideLinear"] == moe
    assert not count["Rotate"] + count["Transpose"] + count["MatMul"] + count["Cast"]


def fused_nodes(proto) -> list:
    from latentrt.runtime.backends.torch import fusion as torch_fusion
    from latentrt.runtime.backends.torch import graph as torch_graph

    nodes = [torch_graph._node(n) for n in proto.graph.node]
    return torch_fusion.fuse(nodes, torch_graph._constants(proto, nodes), [o.name for o in proto.graph.output])


@pytest.mark.slow
def test_products_of_one_input_are_merged(bfloat16_graph, float8_graph):
    """q_a_proj with kv_a_proj in every layer, gate_proj with up_proj in every MLP and shared expert."""
    from latentrt.runtime.backends.torch import merging as torch_merging

    for (proto, weights, c), kind in ((bfloat16_graph, "Gemm"), (float8_graph, "Float8Linear")):
        fused = fused_nodes(proto)
        merged = torch_merging.merge(fused, weights)
        count = [sum(n.op_type == kind for n in kinds) for kinds in (fused, merged)]
        assert count[0] - count[1] == 2 * c.num_hidden_layers
    weight = torch.randn(4, 16).to(torch.float8_e4m3fn)
    assert torch.equal(torch_merging.stack(weight, weight)[4:].view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.slow
def test_bundle_of_a_gpu_target(bfloat16_graph, float32_logits, tmp_path):
    """A plan's bundle keeps the ONNX graph beside it, with weights as inputs; torch runs that."""
    from safetensors.torch import save

    from latentrt.runtime.bundle.manifest import TensorInfo
    from latentrt.runtime.bundle.reader import MANIFEST
    from tests.runtime.tensorrt_fakes import Builder

    proto, weights, c = bfloat16_graph
    builder = Builder(tmp_path / "bundle")
    width, names = c.kv_lora_rank + c.qk_rope_head_dim, [i.name for i in proto.graph.input]
    manifest = builder.write().manifest
    old = manifest.targets["sm89"]
    onnx = builder.add(".onnx", proto.SerializeToString())
    cache = old.cache.model_copy(update=dict(width=width, layers=c.num_hidden_layers))
    target = old.model_copy(update=dict(
        engines={"absorbed": old.engines["absorbed"].model_copy(update=dict(onnx=onnx))},
        weight_inputs=list(weights), cache=cache,
        inputs=[TensorInfo(name=n, dtype="", shape=[]) for n in names if n not in weights],
    ))  # fmt: skip
    sets = {"w": manifest.weight_sets["w"].model_copy(update=dict(files=[builder.add(".safetensors", save(weights))]))}
    manifest = manifest.model_copy(update=dict(targets={"sm89": target}, weight_sets=sets))
    (builder.folder / MANIFEST).write_text(manifest.model_dump_json())
    backend = backends.load(Bundle(builder.folder), "sm89", backend="torch", device="cpu", cache_tokens=704)
    found = ragged.run(step_of(backend), sequences(320), SCHEDULE, ragged.Pages(LENGTHS, 64))
    expected, found = np.concatenate(float32_logits), np.concatenate(found)
    assert np.median(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)) <= 0.03


def test_fusing_changes_nothing_in_float32(tiny_bundle, float32_logits):
    from latentrt.runtime.backends.torch import backend as torch_backend
    from latentrt.runtime.backends.torch import graph as torch_graph

    bundle = Bundle(tiny_bundle)
    _, target = bundle.target("cpu")
    model = torch_graph.read(bundle.file(target.engines["absorbed"].graph))
    weights = torch_backend.load_weights(bundle, target, model, torch.device("cpu"))
    programs = [StepProgram(model, weights, "cpu", "reference", fuse) for fuse in (False, True)]
    assert len(programs[1]._calls) < 0.6 * len(programs[0]._calls)
    caches = {f"latent_cache.{i}": torch.full((12, 64, target.cache.width), float("nan")) for i in range(target.cache.layers)}
    runner = single(programs[0], caches)  # the fused one is what every other test runs
    found = ragged.run(lambda i: runner.step(StepBatch(**i)).logits(), sequences(320), SCHEDULE, ragged.Pages(LENGTHS, 64))
    for e, f in zip(float32_logits, found, strict=True):
        assert np.abs(f - e).max() <= 1e-5 * np.abs(e).max()


def test_refusals(tiny_bundle, monkeypatch):
    bundle = Bundle(tiny_bundle)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BundleError, match="sees no CUDA GPU"):
        backends.load(bundle, "cpu", backend="torch", device="cuda")
    with pytest.raises(BundleError, match="accepted: onnxruntime, torch"):
        backends.load(bundle, "cpu", backend="tensorrt")
    with pytest.raises(BundleError, match="no backend 'jax'"):
        backends.load(bundle, "cpu", backend="jax")


class OneGpu:
    """The part of torch.cuda that says which GPU is current; a step asks that it is `wanted`."""

    def __init__(self, wanted: int):
        self.wanted, self.stack = wanted, [0]

    @contextmanager
    def device(self, device):
        self.stack.append(torch.device(device).index)
        yield
        self.stack.pop()

    def check(self, *given):
        assert self.stack[-1] == self.wanted
        return given[0] if given else None


def test_a_step_runs_on_its_own_gpu_whatever_is_current(monkeypatch):
    """Triton and CUDA graphs go to the current GPU, not to that of the tensors."""
    from latentrt.runtime.backends.torch import step as torch_step

    gpu, program = OneGpu(1), SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(torch_step.torch.cuda, "device", gpu.device)
    runner = StepRunner({"absorbed": program}, {}, FormChooser(("absorbed",)), capture=False)
    on_gpu = SimpleNamespace(device=program.device, __getitem__=None)
    monkeypatch.setattr(runner, "_logits", lambda batch, capture: gpu.check(torch.zeros(1, 4)))
    result = runner.step(pack([SequenceRows([3], 0, [0])], np.array([[1]])))
    assert gpu.stack == [0], "and the thread has its own back"
    result._on_device = on_gpu
    monkeypatch.setattr(torch_step, "_to_host", lambda logits: gpu.check("logits"))
    monkeypatch.setattr(torch_step.DeviceResult, "_greedy", lambda self: gpu.check("largest"))
    assert (result.logits(), result.greedy()) == ("logits", "largest")
    backend = torch_backend.TorchBackend.__new__(torch_backend.TorchBackend)
    page = SimpleNamespace(copy_=gpu.check)
    backend.device, backend.caches = program.device, [{1: page, 2: page}]
    backend.copy_pages([(1, 2)])


@pytest.mark.parametrize(("capability", "precision", "message"), [
    ((7, 5), "bf16", "cuda:0 is sm75, our kernels are for sm80, sm86"),
    ((8, 6), "fp8", "cuda:0 is sm86, which has no FP8 tensor cores"),
    ((8, 6), "fp8-int4", "and precision is fp8-int4; build precision bf16-int4 for it"),
    ((8, 9), "fp8", None),
    ((8, 6), "bf16", None),
])  # fmt: skip
def test_a_gpu_without_kernels_is_refused_at_load(capability, precision, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    target = SimpleNamespace(precision=precision)
    with pytest.raises(BundleError, match=message) if message else nullcontext():
        torch_backend._check_gpu("bundle: target sm89", target, torch.device("cuda:0"))


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert torch_backend.resolve_device("cuda") == torch.device("cuda:1")
    with pytest.raises(BundleError, match="device cuda:2: PyTorch sees 2, accepted: cuda:0, cuda:1"):
        torch_backend.resolve_device("cuda:2")


@pytest.mark.parametrize(("version", "capability", "tried"), [
    ("2.11.0+cu130", (8, 9), False), ("2.12.0", (8, 9), True), ("2.11.0", (9, 0), True), ("2.9.1", (12, 0), True),
])  # fmt: skip
def test_products_that_take_another_streams_workspace_are_not_used(version, capability, tried, monkeypatch):
    from latentrt.runtime.backends.torch import fused_ops

    asked = []
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: asked.append(1))
    fused_ops._has_row_scaled_products.cache_clear()
    assert fused_ops._has_row_scaled_products(torch.device("cpu")) == tried == bool(asked)
    fused_ops._has_row_scaled_products.cache_clear()


def test_weights_that_were_merged_are_freed(bfloat16_graph):
    """A product of merged weights leaves no copy of the originals behind."""
    proto, weights, _ = bfloat16_graph
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    kept = {name: weakref.ref(tensor) for name, tensor in weights.items()}
    program, size = StepProgram(proto, weights, "cpu", "reference"), sum(t.nbytes for t in weights.values())
    weights.clear()
    gc.collect()
    freed = [name for name, found in kept.items() if found() is None]
    assert any("q_proj" in n or "gate_proj" in n or "q_a_proj" in n for n in freed), freed
    held = sum({t.data_ptr(): t.nbytes for t in program._template if t is not None}.values())
    assert held <= 1.01 * size


def test_memory_for_steps_is_taken_before_the_cache(tiny_bundle, monkeypatch):
    """The largest prompt runs in every form, on one page, after what loading took was given back."""
    target, calls = Bundle(tiny_bundle).manifest.targets["cpu"], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch_backend, "StepRunner", lambda programs, small, choose, capture: SimpleNamespace(
        step=lambda batch: calls.append((choose.forms, len(batch.input_ids), len(batch.logit_rows), batch.block_table.shape,
                                         int(batch.block_table.max()), {len(c) for c in small.values()}))))  # fmt: skip
    torch_backend._take_memory({"absorbed": None, "expanded": None}, target, torch.device("cpu"))
    rows, pages = target.limits.max_batch_tokens, target.limits.max_pages(target.cache.page_size)
    assert calls == ["empty", *(((form,), rows, 256, (1, pages), 0, {1}) for form in ("absorbed", "expanded"))]


def test_missing_weight_is_named(tiny_bundle, tmp_path):
    import shutil

    from latentrt.runtime.backends.torch.backend import load_weights
    from latentrt.runtime.backends.torch.graph import read

    copy = Bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    _, target = copy.target("cpu")
    model = read(copy.file(target.engines["absorbed"].graph))
    for ref in copy.manifest.weight_sets[target.weight_set].files:
        path = copy.file(ref)
        path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.norm.weighx"))
    with pytest.raises(BundleError, match=r"lacks model\.norm\.weight"):
        load_weights(copy, target, model, torch.device("cpu"))


def test_the_cache_takes_most_of_a_gpus_free_memory(tiny_bundle, monkeypatch):
    target = Bundle(tiny_bundle).manifest.targets["cpu"]
    per_page = target.cache.bytes_per_token * target.cache.page_size
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * per_page, 1 << 40))
    assert torch_backend._pages(target, None, torch.device("cuda")) == 1 + 18
    assert torch_backend._pages(target, 64, torch.device("cuda")) == 2
    assert torch_backend._pages(target, None, torch.device("cpu")) == pages_for(target, None)


def test_a_graph_with_ops_that_pytorch_lacks_says_what_helps(traced, tiny_checkpoint, tmp_path):
    """Before its weights are looked for, which lie in another order than the graph's names tell."""
    bundle = traced.build_once("tiny.int8", tiny_checkpoint, tmp_path / "bundle", "cpu", "int8")
    with pytest.raises(BundleError, match=r"has no op MatMulNBits.*leave --backend out, or build --target torch"):
        backends.load(Bundle(bundle), backend="torch", device="cpu")
