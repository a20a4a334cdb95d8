"""GPU targets without a GPU: the example's bf16 and FP8 graphs, interpreted by torch on the CPU; faults must fail, by name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors import safe_open

from latentrt.export.checkpoint import Checkpoint
from latentrt.runtime import backends
from latentrt.runtime.backends.tensorrt import device as cuda_device
from latentrt.runtime.backends.torch import fused_ops as torch_fused_ops
from latentrt.runtime.backends.torch.backend import TorchBackend
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.compare import Comparison
from latentrt.validation.dequantize import dequantized_state_dict
from latentrt.validation.judge import weights
from latentrt.validation.report import page
from latentrt.validation.stages import engine_graph
from latentrt.validation.stages.executor import Executor
from latentrt.validation.stages.graph import EngineStage
from latentrt.validation.validate import validate
from tests.conftest import EXAMPLE
from tests.validation.conftest import edit_graph, edit_weight
from tests.validation.test_compare import run

pytestmark = pytest.mark.slow
BOTH = [pytest.param("sm86", marks=pytest.mark.deep), "sm89"]

TOKENS = 512
LAYER, WORST, KL = ("each layer alone: largest relative error", "each layer alone: worst token's relative error",
                    "mean KL, same weights, worst mode")  # fmt: skip
FORMULA = "routing weights: largest error against the formula"
TORCH_ON_CPU = {"backend": "torch", "device": "cpu"}


@pytest.fixture(scope="module")
def judged(gpu_bundle) -> dict:
    """Evidence and comparison by target."""
    return {t: validate(gpu_bundle, EXAMPLE, t, count=TOKENS, **TORCH_ON_CPU) for t in ("sm86", "sm89")}


@pytest.mark.parametrize(("target", "tolerances"), [("sm86", "bf16"), ("sm89", "fp8")])
def test_the_example_passes(judged, target, tolerances):
    evidence, comparison = judged[target]
    assert evidence["verdict"] == "pass", evidence["first_failure"]
    assert evidence["tolerances"] == tolerances
    assert {c.stage for c in comparison.findings.checks} == {"bundle", "weights", "torch model", "exported graph", "engine"}
    assert set(evidence["logits"]["engine"]) == {"prefill", "chunked", "decode"}
    assert len(evidence["layers"]["engine"]) == 5 and [r["layer"] for r in evidence["routing"]["engine"]] == [1, 2, 3, 4]
    assert {LAYER, WORST, KL, FORMULA} <= {c.name for c in comparison.findings.checks if c.limit is not None}


@pytest.mark.deep
@pytest.mark.parametrize(("target", "tolerances"), [("sm86", "bf16-int4"), ("sm89", "fp8-int4")])
def test_int4_experts_pass(traced, stand_ins, tmp_path, target, tolerances):
    """Layers are held to what the rest's precision allows: experts are given as they are stored."""
    with stand_ins():
        bundle = traced.build_once(f"example.{tolerances}", EXAMPLE, tmp_path / "bundle", target, "int4")
    evidence, comparison = validate(bundle, EXAMPLE, target, count=TOKENS, **TORCH_ON_CPU)
    assert evidence["verdict"] == "pass", evidence["first_failure"]
    assert evidence["tolerances"] == tolerances
    assert {LAYER, WORST, KL, FORMULA} <= {c.name for c in comparison.findings.checks if c.limit is not None}


@pytest.mark.deep
def test_a_packed_cache_passes(traced, stand_ins, tmp_path):
    with stand_ins():
        path = traced.build_once("example.gpu.int6", EXAMPLE, tmp_path / "bundle", "sm86", cache_format="int6")
    evidence, comparison = validate(path, EXAMPLE, count=TOKENS, **TORCH_ON_CPU)
    assert evidence["tolerances"] == "bf16, int6 cache"
    assert not [c for c in comparison.findings.checks if not c.passed]
    assert comparison.findings.fidelity["kl_mean"] > 1e-4  # tokens were rounded: bf16 alone has 3e-5


def test_the_report_says_what_was_executed(judged, tmp_path):
    evidence, comparison = judged["sm89"]
    executed = evidence["executed"]
    assert (executed["backend"], executed["device"], executed["gpu"], executed["is_engine"]) == ("torch", "cpu", None, False)
    assert executed["packages"] == {"torch": torch.__version__}
    engine = "not a run of target sm89's engine", "ONNX graph that the plan was built from"
    for words in (*engine, "plain torch ops", "on the CPU"):
        assert words in executed["summary"]
    text = page.write_report(tmp_path, evidence, comparison.findings).read_text()
    assert executed["summary"].replace("'", "&#39;") in text


