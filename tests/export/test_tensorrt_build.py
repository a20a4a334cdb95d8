"""Builds for GPU targets on a machine without one: plans, listings, shared weights, refusals, failures."""

import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest

import latentrt
from latentrt.export import weight_set
from latentrt.export.errors import BuildError
from latentrt.export.lowering.tensorrt import build as tensorrt_build
from latentrt.export.lowering.tensorrt import gpu_kernels
from latentrt.export.lowering.tensorrt import package as tensorrt_package
from latentrt.export.lowering.tensorrt.build import BuildJob
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.launch.compile import CompiledKernel
from latentrt.plugins.moe_experts.plan import Experts, workspace_bytes
from latentrt.runtime.bundle.reader import Bundle
from tests.builds import build
from tests.conftest import EXAMPLE
from tests.export.plan_text import products

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: the package that builds")

LINEARS = {"fp8": 35, "bf16": 0}  # of the example: 4 per attention, 3 of the dense MLP, 3 per layer of shared experts
ABSORBED, LAYERS, MOE_LAYERS = 10, 5, 4


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch, tmp_path):
    """Kernels have tests of their own; compiling them takes a minute."""
    monkeypatch.setattr(gpu_kernels, "compile_all", lambda specs, capability, progress=None: kernel_files(tmp_path, capability))


def kernel_files(folder: Path, capability: int) -> list[CompiledKernel]:
    cubin, manifest = folder / "k.cubin", folder / "k.json"
    cubin.write_bytes(b"machine code of sm%d" % capability)
    spec = dict(op="moe_route", function="route", arguments=[], constexprs=[], num_warps=4, num_stages=1, grid="(1,)")
    metadata = {"architecture": capability, "spec": spec}
    manifest.write_text(json.dumps(metadata))
    return [CompiledKernel(cubin, metadata)]


@pytest.fixture
def no_tensorrt(monkeypatch) -> list[BuildJob]:
    """Lets the child process be; returns the jobs that it was not given."""
    jobs = []

    def run(job: BuildJob, folder: Path, progress) -> None:
        jobs.append(job)
        form = Path(job.plan).parent.name
        Path(job.plan).write_bytes(b"plan %d %s" % (job.compute_capability, form.encode()))
        Path(job.network).write_text("[]")

    monkeypatch.setattr(tensorrt_package, "run", run)
    return jobs


@pytest.fixture(scope="module")
def built(traced, tmp_path_factory) -> Path:
    """The example for three GPUs, precision auto."""
    folder = tmp_path_factory.mktemp("tensorrt")
    with traced.remembered() as patch:
        patch.setattr(gpu_kernels, "compile_all", lambda specs, capability, progress=None: kernel_files(folder, capability))
        build(EXAMPLE, folder / "bundle", "sm86,sm89,sm120")
    return folder / "bundle"


@pytest.fixture(scope="module")
def packed(traced, tmp_path_factory) -> Path:
    """The example for one GPU with a cache of 6 bits."""
    folder = tmp_path_factory.mktemp("packed")
    with traced.remembered() as patch:
        patch.setattr(gpu_kernels, "compile_all", lambda specs, capability, progress=None: kernel_files(folder, capability))
        build(EXAMPLE, folder / "bundle", "sm89", cache_format="int6", prefill="absorbed")
    return folder / "bundle"


@pytest.fixture(scope="module")
def of_ranks(traced, tmp_path_factory) -> dict[str, Path]:
    """The example for one GPU and for two ranks, joined in both ways."""
    folder = tmp_path_factory.mktemp("ranks")
    options = {"alone": {}, "native": {"ranks": 2}, "plugin": {"ranks": 2, "collectives": "plugin", "prefill": "absorbed"}}
    with traced.remembered() as patch:
        patch.setattr(gpu_kernels, "compile_all", lambda specs, capability, progress=None: kernel_files(folder, capability))
        for name, given in options.items():
            build(EXAMPLE, folder / name, "sm89", **given)
    return {name: folder / name for name in options}


