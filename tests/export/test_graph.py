"""The exported graph: stamped equals traced in one piece, names map back to the checkpoint, Polygraphy finds nothing."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from latentrt.export import weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.base import described
from latentrt.export.lowering.onnxruntime import lowering as cpu
from latentrt.export.models.deepseek_v2.model import DeepseekV2Step
from latentrt.export.models.deepseek_v2.weights import checkpoint_tensors, weights
from latentrt.export.quantization import Float32
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.step_graph import FORMS, INPUTS, attention_output, cache_name, caches, layer_output, mlp_output
from latentrt.validation.stages.on_cpu import runnable
from tests import checkpoints, ragged
from tests.builds import locked
from tests.export.test_weight_set import Store
from tests.export.whole_trace import trace_whole

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ATTENTION = {"absorbed": "MlaAttention", "expanded": "MlaPrefill"}


@pytest.fixture(scope="module")
def opened(small_checkpoint) -> Checkpoint:
    return Checkpoint(small_checkpoint)


@pytest.fixture(scope="module", params=FORMS)
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stamped(opened, traced, form) -> ir.Model:
    return traced(opened.config, page_size=4, form=form)


@pytest.fixture(scope="module")
def whole(opened, shared, form) -> ir.Model:
    """The one-piece trace, made once a run."""
    file = shared / f"whole.{form}.onnx"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            file.write_bytes(ir.to_proto(trace_whole(opened.config, page_size=4, form=form)).SerializeToString())
    return ir.from_proto(onnx.load(file))


def weight_inputs(model: ir.Model) -> dict[str, tuple]:
    named = {*INPUTS, *caches(99)}
    return {v.name: tuple(v.shape.numpy()) for v in model.graph.inputs if v.name not in named}


def test_inputs_and_outputs_are_the_contract(stamped, opened):
    c = opened.config
    inputs = {v.name: (v.dtype.name, [str(d) if not isinstance(d, int) else d for d in v.shape]) for v in stamped.graph.inputs}
    expected = {
        "input_ids": ["T"], "positions": ["T"], "query_starts": ["B + 1"], "cached_lengths": ["B"],
        "block_table": ["B", "max_pages"], "num_tokens": [1], "logit_rows": ["N"],
    }  # fmt: skip
    assert {n: inputs[n] for n in INPUTS} == {n: ("INT32", s) for n, s in expected.items()}
    for layer in range(c.num_hidden_layers):
        assert inputs[f"latent_cache.{layer}"] == ("FLOAT", ["num_pages", 4, c.kv_lora_rank + c.qk_rope_head_dim])
    outputs = [v.name for v in stamped.graph.outputs]
    assert outputs == ["logits", "last_hidden", *(f"latent_cache.{i}.updated" for i in range(c.num_hidden_layers))]


def test_weight_inputs_are_the_weights(stamped, whole, opened):
    """Names and shapes, in both graphs, are those of `weights`; and every checkpoint tensor is used, none twice whole."""
    described = {w.name: w.shape for w in weights(opened.config)}
    assert weight_inputs(stamped) == described == weight_inputs(whole)
    used = Counter(name for w in weights(opened.config) for group in w.sources for name in group)
    assert set(used) == set(checkpoint_tensors(opened.config)) == set(opened.tensors)
    assert {n for n, times in used.items() if times > 1} == {n for n in used if "kv_b_proj" in n}  # keys here, values there


def test_every_name_of_a_layer_tells_the_layer(stamped, opened, form):
    layers = {f"model.layers.{i}" for i in range(opened.config.num_hidden_layers)}
    for node in stamped.graph:
        prefix = ".".join(node.name.split(".")[:3])
        assert prefix in layers or node.name.split(".")[0] in ("embed", "head"), node.name
    names = [v.name for n in stamped.graph for v in n.outputs]
    assert len(names) == len(set(names)) and None not in names
    assert len({n.name for n in stamped.graph}) == len(list(stamped.graph))
    ops = Counter(n.op_type for n in stamped.graph if n.domain == DOMAIN)
    assert ops == {ATTENTION[form]: 3, "MoeRoute": 2, "MoeExperts": 2}


def test_what_layers_put_out_has_a_name(stamped, opened):
    """Both terms of each layer's residual sums, and the sum: what validation looks at."""
    sums = {n.outputs[0].name: {v.name for v in n.inputs} for n in stamped.graph if n.op_type == "Add"}
    for layer in range(opened.config.num_hidden_layers):
        (middle,) = sums[layer_output(layer)] - {mlp_output(layer)}
        before = layer_output(layer - 1) if layer else "embed.hidden_out"
        assert sums[middle] == {before, attention_output(layer)}