def test_evidence_of_the_graph_is_not_the_engines(gpu_bundle, capsys):
    """It is filed apart, and the manifest still says that the target was never executed."""
    before = Bundle(gpu_bundle)
    status, evidence = run(capsys, bundle=gpu_bundle, reference=EXAMPLE, target="sm86", tokens=TOKENS, **TORCH_ON_CPU)
    assert status == 0, evidence["first_failure"]
    after = Bundle(gpu_bundle)
    assert after.digest == before.digest and after.manifest.targets["sm86"].executed is None
    assert not after.evidence_file("sm86").exists()
    assert json.loads(after.evidence_file("sm86.torch").read_text()) == evidence


@pytest.mark.parametrize("target", ["sm86", "sm89"])
def test_decoded_weights_are_what_is_stored(gpu_bundle, target):
    """By hand from the files: gate rows above up rows, e4m3 times the row's scale, w_uk above transposed w_uv."""
    bundle, state = Bundle(gpu_bundle), dequantized_state_dict(Bundle(gpu_bundle), target)
    assert set(state) >= set(Checkpoint(EXAMPLE).tensors)
    stored = {}
    for ref in bundle.manifest.weight_sets[bundle.manifest.targets[target].weight_set].files:
        with safe_open(bundle.file(ref), framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in list(file.keys())}
    one = torch.ones(1)
    scaled = {n: t.float() * stored.get(f"{n}.scale", one)[..., None] for n, t in stored.items() if not n.endswith(".scale")}
    prefix = "model.layers.2."
    gate_up = scaled[f"{prefix}mlp.experts.gate_up_proj"][5]
    assert torch.equal(state[f"{prefix}mlp.experts.5.gate_proj.weight"], gate_up[:64])
    assert torch.equal(state[f"{prefix}mlp.experts.5.up_proj.weight"], gate_up[64:])
    assert torch.equal(state[f"{prefix}self_attn.o_proj.weight"], scaled[f"{prefix}self_attn.o_proj.weight"])
    head = state[f"{prefix}self_attn.kv_b_proj.weight"].unflatten(0, (6, 64))[1]
    assert torch.equal(head[:32], scaled[f"{prefix}self_attn.kv_b_proj.w_uk"][1])
    assert torch.equal(head[32:], scaled[f"{prefix}self_attn.kv_b_proj.w_uv"][1].T)


@pytest.fixture
def faulty(gpu_bundle, tmp_path, monkeypatch):
    """A copy of the bundle, and a function that validates one of its targets: failed checks by stage and name."""
    shutil.copytree(gpu_bundle, tmp_path / "bundle")
    monkeypatch.setattr(Comparison, "_early_stages", lambda self: None)  # they know nothing of the bundle

    def failures(target: str) -> dict[tuple[str, str], str]:
        evidence, _ = validate(tmp_path / "bundle", EXAMPLE, target, count=TOKENS, **TORCH_ON_CPU)
        return {(c["stage"], c["name"]): c["detail"] for c in evidence["checks"] if not c["passed"]}

    return SimpleNamespace(path=tmp_path / "bundle", failures=failures)


def of_type(model: onnx.ModelProto, *kinds: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type in kinds]


def set_attribute(node: onnx.NodeProto, name: str, change) -> None:
    attribute = next(a for a in node.attribute if a.name == name)
    attribute.f = change(attribute.f)


def no_mscale(model):
    for node in of_type(model, "MlaAttention", "MlaPrefill"):
        set_attribute(node, "softmax_scale", lambda scale: 48**-0.5)


def smaller_scale(model):
    set_attribute(of_type(model, "MlaAttention", "MlaPrefill")[2], "softmax_scale", lambda scale: 0.8 * scale)


def swapped_norms(model):
    names = [f"model.layers.{i}.self_attn.kv_a_layernorm.weight" for i in (1, 2)]
    for node in model.graph.node:
        node.input[:] = [names[1 - names.index(n)] if n in names else n for n in node.input]


def twice_one_expert(model):
    """The down_proj of expert 7 of the last layer: its scale in FP8, the weight itself in bf16."""
    node = of_type(model, "MoeExperts")[3]
    k = 6 if len(node.input) > 6 else 4
    types = {i.name: i.type.tensor_type for i in model.graph.input}
    factors = np.ones((16,) + (1,) * (len(types[node.input[k]].shape.dim) - 1), np.float32)
    factors[7] = 2
    wide = helper.make_node("Cast", ["factors.f32"], ["factors"], to=types[node.input[k]].elem_type)
    model.graph.initializer.append(numpy_helper.from_array(factors, "factors.f32"))
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place, helper.make_node("Mul", [node.input[k], "factors"], ["scaled"]))
    model.graph.node.insert(place, wide)
    node.input[k] = "scaled"


