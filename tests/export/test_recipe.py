"""Recipes: what is read, what is refused before any work, and what formats make of them."""

import json

import pytest
import torch

from latentrt.export import recipe
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.export.quantization import Fp8, Int4, Int8, Panels, restore
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.validate import validate
from tests.builds import build
from tests.conftest import EXAMPLE

PLAIN = ("model.layers.0.mlp.down_proj", "model.layers.*.self_attn.o_proj", "model.layers.2.mlp.experts.*")
FORMATS = [Fp8(), Int8(), Int4(32), Panels(Int8(expert_block_size=64)), Panels(Int4(32))]


def write(path, text: str):
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def weights():
    return Checkpoint(EXAMPLE).weights(False)


@pytest.mark.parametrize("found", FORMATS, ids=lambda f: f.key)
def test_formats_keep_what_fits(found, weights):
    kept = found.keeping(PLAIN)
    for weight in weights:
        module = weight.name.removesuffix(".weight")
        plain = module in ("model.layers.0.mlp.down_proj", "model.layers.2.mlp.experts.gate_up_proj",
                           "model.layers.2.mlp.experts.down_proj") or module.endswith("self_attn.o_proj")  # fmt: skip
        assert kept.is_quantized(weight) == (found.is_quantized(weight) and not plain)
        if plain:
            (stored,) = kept.stored(weight)
            assert stored.dtype == getattr(torch, kept.plain) and not kept.takes_over(weight)
            value = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            assert torch.equal(kept.decode(weight, kept.encode(weight, value)), value.float())
    assert kept.key != found.key and kept.key != found.keeping(PLAIN[:1]).key and found.keeping(()) is found
    assert found.plain_modules == ()


@pytest.mark.parametrize("found", FORMATS, ids=lambda f: f.key)
def test_a_manifest_gives_the_format_back(found):
    kept = found.keeping(PLAIN)
    again = restore(json.loads(json.dumps(kept.description())))
    assert (again.key, again.plain_modules) == (kept.key, PLAIN)


@pytest.mark.parametrize(("text", "words"), [
    ("plain = [", "not valid TOML"),
    ("", "has nothing; accepted: plain"),
    ('plan = ["x"]', "has plan; accepted: plain"),
    ('plain = ["x"]\nmore = 1', "has plain, more; accepted: plain"),
    ('plain = "lm_head"', "plain is 'lm_head'; accepted: a list of names"),
    ("plain = [1]", "plain is \\[1\\]; accepted: a list of names"),
    ('plain = ["model.layers.0.mlp.gate_up"]', "'model.layers.0.mlp.gate_up' names no weight that this precision quantizes"),
    ('plain = ["model.layers.9.self_attn.o_proj"]', "there is, for example, 'model.layers.0.self_attn.o_proj'"),
    ('plain = ["model.layers.2.mlp.experts.3.up_proj"]', "names 1 of the 48 matrices of model.layers.2.mlp.experts"),
    ('plain = ["*.experts.*.down_proj"]', "names 16 of the 48 matrices of model.layers.1.mlp.experts"),
    ('plain = ["model.embed_tokens"]', "'model.embed_tokens' names no weight that this precision quantizes"),
])  # fmt: skip
def test_wrong_recipes_are_refused_before_anything_is_written(tmp_path, text, words):
    with pytest.raises(BuildError, match=words):
        build(EXAMPLE, tmp_path / "bundle", "cpu", "int8", recipe=write(tmp_path / "r.toml", text))
    assert not (tmp_path / "bundle").exists()


def test_what_another_precision_leaves_plain_anyway_is_refused(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: the package that builds")
    file = write(tmp_path / "r.toml", 'plain = ["lm_head"]')
    with pytest.raises(BuildError, match="'lm_head' names no weight that this precision quantizes"):
        build(EXAMPLE, tmp_path / "bundle", "sm89", "fp8", recipe=file)
    with pytest.raises(BuildError, match="target cpu is built in fp32, where all does; leave it out"):
        build(EXAMPLE, tmp_path / "bundle", "cpu", "fp32", recipe=file)
    with pytest.raises(BuildError, match=r"nowhere.toml: cannot be read \(No such file"):
        build(EXAMPLE, tmp_path / "bundle", "cpu", "int8", recipe=tmp_path / "nowhere.toml")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "plain", "native"), [
    ("int8", PLAIN[:2], True),  # linear products: own kernels run all others
    ("int4", PLAIN, False),  # experts of one layer in float32, the others in 4 bits
    ("int8", ("model.layers.1.self_attn.kv_b_proj", "model.layers.1.mlp.shared_experts.up_proj", "lm_head"), False),
])  # fmt: skip
def test_an_engine_computes_with_both_kinds(tmp_path, traced, precision, plain, native):
    file = write(tmp_path / "r.toml", f"plain = {json.dumps(plain)}")
    with traced.remembered():
        build(EXAMPLE, tmp_path / "bundle", "cpu", precision, recipe=file)
    bundle = Bundle(tmp_path / "bundle")
    _, target = bundle.target()
    assert target.options["plain modules"] == " ".join(plain)
    assert (target.engines["absorbed"].native is not None) == native
    evidence, comparison = validate(tmp_path / "bundle", EXAMPLE, count=256)
    assert not [c for c in comparison.findings.checks if not c.passed], evidence["first_failure"]


def test_an_fp8_graph_keeps_bf16_products(traced):
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: the package that builds")
    from latentrt.export.lowering.tensorrt.fp8_graph import quantize

    model = traced(Checkpoint(EXAMPLE).config, torch.bfloat16, "bfloat16")
    found = Checkpoint(EXAMPLE).weights(False)
    everything, kept = model.clone(), model.clone()
    quantize(everything, found, Fp8())
    quantize(kept, found, Fp8().keeping(PLAIN))
    products = [sum(n.op_type == "Gemm" for n in m.graph) for m in (everything, kept)]
    assert products[1] - products[0] == 1 + 5  # down_proj, and o_proj of every layer
    types = {v.name: v.dtype for v in kept.graph.inputs}
    assert types["model.layers.2.mlp.experts.gate_up_proj"].name == "BFLOAT16"
    assert types["model.layers.3.mlp.experts.gate_up_proj"].name == "FLOAT8E4M3FN"


def test_another_recipe_asks_for_force(tmp_path, fast_trace):
    first, second = (write(tmp_path / f"{n}.toml", f'plain = ["model.layers.{n}.self_attn.o_proj"]') for n in (0, 1))
    build(EXAMPLE, tmp_path / "bundle", "cpu", "int8", recipe=first)
    with pytest.raises(BuildError, match=r"has target cpu already .*layers.0.self_attn.o_proj.*; use --force"):
        build(EXAMPLE, tmp_path / "bundle", "cpu", "int8", recipe=second)
    assert recipe.read(first) == ("model.layers.0.self_attn.o_proj",)
