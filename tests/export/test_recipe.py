"""Recipes: what is refused by name, what a format with plain modules stores, and graphs whose layers differ."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open

from latentrt import cli
from latentrt.export import quantization, recipe, weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.export.lowering.tensorrt import lowering as tensorrt
from latentrt.export.models.base import Weight
from latentrt.export.models.deepseek_v2 import weights as deepseek_v2
from latentrt.export.quantization import BFloat16Int4, Fp8, Fp8Int4, Int4, Int8, Panels
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.step_graph import LOGITS, caches, count_caches
from latentrt.runtime import backends
from latentrt.runtime.backends.torch.graph import StepProgram
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.dequantize import write_checkpoint
from tests import checkpoints, ragged
from tests.builds import build
from tests.conftest import EXAMPLE
from tests.export.graph_on_cpu import CpuGraph, stored
from tests.export.test_weight_set import Store
from tests.ragged import Pages

ROWS = [Int8(expert_block_size=16), Int4(16)]
FORMATS = [Fp8(), Int8(), *ROWS, *map(Panels, ROWS), Fp8Int4(16), BFloat16Int4(16)]
# One of each kind: a dense MLP's and one of a pair of attention's, all experts, an absorbed product, shared experts', the head.
MIXED = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_a_proj", "model.layers.2.mlp.experts",
         "model.layers.2.mlp.shared_experts.gate_proj", "model.layers.1.self_attn.o_proj"]  # fmt: skip
ON_CPU = [*MIXED, "model.layers.0.self_attn.kv_b_proj", "lm_head"]


def written(folder: Path, *patterns: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(f"plain = {json.dumps(patterns)}\n")
    return file


@pytest.fixture(scope="module")
def weights(small_checkpoint) -> list[Weight]:
    return Checkpoint(small_checkpoint).weights()


@pytest.mark.parametrize(("content", "words"), [
    ('plian = ["lm_head"]', ["key 'plian'", "accepted: plain"]),
    ('plain = ["lm_head"]\nother = 1', ["key 'other'"]),
    ('plain = "lm_head"', ["plain is 'lm_head' (str)", "a list"]),
    ("plain = []", ["plain is '[]'", "at least one"]),
    ("", ["plain is missing"]),
    ("plain = [3]", ["plain holds '3' (int)"]),
    ('plain = ["lm_head", ""]', ["plain holds ''"]),
    ("plain = ", ["is no TOML"]),
    ('plain = ["model.layers.0.mlp.donw_proj"]', ["'model.layers.0.mlp.donw_proj'", "no module", "0.mlp.down_proj"]),
    ('plain = ["lm_head", "model.layers.9.*"]', ["'model.layers.9.*'"]),
    ('plain = ["model.layers.*.input_layernorm"]', ["never quantizes", "(norm)"]),
    ('plain = ["model.layers.1.mlp.experts.3.down_proj"]', ["single experts", "'model.layers.1.mlp.experts'"]),
])  # fmt: skip
def test_what_is_refused(tmp_path, tiny_checkpoint, content, words):
    """By name, and before any output is written."""
    (file := tmp_path / "r.toml").write_text(content)
    with pytest.raises(BuildError) as error:
        build(tiny_checkpoint, tmp_path / "bundle", "cpu", "int8", recipe=file)
    assert str(file) in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "bundle").exists()


def test_what_no_precision_takes(tmp_path, tiny_checkpoint):
    with pytest.raises(BuildError, match=r"only fp8, int8, int4, fp8-int4, bf16-int4 quantize .* target cpu is built in fp32"):
        build(tiny_checkpoint, tmp_path / "b", "cpu", "fp32", recipe=written(tmp_path, "lm_head"))
    with pytest.raises(BuildError, match=r"cannot be read .*; give a TOML file"):
        build(tiny_checkpoint, tmp_path / "b", "cpu", "int8", recipe=tmp_path / "none.toml")
    assert not (tmp_path / "b").exists()


def test_fp8_never_quantizes_the_head_but_int8_does(weights, tmp_path):
    """A recipe for two targets keeps in each what is quantized there."""
    chosen = recipe.read(written(tmp_path, "lm_head", "*.o_proj"))
    found = chosen.modules(weights, ["fp8", "int8"])
    outputs = tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(3))
    assert found == {"fp8": outputs, "int8": (*outputs, "lm_head")}
    with pytest.raises(BuildError, match="'lm_head' matches only weights that precision fp8 never quantizes"):
        chosen.modules(weights, ["fp8"])


@pytest.mark.parametrize("weight_format", [Fp8(), Int8(), Int4(), Fp8Int4(), BFloat16Int4()], ids=lambda f: f.name)
def test_roles_are_the_formats_own(weight_format):
    assert set(recipe.QUANTIZED_ROLES[weight_format.name]) == set(weight_format.blocks)


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.key)
def test_a_kept_weight_is_stored_plain_and_all_others_as_before(weight_format, small_checkpoint, tmp_path):
    checkpoint = Checkpoint(small_checkpoint)
    everything = checkpoint.weights()
    names = {"fp8": MIXED, "fp8-int4": MIXED, "bf16-int4": ["model.layers.2.mlp.experts"]}.get(weight_format.name, ON_CPU)
    kept = weight_format.keeping(names)
    tensors = {}
    for number, each in enumerate((weight_format, kept)):
        (folder := tmp_path / str(number)).mkdir()
        store = Store(folder)
        weight_set.write(checkpoint, everything, each, "key", store)
        for file in store.filled:
            with safe_open(folder / file, "pt") as handle:
                tensors |= {(number, n): handle.get_tensor(n) for n in handle.keys()}  # noqa: SIM118
    plain = getattr(torch, weight_format.plain)
    seen = 0
    for weight in everything:
        mine = [tensors[1, weight.name + s.suffix] for s in kept.stored(weight)]
        if weight.module in names and weight.role != "bias":
            original = weight.read(checkpoint.read).to(plain)
            assert len(mine) == 1 and mine[0].dtype == plain and torch.equal(mine[0], original), weight.name
            assert not kept.is_quantized(weight) and (1, f"{weight.name}.scale") not in tensors
            assert torch.equal(kept.decode(weight, mine), original.float())
            seen += 1
        else:
            before = [tensors[0, weight.name + s.suffix] for s in weight_format.stored(weight)]
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(mine, before, strict=True))
    assert seen == len(names) + 1 + ("lm_head" in names)  # experts have two weights, and so has kv_b_proj


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.key)
def test_keys_and_descriptions_tell_recipes_apart(weight_format):
    kept, other = weight_format.keeping(["b.x", "a", "b.x"]), weight_format.keeping(["a"])
    assert len({weight_format.key, kept.key, other.key}) == 3 and weight_format.plain_modules == ()
    assert kept.key == weight_format.keeping(["a", "b.x"]).key and weight_format.keeping([]).key == weight_format.key
    description = kept.description()
    assert description["plain_modules"] == ["a", "b.x"] and json.loads(json.dumps(description)) == description
    found = quantization.restore(description)
    assert found.description() == description and found.key == kept.key
    assert found.plain_modules == ("a", "b.x") and type(found) is type(weight_format)


@pytest.mark.parametrize("weight_format", [Fp8(), Int8(), Int4(16)], ids=lambda f: f.key)
def test_a_checkpoints_own_integers_are_not_taken_over_where_the_weight_is_plain(weight_format):
    weight = Weight("model.layers.0.mlp.down_proj.weight", (4, 128), "linear", (("w",),))
    kept = weight_format.keeping([weight.module])
    assert not kept.takes_over(weight) and not kept.takes_blocks(weight, 128, 4)
    assert weight_format.takes_over(weight)


LENGTHS, SCHEDULE = [70, 9, 1], [[64, 3, 0], [1, 1, 1], [5, 5, 0]]


def exact_logits(folder: Path, sequences: list[list[int]]) -> np.ndarray:
    model = checkpoints.reference(folder)
    return np.concatenate([checkpoints.reference_logits(model, s).numpy() for s in sequences])


def kl(exact: np.ndarray, found: np.ndarray) -> float:
    p, q = (torch.from_numpy(np.asarray(x)).double().log_softmax(-1) for x in (exact, found))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize(("precision", "accuracy"), [("int8", "exact"), ("int8", "fast"), ("int4", "exact"), ("int4", "fast")])
def test_the_cpu_engine_computes_with_the_weights_it_describes(precision, accuracy, tmp_path, fast_trace):
    """Against transformers on the decoded weights; at exact to float32's sums, at fast as near as int8 activations are."""
    file = written(tmp_path, *ON_CPU)
    build(EXAMPLE, tmp_path / "bundle", "cpu", precision, accuracy, recipe=file)
    bundle = Bundle(tmp_path / "bundle")
    _, target = bundle.target()
    described = bundle.manifest.weight_sets[target.weight_set].format
    assert described.plain_modules == sorted(ON_CPU) and target.options["recipe"] == recipe.digest(ON_CPU)
    write_checkpoint(bundle, None, EXAMPLE, tmp_path / "decoded")
    decoded, original = Checkpoint(tmp_path / "decoded"), Checkpoint(EXAMPLE)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.experts.7.up_proj.weight",
                 "model.layers.0.self_attn.kv_b_proj.weight", "lm_head.weight"):  # fmt: skip
        assert torch.equal(decoded.read(name), original.read(name).float()), name
    rounded = "model.layers.1.mlp.experts.7.up_proj.weight"
    assert not torch.equal(decoded.read(rounded), original.read(rounded).float())
    sequences = [np.random.default_rng(n).integers(2, 4096, n).tolist() for n in LENGTHS]
    expected = exact_logits(tmp_path / "decoded", sequences)
    own = ["native"] if target.engines["absorbed"].native and shutil.which("g++") else []
    for kernels in ("onnxruntime", *own):
        with backends.load(bundle, cache_tokens=1000, kernels=kernels) as backend:
            found = np.concatenate(ragged.run(ragged.engine_step(backend), sequences, SCHEDULE, Pages(LENGTHS, 64)))
        if accuracy == "exact":
            np.testing.assert_allclose(found, expected, atol=1e-3)
        else:
            assert kl(expected, found) < 0.01
    assert (target.engines["absorbed"].native is not None) == (accuracy == "fast"), "a recipe must not cost own kernels"