def smaller_routing_weights(model):
    set_attribute(of_type(model, "MoeRoute")[1], "routed_scaling_factor", lambda factor: factor / 1.25)


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize(
    ("fault", "failed", "detail"),
    [
        (no_mscale, {LAYER, WORST, KL}, "layer 0 is the first that is off: its attention"),
        (smaller_scale, {LAYER}, "layer 2 is the first that is off: its attention"),
        (swapped_norms, {LAYER, WORST, KL}, "layer 1 is the first that is off: its attention"),
        (twice_one_expert, {WORST}, "layer 4 is the first that is off: its MoE block"),
        (smaller_routing_weights, {FORMULA}, "layer 2 is the first"),
    ],
)
def test_a_fault_in_the_graph_is_found(faulty, target, fault, failed, detail):
    edit_graph(faulty.path, fault, target)
    found = faulty.failures(target)
    assert {("engine", name) for name in failed} <= set(found)
    assert detail in found["engine", next(name for name in (LAYER, WORST, FORMULA) if name in failed)]
    assert {stage for stage, _ in found} == {"engine"}


@pytest.mark.parametrize("target", BOTH)
def test_half_split_rope_is_found(faulty, target, monkeypatch):
    """Pairs (i, i + R/2) instead of (2i, 2i + 1)."""

    def rotate(x, cos, sin):
        a, b = x.float().chunk(2, -1)
        cos, sin = (c.reshape(x.shape[0], *[1] * (x.dim() - 2), -1) for c in (cos, sin))
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

    monkeypatch.setattr(torch_fused_ops, "rotate", rotate)
    found = faulty.failures(target)
    original = "mean KL to the original, nats", "top-1 of the original: chance of so many others"
    names = LAYER, WORST, KL, *original, "perplexity: |ratio to the original - 1|"
    assert {("engine", n) for n in names} <= set(found)


@pytest.mark.parametrize("target", BOTH)
def test_an_error_that_only_decoding_has_is_found(faulty, target, monkeypatch):
    """Positions one too far as soon as something is cached: prefill and layers, which are prefilled, are right."""
    real = TorchBackend.step

    def step(self, batch):
        starts = np.repeat(batch.cached_lengths > 0, np.diff(batch.query_starts))
        return real(self, type(batch)(**vars(batch) | {"positions": batch.positions + starts.astype(np.int32)}))

    monkeypatch.setattr(TorchBackend, "step", step)
    assert set(faulty.failures(target)) == {("engine", KL)}


def test_a_wrong_scale_of_one_channel_is_found_by_name(faulty):
    """Only weights can tell: the reference decodes what is stored, and the engine computes with it faithfully."""
    name = "model.layers.3.mlp.experts.down_proj.scale"
    edit_weight(faulty.path, name, lambda scale: np.where(np.arange(scale.size) == 1000, 2 * scale, scale))
    found = weights.compare(Bundle(faulty.path), "sm89", Checkpoint(EXAMPLE))
    wrong = {w.name: w.error for w in found if w.error > 0.04}
    assert wrong == {name.removesuffix(".scale"): pytest.approx(1.0, abs=0.05)}
    detail = faulty.failures("sm89")["weights", "largest error of quantized weights"]
    assert name.removesuffix(".scale") in detail


def test_without_room_the_layers_are_skipped_by_name(gpu_bundle, monkeypatch):
    monkeypatch.setattr(Comparison, "_early_stages", lambda self: None)
    monkeypatch.setattr(engine_graph, "free_memory", lambda device: 5e6)
    evidence, _ = validate(gpu_bundle, EXAMPLE, "sm86", count=TOKENS, **TORCH_ON_CPU)
    assert evidence["verdict"] == "pass" and "engine" not in evidence["layers"]
    (note,) = evidence["notes"]
    assert note.startswith("not compared layer by layer: target sm86's graph in PyTorch takes about 0.0")
    page.render(evidence, {})