def test_ranks_share_one_plan(of_ranks):
    """Three gathers and a sum in every layer with experts; a rank's experts are as many as it has."""
    bundle = Bundle(of_ranks["native"])
    _, target = bundle.target("sm89")
    assert target.ranks == 2 and target.limits.max_batch_tokens == 1024
    for engine in target.engines.values():
        listing = json.loads(bundle.file(engine.network).read_text())
        assert sum(layer["type"] == "dist_collective" for layer in listing) == 4 * MOE_LAYERS
    shared = [target.weight_set and bundle.manifest.weight_sets[target.weight_set].tensors[n] for n in target.shared_weights]
    assert len(shared) == 4 * MOE_LAYERS and {tensor.shape[0] for tensor in shared} == {16}, "weights and scales"
    model = onnx.load(bundle.file(target.engines["absorbed"].onnx), load_external_data=False)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert {shapes[name][0] for name in target.shared_weights} == {8} and shapes["first_expert"] == [1, 1]


def test_ranks_may_be_joined_by_plugins(of_ranks):
    bundle = Bundle(of_ranks["plugin"])
    _, target = bundle.target("sm89")
    listing = json.loads(bundle.file(target.engines["absorbed"].network).read_text())
    plugins = [layer["plugin"] for layer in listing if layer["type"] == "plugin_v3"]
    assert plugins.count("AllGather") == 3 * MOE_LAYERS and plugins.count("ReduceScatter") == MOE_LAYERS
    assert not any(layer["type"] == "dist_collective" for layer in listing)


@pytest.mark.parametrize("joined", ["native", "plugin"])
def test_the_graphs_of_two_ranks_give_the_numbers_of_one(of_ranks, example_bundle, joined):
    """Interpreted by PyTorch on the CPU: two processes over gloo are as far from float32 as one is.

    Not the same numbers: sums over experts are rounded to bf16 once more, and then another FP8 value may be the nearest.
    """
    text = (EXAMPLE / "held_out.txt").read_text()[:3000]
    with latentrt.load(example_bundle) as exact:
        lists = [exact.tokenizer.encode(text)[:400]]
        expected = exact.logits(lists)
    found = {}
    for name in ("alone", joined):
        with latentrt.load(of_ranks[name], backend="torch", device="cpu", threads=2, cache_tokens=1024) as engine:
            found[name] = np.linalg.norm(engine.logits(lists) - expected) / np.linalg.norm(expected)
    # measured: 0.0265 alone, 0.0260 and 0.0249 joined
    assert found[joined] == pytest.approx(found["alone"], rel=0.15)


@pytest.mark.parametrize(("options", "message"), [
    ({"ranks": 3}, "ranks is 3, accepted: 1, 2, 4, 8, 16 (divisors of n_routed_experts, which is 16)"),
    ({"ranks": 2, "weights": "embedded"}, "ranks is 2: all share a plan, but not its embedded weights; leave --weights out"),
    ({"collectives": "plugin"}, "collectives is 'plugin', but ranks is 1, which has none; leave it out"),
    ({"ranks": 0}, "ranks is 0, accepted: 1 (one process) or more"),
])  # fmt: skip
def test_ranks_that_cannot_be_had(options, message, tmp_path):
    with pytest.raises(BuildError, match=re.escape(message)):
        build(EXAMPLE, tmp_path / "bundle", "sm89", **options)


@pytest.mark.parametrize(("name", "precision"), [("sm86", "bf16"), ("sm89", "fp8"), ("sm120", "fp8")])
def test_targets(built, name, precision):
    bundle = Bundle(built)
    _, target = bundle.target(name)
    assert (target.precision, target.backend, target.compute_capability) == (precision, "tensorrt_rtx", name)
    assert target.executed is None
    assert target.cache.format == "bfloat16" and target.cache.layers == LAYERS
    assert {form: set(e.profiles) for form, e in target.engines.items()} == {
        "absorbed": {"decode", "prefill"}, "expanded": {"prefill"},
    }  # fmt: skip
    for form, attention in (("absorbed", "MlaAttention"), ("expanded", "MlaPrefill")):
        listing = json.loads(bundle.file(target.engines[form].network).read_text())
        plugins = [layer["plugin"] for layer in listing if layer["type"] == "plugin_v3"]
        assert {p: plugins.count(p) for p in plugins} == {attention: LAYERS, "MoeRoute": MOE_LAYERS, "MoeExperts": MOE_LAYERS}
        types = {t for layer in listing for t in layer["outputs"]}
        assert ("fp8" in types) == (precision == "fp8") and "bf16" in types