def test_info_names_what_is_kept(tmp_path, fast_trace, tiny_checkpoint, capsys):
    build(tiny_checkpoint, tmp_path / "bundle", "cpu", "int8", recipe=written(tmp_path, "lm_head", "*.o_proj"))
    assert cli.main(["info", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert "kept float32" in shown and "lm_head" in shown and "model.layers.2.self_attn.o_proj" in shown


def test_layers_of_a_gpus_graph_differ(traced, tmp_path):
    """The file that TensorRT parses, run on ONNX Runtime: types as the recipe says, and nearer to transformers than without."""
    checkpoint = Checkpoint(EXAMPLE)
    everything, logits = deepseek_v2.weights(checkpoint.config), {}
    sequences = [np.random.default_rng(n).integers(2, 4096, n).tolist() for n in LENGTHS]
    # Of this dense layer and of these experts everything that fp8 quantizes, so that the difference is well above chance.
    names = [w.module for w in everything if w.role == "linear" and w.name.startswith("model.layers.0.")] + MIXED
    for name, weight_format in (("fp8", Fp8()), ("recipe", Fp8().keeping(names))):
        model = traced(checkpoint.config, torch.bfloat16, "bfloat16", 64)
        tensorrt.prepare(model, everything, weight_format)
        ir.save(model, tmp_path / f"{name}.onnx")
        graph = onnx.load(tmp_path / f"{name}.onnx")
        types = {i.name: i.type.tensor_type.elem_type for i in graph.graph.input}
        for weight in everything:
            quantized = weight_format.is_quantized(weight)
            assert types[weight.name] == (onnx.TensorProto.FLOAT8E4M3FN if quantized else onnx.TensorProto.BFLOAT16)
            assert (f"{weight.name}.scale" in types) == quantized
        inputs = {len([i for i in n.input if i]) for n in graph.graph.node if (n.domain, n.op_type) == (DOMAIN, "MoeExperts")}
        assert inputs == ({7} if name == "fp8" else {5, 7})
        session = CpuGraph(graph, stored(checkpoint, weight_format), Pages(LENGTHS, 64).num_pages)
        logits[name] = np.concatenate(ragged.run(session.step, sequences, SCHEDULE, Pages(LENGTHS, 64)))
    logits["torch"] = np.concatenate(by_torch(graph, stored(checkpoint, weight_format), sequences))
    exact = exact_logits(EXAMPLE, sequences)
    assert kl(exact, logits["recipe"]) < kl(exact, logits["fp8"]) < 0.02
    assert kl(exact, logits["torch"]) < kl(exact, logits["fp8"])


def by_torch(graph: onnx.ModelProto, tensors: dict[str, torch.Tensor], sequences: list[list[int]]) -> list[np.ndarray]:
    """The torch backend's interpreter, which fuses and merges products: of pairs, one is plain in some layers."""
    program, pages = StepProgram(graph, tensors, "cpu", "reference"), Pages(LENGTHS, 64)
    assert program.op_counts["Stack"] and program.op_counts["Float8Linear"], "others are merged and fused as ever"
    shapes = {i.name: [d.dim_value or pages.num_pages for d in i.type.tensor_type.shape.dim] for i in graph.graph.input}
    cached = {name: torch.full(shapes[name], torch.nan, dtype=torch.bfloat16) for name in caches(count_caches(shapes))}

    @torch.inference_mode()
    def step(inputs: dict) -> np.ndarray:
        found = program.run({n: torch.from_numpy(x) for n, x in inputs.items()} | cached)
        cached.update({n: found[updated] for n, updated in caches(len(cached)).items()})
        return found[LOGITS].float().numpy()

    return ragged.run(step, sequences, SCHEDULE, pages)


def test_another_recipe_is_another_target(tiny_checkpoint, tmp_path, fast_trace):
    """Sets are told apart; the same recipe in other words is up to date; another one needs --force."""
    out, first = tmp_path / "bundle", written(tmp_path, "model.layers.*.self_attn.o_proj")
    assert build(tiny_checkpoint, out, "cpu", "int8", recipe=first)["built"]
    same = written(tmp_path, *(f"model.layers.{i}.self_attn.o_proj" for i in (2, 0, 1)))
    assert not build(tiny_checkpoint, out, "cpu", "int8", recipe=same)["built"]
    with pytest.raises(BuildError, match=r"has target cpu already .*'recipe'.*--force"):
        build(tiny_checkpoint, out, "cpu", "int8")
    before = set(Bundle(out).manifest.weight_sets)
    build(tiny_checkpoint, out, "cpu", "int8", recipe=written(tmp_path, "lm_head"), force=True)
    assert not before & set(Bundle(out).manifest.weight_sets)