def test_both_forms_have_the_same_inputs_and_outputs(opened, traced):
    """Names, types and shapes, in the same order: engines of both forms share all memory."""
    forms = [traced(opened.config, page_size=4, form=form).graph for form in FORMS]
    for one, other in ((forms[0].inputs, forms[1].inputs), (forms[0].outputs, forms[1].outputs)):
        assert described(one) == described(other)


def test_only_custom_ops_are_special(stamped, whole):
    """No control flow, no functions, no 64-bit float: what TensorRT, ONNX Runtime and the torch interpreter all take."""
    for model in (stamped, whole):
        assert {n.domain for n in model.graph} <= {"", DOMAIN} and not model.functions
        assert not {n.op_type for n in model.graph} & {"If", "Loop", "Scan"}
        assert all(v.dtype != ir.DataType.DOUBLE for n in model.graph for v in n.outputs)


OUTPUTS = ["logits", "last_hidden", *(f"latent_cache.{i}.updated" for i in range(3))]


@pytest.fixture(scope="module")
def step(opened) -> dict[str, np.ndarray]:
    """A ragged step with padding: a chunk that continues a prefix, a whole prompt, an empty sequence; and its caches."""
    pages = ragged.Pages([11, 6, 0], 4, seed=2)
    sequences = checkpoints.random_tokens([11, 6, 0])
    inputs = ragged.batch([sequences[0][4:], sequences[1], []], [4, 0, 0], pages.table, padding=2)
    shape = pages.num_pages, 4, opened.config.kv_lora_rank + opened.config.qk_rope_head_dim
    caches = [np.random.default_rng(layer).standard_normal(shape).astype(np.float32) for layer in range(3)]
    return inputs | {cache_name(i): c for i, c in enumerate(caches)}


def outputs(model: ir.Model, opened: Checkpoint, step: dict) -> list[np.ndarray]:
    """What the graph makes of a step on ONNX Runtime, function bodies attached, with float32 weights as inputs."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    content = runnable(ir.to_proto(model)).SerializeToString()
    session = ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    values = {w.name: w.read(opened.read).contiguous().numpy() for w in weights(opened.config)}
    return without_scratch(session.run(OUTPUTS, step | values))


def without_scratch(found) -> list[np.ndarray]:
    """Outputs but for page 0 of the caches."""
    return [np.asarray(value)[1:] if np.ndim(value) == 3 else np.asarray(value) for value in found]


def module_outputs(opened: Checkpoint, step: dict, form: str) -> list[np.ndarray]:
    """The same by the module that the graph was traced from."""
    model = DeepseekV2Step(opened.config, form=form).load_weights(opened.read)
    with torch.no_grad():
        batch = {n: torch.from_numpy(step[n]) for n in INPUTS}
        logits, hidden, updated = model(batch, [torch.from_numpy(step[n]) for n in caches(3)])
    return without_scratch([logits, hidden, *updated])


def test_stamped_equals_whole_trace(stamped, whole, opened, step, form):
    """Both graphs, and the module that they were traced from."""
    found = [outputs(model, opened, step) for model in (stamped, whole)]
    for name, one, other in zip(OUTPUTS, *found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6, err_msg=name)  # same nodes: equal but for fusions
    for one, other in zip(found[0], module_outputs(opened, step, form), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)  # two codes: float32 sums in another order


def test_both_forms_are_equal(opened, traced, step):
    """Expanded and absorbed, as modules and as graphs."""
    found = [outputs(traced(opened.config, page_size=4, form=form), opened, step) for form in FORMS]
    found += [module_outputs(opened, step, form) for form in FORMS]
    for other in found[1:]:
        for name, one, two in zip(OUTPUTS, found[0], other, strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=2e-5, err_msg=name)


CHILD = """
import json, sys, time
import torch
torch.set_num_threads(1)
from latentrt.export import graph
from latentrt.export.models import registry
from latentrt.export.models.deepseek_v2.weights import weights
from collections import Counter