@pytest.mark.parametrize(("name", "precision"), [("sm86", "bf16"), ("sm89", "fp8"), ("sm120", "fp8")])
def test_products_of_the_plan_run_in_the_precision_asked_for(built, name, precision):
    """TensorRT may answer an FP8 graph with bf16 products; the plan tells. Every profile has its own instructions."""
    bundle = Bundle(built)
    _, target = bundle.target(name)
    for plan, absorbed in ((target.engines["absorbed"], ABSORBED), (target.engines["expanded"], 0)):
        found = products(bundle.file(plan.graph))
        if not found:
            pytest.skip("this TensorRT-RTX writes no readable instructions")
        profiles, fp8 = len(plan.profiles), LINEARS[precision]
        assert found["fp8_e4m3", "fp8_e4m3", "bf16"] == profiles * fp8
        assert found["bf16", "bf16", "bf16"] == profiles * (35 - fp8 + absorbed + 1)  # and the head
        assert found["float", "float", "float"] == profiles * MOE_LAYERS  # router logits


def test_static_scales_keep_fp8_products(fast_trace, tmp_path):
    """Constants in place of the largest value of every row: as many FP8 products, and no ReduceMax in the graph."""
    (tmp_path / "ids.json").write_text("[[5, 6, 7, 8], [9]]")
    out, options = tmp_path / "bundle", dict(activations="static", calibration=tmp_path / "ids.json")
    build(EXAMPLE, out, "sm89", "fp8", **options)
    bundle = Bundle(out)
    _, target = bundle.target()
    assert target.options["activations"] == "static" and len(target.options["calibration"]) == 64
    engine = target.engines["absorbed"]
    assert not [n for n in onnx.load(bundle.file(engine.onnx)).graph.node if n.op_type == "ReduceMax"]
    found = products(bundle.file(engine.graph))
    if not found:
        pytest.skip("this TensorRT-RTX writes no readable instructions")
    assert found["fp8_e4m3", "fp8_e4m3", "bf16"] == len(engine.profiles) * LINEARS["fp8"]
    assert found["bf16", "bf16", "bf16"] == len(engine.profiles) * (ABSORBED + 1)


def test_int4_experts(fast_trace, tmp_path):
    """Two targets by one name: what is not an expert is as their best precision has it, in the plan's products too."""
    out = tmp_path / "bundle"
    build(EXAMPLE, out, "sm86,sm89", "int4", prefill="absorbed")
    bundle = Bundle(out)
    layer, sets = "model.layers.1.mlp.experts", bundle.manifest.weight_sets
    for name, precision, fp8 in (("sm86", "bf16-int4", 0), ("sm89", "fp8-int4", LINEARS["fp8"])):
        _, target = bundle.target(name)
        tensors, described = sets[target.weight_set].tensors, sets[target.weight_set].format
        assert target.precision == described.name == precision and ("activations" in target.options) == bool(fp8)
        assert (described.bits, described.blocks["gate_up"]) == ({"gate_up": 4, "down": 4}, 64)
        assert described.experts.model_dump() == {"quantized": "int8", "zero_point": 128}
        found = [(t.dtype, t.shape) for t in (tensors[f"{layer}.{n}"] for n in ("gate_up_proj", "down_proj.scale"))]
        assert found == [("int8", [16, 128, 96]), ("float32", [16, 192, 1])]
        engine = target.engines["absorbed"]
        found, profiles = products(bundle.file(engine.graph)), len(engine.profiles)
        if not found:
            pytest.skip("this TensorRT-RTX writes no readable instructions")
        assert found["fp8_e4m3", "fp8_e4m3", "bf16"] == profiles * fp8
        assert found["bf16", "bf16", "bf16"] == profiles * (35 - fp8 + ABSORBED + 1)