class Gpu:
    name, capability, driver_version, closed = "NVIDIA H200", 90, 13000, False

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (cuda_device.NoGpuError("no CUDA driver (libcuda.so)"), ("no CUDA driver; ", "--backend torch --device cpu")),
        (cuda_device.CudaError("cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"), ("INVALID_DEVICE", "--backend torch --device cpu")),
        (Gpu(), ("GPU 0 (NVIDIA H200) is sm90", "add --backend torch to judge")),
    ],
)
def test_an_engine_without_its_gpu_is_refused_in_one_line(gpu_bundle, capsys, monkeypatch, found, words):
    def open_device(index):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(cuda_device, "open_device", open_device)
    status, output = run(capsys, bundle=gpu_bundle, reference=EXAMPLE, target="sm89")
    assert status == 2 and "\n" not in output["error"]
    for text in ("sm89", "not the engine", *words):
        assert text in output["error"]
    assert not isinstance(found, Gpu) or found.closed


def test_other_options_are_refused_before_anything_is_read(gpu_bundle, capsys):
    cases = [
        ({"backend": "onnxruntime"}, "accepted: tensorrt_rtx, torch"),
        ({"backend": "torch", "device": "gpu"}, "accepted: auto, cpu, cuda, cuda:1"),
        ({"device": "cpu"}, "choose backend torch"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"backend": "torch", "device": "cuda"}, "no CUDA GPU"))
    for options, words in cases:
        status, output = run(capsys, bundle=gpu_bundle, reference=Path("nothing"), target="sm86", **options)
        assert status == 2 and words in output["error"], output


def test_an_engine_on_its_gpu_is_described_as_such(gpu_bundle):
    name, target = Bundle(gpu_bundle).target("sm89")
    executor = Executor(Bundle(gpu_bundle), name, target)
    found = executor.describe(SimpleNamespace(gpu="NVIDIA H200 (sm90, driver 13000)", ranks=1))
    assert found["is_engine"] and found["device"].startswith("NVIDIA H200 (sm90, ")
    assert found["summary"].startswith("the plan of target sm89 ran on tensorrt_rtx, on NVIDIA H200 (sm90, ")
    assert set(found["packages"]) == {"tensorrt-rtx-cu13", "cuda-bindings"}
    assert executor.evidence_name == "sm89"
    assert engine_graph.logit_rows(executor) == target.engines["absorbed"].profiles["prefill"]["logit_rows"].max[0] == 256
    assert engine_graph.logit_rows(Executor(Bundle(gpu_bundle), name, target, "torch")) is None


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.deep)])
def test_target_torch_passes_on_one_rank_and_on_two(traced, tmp_path, monkeypatch, ranks):
    """Logits are those of the ranks; layers those of the same graph in one process."""
    monkeypatch.setattr(Comparison, "_early_stages", lambda self: None)
    bundle = traced.build_once(f"ranks-{ranks}", EXAMPLE, tmp_path / "bundle", "torch", "fp32", ranks=ranks)
    evidence, comparison = validate(bundle, EXAMPLE, count=256, device="cpu")
    assert evidence["verdict"] == "pass", evidence["first_failure"]
    assert {LAYER, WORST, KL, FORMULA} <= {c.name for c in comparison.findings.checks if c.limit is not None}
    assert ("on 2 ranks, each on the CPU" in evidence["executed"]["summary"]) == (ranks == 2)
    assert any("not of 2 ranks" in note for note in comparison.findings.notes) == (ranks == 2)


def test_steps_keep_to_the_logits_that_an_engine_gives(tiny_bundle):
    """The rest comes from the same step run again; the cache is written twice with the same."""
    backend = backends.load(Bundle(tiny_bundle), cache_tokens=1024)
    windows = [np.random.default_rng(k).integers(0, 320, n) for k, n in enumerate((70, 41))]
    limited, plain = EngineStage(backend, None, 8), EngineStage(backend, None)
    expected = [plain.prefill(windows[0]), *plain.chunked(windows), *plain.decode(windows, 9)]
    counts, real = [], backend.step

    def step(batch):
        counts.append(len(batch.logit_rows))
        return real(batch)

    backend.step = step
    found = [limited.prefill(windows[0]), *limited.chunked(windows), *limited.decode(windows, 9)]
    assert max(counts) == 8
    for e, f in zip(expected, found, strict=True):
        assert np.abs(e - f).max() < 1e-4


def test_torch_runs_a_cpu_target_too(tiny_bundle, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(Comparison, "_early_stages", lambda self: None)
    evidence, comparison = validate(tiny_bundle, tiny_checkpoint, count=100, **TORCH_ON_CPU)
    assert evidence["verdict"] == "pass", evidence["first_failure"]
    assert comparison.s.executor.evidence_name == "cpu.torch" and "its ONNX graph" in evidence["executed"]["summary"]