for name in sys.argv[1:]:
    c = registry.parse(json.load(open(f"tests/configs/{name}.json")))
    start = time.process_time()
    models = graph.build_forms(c, torch.bfloat16, "bfloat16")
    seconds = time.process_time() - start
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
    for form, model in models.items():
        named = {v.name: list(v.shape.numpy()) for v in model.graph.inputs if v.name.startswith(("model.", "lm_head"))}
        fits = named == {w.name: list(w.shape) for w in weights(c)}
        ops = Counter(n.op_type for n in model.graph if n.domain)
        found = {"seconds": seconds, "bytes": peak, "nodes": len(list(model.graph)), "fits": fits, "ops": ops, "form": form}
        print(json.dumps(found))
"""


def test_real_models_export():
    """Both forms, without weights, in bf16. Processor time, since other work may share the machine; VmHWM, since ru_maxrss
    starts with the parent's. Bounds: 30 s and 2 GB for V2-Lite; V2 traces the same two layers and stamps more."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, "v2_lite", "v2"], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    for line, layers in zip(child.stdout.splitlines(), (27, 27, 60, 60), strict=True):
        found = json.loads(line)
        assert found["seconds"] < 30 and found["bytes"] < 2e9 and found["fits"]
        assert 40 * layers < found["nodes"] < 80 * layers  # some 50 a layer (facts.md), against hundreds where heads unroll
        assert found["ops"] == {ATTENTION[found["form"]]: layers, "MoeRoute": layers - 1, "MoeExperts": layers - 1}


def polygraphy(*arguments) -> str:
    command = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())", *map(str, arguments)]
    env = os.environ | {"POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout + child.stderr


@pytest.fixture(scope="module")
def files(traced, opened, tmp_path_factory) -> dict[str, Path]:
    """The exported graphs (weights are inputs; functions attached, since ONNX Runtime, which lint calls, has to know all
    ops), and the graph lowered for the CPU beside its weights."""
    folder = tmp_path_factory.mktemp("polygraphy")
    found = {kind: folder / f"{kind}.onnx" for kind in (*FORMS, "lowered")}
    for form in FORMS:
        found[form].write_bytes(runnable(ir.to_proto(traced(opened.config, page_size=4, form=form))).SerializeToString())
    members, options = cpu.stored_weights(weights(opened.config)), cpu.CpuOptions("fp32", "exact")
    located = weight_set.write(opened, members, Float32(), "key", Store(folder))
    proto = cpu.lower(traced(opened.config, page_size=4), members, located, Float32(), options)
    found["lowered"].write_bytes(proto.SerializeToString())
    return found


@pytest.mark.parametrize("kind", [*FORMS, "lowered"])
def test_polygraphy_inspects(files, kind):
    text = polygraphy("inspect", "model", files[kind], "--show", "layers")
    for word in (ATTENTION.get(kind, "MlaAttention"), "MoeExperts", "latent_cache.2.updated", "model.layers.1."):
        assert word in text


@pytest.mark.parametrize("kind", [*FORMS, "lowered"])
def test_polygraphy_lint_is_clean(files, kind, tmp_path):
    report = tmp_path / "lint.json"
    polygraphy("check", "lint", files[kind], "--data-loader-script", "tests/export/polygraphy_inputs.py", "-o", report)
    found = json.loads(report.read_text())
    assert found["lint_entries"] == []
    assert found["summary"]["failing"] == [] and len(found["summary"]["passing"]) > 0