def test_an_engine_reads_int4_experts_where_they_lie(tmp_path):
    """34 MB of elements and scales as inputs: the engine asks for the plugin's workspace, and for no copy."""
    experts, hidden, inner, top_k, rows = 8, 2048, 1408, 2, 64
    kinds = onnx.TensorProto
    inputs = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in (
        ("x", kinds.BFLOAT16, ["T", hidden]), ("ids", kinds.INT32, ["T", top_k]), ("shares", kinds.FLOAT, ["T", top_k]),
        ("gate_up", kinds.INT8, [experts, 2 * inner, hidden // 2]), ("down", kinds.INT8, [experts, hidden, inner // 2]),
        ("gate_up_scale", kinds.FLOAT, [experts, 2 * inner, 16]), ("down_scale", kinds.FLOAT, [experts, hidden, 11]),
    )]  # fmt: skip
    attributes = dict(first_expert=0, gate_up_layout="concatenated", packed=2, plugin_namespace=DOMAIN, plugin_version="1")
    node = onnx.helper.make_node("MoeExperts", [i.name for i in inputs], ["y"], domain=DOMAIN, **attributes)
    output = onnx.helper.make_tensor_value_info("y", kinds.BFLOAT16, ["T", hidden])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "experts", inputs, [output])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "experts.onnx")
    widths = {"x": hidden, "ids": top_k, "shares": top_k}
    profile = {name: {"min": [1, n], "opt": [rows, n], "max": [rows, n]} for name, n in widths.items()}
    told = "\n".join(layers_told(tmp_path / "experts.onnx", tmp_path, [profile]))
    if "Total Activation Memory" not in told:
        pytest.skip("this TensorRT-RTX does not say what memory an engine takes")
    memory = int(re.search(r"Total Activation Memory: (\d+)", told)[1])
    config = Experts(experts, hidden, inner, top_k, "bfloat16", "int8", 0, "concatenated", 16, 11, packed=2)
    workspace = workspace_bytes(config, rows, Gpu.of(89))
    assert workspace <= memory <= workspace + 4096, "rounded up by a few hundred bytes"


def test_int4_experts_of_a_size_that_no_kernel_takes(small_checkpoint, tmp_path):
    """48 and 32 inputs: 48 is no multiple of 32."""
    with pytest.raises(BuildError, match=r"fp8-int4 takes experts whose inputs are multiples of 32, found \[32, 48\]"):
        build(small_checkpoint, tmp_path / "bundle", "sm89", "int4")
    assert not (tmp_path / "bundle").exists()


def test_a_recipe_keeps_products_of_single_layers_in_bf16(fast_trace, tmp_path):
    """All output projections and one layer's experts: so many FP8 products fewer in the plan, and so many bf16 ones more."""
    file, out = tmp_path / "recipe.toml", tmp_path / "bundle"
    file.write_text('plain = ["*.self_attn.o_proj", "model.layers.2.mlp.experts"]')
    build(EXAMPLE, out, "sm86,sm89", recipe=file, prefill="absorbed")
    bundle = Bundle(out)
    _, target = bundle.target("sm89")
    tensors = bundle.manifest.weight_sets[target.weight_set].tensors
    assert [tensors[f"model.layers.{i}.mlp.experts.down_proj"].dtype for i in (1, 2)] == ["float8_e4m3fn", "bfloat16"]
    assert "recipe" in target.options and "recipe" not in bundle.manifest.targets["sm86"].options, "bf16 quantizes nothing"
    found, profiles = products(bundle.file(target.engines["absorbed"].graph)), len(target.engines["absorbed"].profiles)
    if not found:
        pytest.skip("this TensorRT-RTX writes no readable instructions")
    assert found["fp8_e4m3", "fp8_e4m3", "bf16"] == profiles * (LINEARS["fp8"] - LAYERS)
    assert found["bf16", "bf16", "bf16"] == profiles * (LAYERS + ABSORBED + 1)


def test_weights_are_inputs_that_targets_share(built):
    bundle = Bundle(built)
    targets = bundle.manifest.targets
    assert targets["sm89"].weight_set == targets["sm120"].weight_set != targets["sm86"].weight_set
    for target in targets.values():
        stored = bundle.manifest.weight_sets[target.weight_set].tensors
        graphs = [onnx.load(bundle.file(plan.onnx)).graph for plan in target.engines.values()]
        inputs = {i.name: i.type.tensor_type for i in graphs[0].input}
        assert list(graphs[0].input) == list(graphs[1].input) and list(graphs[0].output) == list(graphs[1].output)
        assert set(inputs) == {i.name for i in target.inputs} | set(target.weight_inputs)
        assert set(target.weight_inputs) == set(stored)
        for name, tensor in stored.items():
            assert tensor.offset % 256 == 0, f"{name}: TensorRT asks for aligned addresses"
            assert [d.dim_value for d in inputs[name].shape.dim] == tensor.shape
            kinds = {"bfloat16": 16, "float32": 1, "float8_e4m3fn": 17}
            assert inputs[name].elem_type == kinds[tensor.dtype], name
    assert bundle.verify() == []


def test_profiles_cover_the_limits(built):
    _, target = Bundle(built).target("sm89")
    decode, prefill = target.engines["absorbed"].profiles.values()
    for profile in (decode, prefill):
        assert set(profile) == {i.name for i in target.inputs} - {"num_tokens"}
        smallest, usual, largest = ({n: getattr(r, k) for n, r in profile.items()} for k in ("min", "opt", "max"))
        assert largest["block_table"] == [target.limits.max_sequences, target.limits.max_context // target.cache.page_size]
        assert largest["query_starts"] == [target.limits.max_sequences + 1]
        assert all(a <= b <= c for n in profile for a, b, c in zip(smallest[n], usual[n], largest[n], strict=True))
        assert largest["latent_cache.0"][0] * target.cache.page_size * target.cache.width < 2**31
    assert decode["input_ids"].max == [target.limits.max_sequences]
    assert prefill["input_ids"].max == [target.limits.max_batch_tokens]
    assert target.engines["expanded"].profiles == {"prefill": prefill}


def test_repeated_it_does_nothing(built, no_tensorrt, monkeypatch):
    before = (built / "manifest.json").read_bytes()
    monkeypatch.setattr(weight_set, "write", None)
    summary = build(EXAMPLE, built, "sm86,sm89,sm120")
    assert [t["built"] for t in summary["targets"]] == [False] * 3 and no_tensorrt == []
    assert (built / "manifest.json").read_bytes() == before


@pytest.fixture
def started(fast_trace, no_tensorrt, tmp_path) -> Path:
    """A bundle for sm89 without real plans."""
    build(EXAMPLE, tmp_path / "bundle", "sm89")
    return tmp_path / "bundle"


def test_a_new_target_shares_the_weights_that_are_there(started, no_tensorrt, fast_trace, monkeypatch):
    monkeypatch.setattr(weight_set, "write", None)  # writing them again would fail
    summary = build(EXAMPLE, started, "sm89,sm120,sm121")
    assert [t["built"] for t in summary["targets"]] == [False, True, True]
    assert [j.compute_capability for j in no_tensorrt] == [89, 89, 120, 120, 121, 121], "two plans each"
    bundle = Bundle(started)
    assert set(bundle.manifest.targets) == {"sm89", "sm120", "sm121"} and len(bundle.manifest.weight_sets) == 1
    assert bundle.verify() == []


def test_absorbed_prefill_is_one_plan(fast_trace, no_tensorrt, tmp_path):
    out = tmp_path / "bundle"
    build(EXAMPLE, out, "sm89", prefill="absorbed")
    _, target = Bundle(out).target()
    assert list(target.engines) == ["absorbed"] and len(no_tensorrt) == 1 and target.options["prefill"] == "absorbed"
    with pytest.raises(BuildError, match=r"has target sm89 already .*'prefill': 'absorbed'.*--force"):
        build(EXAMPLE, out, "sm89")


def test_the_kernels_are_those_of_both_plans(fast_trace, no_tensorrt, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        gpu_kernels, "compile_all", lambda specs, capability, progress: asked.extend(specs) or kernel_files(tmp_path, 89)
    )
    build(EXAMPLE, tmp_path / "bundle", "sm89")
    assert {s.op for s in asked} == {"mla_attention", "mla_prefill", "moe_route", "moe_experts", "sampling"}
    assert len(asked) == len(set(asked))


def test_a_target_is_built_anew_where_the_tools_changed(started, no_tensorrt, fast_trace, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "identity", lambda: {"triton": "another"})
    assert build(EXAMPLE, started, "sm89")["built"]
    with pytest.raises(BuildError, match=r"has target sm89 already \(fp8.*--force"):
        build(EXAMPLE, started, "sm89", "bf16")


def test_what_was_finished_before_a_failure_stays(started, no_tensorrt, fast_trace, monkeypatch):
    good = tensorrt_package.run

    def run(job, folder, progress):
        if job.compute_capability == 121:
            raise BuildError("no such luck")
        good(job, folder, progress)

    monkeypatch.setattr(tensorrt_package, "run", run)
    with pytest.raises(BuildError, match="no such luck"):
        build(EXAMPLE, started, "sm120,sm121,sm86", "bf16")
    bundle = Bundle(started)
    assert set(bundle.manifest.targets) == {"sm89", "sm120"} and bundle.verify() == []
    assert {p.name for p in (started / "files").iterdir()} == {r.file for r in bundle.manifest.refs()}


def test_embedded_weights_are_in_the_plan(fast_trace, tmp_path, built):
    build(EXAMPLE, tmp_path / "bundle", "sm86", weights="embedded")
    bundle = Bundle(tmp_path / "bundle")
    _, target = bundle.target()
    assert target.weight_inputs == [] and target.options == {"weights": "embedded", "prefill": "absorbed"}
    assert list(target.engines) == ["absorbed"], "a second plan would hold all weights again"
    weights = sum(f.size for f in bundle.manifest.weight_sets[target.weight_set].files)
    mine, other = (t.engines["absorbed"] for t in (target, Bundle(built).manifest.targets["sm86"]))
    assert mine.graph.size > 0.9 * weights + other.graph.size / 2
    initializers = onnx.load(bundle.file(mine.onnx)).graph.initializer  # with the files that it names, beside it
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {t.name for t in initializers}
    assert {i.name for i in onnx.load(bundle.file(mine.onnx), load_external_data=False).graph.input} == {
        i.name for i in target.inputs
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sm89,sm86", "fp8"), "'fp8' is not to be had on sm86: its hardware has no fp8; accepted: auto, bf16, bf16-int4"),
        (("sm86", "fp8-int4"), "'fp8-int4' is not to be had on sm86: its hardware has no fp8-int4"),
        (("sm89,sm999", "auto"), "unknown target 'sm999', accepted: cpu, torch, sm80, sm86, sm89, sm90"),
        (("sm89", "int8"), "'int8' is not to be had on sm89; accepted: auto, fp8, bf16, fp8-int4, bf16-int4"),
        (("sm89", "auto", "fast", "auto", None, "shared"), "weights is 'shared', accepted: inputs, embedded"),
        (("sm89", "auto", "fast", "float32"), "cache_format is 'float32', accepted for target sm89: auto, bfloat16"),
    ],
)
def test_refused_before_anything_is_built(arguments, message, tmp_path):
    with pytest.raises(BuildError) as error:
        build(EXAMPLE, tmp_path / "bundle", *arguments)
    assert message in str(error.value) and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target="cpu", prefill="expanded"), "only other targets have two forms, and target cpu is built in int8"),
        (dict(target="sm89", prefill="expanded", weights="embedded"), "with embedded weights each plan holds them; leave it"),
        (dict(target="sm89", prefill="naive"), "prefill is 'naive', accepted: auto, expanded, absorbed"),
    ],
)
def test_prefill_that_cannot_be_had(options, message, tmp_path):
    with pytest.raises(BuildError) as error:
        build(EXAMPLE, tmp_path / "bundle", **options)
    assert message in str(error.value) and not (tmp_path / "bundle").exists()


def test_a_packed_cache_is_words(packed):
    """What the manifest says that a token takes, and TensorRT was given, is what the format's formula says."""
    bundle = Bundle(packed)
    _, target = bundle.target()
    rank, rope = (bundle.manifest.config[name] for name in ("kv_lora_rank", "qk_rope_head_dim"))
    words = (rank * 6 // 8 + rope + 4) // 4  # 6 and 8 bits, two float16 scales
    assert (target.cache.format, target.cache.dtype, target.cache.bytes_per_token) == ("int6", "int32", LAYERS * words * 4)
    graph = onnx.load(bundle.file(target.engines["absorbed"].onnx)).graph
    caches = [v for v in (*graph.input, *graph.output) if v.name.startswith("latent_cache.")]
    assert len(caches) == 2 * LAYERS
    for value in caches:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.INT32
        assert [d.dim_value for d in value.type.tensor_type.shape.dim][1:] == [64, words]
    assert bundle.manifest.weight_sets[target.weight_set].rotated


def layers_told(model: Path, folder: Path, profiles: list) -> list[str]:
    """Builds an engine for sm89; what TensorRT says of its layers and memory."""
    files = [str(model), str(folder / "plan"), str(folder / "network.json")]
    BuildJob("tensorrt_rtx", 89, *files, profiles).save(folder / "job.json")
    command = [sys.executable, "-m", "tests.export.engine_layers", str(folder / "job.json")]
    environment = tensorrt_package._environment("tensorrt_rtx", folder)
    child = subprocess.run(command, cwd=tensorrt_package.ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.parametrize(("bundle", "form"), [("built", "absorbed"), ("built", "expanded"), ("packed", "absorbed")])
def test_no_layer_copies_a_cache(request, tmp_path, bundle, form):
    """The engine's own listing: every cache goes from its network input into the plugin, and out as a network output."""
    bundle = Bundle(request.getfixturevalue(bundle))
    _, target = bundle.target("sm89")
    engine = target.engines[form]
    profiles = [{n: r.model_dump() for n, r in p.items()} for p in engine.profiles.values()]
    told = layers_told(bundle.file(engine.onnx), tmp_path, profiles)
    layers = [line for text in told for line in text.splitlines() if line.startswith("Layer(")]
    if not layers:
        pytest.skip("this TensorRT-RTX does not list an engine's layers")
    touching = [line for line in layers if "latent_cache." in line]
    assert len(touching) == len(engine.profiles) * LAYERS and all(line.startswith("Layer(PluginV3)") for line in touching)
    for line in touching:
        inputs, outputs = line.split(" -> ")
        assert re.findall(r", latent_cache\.(\d+) ", inputs) == re.findall(r", latent_cache\.(\d+)\.updated ", outputs)
    largest = max(p["latent_cache.0"].max for p in engine.profiles.values())
    memory = [int(text.split()[-2]) for text in told if text.startswith("Total Activation")]
    size = target.cache.bytes_per_token // LAYERS * prod(largest[:2])
    assert len(memory) == len(engine.profiles) and max(memory) < 0.1 * size, "bytes of one cache"


def test_steps_allocate_nothing_so_that_they_can_be_captured(tmp_path):
    import tensorrt_rtx as trt

    builder = trt.Builder(tensorrt_build._logger(trt))
    job = BuildJob("tensorrt_rtx", 89, "", "", "", [])
    config = tensorrt_build._config(trt, builder, builder.create_network(0), job, lambda part: None)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03)
